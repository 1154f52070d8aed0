"""Log lines, for people (text) or for machines (one JSON object per line), and the log lines of events.

Events of single requests are logged at level debug; events for the operator (members, loads, holds, failures) at info and above. Each kind of line has a rate
limit after a burst (`Limit`), so that five thousand workers starting together do not bury all other lines.

A reader that does not read must not stop the process: lines go into a buffer that a thread writes out. Lines that do not fit the buffer are dropped and
counted, and their number is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, TextIO

from sllm.protocol import events
from sllm.protocol.events import Event
from sllm.protocol.node import Node

LOGGER = "sllm"
BURST, REFILL_PER_S = 50, 10.0  # lines of one kind that are printed at once, and per second after that; the number of the others is logged
DEBUG_BURST, DEBUG_REFILL_PER_S = 1000, 200.0  # at level debug
BUFFER_BYTES = 4 << 20  # of lines that nobody has read yet
WRITE_BYTES = 1 << 16  # handed to the system in one call, roughly
FLUSH_S = 2.0  # longest wait for a slow reader at the end of the process
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
RESERVED = frozenset({"time", "level", "message", "event", "error", "stack", "pid"})


class Line(NamedTuple):
    """The log line of a kind of event: its level, and a template with the event's fields."""

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
    events.WorkerDisplaced: Line(logging.WARNING, "{worker_id}: an older life at {address} reports too and is refused: give each worker an id of its own"),
    events.DisplacedByNamesake: Line(logging.WARNING, "{worker_id}: a newer worker reports under this name, so this one gets no requests: set WORKER_ID"),
    events.RivalSeen: Line(logging.ERROR, "two coordinators answer under one address: requests are placed by each on its own workers; stop one of them"),
    events.RivalGone: Line(logging.INFO, "one coordinator answers again"),
    events.HardwareUnknown: Line(logging.WARNING, "{worker_id} reports hardware {hardware!r}, which is not in the catalogue: it gets no requests"),
    events.TableFull: Line(logging.ERROR, "the table of workers is full at {limit} rows, new workers are refused: raise WORKERS_MAX, or look who reports"),
    events.CoordinatorReady: Line(logging.INFO, "ready, with {workers} workers"),
    events.ExpiryHeld: Line(logging.WARNING, "degraded: {silent} of {known} workers silent; nobody is declared dead: {reason}"),
    events.ExpiryResumed: Line(logging.INFO, "no longer degraded: silent workers are declared dead again"),
    events.RequestAdmitted: Line(logging.DEBUG, "request {request_id} for {model} taken"),
    events.RequestCancelled: Line(logging.DEBUG, "request {request_id} for {model} cancelled: its client does not wait for it any more"),
    events.RequestServed: Line(logging.DEBUG, "request {request_id} for {model} served: {output_tokens} tokens"),
    events.ModelLoadStarted: Line(logging.INFO, "loading {model}"),
    events.ModelLoaded: Line(logging.INFO, "{model} loaded from {tier_from} in {load_s:.3f} s"),
    events.ModelEvicted: Line(logging.INFO, "{model} evicted"),
    events.WorkerDrained: Line(logging.INFO, "{worker_id} drained: nothing is running any more"),
    events.CoordinatorSilent: Line(logging.WARNING, "coordinator silent for {silent_s:.1f} s"),  # a process says more: `sllm.observe.causes`
    events.InternalErrorCaught: Line(logging.ERROR, "internal error at {place}: {problem}; {what} was dropped, the next ones from there are only counted"),
    events.CoordinatorOverdue: Line(logging.DEBUG, "coordinator owes an answer, {silent_s:.1f} s after its last: over a new socket"),
    events.CoordinatorChanged: Line(logging.INFO, "another life of the coordinator answers"),
}


def describe(event: Event) -> tuple[int, str, dict[str, Any]]:
    """(level, message, fields) of an event. The message of an event without an entry in LINES is the name of its class. The field `at` is left out."""
    fields = {name: value for name, value in zip(event.FIELDS, event.values(), strict=True) if name != "at"}
    line = LINES.get(type(event))
    if line is None:
        return logging.INFO, type(event).__name__, fields
    return line.level, line.template.format_map(fields), fields


