"""Log lines, for people (text) or for machines (one JSON object a line), and the lines that events become.

What happens to a single request is told at level debug; what an operator wants to know (members, loads, holds, failures) at info and above. Of one kind a
burst is printed and then so many lines a second (`Limit`), so that five thousand workers starting together do not bury everything else.

A reader that does not read must not stop the process: lines go into a buffer that a thread writes out; what does not fit is dropped, counted and told.
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
BURST, REFILL_PER_S = 50, 10.0  # lines of one kind printed at once, and a second after that; the rest is counted and told as a sum
DEBUG_BURST, DEBUG_REFILL_PER_S = 1000, 200.0  # at level debug
BUFFER_BYTES = 4 << 20  # of lines that nobody has read yet
WRITE_BYTES = 1 << 16  # handed to the system at once, about
FLUSH_S = 2.0  # at the end of the process, for a reader that is slow
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
    """(level, message, fields) of any event; one without a line of its own is told by its name. The run's clock (`at`) is left out."""
    fields = {name: value for name, value in zip(event.FIELDS, event.values(), strict=True) if name != "at"}
    line = LINES.get(type(event))
    if line is None:
        return logging.INFO, type(event).__name__, fields
    return line.level, line.template.format_map(fields), fields


class Limit(logging.Filter):
    """Lets a burst of one kind of line through and then so many a second. A kind is an event's, or the place in the program that logs: both are few."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._budgets: dict[object, tuple[float, float]] = {}  # lines left, as of when
        self._held: dict[object, tuple[int, int, str, str]] = {}  # kind -> lines, level, what they say or are, event
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
        """Tell how many lines were suppressed since the last time; to be called now and then."""
        with self._lock:
            held, self._held = self._held, {}
        for count, level, what, event in held.values():
            extra = {"fields": {"suppressed": count}, "unlimited": True, **({"event": event} if event else {})}
            log.log(level, "%d more lines suppressed: %s", count, what, extra=extra)


class EventLog:
    """Hears all events and logs them, but for those that somebody else tells."""

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


def one_line(text: str) -> str:
    """`text` with everything escaped that is not a printable character: it can neither leave its line nor change how the line is shown (U+202E)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.12g}"
    text = one_line(str(value))
    return f'"{text}"' if not text or re.search(r'[\s"=]', text) else text


# --- writing ------------------------------------------------------------------------------------------------------------------------


class Output(logging.Handler):
    """Writes lines to a stream. One that somebody reads (a pipe, a terminal, a file) is written by a thread of its own, so that whoever logs never waits for
    the reader. A reader that has gone away is no reason to stop working, nor to complain about it for every line; nor is a stream that was closed before the
    process began (None): its lines go nowhere."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self.stream: Final = stream
        self.dropped = 0  # lines that did not fit, since the start
        self._lines: deque[str] = deque()
        self._size = 0
        self._untold = 0  # of those dropped
        self._writing = False
        self._unread = False  # somebody waited for the reader in vain
        self._ended = False
        self._changed = threading.Condition()
        self._descriptor: int | None = None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._descriptor = stream.fileno()
        self._thread: threading.Thread | None = None  # none: lines are written where they are logged
        if self._descriptor is not None:
            thread = threading.Thread(target=self._run, name="log", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread to be had
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
        """Wait until everything is written, `FLUSH_S` at most."""
        self.wait_until_written(FLUSH_S)

    def wait_until_written(self, patience_s: float) -> bool:
        """Whether everything was written within `patience_s`. Once somebody waited in vain, nobody waits again."""
        if self._thread is None:
            return True
        with self._changed:
            written = self._changed.wait_for(self._is_written, 0.0 if self._unread else patience_s)
            self._unread = not written
            return written

    def _is_written(self) -> bool:
        return not self._lines and not self._writing and not self._untold

    def close(self) -> None:
        """Write what there is, within `FLUSH_S`; then end the thread, unless its reader holds it: such a one ends with the process."""
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
        """Some lines out of the buffer, and what became of those that did not fit; "": there is nothing."""
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
        with contextlib.suppress(OSError, ValueError):  # the reader, or the stream, is gone
            if self._descriptor is None:
                self.stream.write(text)
                self.stream.flush()
                return
            # Past the stream's own buffer: its lock, held here when the process ends, would end that with a fatal error.
            data = memoryview(text.encode(self.stream.encoding or "utf-8", "backslashreplace"))
            while data:
                data = data[os.write(self._descriptor, data) :]


def logger() -> logging.Logger:
    """The project's logger."""
    return logging.getLogger(LOGGER)


def flush() -> None:
    """Tell what was suppressed; to be called now and then."""
    log = logger()
    for handler in log.handlers:
        for limit in handler.filters:
            if isinstance(limit, Limit):
                limit.flush(log)


def dropped() -> int:
    """Lines that were dropped because nobody read them."""
    return sum(handler.dropped for handler in logger().handlers if isinstance(handler, Output))


def finish(patience_s: float = FLUSH_S) -> None:
    """Wait until what was logged is written, `patience_s` at most."""
    for handler in logger().handlers:
        if isinstance(handler, Output):
            handler.wait_until_written(patience_s)


def setup(level: str = "info", form: str = "text", stream: TextIO | None = None, now: Callable[[], float] = time.monotonic) -> logging.Logger:
    """Log to `stream` (stdout) from `level` on, in `form` text or json; uncaught exceptions too. Returns the logger. Replaces what was set up before."""
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
