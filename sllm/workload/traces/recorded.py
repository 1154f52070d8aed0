"""Our own recording of a workload: written once, replayed exactly, each float to its last bit.

A recording has JSON lines. The first line is `{"schema": "sllm-workload", "version": 1}`; each further line is a request with the fields of
`sllm.workload.request.Request`, in order of arrival. `repeats` is `[request id, tokens]`, and only in requests whose prompt repeats an earlier turn. A file
whose name ends in .gz is compressed.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, BinaryIO

from sllm.protocol.errors import UsageError
from sllm.protocol.limits import name_problem
from sllm.protocol.messages import HIGH, LOW
from sllm.workload.request import Repeat, Request
from sllm.workload.traces.base import (
    TIME_MAX_S,
    TOKENS_MAX,
    Header,
    Lines,
    TraceFormat,
    TraceRow,
    json_field,
    json_number,
    json_object,
    json_tokens,
    plain,
    shorten,
)

SCHEMA = "sllm-workload"
VERSION = 1


class Recorded(TraceFormat):
    """The format."""

    name = "recorded"
    about = f'JSON lines after {{"schema": "{SCHEMA}", "version": {VERSION}}}'
    exact = True

    def matches(self, header: Header) -> bool:
        return header.record is not None and header.record.get("schema") == SCHEMA

    def rows(self, lines: Lines, body: Iterator[str], header: Header) -> Iterator[TraceRow]:
        version = (header.record or {}).get("version")
        if version != VERSION or type(version) is not int:
            raise lines.error("version", f"{shorten(json.dumps(version))}: this release reads version {VERSION}")
        previous = 0.0
        ids = _UniqueIds()
        for text in body:
            if text.isspace():
                continue
            record = json_object(lines, text)
            row = _row(lines, record)
            if row.arrival_s < previous:
                raise lines.error("arrival_s", f"{plain(row.arrival_s)} is earlier than {'the request before it' if previous else '0'}")
            if not ids.add(row.request_id or ""):
                raise lines.error("request_id", f"{shorten(row.request_id or '')} was used before; a request id names one request")
            previous = row.arrival_s
            yield row


def _row(lines: Lines, record: dict[str, Any]) -> TraceRow:
    prompt, output = json_tokens(lines, record, "prompt_tokens"), json_tokens(lines, record, "output_tokens")
    for key, count in (("prompt_tokens", prompt), ("output_tokens", output)):
        if not count:
            raise lines.error(key, "0 tokens: must be at least 1")
    priority = record.get("priority", Request._field_defaults["priority"])
    if type(priority) is not int or not LOW <= priority <= HIGH:
        raise lines.error("priority", f"{shorten(json.dumps(priority))}: must be a whole number from {LOW} to {HIGH}")
    arrival_s = float(json_number(lines, record, "arrival_s"))
    if arrival_s >= TIME_MAX_S:
        raise lines.error("arrival_s", f"{plain(arrival_s)} is not a time in seconds")
    return TraceRow(arrival_s, prompt, output, _name(lines, record, "model"), _name(lines, record, "request_id"), priority, _repeats(lines, record, prompt))


def _repeats(lines: Lines, record: dict[str, Any], prompt: int) -> Repeat | None:
    """The earlier turn that the prompt repeats; None if the request names none."""
    value = record.get("repeats")
    if value is None:
        return None
    fits = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and not name_problem(value[0]) and type(value[1]) is int
    if not fits or not 0 < value[1] < prompt:
        raise lines.error("repeats", f"{shorten(json.dumps(value))}: must be [request id, tokens], with fewer tokens than the prompt has")
    return Repeat(*value)


def _name(lines: Lines, record: dict[str, Any], key: str) -> str:
    value = json_field(lines, record, key)
    problem = name_problem(value) if isinstance(value, str) else "must be a text"
    if problem:
        raise lines.error(key, f"{shorten(json.dumps(value))}: {problem}")
    return str(value)


class _UniqueIds:
    """Recognises request ids that were used before. Ids that the generator makes ("r" and the row number) need no memory; all others do."""

    __slots__ = ("_count", "_others", "_rows_of_others")

    _NUMBERED = re.compile(r"r(0|[1-9]\d{0,17})", re.ASCII)

    def __init__(self) -> None:
        self._count = 0
        self._others: set[str] = set()
        self._rows_of_others: set[int] = set()

    def add(self, request_id: str) -> bool:
        """Whether the id is new."""
        row = self._count
        self._count += 1
        if request_id == f"r{row}":
            return request_id not in self._others
        match = self._NUMBERED.fullmatch(request_id)
        used_in_its_row = match is not None and int(match[1]) < row and int(match[1]) not in self._rows_of_others
        if used_in_its_row or request_id in self._others:
            return False
        self._others.add(request_id)
        self._rows_of_others.add(row)
        return True


class RecordedWriter:
    """Writes a recording request by request, to the file `path` or to `raw`, which stays open; a context manager. UsageError if the file cannot be written.

    ValueError for a request that could not be read back, which is a mistake of the program and not of the user.
    """

    def __init__(self, path: str, raw: BinaryIO | None = None) -> None:
        self.path = path
        self._owned = raw is None
        self.count = 0
        self._previous = 0.0
        try:
            self._raw: BinaryIO = open(path, "wb") if raw is None else raw  # noqa: SIM115 - closed by close()
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None
        # Without name and time in the gzip header, so that the same workload gives the same bytes.
        self._file: Any = gzip.GzipFile(filename="", mode="wb", fileobj=self._raw, mtime=0) if path.endswith(".gz") else self._raw
        self._line({"schema": SCHEMA, "version": VERSION})

    def write(self, request: Request) -> None:
        """Add one request. Requests have to be added in order of arrival."""
        if not self._previous <= request.arrival_s < TIME_MAX_S:
            raise ValueError(f"{request}: arrives before the request that precedes it, or at no time at all")
        if not (0 < request.prompt_tokens <= TOKENS_MAX and 0 < request.output_tokens <= TOKENS_MAX):
            raise ValueError(f"{request}: token counts must be 1 to {TOKENS_MAX}")
        if name_problem(request.request_id) or name_problem(request.model) or not (LOW <= request.priority <= HIGH):
            raise ValueError(f"{request}: its id, model or priority cannot be recorded")
        if request.repeats is not None and not 0 < request.repeats.tokens < request.prompt_tokens:
            raise ValueError(f"{request}: repeats as many tokens as its prompt has, or none")
        fields = request._asdict()
        if request.repeats is None:
            del fields["repeats"]
        self._line(fields)
        self._previous = request.arrival_s
        self.count += 1

    def _line(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: Exception) -> UsageError:
        return UsageError(f"{self.path}: cannot be written: {getattr(error, 'strerror', None) or error}")

    def close(self) -> None:
        try:
            if self._file is not self._raw:
                self._file.close()
            if self._owned:
                self._raw.close()
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> RecordedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def write_recorded(path: str, requests: Iterable[Request]) -> int:
    """Record a whole workload; returns the number of its requests. Errors as `RecordedWriter`."""
    with RecordedWriter(path) as writer:
        for request in requests:
            writer.write(request)
        return writer.count


FORMAT = Recorded()