class Limit(logging.Filter):
    """Lets a burst of lines of one kind through, and then a fixed number a second. The kind of a line is its class of event, or the place in the program
    that logs; both are few."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._budgets: dict[object, tuple[float, float]] = {}  # kind -> (lines left, time of that count)
        self._held: dict[object, tuple[int, int, str, str]] = {}  # kind -> (suppressed lines, level, event or message, event)
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        event = getattr(record, "event", "")
        if getattr(record, "unlimited", False):
            return True
        kind = (event or (record.pathname, record.lineno)), record.levelno
        with self._lock:
            allowed = self._allowed(kind, record.levelno)
            if not allowed:
                count = self._held.get(kind, (0,))[0]
                self._held[kind] = count + 1, record.levelno, event or str(record.msg), event
        return allowed

    def _allowed(self, kind: object, level: int) -> bool:
        burst, per_s = (DEBUG_BURST, DEBUG_REFILL_PER_S) if level <= logging.DEBUG else (BURST, REFILL_PER_S)
        now = self._now()
        left, since = self._budgets.get(kind, (float(burst), now))
        left = min(float(burst), left + (now - since) * per_s)
        allowed = left >= 1.0
        self._budgets[kind] = (left - 1.0 if allowed else left, now)
        return allowed

    def flush(self, log: logging.Logger) -> None:
        """Log the number of lines suppressed since the last call; to be called regularly."""
        with self._lock:
            held, self._held = self._held, {}
        for count, level, what, event in held.values():
            extra = {"fields": {"suppressed": count}, "unlimited": True, **({"event": event} if event else {})}
            log.log(level, "%d more lines suppressed: %s", count, what, extra=extra)


class EventLog:
    """A handler that logs every event, except the kinds in `told_elsewhere`."""

    def __init__(self, log: logging.Logger | None = None, told_elsewhere: Collection[type] = ()) -> None:
        self._logger = log or logging.getLogger(LOGGER)
        self._told_elsewhere = told_elsewhere

    def __call__(self, node: Node, event: Event) -> None:
        kind = type(event)
        if kind in self._told_elsewhere:
            return
        line = LINES.get(kind)
        if self._logger.isEnabledFor(line.level if line else logging.INFO):
            level, message, fields = describe(event)
            self._logger.log(level, "%s", message, extra={"event": kind.__name__, "fields": fields})


# --- formats ------------------------------------------------------------------------------------------------------------------------


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC, with milliseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """One JSON object per line, for any message."""

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
        return json.dumps(line, allow_nan=False)  # all ASCII, which every reader can decode and no reader splits in the middle


class TextFormatter(logging.Formatter):
    """Time, level, message, and the fields that the message does not show already. Text from peers is escaped and cannot begin a new line."""

    def format(self, record: logging.LogRecord) -> str:
        message = one_line(record.getMessage())
        text = f"{timestamp(record.created)} {record.levelname.lower():<7} {message}"
        for name, value in (getattr(record, "fields", None) or {}).items():
            if name == "trace" and "\n" in value:
                text += "".join(f"\n  {one_line(line)}" for line in value.splitlines())
                continue
            shown = _value(value)
            if shown.strip('"') not in message:
                text += f" {name}={shown}"
        if record.exc_info and record.exc_info[0] is not None:
            stack = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            text += "".join(f"\n{one_line(line)}" for line in stack.split("\n"))
        return text


def _plain(value: Any) -> Any:
    """`value` in types that JSON has; NaN, infinities and other objects as text."""
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    return str(value)


def one_line(text: str) -> str:
    """`text` with every unprintable character escaped, so that the text can neither begin a new line nor change how a line is shown (U+202E)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.12g}"
    text = one_line(str(value))
    return f'"{text}"' if not text or re.search(r'[\s"=]', text) else text


# --- writing ------------------------------------------------------------------------------------------------------------------------


