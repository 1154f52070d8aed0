"""Log lines, for people (text) or for machines (one JSON object a line), and the lines that events become.

What happens to a single request is told at level debug; what an operator wants to know (members, loads, holds, failures) at info and above, at most
`BURST` lines of a kind at once, so that five thousand workers starting together do not bury everything else.
"""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO

from sllm import events
from sllm.events import Event
from sllm.node import Node

LOGGER = "sllm"
BURST = 50  # lines of one kind of event printed at once ...
REFILL_PER_S = 10.0  # ... and this many a second after that; the rest is counted and told as a sum
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
RESERVED = frozenset({"time", "level", "message", "event", "error", "stack", "pid"})


class Line(NamedTuple):
    """How a kind of event is told: its level, and a template of its fields."""

    level: int
    template: str


LINES: dict[type, Line] = {
    events.RequestSent: Line(logging.DEBUG, "request {request_id} for {model} sent"),
    events.FirstTokenReceived: Line(logging.DEBUG, "request {request_id}: first token after {ttft_s:.3f} s"),
    events.RequestCompleted: Line(logging.DEBUG, "request {request_id} completed by {worker_id} in {e2e_s:.3f} s"),
    events.RequestFailed: Line(logging.WARNING, "request {request_id} failed: {reason}"),
    events.RequestRejected: Line(logging.WARNING, "request {request_id} rejected: {code}"),
    events.RequestRetried: Line(logging.INFO, "request {request_id} goes elsewhere: {worker_id} {reason}"),
    events.DuplicateResponse: Line(logging.WARNING, "request {request_id} was answered again, by {sender_id}"),
    events.RequestRouted: Line(logging.DEBUG, "request {request_id} for {model} goes to {worker_id}: {action}"),
    events.RequestRefused: Line(logging.DEBUG, "request {request_id} for {model} refused: {code}"),
    events.WorkerStateChanged: Line(logging.INFO, "{worker_id} is {new}: {reason}"),
    events.CoordinatorReady: Line(logging.INFO, "ready, with {workers} workers"),
    events.ExpiryHeld: Line(logging.WARNING, "degraded: {silent} of {known} workers silent; nobody is declared dead: {reason}"),
    events.ExpiryResumed: Line(logging.INFO, "no longer degraded: silent workers are declared dead again"),
    events.RequestAdmitted: Line(logging.DEBUG, "request {request_id} for {model} taken"),
    events.RequestServed: Line(logging.DEBUG, "request {request_id} for {model} served: {output_tokens} tokens"),
    events.ModelLoadStarted: Line(logging.INFO, "loading {model}"),
    events.ModelLoaded: Line(logging.INFO, "{model} loaded from {tier_from} in {load_s:.3f} s"),
    events.ModelEvicted: Line(logging.INFO, "{model} evicted"),
    events.WorkerDrained: Line(logging.INFO, "{worker_id} drained: nothing is running any more"),
    events.CoordinatorSilent: Line(logging.WARNING, "coordinator silent for {silent_s:.1f} s: looking it up again, over a new socket"),
    events.CoordinatorOverdue: Line(logging.DEBUG, "coordinator owes an answer, {silent_s:.1f} s after its last: over a new socket"),
    events.CoordinatorChanged: Line(logging.INFO, "another life of the coordinator answers"),
}


def describe(event: Event) -> tuple[int, str, dict[str, Any]]:
    """(level, message, fields) of any event; one without a line of its own is told by its name. The run's clock (`at`) is left out."""
    fields = event._asdict()
    fields.pop("at", None)
    line = LINES.get(type(event))
    if line is None:
        return logging.INFO, type(event).__name__, fields
    return line.level, line.template.format_map(fields), fields


class EventLog:
    """An observer for the driver that logs what it is told, with a limit for each kind of event."""

    def __init__(self, log: logging.Logger | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._logger = log or logging.getLogger(LOGGER)
        self._now = now
        self._budget: dict[type, tuple[float, float]] = {}  # lines left, as of when
        self._held: dict[type, int] = {}

    def __call__(self, node: Node, event: Event) -> None:
        kind = type(event)
        line = LINES.get(kind)
        level = line.level if line else logging.INFO
        if not self._logger.isEnabledFor(level):
            return
        if level > logging.DEBUG and not self._allowed(kind):
            self._held[kind] = self._held.get(kind, 0) + 1
            return
        _, message, fields = describe(event)
        self._logger.log(level, "%s", message, extra={"event": kind.__name__, "fields": fields})

    def _allowed(self, kind: type) -> bool:
        now = self._now()
        left, since = self._budget.get(kind, (float(BURST), now))
        left = min(float(BURST), left + (now - since) * REFILL_PER_S)
        allowed = left >= 1.0
        self._budget[kind] = (left - 1.0 if allowed else left, now)
        return allowed

    def flush(self) -> None:
        """Tell how many lines were held back since the last time; to be called now and then."""
        for kind, count in self._held.items():
            line = LINES.get(kind)
            fields = {"held": count}
            level = line.level if line else logging.INFO
            self._logger.log(level, "%d more %s not printed one by one", count, kind.__name__, extra={"event": kind.__name__, "fields": fields})
        self._held.clear()


# --- formats ------------------------------------------------------------------------------------------------------------------------


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """One JSON object a line, whatever is in the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        event = getattr(record, "event", None)
        if event is not None:
            line["event"] = event
        for name, value in (getattr(record, "fields", None) or {}).items():
            line[f"{name}_" if name in RESERVED else name] = _plain(value)
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["stack"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(line, allow_nan=False)  # all ASCII: no reader splits it in the middle or cannot decode it


class TextFormatter(logging.Formatter):
    """Time, level, message, and the fields that the message does not show already. What peers said cannot break out of its line."""

    def format(self, record: logging.LogRecord) -> str:
        message = _one_line(record.getMessage())
        text = f"{timestamp(record.created)} {record.levelname.lower():<7} {message}"
        for name, value in (getattr(record, "fields", None) or {}).items():
            shown = _value(value)
            if shown.strip('"') not in message:
                text += f" {name}={shown}"
        if record.exc_info and record.exc_info[0] is not None:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return text


def _plain(value: Any) -> Any:
    """`value` as JSON can say it: no NaN, no types of ours."""
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    return str(value)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def _one_line(text: str) -> str:
    return _CONTROL.sub(lambda match: ascii(match.group())[1:-1], text)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = _one_line(str(value))
    return f'"{text}"' if not text or re.search(r'[\s"=]', text) else text


class _Stdout(logging.StreamHandler[TextIO]):
    """A reader that has gone away is no reason to stop working, nor to complain about it for every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def logger() -> logging.Logger:
    """The project's logger."""
    return logging.getLogger(LOGGER)


def setup(level: str = "info", form: str = "text", stream: TextIO | None = None) -> logging.Logger:
    """Log to `stream` (stdout) from `level` on, in `form` text or json; uncaught exceptions too. Returns the logger. Replaces what was set up before."""
    logger = logging.getLogger(LOGGER)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    stream = stream if stream is not None else sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    handler = _Stdout(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logger.addHandler(handler)
    logger.setLevel(LEVELS[level])
    logger.propagate = False
    return logger
