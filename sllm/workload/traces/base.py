"""What every trace format shares: lines with their numbers, columns, and errors that say where.

A format is one file of this folder with a constant `FORMAT`; `sllm.workload.traces` finds it by listing the folder. Reading streams:
memory does not grow with the file. Rules for all formats but our own recording:
- the first request kept arrives at 0, all others as long after it as the file says;
- a request without tokens in or without tokens out did no work (BurstGPT, arXiv 2401.17644, marks failures so): it is skipped and counted;
- rows go forward in time; one that does not is an error, since sorting would need the whole file in memory.
"""

from __future__ import annotations

import csv
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, BinaryIO, ClassVar, NamedTuple

from sllm.errors import UsageError
from sllm.limits import TOKENS_MAX as TOKENS_MAX
from sllm.node import new_tuple

LINE_MAX = 1 << 20  # bytes; a Mooncake line with the hashes of a million tokens has 20,000
TIME_MAX_S = 1e12  # 30,000 years: a number beyond it is not a time


class TraceRow(NamedTuple):
    """One request of a trace."""

    arrival_s: float  # from the first request
    prompt_tokens: int
    output_tokens: int
    model: str | None = None  # None: the trace does not say
    request_id: str | None = None
    priority: int | None = None


class Lines:
    """The lines of an open file, decoded one by one, so that every error can say where it is. Closes the file at its end or on an error."""

    __slots__ = ("_file", "number", "path", "skipped")

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self.number = 0  # of the line given last, from 1
        self.skipped = 0  # requests that did no work
        self._file = file

    def __iter__(self) -> Iterator[str]:
        """UsageError for what is not UTF-8 and for compressed data that is damaged or cut off."""
        readline = self._file.readline
        try:
            while raw := readline(LINE_MAX):
                self.number += 1
                if len(raw) == LINE_MAX:
                    raise self.error(None, f"line longer than {LINE_MAX} bytes")
                yield raw.decode()
        except UnicodeDecodeError as error:
            column = len(error.object[: error.start].decode()) + 1
            raise self.error(str(column), f"not UTF-8 (byte 0x{error.object[error.start]:02x})") from None
        except EOFError:
            raise UsageError(f"{self.path}, after line {self.number}: compressed data ends early; the file is cut off") from None
        except (OSError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{self.path}, after line {self.number}: cannot be read: {reason}") from None
        finally:
            self.close()

    def close(self) -> None:
        self._file.close()

    def error(self, column: str | None, problem: str) -> UsageError:
        """The error to raise for the present line; `column` is a column's name, or a position in the line counted from 1."""
        where = "" if column is None else f", column {column}"
        return UsageError(f"{self.path}, line {self.number}{where}: {problem}")


class Header(NamedTuple):
    """The first line that is not blank."""

    text: str
    columns: tuple[str, ...]  # of CSV; the keys of a JSON object
    record: dict[str, Any] | None  # the JSON object; None: CSV


class TraceFormat(ABC):
    """One kind of trace file."""

    name: ClassVar[str]
    about: ClassVar[str]  # its columns, shown when a file fits no format
    exact: ClassVar[bool] = False  # requests are replayed as they stand: times not shifted, ids, models and priorities binding

    @abstractmethod
    def matches(self, header: Header) -> bool:
        """Whether a file that begins so is of this format."""

    @abstractmethod
    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        """The requests. `body` gives the lines after the header; `lines` knows where it is. UsageError for what does not fit."""


class CsvFormat(TraceFormat):
    """Comma-separated values with a header. Columns are found by name: their order and further columns do not matter."""

    time_column: ClassVar[str]
    prompt_column: ClassVar[str]
    output_column: ClassVar[str]
    model_column: ClassVar[str | None] = None
    other_columns: ClassVar[tuple[str, ...]] = ()  # needed to know the format by, not read
    time_form: ClassVar[str] = "a time in seconds"

    def clock(self) -> Callable[[str], float]:
        """A function from the text of a time to seconds, from any origin. ValueError if it is no time."""
        return float

    def matches(self, header: Header) -> bool:
        needed = {self.time_column, self.prompt_column, self.output_column, *self.other_columns}
        if self.model_column is not None:
            needed.add(self.model_column)
        return header.record is None and needed.issubset(header.columns)

    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        columns = header.columns
        width = len(columns)
        named = self.model_column is not None
        names = (self.time_column, self.prompt_column, self.output_column, self.model_column or self.time_column)
        pick = itemgetter(*(columns.index(name) for name in names))
        seconds = self.clock()
        origin: float | None = None
        previous = -TIME_MAX_S
        for line in body:
            fields = line.rstrip("\r\n").split(",")
            if len(fields) != width or '"' in line:
                fields = split_csv(lines, line)
                if not fields:
                    continue
                if len(fields) != width:
                    raise lines.error(str(min(len(fields), width) + 1), f"{len(fields)} columns where the header has {width}")
            when, prompt_text, output_text, model = pick(fields)
            try:
                arrival, prompt, output = seconds(when), int(prompt_text), int(output_text)
            except ValueError:
                arrival = self._time(lines, seconds, when)
                prompt = csv_tokens(lines, self.prompt_column, prompt_text)
                output = csv_tokens(lines, self.output_column, output_text)
            if not (0 < prompt <= TOKENS_MAX and 0 < output <= TOKENS_MAX):
                check_tokens(lines, self.prompt_column, prompt)
                check_tokens(lines, self.output_column, output)
                lines.skipped += 1
                continue
            if not previous <= arrival < TIME_MAX_S:
                raise self._not_in_order(lines, when, arrival)
            previous = arrival
            if origin is None:
                origin = arrival
            yield new_tuple(TraceRow, (arrival - origin, prompt, output, model if named else None, None, None))
        if origin is None:
            raise nothing(lines)

    def _time(self, lines: Lines, seconds: Callable[[str], float], text: str) -> float:
        try:
            return seconds(text)
        except ValueError:
            raise lines.error(self.time_column, f"{shorten(text)} is not {self.time_form}") from None

    def _not_in_order(self, lines: Lines, text: str, arrival: float) -> UsageError:
        if not abs(arrival) < TIME_MAX_S:
            return lines.error(self.time_column, f"{shorten(text)} is not {self.time_form}")
        return lines.error(self.time_column, f"{shorten(text)} is earlier than the request before it; sort the file by time")


def shorten(text: str, limit: int = 60) -> str:
    """Text from a file as it is shown in an error: in quotes, on one line, not too long."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


def nothing(lines: Lines) -> UsageError:
    """The error for a file without a single request."""
    skipped = f" ({lines.skipped} skipped: no tokens in or no tokens out)" if lines.skipped else ""
    return UsageError(f"{lines.path}, line {lines.number}: no requests after the header{skipped}")


def split_csv(lines: Lines, line: str) -> list[str]:
    """The fields of a line that may be quoted; none if it is blank."""
    if not line.strip():
        return []
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise lines.error("1", f"not CSV ({error})") from None


def csv_tokens(lines: Lines, column: str, text: str) -> int:
    """A token count written as text. "374.0" counts as 374: data frames write whole numbers so once a cell of the column was empty."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise lines.error(column, f"{shorten(text)} is not a whole number of tokens")
    return int(value)


def check_tokens(lines: Lines, column: str, count: int) -> None:
    """UsageError for a count that no request can have; 0 passes."""
    if count < 0:
        raise lines.error(column, f"{count} tokens: must not be negative")
    if count > TOKENS_MAX:
        raise lines.error(column, f"{shorten(str(count), 20)} tokens: more than {TOKENS_MAX}")


def json_object(lines: Lines, text: str) -> dict[str, Any]:
    """The JSON object that is this line."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise lines.error(str(error.colno), f"not JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        raise lines.error("1", "not JSON of a sane size (a number too long, or nested too deeply)") from None
    if not isinstance(record, dict):
        raise lines.error("1", f"{shorten(text.strip())} is not a JSON object")
    return record


def json_field(lines: Lines, record: dict[str, Any], key: str) -> Any:
    """A field that must be there."""
    try:
        return record[key]
    except KeyError:
        raise lines.error(key, "missing") from None


def json_number(lines: Lines, record: dict[str, Any], key: str) -> int | float:
    """A number of reasonable size."""
    value = json_field(lines, record, key)
    if type(value) not in (int, float) or not abs(value) < TIME_MAX_S * 1000:
        raise lines.error(key, f"{shorten(json.dumps(value))} is not a number")
    return value  # type: ignore[no-any-return]


def json_tokens(lines: Lines, record: dict[str, Any], key: str) -> int:
    """A token count of 0 or more."""
    value = json_number(lines, record, key)
    if isinstance(value, float) and not value.is_integer():
        raise lines.error(key, f"{value} is not a whole number of tokens")
    count = int(value)
    check_tokens(lines, key, count)
    return count
