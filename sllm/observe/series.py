"""A run over time, in bins: the section `series` of the results, and the data of plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil
from typing import Any, NamedTuple

from sllm.engine.base import EngineUsage
from sllm.observe.recorder import Recorder
from sllm.observe.statistics import percentile, ratio, rounded
from sllm.observe.timeline import LOOKS_MAX, UsageTimeline
from sllm.protocol.messages import ACTIONS, COLD_START

BINS_MIN = 30
BINS_USUAL = 60  # of a run without a usage timeline
CURVE_POINTS = 400
STEPS_MAX = 1200  # changes of the requests in flight that a line shows, more than a screen has columns

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
        """The bin of a moment; moments outside all bins belong to the first or the last bin."""
        return min(max(int((at - self.start_s) / self.width_s), 0), self.count - 1)

    def counts(self, moments: Iterable[float]) -> list[int]:
        """The number of moments in each bin."""
        counts = [0] * self.count
        start_s, per_s, last = self.start_s, 1.0 / self.width_s, self.count - 1
        for at in moments:
            index = int((at - start_s) * per_s)
            counts[index if 0 <= index <= last else 0 if index < 0 else last] += 1
        return counts


class Capacity(NamedTuple):
    """The totals of a fleet."""

    workers: int
    slots: int
    memory_bytes: int

    def shares(self, usage: EngineUsage, time_s: float) -> tuple[float | None, float | None, float | None]:
        """The mean parts in use over `time_s`: (of the workers, of the slots, of the memory that weights left for KV cache)."""
        room_byte_s = self.memory_bytes * time_s - usage.weights_byte_s
        return _part(usage.busy_s, self.workers * time_s), _part(usage.slot_s, self.slots * time_s), _part(usage.kv_byte_s, room_byte_s)


def _part(used: float, whole: float) -> float | None:
    """used / whole, at most 1: a host that thaws can do more work in a moment than the moment has room for."""
    part = ratio(used, whole)
    return None if part is None else min(1.0, max(0.0, part))


def make_bins(recorder: Recorder, began_s: float = 0.0, timeline: UsageTimeline | None = None) -> Bins | None:
    """Bins from `began_s`, when requests began to arrive, to the last event of a request; None if no request was sent. Each bin is as wide as a step of the
    timeline, or as a whole fraction of a step, so that there are at least `BINS_MIN` bins."""
    if not recorder.sent_at:
        return None
    last = max(recorder.sent_at[-1], max(recorder.done_at, default=began_s), max(recorder.given_up_at, default=began_s))
    span_s = max(last - began_s, 1e-6) * (1.0 + 1e-12)
    if timeline is None or not timeline.step_s or span_s > 2 * LOOKS_MAX * timeline.step_s:
        return Bins(began_s, span_s / BINS_USUAL, BINS_USUAL)
    steps = ceil(span_s / timeline.step_s)
    parts = ceil(BINS_MIN / steps)
    width_s = timeline.step_s / parts
    return Bins(began_s, width_s, max(BINS_MIN, ceil(span_s / width_s)))


def series_section(recorder: Recorder, bins: Bins | None, timeline: UsageTimeline | None, capacity: Capacity) -> dict[str, Any]:
    """One list for each figure, with one entry per bin. `at_s`: the end of each bin, in seconds after requests began to arrive; `in_flight` and `waiting` (at
    the workers, a sample) are values at the end of the bin; counts, parts in use and percentiles (of requests that arrived in the bin) are of the bin."""
    if bins is None:
        return {"bin_s": None, "at_s": []}
    given_up = bins.counts(recorder.given_up_at)
    completed, sent = bins.counts(recorder.done_at), bins.counts(recorder.sent_at)
    p50, p99 = (spread(points, bins) for points in ttft_percentiles(recorder, bins, (50, 99)))
    edges = bins.edges()
    section: dict[str, Any] = {
        "bin_s": rounded(bins.width_s),
        "at_s": [rounded(edge - bins.start_s) for edge in edges[1:]],
        "sent": sent,
        "completed": completed,
        "given_up": given_up,
        "cold_starts": actions(recorder, bins)[ACTIONS.index(COLD_START)],
        "ttft_p50_s": p50,
        "ttft_p99_s": p99,
        "in_flight": list(accumulate(came - done - gone for came, done, gone in zip(sent, completed, given_up, strict=True))),
    }
    if timeline is not None and timeline.looks:
        section["waiting"] = [timeline.waiting(edge) for edge in edges[1:]]
        shares = [capacity.shares(*_between(timeline, begin, end)) for begin, end in pairwise(edges)]
        section |= dict(zip(("utilisation", "slot_occupancy", "kv_occupancy"), map(list, zip(*shares, strict=True)), strict=True))
    return section


def _between(timeline: UsageTimeline, begin: float, end: float) -> tuple[EngineUsage, float]:
    """The usage between two moments and the seconds between them, up to the last look of the timeline."""
    end = min(end, timeline.looks[-1].at)
    return timeline.at(end) - timeline.at(begin), max(0.0, end - begin)


def spread(points: Points, bins: Bins) -> list[float | None]:
    """One value for each bin, from points at the middles of bins; None for a bin without a point."""
    values: list[float | None] = [None] * bins.count
    for middle, value in points:
        values[bins.index(middle)] = rounded(value)
    return values


def cdf(values: Sequence[float]) -> Points:
    """The cumulative distribution, (value, part of the values that are at most that value), in about CURVE_POINTS points, half of them in the upper tenth."""
    ordered = sorted(values)
    count = len(ordered)
    if count <= CURVE_POINTS:
        return [(value, (index + 1) / count) for index, value in enumerate(ordered)]
    half = CURVE_POINTS // 2
    places = {round(count * 0.9 * step / half) for step in range(half)} | {round(count * (0.9 + 0.1 * step / half)) for step in range(half + 1)}
    return [(ordered[max(place, 1) - 1], max(place, 1) / count) for place in sorted(places)]


def ttft_percentiles(recorder: Recorder, bins: Bins, percents: Sequence[int]) -> list[Points]:
    """For each of `percents`, that percentile of TTFT by bin of arrival; bins without a request are left out."""
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


def in_flight(recorder: Recorder, bins: Bins) -> Points:
    """The requests in flight over time, one point for each change; with more than `STEPS_MAX` changes, the highest value in each of `STEPS_MAX` pieces of time.
    """
    changes = [(at, 1) for at in recorder.sent_at] + [(at, -1) for column in (recorder.done_at, recorder.given_up_at) for at in column]
    changes.sort()
    piece_s = (bins.end_s - bins.start_s) / STEPS_MAX if len(changes) > STEPS_MAX else 0.0
    points, level, last = [(bins.start_s, 0.0)], 0, -1
    for at, change in changes:
        level += change
        piece = int((at - bins.start_s) / piece_s) if piece_s else last + 1
        if piece == last:
            points[-1] = points[-1][0], max(points[-1][1], float(level))
        else:
            points.append((at, float(level)))
        last = piece
    return [*points, (bins.end_s, float(level))]


def actions(recorder: Recorder, bins: Bins) -> list[list[int]]:
    """For each of ACTIONS, the number of placements in each bin."""
    counts = [[0] * bins.count for _ in ACTIONS]
    for at, action in zip(recorder.routed_at, recorder.routed_action, strict=True):
        counts[action][bins.index(at)] += 1
    return counts
