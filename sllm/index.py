"""Indexes over rows of a table: sets that can be sampled, and sets by a number. Every operation costs the same however many rows there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Generic, Protocol, TypeVar

LEVEL_MAX = 20_000  # levels above it share a bag: one report with a huge number in it must not cost as many bags


class Named(Protocol):
    """What can be put into an index."""

    @property
    def worker_id(self) -> str: ...


R = TypeVar("R", bound=Named)


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
            self._place[row.worker_id] = len(self.rows)
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
    """Workers by a whole number from 0, each level a bag; the lowest level that holds anybody is known."""

    __slots__ = ("_lowest", "bags")

    def __init__(self) -> None:
        self.bags: list[Bag[R]] = [Bag()]
        self._lowest = 0  # no level below it holds anybody

    def move(self, row: R, old: int, new: int) -> None:
        """From level `old` to `new`; -1 is nowhere."""
        bags = self.bags
        if old >= 0:
            bags[min(old, LEVEL_MAX)].remove(row)
        if new >= 0:
            new = min(new, LEVEL_MAX)
            while len(bags) <= new:
                bags.append(Bag())
            bags[new].add(row)
            if new < self._lowest:
                self._lowest = new

    def lowest(self) -> tuple[int, Bag[R]]:
        """The lowest level that holds anybody, and its bag; the last level and an empty bag when nobody is there."""
        bags, low = self.bags, self._lowest
        while low < len(bags) - 1 and not bags[low].rows:
            low += 1
        self._lowest = low
        return low, bags[low]

    def rising(self) -> Iterator[R]:
        """Everybody, level by level from the lowest."""
        for level in range(self.lowest()[0], len(self.bags)):
            yield from self.bags[level].rows
