"""What a run's columns look like over time, in a bounded number of bins, for plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from sllm.messages import ACTIONS
from sllm.results import Recorder, percentile

BINS_MAX = 120
PER_BIN = 20  # requests a bin holds on average, at least: fewer say nothing of a 99th percentile
CURVE_POINTS = 400

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bins:
    """Equal bins of time from `start_s`."""

    start_s: float
    width_s: float
    count: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.count * self.width_s

    def middles(self) -> list[float]:
        return [self.start_s + (index + 0.5) * self.width_s for index in range(self.count)]

    def edges(self) -> list[float]:
        return [self.start_s + index * self.width_s for index in range(self.count + 1)]

    def index(self, at: float) -> int:
        """The bin of a moment; moments outside fall into the first or last."""
        return min(max(int((at - self.start_s) / self.width_s), 0), self.count - 1)

    def counts(self, moments: Iterable[float]) -> list[int]:
        """How many moments fall into each bin."""
        counts = [0] * self.count
        start_s, per_s, last = self.start_s, 1.0 / self.width_s, self.count - 1
        for at in moments:
            index = int((at - start_s) * per_s)
            counts[index if 0 <= index <= last else 0 if index < 0 else last] += 1
        return counts


def make_bins(recorder: Recorder) -> Bins | None:
    """Bins over a run, from its first request to its last sign of life; None if nothing was sent."""
    if not recorder.sent_at:
        return None
    first = min(recorder.sent_at[0], 0.0) if recorder.sent_at[0] < recorder.sent_at[-1] else recorder.sent_at[0]
    last = max(recorder.sent_at[-1], max(recorder.done_at, default=first), max(recorder.given_up_at, default=first))
    count = max(1, min(BINS_MAX, len(recorder.sent_at) // PER_BIN))
    return Bins(first, max(last - first, 1e-6) * (1.0 + 1e-12) / count, count)


def cdf(values: Sequence[float]) -> Points:
    """(value, fraction of values at most it) in at most CURVE_POINTS points, half of them in the upper tenth, where the tail is."""
    ordered = sorted(values)
    count = len(ordered)
    if count <= CURVE_POINTS:
        return [(value, (index + 1) / count) for index, value in enumerate(ordered)]
    half = CURVE_POINTS // 2
    places = {round(count * 0.9 * step / half) for step in range(half)} | {round(count * (0.9 + 0.1 * step / half)) for step in range(half + 1)}
    return [(ordered[max(place, 1) - 1], max(place, 1) / count) for place in sorted(places)]


def ttft_percentiles(recorder: Recorder, bins: Bins, percents: Sequence[int]) -> list[Points]:
    """For each percentage, TTFT over the time of arrival; bins without a request are left out."""
    content: list[list[float]] = [[] for _ in range(bins.count)]
    for at, e2e_s, ttft_s in zip(recorder.done_at, recorder.e2e_s, recorder.ttft_s, strict=True):
        content[bins.index(at - e2e_s)].append(ttft_s)
    lines: list[Points] = [[] for _ in percents]
    for middle, values in zip(bins.middles(), content, strict=True):
        values.sort()
        for line, percent in zip(lines, percents, strict=True):
            value = percentile(values, percent)
            if value is not None:
                line.append((middle, value))
    return lines


def rates(moments: Iterable[float], bins: Bins) -> Points:
    """How many a second over time."""
    return [(middle, count / bins.width_s) for middle, count in zip(bins.middles(), bins.counts(moments), strict=True)]


def in_flight(recorder: Recorder, bins: Bins) -> Points:
    """Requests sent and not yet ended, at the edges of the bins."""
    into = bins.counts(recorder.sent_at)
    out = [done + gone for done, gone in zip(bins.counts(recorder.done_at), bins.counts(recorder.given_up_at), strict=True)]
    levels = accumulate((i - o for i, o in zip(into, out, strict=True)), initial=0)
    return [(edge, float(level)) for edge, level in zip(bins.edges(), levels, strict=True)]


def actions(recorder: Recorder, bins: Bins) -> list[list[int]]:
    """Placements in each bin, for each of ACTIONS."""
    counts = [[0] * bins.count for _ in ACTIONS]
    for at, action in zip(recorder.routed_at, recorder.routed_action, strict=True):
        counts[action][bins.index(at)] += 1
    return counts


def busy_workers(recorder: Recorder, bins: Bins) -> Points:
    """Mean number of workers with a request in service, over time, from the completed requests.

    A request is in service from the end of its wait to its last token, as its client saw it: one network latency off either way. Requests end in
    the order of the columns, so that going backwards, what a worker's earlier intervals add lies below the earliest start seen so far.
    """
    width_s, start_s = bins.width_s, bins.start_s
    partial, whole = [0.0] * bins.count, [0] * (bins.count + 1)
    earliest = [float("inf")] * len(recorder.worker_ids)
    times = zip(reversed(recorder.done_at), reversed(recorder.e2e_s), reversed(recorder.queue_wait_s), strict=True)
    for (at, e2e_s, queue_wait_s), worker in zip(times, reversed(recorder.served_by), strict=True):
        begin, end = at - e2e_s + queue_wait_s, min(at, earliest[worker])
        if begin >= end:
            continue
        earliest[worker] = begin
        first, last = bins.index(begin), bins.index(end)
        if first == last:
            partial[first] += end - begin
        else:
            partial[first] += start_s + (first + 1) * width_s - begin
            partial[last] += end - (start_s + last * width_s)
            whole[first + 1] += 1
            whole[last] -= 1
    full = accumulate(whole)
    return [(middle, part / width_s + level) for middle, part, level in zip(bins.middles(), partial, full, strict=False)]
