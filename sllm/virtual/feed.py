"""Arrivals from outside: when something comes to a host that no other host has sent, and what is done with it then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

T = TypeVar("T")

AHEAD = 64  # arrivals taken in advance: reading a trace some rows at a time is quicker than one by one in between


class Feed:
    """What comes to one host, in order of time. Taken some at a time, never all."""

    __slots__ = ("_ahead", "_arrivals", "_ended", "_submit", "item")

    def __init__(self, arrivals: Iterable[tuple[float, T]], submit: Callable[[T, float], object], ended: Callable[[], object] | None = None) -> None:
        self.item: Any = None  # the one that comes next
        self._arrivals = iter(arrivals)
        self._submit: Callable[[Any, float], object] = submit
        self._ended = ended
        self._ahead: list[tuple[float, Any]] = []  # those after it, the nearest last

    def turn(self) -> float | None:
        """Make the following arrival the next one; returns its time. None: there is none, and ended() has been called."""
        if not self._ahead:
            self._ahead = list(islice(self._arrivals, AHEAD))
            if not self._ahead:
                if self._ended is not None:
                    self._ended()
                return None
            self._ahead.reverse()
        at, self.item = self._ahead.pop()
        return at

    def submit(self, item: Any, now: float) -> None:
        """It has come."""
        self._submit(item, now)
