"""Deadlines: `Timers` for exact ones (the timers inside a role, the roles inside a driver), `Wheel` for coarse ones of 100,000 things."""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush, heapreplace
from math import ceil, inf
from typing import Generic, Protocol, TypeVar

NEVER = -1


class Timed(Protocol):
    """A thing that can be given an exact deadline. Only `Timers` writes the two fields; initialise both to inf."""

    due_at: float  # when the thing comes due, absolute seconds; inf: never
    entry_at: float  # the time of the thing's entry in the heap; inf: the heap has no entry for it


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """Absolute deadlines in seconds, one for each thing. Equal deadlines come due in the order in which they were set.

    Moving a deadline later, by far the most common change, leaves the thing's heap entry in place; the entry is moved when it reaches the front.
    """

    __slots__ = ("_count", "_heap", "earliest")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0
        self.earliest = inf  # the earliest deadline; inf: no deadline is set

    def set(self, thing: T, at: float) -> None:
        """Let `thing` come due at `at`, instead of any deadline that it had before."""
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
        """Take away the deadline of `thing`."""
        thing.due_at = inf
        if self._heap and self._heap[0][2] is thing:
            self._tidy()

    def _tidy(self) -> None:
        """Drop or move entries at the front of the heap until the front entry has the true deadline of its thing."""
        heap = self._heap
        while heap:
            at, _, thing = heap[0]
            due_at = thing.due_at
            if due_at == at:
                self.earliest = at
                return
            if due_at == inf or thing.entry_at != at:  # the thing was cancelled, or another entry stands for it
                if thing.entry_at == at:
                    thing.entry_at = inf
                heappop(heap)
            else:
                thing.entry_at = due_at
                self._count += 1
                heapreplace(heap, (due_at, self._count, thing))
        self.earliest = inf

    def pop_due(self, now: float) -> T | None:
        """Take out one thing whose deadline is not after `now`; None if there is no such thing."""
        if self.earliest > now:
            return None
        thing = heappop(self._heap)[2]
        thing.due_at = thing.entry_at = inf
        self._tidy()
        return thing


class Due(Protocol):
    """A thing that can be put into a wheel."""

    due: int  # the thing's slot in its wheel; NEVER: the thing is in no wheel


D = TypeVar("D", bound=Due)


class Wheel(Generic[D]):
    """Deadlines in steps of `step_s`; each step has a slot with the things that come due in it (the timing wheel of Varghese and Lauck, SOSP 1987).

    Setting and taking a thing are O(1), whatever the number of things; a heap would need O(log n). A thing that is set to an earlier slot leaves a void place
    behind in the later slot.
    """

    __slots__ = ("_order", "_slots", "step_s")

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self._slots: dict[int, deque[D]] = {}
        self._order: list[int] = []  # heap of the slots in use

    def set(self, thing: D, at: float) -> None:
        """Let `thing` come due in the step that ends at or just after `at`. An earlier deadline that was set before stays, so whoever takes the thing has to
        check its true deadline."""
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
        """Whether there may be things to take."""
        return bool(self._order) and self._order[0] * self.step_s <= now

    def take(self, now: float, most: int) -> list[D]:
        """Take out at most `most` things that are due, in the order of their steps. A thing that is to come due again must be set again."""
        taken: list[D] = []
        while self.has_due(now) and len(taken) < most:
            slot = self._order[0]
            queue = self._slots[slot]
            thing = queue.popleft()
            if thing.due == slot:  # otherwise the place is void: the thing was set to an earlier slot
                thing.due = NEVER
                taken.append(thing)
            if not queue:
                del self._slots[heappop(self._order)]
        return taken
