"""Which model a request is for, and which priority it has."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Generic, TypeVar

T = TypeVar("T")


class Shares(Generic[T]):
    """Each item is drawn in proportion to its weight, which is at least 0; one weight at least is above 0. A draw costs O(log n)."""

    __slots__ = ("_cumulative", "_items", "_last", "_total")

    def __init__(self, items: Sequence[T], weights: Iterable[float]) -> None:
        if not items:
            raise ValueError("popularity needs at least one model")
        self._items = tuple(items)
        self._cumulative: list[float] = list(accumulate(weights))
        self._total = self._cumulative[-1]
        # The last item that can be drawn: one of weight 0 behind it has no room of its own.
        self._last = self._cumulative.index(self._total)

    @classmethod
    def of(cls, weights: Mapping[T, float]) -> Shares[T]:
        """The items of a mapping to their weights."""
        return Shares(tuple(weights), weights.values())

    def draw(self, rng: Random) -> T:
        """One of the items."""
        # The product may round up to the total itself, which would point behind the last item.
        return self._items[bisect_right(self._cumulative, rng.random() * self._total, 0, self._last)]

    def probability(self, rank: int) -> float:
        """How likely the item at `rank` (from 0) is drawn."""
        below = self._cumulative[rank - 1] if rank else 0.0
        return (self._cumulative[rank] - below) / self._total

    def items(self) -> Iterable[tuple[T, float]]:
        """Each item with the probability of its draw."""
        return ((item, self.probability(rank)) for rank, item in enumerate(self._items))


class Zipf(Shares[str]):
    """The model at rank i (from 1, in the order given) is asked for in proportion to i ** -exponent; exponent 0 makes all alike.

    Papers use exponents of 1.0 to 1.2.
    """

    __slots__ = ()

    def __init__(self, names: Sequence[str], exponent: float) -> None:
        super().__init__(names, ((rank + 1.0) ** -exponent for rank in range(len(names))))
