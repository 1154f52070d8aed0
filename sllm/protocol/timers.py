"""Deadlines: exact ones, for the timers inside a role and those of many roles inside a driver; and coarse ones for very many things."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush, heapreplace
from math import ceil, inf
from typing import Generic, Protocol, TypeVar

NEVER = -1


class Timed(Protocol):
    """What can be given an exact deadline. Both are the timers' to write; a thing is made with `inf` in them."""

    due_at: float  # when it comes due, absolute seconds; inf: it does not
    entry_at: float  # where it stands in the heap; inf: nowhere


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """Absolute deadlines in seconds, one for each thing. Equal deadlines come due in the order in which they were set.

    Moving a deadline later, by far the most common change, leaves the thing's heap entry where it is; it is moved only when it comes to the front.
    """

    __slots__ = ("_count", "_heap", "earliest")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0
        self.earliest = inf  # the earliest deadline set; inf: none is

    def set(self, thing: T, at: float) -> None:
        """`thing` comes due at `at`, whatever it was set to before."""
        thing.due_at = at
        if at < thing.entry_at:
            thing.entry_at = at
            self._count += 1
            heappush(self._heap, (at, self._count, thing))
            if at < self.earliest:
                self.earliest = at
        elif self._heap[0][2] is thing:
            self._tidy()

    def cancel(self, thing: T) -> None:
        """`thing` does not come due."""
        thing.due_at = inf
        if self._heap and self._heap[0][2] is thing:
            self._tidy()

    def _tidy(self) -> None:
        """Bring a thing to the front that is due when its entry says."""
        heap = self._heap
        while heap:
            at, _, thing = heap[0]
            due_at = thing.due_at
            if due_at == at:
                self.earliest = at
                return
            if due_at == inf or thing.entry_at != at:  # cancelled, or another entry stands for it
                if thing.entry_at == at:
                    thing.entry_at = inf
                heappop(heap)
            else:
                thing.entry_at = due_at
                self._count += 1
                heapreplace(heap, (due_at, self._count, thing))
        self.earliest = inf

    def pop_due(self, now: float) -> T | None:
        """Take out one thing whose deadline is not after `now`; None when there is none."""
        if self.earliest > now:
            return None
        thing = heappop(self._heap)[2]
        thing.due_at = thing.entry_at = inf
        self._tidy()
        return thing


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
