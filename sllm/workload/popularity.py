"""Which model a request is for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from random import Random


class Zipf:
    """The model at rank i (from 1, in the order given) is asked for in proportion to i ** -exponent; exponent 0 makes all alike.

    Papers use exponents of 1.0 to 1.2. A draw costs O(log n).
    """

    __slots__ = ("_cumulative", "_last", "_names", "_total")

    def __init__(self, names: Sequence[str], exponent: float) -> None:
        if not names:
            raise ValueError("popularity needs at least one model")
        self._names = tuple(names)
        self._cumulative: list[float] = list(accumulate((rank + 1.0) ** -exponent for rank in range(len(names))))
        self._total = self._cumulative[-1]
        self._last = len(names) - 1

    def draw(self, rng: Random) -> str:
        """The name of a model."""
        # The product may round up to the total itself, which would point behind the last name.
        return self._names[bisect_right(self._cumulative, rng.random() * self._total, 0, self._last)]

    def probability(self, rank: int) -> float:
        """How likely the model at `rank` (from 0) is drawn."""
        below = self._cumulative[rank - 1] if rank else 0.0
        return (self._cumulative[rank] - below) / self._total