class Output(logging.Handler):
    """Writes lines to a stream. A stream with a file descriptor (a pipe, a terminal, a file) is written by a separate thread, so that logging never waits for
    the reader. Errors of the stream, such as a reader that has gone away, are ignored; without a stream (None: it was closed before the process began) lines
    are discarded."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self.stream: Final = stream
        self.dropped = 0  # lines that did not fit, since the start
        self._lines: deque[str] = deque()
        self._size = 0
        self._untold = 0  # dropped lines whose number has not been logged yet
        self._writing = False
        self._unread = False  # a wait for the reader has timed out
        self._ended = False
        self._changed = threading.Condition()
        self._descriptor: int | None = None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._descriptor = stream.fileno()
        self._thread: threading.Thread | None = None  # None: lines are written by the thread that logs them
        if self._descriptor is not None:
            thread = threading.Thread(target=self._run, name="log", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system has no thread left
                thread.start()
                self._thread = thread

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:
            self.handleError(record)
            return
        if self._thread is None:
            self._write(line)
            return
        with self._changed:
            if self._size + len(line) > BUFFER_BYTES:
                self.dropped += 1
                self._untold += 1
                return
            self._lines.append(line)
            self._size += len(line)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything is written, for at most `FLUSH_S`."""
        self.wait_until_written(FLUSH_S)

    def wait_until_written(self, patience_s: float) -> bool:
        """Wait until everything is written, for at most `patience_s`; returns whether it was. After one wait has timed out, no later call waits."""
        if self._thread is None:
            return True
        with self._changed:
            written = self._changed.wait_for(self._is_written, 0.0 if self._unread else patience_s)
            self._unread = not written
            return written

    def _is_written(self) -> bool:
        return not self._lines and not self._writing and not self._untold

    def close(self) -> None:
        """Write the remaining lines within `FLUSH_S` and end the thread. A thread that is blocked by its reader ends with the process."""
        self.flush()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None and self.wait_until_written(0.0):
            self._thread.join(FLUSH_S)
        super().close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._untold or self._ended)
                text = self._take()
                if not text:
                    return
                self._writing = True
            self._write(text)
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _take(self) -> str:
        """Take lines out of the buffer, with a line about dropped lines at the end; "" if there are none."""
        taken: list[str] = []
        size = 0
        while self._lines and size < WRITE_BYTES:
            line = self._lines.popleft()
            size += len(line)
            taken.append(line)
        self._size -= size
        if self._untold and not self._lines:
            taken.append(self._tell_dropped(self._untold))
            self._untold = 0
        return "".join(taken)

    def _tell_dropped(self, count: int) -> str:
        message = "%d log lines were dropped: nobody read them in time"
        record = logging.LogRecord(LOGGER, logging.WARNING, __file__, 0, message, (count,), None)
        record.fields = {"dropped": count}
        return self.format(record) + "\n"

    def _write(self, text: str) -> None:
        if self.stream is None:
            return
        with contextlib.suppress(OSError, ValueError):  # the reader has gone, or the stream is closed
            if self._descriptor is None:
                self.stream.write(text)
                self.stream.flush()
                return
            # Not through the stream's own buffer: if this thread held the buffer's lock when the process ends, Python would abort with a fatal error.
            data = memoryview(text.encode(self.stream.encoding or "utf-8", "backslashreplace"))
            while data:
                data = data[os.write(self._descriptor, data) :]


def logger() -> logging.Logger:
    """The project's logger."""
    return logging.getLogger(LOGGER)


def flush() -> None:
    """Log the numbers of suppressed lines; to be called regularly."""
    log = logger()
    for handler in log.handlers:
        for limit in handler.filters:
            if isinstance(limit, Limit):
                limit.flush(log)


def dropped() -> int:
    """The number of lines dropped because nobody read them."""
    return sum(handler.dropped for handler in logger().handlers if isinstance(handler, Output))


def finish(patience_s: float = FLUSH_S) -> None:
    """Wait until all lines are written, for at most `patience_s`."""
    for handler in logger().handlers:
        if isinstance(handler, Output):
            handler.wait_until_written(patience_s)


def setup(level: str = "info", form: str = "text", stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> logging.Logger:
    """Log to `stream` (None: stdout) from `level` on, in `form` text or json. Returns the logger. Replaces an earlier setup."""
    log = logging.getLogger(LOGGER)
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    stream = stream if stream is not None else sys.stdout
    handler = Output(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(Limit(now))
    log.addHandler(handler)
    log.setLevel(LEVELS[level])
    log.propagate = False
    return log
