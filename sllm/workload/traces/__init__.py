"""Traces of real requests: one file for each format, found by listing this folder. The first line of a trace file decides its format."""

from __future__ import annotations

import gzip
import io
import sys
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import BinaryIO, cast

from sllm.inputs import folder
from sllm.protocol.errors import UsageError
from sllm.workload.traces.base import TOKENS_MAX, CsvFormat, Header, Lines, TraceFormat, TraceRow, find_delimiter, json_object, shorten, split_csv
from sllm.workload.traces.own import EXAMPLE, OwnColumns

__all__ = ["FORMATS", "TOKENS_MAX", "Trace", "TraceFormat", "TraceRow", "open_trace", "read_trace"]


def _format_of(module: ModuleType) -> dict[str, TraceFormat]:
    return {module.FORMAT.name: module.FORMAT} if hasattr(module, "FORMAT") else {}


FORMATS, BROKEN = folder.read_folder(sys.modules[__name__], _format_of)
"""Every format by its name, and for each file that cannot be imported the reason."""


class Trace(Iterator[TraceRow]):
    """An open trace file; its rows can be iterated once. The file is closed at its end; a context manager closes it when the iteration stops earlier."""

    def __init__(self, lines: Lines, body: Iterator[str], header: Header, kind: TraceFormat) -> None:
        self.path = lines.path
        self.format = kind
        self.names_models = kind.exact or kind.model_column(header) is not None
        self._lines = lines
        self._rows = _closing(lines, kind.rows(lines, body, header))

    @property
    def format_name(self) -> str:
        return self.format.name

    @property
    def skipped(self) -> int:
        """Requests left out so far because they had no tokens in or no tokens out."""
        return self._lines.skipped

    def __iter__(self) -> Iterator[TraceRow]:
        return self._rows  # the generator itself, which saves a call per row

    def __next__(self) -> TraceRow:
        return next(self._rows)

    def error(self, column: str, problem: str) -> UsageError:
        """The error for a row that could be read but cannot be used."""
        return self._lines.error(column, problem)

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _closing(lines: Lines, rows: Iterator[TraceRow]) -> Iterator[TraceRow]:
    try:
        yield from rows
    finally:
        lines.close()


class _Gunzipped(io.BufferedReader):
    """The contents of a gzip file. `close` closes the compressed file too, which `gzip.GzipFile` does not."""

    def __init__(self, compressed: BinaryIO) -> None:
        self._compressed = compressed
        super().__init__(cast(io.RawIOBase, gzip.GzipFile(fileobj=compressed, mode="rb")))

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._compressed.close()


def open_trace(path: str, columns: str = "") -> Trace:
    """Open a trace file and recognise its format by its first line, and gzip by its first bytes. `columns`: the value of `--columns` for a CSV file.

    UsageError, naming file, line and column, if the file cannot be read or has no known format; the iteration raises UsageError for rows that do not fit.
    """
    try:
        file: BinaryIO = open(path, "rb")  # noqa: SIM115 - the trace closes it
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        if cast(io.BufferedReader, file).peek(2)[:2] == b"\x1f\x8b":
            file = _Gunzipped(file)
        lines = Lines(path, file)
        body = iter(lines)
        header = _read_header(lines, body)
        return Trace(lines, body, header, _format(lines, header, columns))
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
        raise


def _format(lines: Lines, header: Header, columns: str) -> TraceFormat:
    """The format of a file with this header. UsageError if no format matches, or if a column that `columns` names is missing."""
    if columns:
        own = OwnColumns(columns)
        own.check(lines, header)
        header.check_repeated(lines)
        return own
    for kind in FORMATS.values():
        if kind.matches(header):
            header.check_repeated(lines)
            return kind
    known = "; ".join([*(f"{kind.name}: {kind.about}" for kind in FORMATS.values()), *(f"not readable: {problem}" for problem in BROKEN.values())])
    raise lines.error("1", f"no known format begins with {shorten(header.text.strip())}{_what_is_missing(header)}. Known formats: {known}")


def _what_is_missing(header: Header) -> str:
    """The end of the error text for a CSV file: the columns that the nearest format lacks, and the flag that helps."""
    if header.record is not None:
        return ""
    lacking = {kind.name: kind.missing(header) for kind in FORMATS.values() if isinstance(kind, CsvFormat)}
    nearest = min(lacking, key=lambda name: len(lacking[name]), default="")
    near = f" (for {nearest} it lacks {', '.join(lacking[nearest])})" if nearest and len(lacking[nearest]) < 3 else ""
    return f"{near}; say which columns hold what: --columns {EXAMPLE}"


def _read_header(lines: Lines, body: Iterator[str]) -> Header:
    for text in body:
        if lines.number == 1:
            text = text.removeprefix("\ufeff")  # spreadsheets put a byte order mark there
        if text.isspace() or not text:
            continue
        if text.lstrip().startswith("{"):
            record = json_object(lines, text)
            return Header(text, tuple(record), record)
        delimiter = find_delimiter(lines, text.rstrip("\r\n"))
        return Header(text, tuple(name.strip() for name in split_csv(lines, text.rstrip("\r\n"), delimiter)), None, delimiter)
    raise UsageError(f"{lines.path}, line 1, column 1: empty, not even a header")


def read_trace(path: str) -> Iterator[TraceRow]:
    """The rows of a trace file; errors as `open_trace`."""
    return iter(open_trace(path))
