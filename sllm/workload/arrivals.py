"""Arrival processes: when requests come, at a mean rate.

Each process is a function `(rate_per_s, duration_s, cv, rng)` that yields arrival times in seconds, from 0 up to but excluding `duration_s`
(which may be infinite), never decreasing. The expected number of arrivals is rate * duration for every process and every duration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

ArrivalProcess = Callable[[float, float, float, Random], Iterator[float]]


def poisson(rate_per_s: float, duration_s: float, cv: float, rng: Random) -> Iterator[float]:
    """Independent arrivals: exponential gaps, whose coefficient of variation is 1. `cv` is not used."""
    gap = rng.expovariate
    now = gap(rate_per_s)
    while now < duration_s:
        yield now
        now += gap(rate_per_s)


def gamma(rate_per_s: float, duration_s: float, cv: float, rng: Random) -> Iterator[float]:
    """Bursts: gamma gaps of shape 1/cv^2, as AlpaServe (OSDI 2023) and ServerlessLLM (OSDI 2024) draw them, with cv = 8.

    The start of the run is a random moment in a gap, not an arrival. A gap that covers a given moment is longer than most gaps (its density is
    weighted by its length: gamma of shape + 1), and the moment is uniform within the gap. Starting with an ordinary gap would add
    (cv^2 - 1)/2 requests to every long run, which is 31 requests at cv = 8.
    """
    shape = 1.0 / (cv * cv)
    scale = 1.0 / (rate_per_s * shape)
    gap = rng.gammavariate
    now = rng.random() * gap(shape + 1.0, scale)
    while now < duration_s:
        yield now
        now += gap(shape, scale)


def deterministic(rate_per_s: float, duration_s: float, cv: float, rng: Random) -> Iterator[float]:
    """Evenly spaced arrivals, the first at 0. Times are computed from the count, so that rounding errors do not add up. `cv` and `rng` are not used."""
    count = 0
    while (now := count / rate_per_s) < duration_s:
        yield now
        count += 1


ARRIVALS: dict[str, ArrivalProcess] = {"poisson": poisson, "gamma": gamma, "deterministic": deterministic}
"""Arrival processes by the name that users choose them with."""
