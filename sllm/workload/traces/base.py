"""The base of every trace format: lines with their numbers, columns, and errors that name the place.

A format is one file of this folder with a constant `FORMAT`; `sllm.workload.traces` finds it by listing the folder. Files are read row by row:
memory does not grow with the file. Rules for all formats but our own recording:
- the first request kept arrives at 0, and the distances between arrivals are those of the file;
- a column or key `model`, in any case, names the model of each request; the first line of a file says whether its requests name models;
- a request without tokens in or without tokens out (how BurstGPT, arXiv 2401.17644, marks failures) did no work: it is skipped and counted;
- rows are in order of time; a row out of order is an error, because sorting would need the whole file in memory.
"""

from __future__ import annotations

import csv
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import chain
from operator import itemgetter
from typing import Any, BinaryIO, ClassVar, NamedTuple

from sllm.protocol.errors import UsageError
from sllm.protocol.limits import TOKENS_MAX as TOKENS_MAX
from sllm.protocol.limits import name_problem
from sllm.workload.request import Repeat

LINE_MAX = 1 << 20  # bytes; a Mooncake line with the hashes of a million tokens has 20,000
TIME_MAX_S = 1e12  # 30,000 years: a larger number is not a time
MODEL = "model"  # the column or key of the model's name, in upper or lower case
MODELS_MAX = 100_000  # different models in one trace; a catalogue can have no more copies of a model either
DELIMITERS = (",;\t|", " :^~")  # of CSV; the second group is tried only if no delimiter of the first group gives two names in the header


class TraceRow(NamedTuple):
    """One request of a trace."""

    arrival_s: float  # from the first request
    prompt_tokens: int
    output_tokens: int
    model: str | None = None  # None: the trace does not say
    request_id: str | None = None
    priority: int | None = None
    repeats: Repeat | None = None


