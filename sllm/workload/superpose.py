"""A trace with more or fewer requests in the same time (superposition and thinning).

Reading a trace twice as fast would double its rate, but would also speed up its bursts, days and nights. Instead, copies of the trace are laid over one
another. Each copy but the first is shifted by a random time of at most a minute, and requests shifted beyond the end come at the beginning. So the requests of
two copies do not arrive at the same moments, and the rate keeps the shape of the trace. A fraction of a copy keeps each request with that probability.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from sllm.protocol.errors import UsageError
from sllm.protocol.seeds import rng_for
from sllm.workload.traces import Trace, TraceRow

SHIFT_MAX_S = 60.0

Opener = Callable[[], Trace]


def superpose(first: Trace, again: Opener, rate: float, until_s: float, seed: int) -> Iterator[TraceRow]:
    """The rows of `rate` copies of a trace before `until_s`, in order of arrival. `first` is the open trace; again() opens the file once more. UsageError
    for a pipe."""
    whole = int(rate)
    copies: list[Iterator[TraceRow]] = [first] if whole else [_thin(first, rate, rng_for(seed, "workload/trace-rate/0"))]
    if rate > 1.0:
        if not Path(first.path).is_file():
            raise UsageError(f"{first.path}: is read several times for --trace-rate above 1; it must be a file, not a pipe")
        span_s = _span_s(again, until_s)
        for number in range(1, whole + (rate > whole)):
            rng = rng_for(seed, f"workload/trace-rate/{number}")
            copy = _shift(again, rng.random() * min(SHIFT_MAX_S, span_s), span_s)
            copies.append(copy if number < whole else _thin(copy, rate - whole, rng))
    return heapq.merge(*copies, key=_arrival_s) if len(copies) > 1 else copies[0]


def _arrival_s(row: TraceRow) -> float:
    return row.arrival_s


def _span_s(again: Opener, until_s: float) -> float:
    """The arrival time of the last request before `until_s`."""
    last_s = 0.0
    with again() as trace:
        for row in trace:
            if row.arrival_s >= until_s:
                break
            last_s = row.arrival_s
    return last_s


def _shift(again: Opener, by_s: float, span_s: float) -> Iterator[TraceRow]:
    """A copy whose requests come `by_s` later; requests beyond the end come at the beginning. Reads the file twice, so that no rows are kept in memory."""
    turn_s = span_s - by_s
    with again() as trace:
        for row in trace:
            if row.arrival_s > span_s:
                break
            if row.arrival_s >= turn_s:
                yield TraceRow(min(row.arrival_s - turn_s, by_s), *row[1:])
    with again() as trace:
        for row in trace:
            if row.arrival_s >= turn_s:
                return
            yield TraceRow(row.arrival_s + by_s, *row[1:])


def _thin(rows: Iterator[TraceRow], share: float, rng: Random) -> Iterator[TraceRow]:
    return (row for row in rows if rng.random() < share)
