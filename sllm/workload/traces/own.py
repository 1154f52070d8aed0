"""A CSV file with any columns, whose names the user gives: `arrival=start,prompt=tokens_in,output=tokens_out,model=model,unit=ms`.

Arrivals are numbers from any origin (seconds since 1970, for example), or dates and times of ISO 8601. `unit` is the unit of numbers, s by default.
"""

from __future__ import annotations

from collections.abc import Callable

from sllm.protocol.errors import UsageError
from sllm.workload.traces.azure import FORMAT as AZURE
from sllm.workload.traces.base import MODEL, CsvFormat, Header, Lines, shorten

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
REQUIRED = ("arrival", "prompt", "output")
EXAMPLE = "arrival=NAME,prompt=NAME,output=NAME[,model=NAME][,unit=s|ms|us|ns]"


class OwnColumns(CsvFormat):
    """The format that `--columns` describes. UsageError for a description that does not fit."""

    name = "columns"
    about = EXAMPLE

    def __init__(self, text: str) -> None:
        said: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if key not in (*REQUIRED, MODEL, "unit") or not equals or not value:
                raise UsageError(f"columns {text!r}: {part.strip()!r} does not fit {EXAMPLE}")
            if key in said:
                raise UsageError(f"columns {text!r}: {key!r} is there twice")
            said[key] = value
        missing = [key for key in REQUIRED if key not in said]
        if missing:
            raise UsageError(f"columns {text!r}: {' and '.join(missing)} missing; must be {EXAMPLE}")
        unit = said.pop("unit", "s")
        if unit not in UNITS_S:
            raise UsageError(f"columns {text!r}: unit {unit!r} is none of {', '.join(UNITS_S)}")
        self._said = said
        self._unit_s = UNITS_S[unit]
        self.time_form = f"a time in {unit}, or a date and time"
        self.time_column, self.prompt_column, self.output_column = (said[key] for key in REQUIRED)

    def check(self, lines: Lines, header: Header) -> None:
        """UsageError if the file lacks one of the columns; the error lists the missing columns and those of the file."""
        if header.record is not None:
            raise lines.error(None, "a JSON object: --columns is for CSV with a header")
        missing = [f"{key}={shorten(column)}" for key, column in self._said.items() if header.find(column) is None]
        if missing:
            raise lines.error(None, f"no column {', '.join(missing)} (--columns); there are {', '.join(shorten(column) for column in header.columns)}")

    def model_column(self, header: Header) -> str | None:
        """The column that names the model: the one in the user's description, otherwise a column `model`."""
        return header.find(self._said.get(MODEL, MODEL))

    def clock(self) -> Callable[[str], float]:
        """See `CsvFormat.clock`. The first row decides whether times are numbers or dates."""
        unit_s, read_date = self._unit_s, AZURE.clock()
        numbers: bool | None = None

        def seconds(text: str) -> float:
            nonlocal numbers
            if numbers is None:
                try:
                    float(text)
                    numbers = True
                except ValueError:
                    numbers = False
            return float(text) * unit_s if numbers else read_date(text)

        return seconds