class Lines:
    """The lines of an open file, decoded one by one, so that every error can name its line. Closes the file at its end or on an error."""

    __slots__ = ("_file", "number", "path", "skipped")

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self.number = 0  # of the last line read, from 1
        self.skipped = 0  # requests that did no work
        self._file = file

    def __iter__(self) -> Iterator[str]:
        """The lines. UsageError for bytes that are not UTF-8 and for compressed data that is damaged or cut off."""
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
            raise UsageError(f"{self._reached}: compressed data ends early; the file is cut off") from None
        except (OSError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{self._reached}: cannot be read: {reason}") from None
        finally:
            self.close()

    @property
    def _reached(self) -> str:
        """The path, and the last line that could be read."""
        return f"{self.path}, after line {self.number}" if self.number else self.path

    def close(self) -> None:
        self._file.close()

    def error(self, column: str | None, problem: str) -> UsageError:
        """The error to raise for the present line; `column` is a column's name, or a position in the line counted from 1."""
        where = "" if column is None else f", column {column}"
        return UsageError(f"{self.path}, line {self.number}{where}: {problem}")


class Header(NamedTuple):
    """The first line that is not blank."""

    text: str
    columns: tuple[str, ...]  # of CSV, without the spaces around them; the keys of a JSON object
    record: dict[str, Any] | None  # the JSON object; None: CSV
    delimiter: str = ","  # of CSV

    def find(self, name: str) -> str | None:
        """The column of that name in any case, spelled as in the file; None if there is none."""
        wanted = name.casefold()
        return next((column for column in self.columns if column.casefold() == wanted), None)

    def check_repeated(self, lines: Lines) -> None:
        """UsageError if two columns have the same name in any case, because it is unknown which of the two holds the figures."""
        first: dict[str, int] = {}
        for position, column in enumerate(self.columns, 1):
            earlier = first.setdefault(column.casefold(), position)
            if column and earlier != position:
                raise lines.error(str(position), f"{shorten(column)} is the name of column {earlier} too: which of them counts?")


class ModelNames:
    """The models that the rows of one file name, each name checked once."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: set[str] = set()

    def read(self, lines: Lines, column: str, text: object) -> str | None:
        """The name without the spaces around it; None for a row that names no model. UsageError for an invalid name, and for too many names."""
        if text is None:
            return None
        if not isinstance(text, str):
            raise lines.error(column, f"{shorten(json.dumps(text))} is not the name of a model")
        name = text.strip()
        if name in self._known or not name:
            return name or None
        problem = name_problem(name)
        if problem:
            raise lines.error(column, f"{shorten(name)}: a model's name {problem}")
        if len(self._known) == MODELS_MAX:
            raise lines.error(column, f"more than {MODELS_MAX} different models: is this column the model's name?")
        self._known.add(name)
        return name


class TraceFormat(ABC):
    """One kind of trace file."""

    name: ClassVar[str]
    about: ClassVar[str]  # its columns, shown when a file fits no format
    exact: ClassVar[bool] = False  # requests are replayed unchanged: times are not shifted; ids, models and priorities are those of the file

    @abstractmethod
    def matches(self, header: Header) -> bool:
        """Whether a file with this header is of this format."""

    def model_column(self, header: Header) -> str | None:
        """The column or key that names the model of each request, spelled as in the file; None: requests name no models."""
        return header.find(MODEL)

    @abstractmethod
    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        """The requests. `body` gives the lines after the header; `lines` knows the number of the present line. UsageError for a row that does not fit."""


class CsvFormat(TraceFormat):
    """Values with a header, separated by one of DELIMITERS. Columns are found by name in any case: their order and further columns do not matter."""

    time_column: str
    prompt_column: str
    output_column: str
    time_form: str = "a time in seconds"

    def clock(self) -> Callable[[str], float]:
        """A function from the text of a time to seconds from any origin, which raises ValueError for a text that is no time."""
        return float

    def matches(self, header: Header) -> bool:
        return header.record is None and not self.missing(header)

    def missing(self, header: Header) -> list[str]:
        """The columns that a header lacks."""
        return [column for column in (self.time_column, self.prompt_column, self.output_column) if header.find(column) is None]

    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        columns, delimiter = header.columns, header.delimiter
        width = len(columns)
        time_name, prompt_name, output_name = (header.find(name) or name for name in (self.time_column, self.prompt_column, self.output_column))
        model_name = self.model_column(header)
        pick = itemgetter(*(columns.index(name) for name in (time_name, prompt_name, output_name, model_name or time_name)))
        read_name = ModelNames().read
        seconds = self.clock()
        origin: float | None = None
        previous = -TIME_MAX_S
        for line in body:
            fields = line.rstrip("\r\n").split(delimiter)
            if len(fields) != width or '"' in line:
                fields = split_csv(lines, line, delimiter)
                if not fields:
                    continue
                if len(fields) != width:
                    raise lines.error(str(min(len(fields), width) + 1), f"{len(fields)} columns where the header has {width}")
            when, prompt_text, output_text, model = pick(fields)
            try:
                arrival, prompt, output = seconds(when), int(prompt_text), int(output_text)
            except ValueError:
                arrival = self._time(lines, seconds, time_name, when)
                prompt = csv_tokens(lines, prompt_name, prompt_text)
                output = csv_tokens(lines, output_name, output_text)
            if not (0 < prompt <= TOKENS_MAX and 0 < output <= TOKENS_MAX):
                check_tokens(lines, prompt_name, prompt)
                check_tokens(lines, output_name, output)
                lines.skipped += 1
                continue
            if not previous <= arrival < TIME_MAX_S:
                raise self._not_in_order(lines, time_name, when, arrival)
            previous = arrival
            if origin is None:
                origin = arrival
            named = read_name(lines, model_name, model) if model_name is not None else None
            yield TraceRow(arrival - origin, prompt, output, named, None, None, None)
        if origin is None:
            raise nothing(lines)

    def _time(self, lines: Lines, seconds: Callable[[str], float], column: str, text: str) -> float:
        try:
            return seconds(text)
        except ValueError:
            raise lines.error(column, f"{shorten(text)} is not {self.time_form}") from None

    def _not_in_order(self, lines: Lines, column: str, text: str, arrival: float) -> UsageError:
        if not abs(arrival) < TIME_MAX_S:
            return lines.error(column, f"{shorten(text)} is not {self.time_form}{OTHER_UNIT if abs(arrival) < math.inf else ''}")
        return lines.error(column, f"{shorten(text)} is earlier than the request before it; sort the file by time")


class JsonLinesFormat(TraceFormat):
    """One JSON object per line, each object a request."""

    time_key: ClassVar[str] = "timestamp"
    prompt_key: ClassVar[str] = "input_length"
    output_key: ClassVar[str] = "output_length"

    def matches(self, header: Header) -> bool:
        return header.record is not None and {self.time_key, self.prompt_key, self.output_key}.issubset(header.columns)

    def check_keys(self, lines: Lines, request: Header) -> None:
        """UsageError if a request has another format than the first request, because its time may be in another unit."""

    def records(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[tuple[float, int, int, str | None]]:
        """(time in the file's own unit and from its own origin, tokens in, tokens out, model) of each request that did work, in order of time."""
        model_key = self.model_column(header)
        read_name = ModelNames().read
        previous: float | None = None
        keys: object = None
        for text in chain((header.text,), body):
            if text.isspace():
                continue
            record = json_object(lines, text)
            if record.keys() != keys:
                keys = record.keys()
                self.check_keys(lines, Header(text, tuple(record), record))
            time = json_number(lines, record, self.time_key)
            prompt, output = json_tokens(lines, record, self.prompt_key), json_tokens(lines, record, self.output_key)
            if model_key is None and MODEL in record:
                raise lines.error(MODEL, "names a model, the first request of the file does not: all requests of a trace do, or none")
            model = read_name(lines, model_key, record.get(model_key)) if model_key is not None else None
            if not (prompt and output):
                lines.skipped += 1
                continue
            if previous is not None and time < previous:
                raise lines.error(self.time_key, f"{plain(time)} is earlier than the request before it; sort the file by time")
            previous = time
            yield time, prompt, output, model
        if previous is None:
            raise nothing(lines)


def shorten(text: str, limit: int = 60) -> str:
    """Text from a file for an error message: in quotes, on one line, cut after `limit` characters."""
    return repr(text if len(text) <= limit else text[:limit] + "...")


OTHER_UNIT = ": it is too large, and may be in milliseconds or a smaller unit"


def plain(value: float) -> str:
    """A number as a person writes it: without an exponent, and without a point if it is whole."""
    if not math.isfinite(value):
        return str(value)
    text = f"{Decimal(repr(value)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def nothing(lines: Lines) -> UsageError:
    """The error for a file without a single request."""
    skipped = f" ({lines.skipped} skipped: no tokens in or no tokens out)" if lines.skipped else ""
    return UsageError(f"{lines.path}, line {lines.number}: no requests after the header{skipped}")


def find_delimiter(lines: Lines, line: str) -> str:
    """The delimiter of a header: the one of DELIMITERS that gives the most names; of several that give equally many names, the first. "," if none does."""
    for some in DELIMITERS:
        counts = {delimiter: sum(map(_has_letter, split_csv(lines, line, delimiter))) for delimiter in some if delimiter in line}
        if counts and max(counts.values()) > 1:
            return max(counts, key=lambda delimiter: counts[delimiter])
    return ","


def _has_letter(text: str) -> bool:
    return any(map(str.isalpha, text))


def split_csv(lines: Lines, line: str, delimiter: str = ",") -> list[str]:
    """The fields of a line, which may be quoted; [] for a blank line."""
    if not line.strip():
        return []
    if line.count('"') % 2:
        raise lines.error(str(line.rindex('"') + 1), "a quote that is not closed")
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise lines.error("1", f"not CSV ({str(error).partition(' - ')[0]})") from None


def csv_tokens(lines: Lines, column: str, text: str) -> int:
    """A token count written as text. "374.0" counts as 374, because data frames write whole numbers that way if a cell of the column is empty."""
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
    """UsageError for a count that no request can have; 0 is accepted."""
    if count < 0:
        raise lines.error(column, f"{count} tokens: must not be negative")
    if count > TOKENS_MAX:
        raise lines.error(column, f"{shorten(str(count), 20)} tokens: more than {TOKENS_MAX}")


class _RepeatedKey(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKey(key)
            seen.add(key)
    return record


def json_object(lines: Lines, text: str) -> dict[str, Any]:
    """The JSON object on a line. UsageError if the line is anything else, or if a key occurs twice."""
    try:
        record = json.loads(text, object_pairs_hook=_object_of_pairs)
    except json.JSONDecodeError as error:
        raise lines.error(str(error.colno), f"not JSON ({error.msg})") from None
    except _RepeatedKey as error:
        raise lines.error(None, f"the key {shorten(error.key)} is there twice: which of them counts?") from None
    except (ValueError, RecursionError):
        raise lines.error("1", "JSON beyond the limits (a number too long, or nested too deeply)") from None
    if not isinstance(record, dict):
        raise lines.error("1", f"{shorten(text.strip())} is not a JSON object")
    return record


def json_field(lines: Lines, record: dict[str, Any], key: str) -> Any:
    """The value of a required key. UsageError if it is missing."""
    try:
        return record[key]
    except KeyError:
        raise lines.error(key, "missing") from None


def json_number(lines: Lines, record: dict[str, Any], key: str) -> int | float:
    """The number under a required key. UsageError if the value is no number or too large for a time in milliseconds."""
    value = json_field(lines, record, key)
    if type(value) not in (int, float) or not abs(value) < TIME_MAX_S * 1000:
        raise lines.error(key, f"{shorten(json.dumps(value))} is not a number")
    return value  # type: ignore[no-any-return]


def json_tokens(lines: Lines, record: dict[str, Any], key: str) -> int:
    """The token count, at least 0, under a required key."""
    value = json_number(lines, record, key)
    if isinstance(value, float) and not value.is_integer():
        raise lines.error(key, f"{plain(value)} is not a whole number of tokens")
    count = int(value)
    check_tokens(lines, key, count)
    return count
