"""Deadlines: exact ones by key, for the timers inside a role and those of many roles inside a driver; and coarse ones for very many things."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace
from math import ceil
from typing import Generic, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)
NEVER = -1


class Timers(Generic[K]):
    """Absolute deadlines in seconds, one for each key. Equal deadlines come due in the order in which they were set.

    Moving a deadline later, by far the most common change, costs one dictionary store: its heap entry is left where it is and moved only when it surfaces.
    """

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

    def pop_due(self, now: float) -> K | None:
        """Take out one key whose deadline is not after `now`; None when there is none."""
        at = self.next_deadline()
        if at is None or at > now:
            return None
        key = heappop(self._heap)[2]
        del self._due[key]
        return key


class Due(Protocol):
    """What can be put into a wheel."""

    due: int  # its slot in the wheel it is in; NEVER: in none


D = TypeVar("D", bound=Due)


class Wheel(Generic[D]):
    """Deadlines in steps of `step_s`, each a slot with what comes due by then (the timing wheel of Varghese and Lauck, SOSP 1987).

    A thing comes due in one slot and keeps its number, so it costs a place in a queue and no more: setting and taking it are O(1) with 100,000 others, where
    a heap would have to find its way among them. One set to an earlier slot leaves its place in the later one behind, which is void when it comes up.
    """

    __slots__ = ("_order", "_slots", "step_s")

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._slots: dict[int, deque[D]] = {}
        self._order: list[int] = []  # heap of the slots in use

    def set(self, thing: D, at: float) -> None:
        """`thing` comes due in the step that ends at or just after `at`, or before that if it was set so before: whoever takes it looks again."""
        slot = ceil(at / self.step_s)
        if thing.due != NEVER and thing.due <= slot:
            return
        thing.due = slot
        queue = self._slots.get(slot)
        if queue is None:
            queue = self._slots[slot] = deque()
            heappush(self._order, slot)
        queue.append(thing)

    def has_due(self, now: float) -> bool:
        """There may be something to take."""
        return bool(self._order) and self._order[0] * self.step_s <= now

    def take(self, now: float, most: int) -> list[D]:
        """Take out what is due, in the order of its steps, at most so much; what is to come due again must be set again."""
        taken: list[D] = []
        while self.has_due(now) and len(taken) < most:
            slot = self._order[0]
            queue = self._slots[slot]
            thing = queue.popleft()
            if thing.due == slot:  # else it was set to an earlier one since
                thing.due = NEVER
                taken.append(thing)
            if not queue:
                del self._slots[heappop(self._order)]
        return taken
