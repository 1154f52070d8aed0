"""Internal errors: exceptions of this program, each a bug. An internal error is counted by its place in the code, told once for each place, and dropped
together with the datagram, timer or question being handled."""

from __future__ import annotations

import errno
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sllm.protocol.bus import EventBus
from sllm.protocol.events import InternalErrorCaught
from sllm.protocol.node import Node

TRACE_MAX = 20  # innermost frames of an exception that are told


class InternalErrors:
    """Counts internal errors, and tells the first one of each place as an event of the node that was being called."""

    def __init__(self, bus: EventBus, now: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter()  # by file and line
        self._bus = bus
        self._now = now

    def note(self, what: str, error: Exception, node: Node | None = None) -> None:
        """Count an error. `what`: the work that was being done and is dropped. Without a node no event is told."""
        place = place_of(error)
        self.counts[place] += 1
        if node is not None and self.counts[place] == 1:
            trace = "".join(traceback.format_exception(error, limit=-TRACE_MAX)).rstrip()
            told = InternalErrorCaught(self._now(), node.node_id, place, what, f"{type(error).__name__}: {error}", trace)
            self._bus.publish(node, (told,))


def place_of(error: BaseException) -> str:
    """Where an exception was raised, as file and line: "fleet.py:120"."""
    place = "unknown"
    for frame, line in traceback.walk_tb(error.__traceback__):
        place = f"{Path(frame.f_code.co_filename).name}:{line}"
    return place


def reason_of(error: Exception) -> str:
    """A name for an error of a socket: the system's name, or the class of the exception."""
    return errno.errorcode.get(error.errno or 0, "EUNKNOWN").lower() if isinstance(error, OSError) else type(error).__name__.lower()
