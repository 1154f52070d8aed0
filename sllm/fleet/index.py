"""Indexes over rows of a table: sets that can be sampled, and sets by a number. Every operation costs the same however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from math import inf
from random import Random
from typing import Generic, Protocol, TypeVar

HEAP_SLACK = 64  # levels that hold nobody any more and may stand in a heap


class Named(Protocol):
    """What can be put into an index."""

    @property
    def worker_id(self) -> str: ...


R = TypeVar("R", bound=Named)


_PLACES: list[int] = []  # 0, 1, 2, ...: the same objects in all bags, of which a worker is in ten or so; bench/memory.py has what that is worth


class Bag(Generic[R]):
    """A set of workers with O(1) add, remove and uniform sampling; its order depends only on what was done to it."""

    __slots__ = ("_place", "rows")

    def __init__(self) -> None:
        self.rows: list[R] = []
        self._place: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, row: R) -> bool:
        return row.worker_id in self._place

    def add(self, row: R) -> None:
        if row.worker_id not in self._place:
            place = len(self.rows)
            if place == len(_PLACES):
                _PLACES.append(place)
            self._place[row.worker_id] = _PLACES[place]
            self.rows.append(row)

    def remove(self, row: R) -> None:
        place = self._place.pop(row.worker_id, None)
        if place is None:
            return
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
            self._place[last.worker_id] = place

    def sample(self, count: int, rng: Random) -> list[R]:
        """`count` different workers in random order; all of them, in random order, when there are no more."""
        rows = self.rows
        size = len(rows)
        if size <= 1:
            return rows[:]
        if count == 1:
            return [rows[int(rng.random() * size)]]
        if size <= count:
            picked = rows[:]
            rng.shuffle(picked)
            return picked
        return [rows[place] for place in _places(size, count, rng)]


def _places(size: int, count: int, rng: Random) -> dict[int, None]:
    """`count` different places below `size`, in the order drawn."""
    random = rng.random
    chosen = {int(random() * size): None for _ in range(count)}
    while len(chosen) < count:
        chosen[int(random() * size)] = None
    return chosen


def sample_all(bags: Sequence[Bag[R]], count: int, rng: Random) -> list[R]:
    """`count` different workers of several bags that share none, in random order, each as likely as any other; all of them when there are no more."""
    if len(bags) == 1:
        return bags[0].sample(count, rng)
    size = sum(len(bag) for bag in bags)
    if size <= count:
        picked = [row for bag in bags for row in bag.rows]
        rng.shuffle(picked)
        return picked
    drawn = []
    for place in _places(size, count, rng):
        for bag in bags:
            if place < len(bag):
                drawn.append(bag.rows[place])
                break
            place -= len(bag)
    return drawn


class Levels(Generic[R]):
    """Workers by a whole number from 0, each level a bag; the lowest level that holds anybody is found at once. Costs do not grow with the numbers."""

    __slots__ = ("_heap", "bags")

    def __init__(self) -> None:
        self.bags: dict[int, Bag[R]] = {}  # those that hold somebody
        self._heap: list[int] = []  # their levels, and some that no longer are

    def move(self, row: R, old: int, new: int) -> None:
        """From level `old` to `new`; -1 is nowhere."""
        bags = self.bags
        if old >= 0:
            left = bags[old]
            left.remove(row)
            if not left.rows:
                del bags[old]
        if new >= 0:
            bag = bags.get(new)
            if bag is None:
                bag = bags[new] = Bag()
                if len(self._heap) < HEAP_SLACK + 2 * len(bags):
                    heappush(self._heap, new)
                else:
                    self._heap = sorted(bags)
            bag.add(row)

    def lowest(self) -> tuple[int, Bag[R]]:
        """The lowest level that holds anybody, and its bag; level 0 and an empty bag when nobody is there."""
        heap, bags = self._heap, self.bags
        while heap:
            bag = bags.get(heap[0])
            if bag is not None:
                return heap[0], bag
            heappop(heap)
        return 0, Bag()

    def rising(self, begin: int = 0, end: float = inf) -> Iterator[R]:
        """Everybody from level `begin` to below `end`, level by level from the lowest. Whoever stops within the lowest of all pays for no other."""
        low, bag = self.lowest()
        if begin <= low < end:
            yield from bag.rows
        if low < end:
            for level in sorted(level for level in self.bags if low < level and begin <= level < end):
                yield from self.bags[level].rows
