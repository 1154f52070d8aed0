"""Deadlines by key: the timers inside a role, and those of many roles inside a driver.

Moving a deadline later, by far the most common change, costs one dictionary store: its heap entry is left where it is and moved only when it
surfaces.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Timers(Generic[K]):
    """Absolute deadlines in seconds, one for each key. Equal deadlines come due in the order in which they were set."""

    __slots__ = ("_count", "_due", "_heap")

    def __init__(self) -> None:
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._due)

    def set(self, key: K, at: float) -> None:
        """`key` comes due at `at`, whatever it was set to before."""
        old = self._due.get(key)
        self._due[key] = at
        if old is None or at < old:
            self._count += 1
            heappush(self._heap, (at, self._count, key))

    def cancel(self, key: K) -> None:
        self._due.pop(key, None)
        if not self._due:
            self._heap.clear()

    def next_deadline(self) -> float | None:
        """The earliest deadline set, or None."""
        heap, due = self._heap, self._due
        while heap:
            at, _, key = heap[0]
            actual = due.get(key)
            if actual == at:
                return at
            if actual is None or actual < at:  # cancelled, or an earlier entry stands for it
                heappop(heap)
            else:
                self._count += 1
                heapreplace(heap, (actual, self._count, key))
        return None

    def first_due(self, now: float) -> K | None:
        """The key that came due first, left where it is, for whoever sets it anew (or cancels it) at once: taking out and putting back would make a large
        dictionary resize now and then, which takes milliseconds. None when nothing is due."""
        at = self.next_deadline()
        return self._heap[0][2] if at is not None and at <= now else None

    def pop_due(self, now: float) -> K | None:
        """Take out one key whose deadline is not after `now`; None when there is none."""
        at = self.next_deadline()
        if at is None or at > now:
            return None
        key = heappop(self._heap)[2]
        del self._due[key]
        return key
