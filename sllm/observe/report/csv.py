"""CSV with one row for each request, written as requests end: memory does not grow with the number of requests."""

from __future__ import annotations

import csv
from types import TracebackType
from typing import Protocol

from sllm.observe.report.files import OutputFile
from sllm.protocol.bus import Handler
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected

COLUMNS = (
    "request_id", "model", "worker_id", "action", "outcome", "arrival_s", "ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "load_s",
    "prompt_tokens", "output_tokens", "placements", "retries", "reason", "stalled_s",
)  # fmt: skip
"""The columns, in order. Times are in seconds of the run's clock. A request that was not completed has only id, model, outcome, arrival and reason."""


class Request(Protocol):
    """A request that was not completed."""

    @property
    def request_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def arrival_s(self) -> float: ...


COMPLETED, FAILED, REJECTED, IN_FLIGHT = "completed", "failed", "rejected", "in_flight"


class RequestsCsv:
    """Writes the requests of a run, from its events, in the order in which requests end.

    The file is opened at once, so that a path that cannot be written is a UsageError before the run. As a context manager `RequestsCsv` keeps the rows written
    so far when the run ends in any way; the file gets its name when it is closed.
    """

    def __init__(self, path: str, flag: str = "--requests-csv") -> None:
        self._file = OutputFile(flag, path)
        self._write = csv.writer(self._file.stream, lineterminator="\n").writerow
        self._write(COLUMNS)
        self.handlers: dict[type, Handler] = {
            RequestCompleted: self._on_completed,
            RequestFailed: self._on_failed,
            RequestRejected: self._on_rejected,
        }

    def _on_completed(self, node: object, event: RequestCompleted) -> None:
        moments = event.arrival_s, event.ttft_s, event.e2e_s, event.tpot_s, event.queue_wait_s, event.load_s
        times = ("%.9g,%.9g,%.9g,%.9g,%.9g,%.9g" % moments).split(",")  # noqa: UP031 - quicker than six f-strings
        self._write((
            event.request_id, event.model, event.worker_id, event.action, COMPLETED, *times, event.prompt_tokens, event.output_tokens, event.placements,
            event.retries, "", f"{event.stalled_s:.9g}",
        ))  # fmt: skip

    def _on_failed(self, node: object, event: RequestFailed) -> None:
        self._put_unfinished(event, FAILED, event.reason)

    def _on_rejected(self, node: object, event: RequestRejected) -> None:
        self._put_unfinished(event, REJECTED, event.code)

    def _put_unfinished(self, request: Request, outcome: str, reason: str) -> None:
        self._write((request.request_id, request.model, "", "", outcome, f"{request.arrival_s:.9g}", "", "", "", "", "", "", "", "", "", reason, ""))

    def put_in_flight(self, request: Request, reason: str) -> None:
        """A request that had not ended when the run did, and why the run ended."""
        self._put_unfinished(request, IN_FLIGHT, reason)

    def close(self) -> None:
        """Give the complete file its name. OutputError if it could not be written."""
        self._file.commit()

    def discard(self) -> None:
        """Remove the file, unless it has been closed."""
        self._file.discard()

    def __enter__(self) -> RequestsCsv:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
