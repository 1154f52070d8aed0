"""Exceptions of our own: each is a bug that is counted by the place that raised it, told once for each place, and dropped with what was being handled."""

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
    """Counts them, and tells the first from each place as an event of the node that was concerned."""

    def __init__(self, bus: EventBus, now: Callable[[], float]) -> None:
        self.counts: Counter[str] = Counter()  # by file and line
        self._bus = bus
        self._now = now

    def note(self, what: str, error: Exception, node: Node | None = None) -> None:
        """`what` was being handled, and is dropped. Without a node nothing is told."""
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
    """A name for what went wrong with a socket: the system's, or that of the exception."""
    return errno.errorcode.get(error.errno or 0, "EUNKNOWN").lower() if isinstance(error, OSError) else type(error).__name__.lower()
