"""Random choice by weight: the model and the priority of each request."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from random import Random
from typing import Generic, TypeVar

T = TypeVar("T")


class Shares(Generic[T]):
    """Draws each item in proportion to its weight. Weights are at least 0, and at least one weight is above 0. A draw costs O(log n)."""

    __slots__ = ("_cumulative", "_items", "_last", "_total")

    def __init__(self, items: Sequence[T], weights: Iterable[float]) -> None:
        if not items:
            raise ValueError("popularity needs at least one model")
        self._items = tuple(items)
        self._cumulative: list[float] = list(accumulate(weights))
        self._total = self._cumulative[-1]
        # The last item that can be drawn: all items behind it have weight 0.
        self._last = self._cumulative.index(self._total)

    @classmethod
    def of(cls, weights: Mapping[T, float]) -> Shares[T]:
        """Shares of a mapping from items to their weights."""
        return Shares(tuple(weights), weights.values())

    def draw(self, rng: Random) -> T:
        """One of the items."""
        # The product may round up to the total, which would point behind the last item.
        return self._items[bisect_right(self._cumulative, rng.random() * self._total, 0, self._last)]

    def probability(self, rank: int) -> float:
        """The probability that a draw gives the item at `rank` (from 0)."""
        below = self._cumulative[rank - 1] if rank else 0.0
        return (self._cumulative[rank] - below) / self._total

    def items(self) -> Iterable[tuple[T, float]]:
        """Each item with the probability of its draw."""
        return ((item, self.probability(rank)) for rank, item in enumerate(self._items))


class Zipf(Shares[str]):
    """Zipf's law: the model at rank i (from 1, in the order given) has the weight i ** -exponent; with exponent 0 all models are equally likely.

    Papers use exponents of 1.0 to 1.2.
    """

    __slots__ = ()

    def __init__(self, names: Sequence[str], exponent: float) -> None:
        super().__init__(names, ((rank + 1.0) ** -exponent for rank in range(len(names))))
