"""Statistics of several runs of several candidates: means with intervals over seeds, paired differences, and the best candidate.

A **candidate** is a policy, or a file of results. A **setting** is a combination of workers, rate, trace and report interval. All candidates are run under
each setting with the same seeds, and so with the same requests (common random numbers): chance affects all candidates alike, and differences are taken seed
by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor
from typing import Any, NamedTuple

from experiments.theory import interval
from sllm.observe.report.text import count, duration, percent, rate
from sllm.observe.statistics import rounded

QUANTILES = (*(float(p) for p in range(100)), 99.5, 99.9, 100.0)  # percent, of the times to first token that are kept of each run
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
TIMES = ("ttft", "e2e", "tpot", "queue_wait")
COMPLETED_AS_MANY = 0.001  # times are of completed requests, so a candidate whose completed part is lower by more than this cannot win by times


class Figure(NamedTuple):
    """A figure that candidates are compared by."""

    name: str  # in files
    title: str  # in tables
    unit: str  # "s", "part" or "number"
    lower_is_better: bool
    of_completed: bool = False  # the figure is a time, which only completed requests have

    def show(self, value: float | None) -> str:
        if value is None or self.unit == "s":
            return duration(value)
        return percent(value) if self.unit == "part" else f"{value:,.1f}" if abs(value) < 1000 and value != int(value) else f"{value:,.0f}"


SHOWN = (
    Figure("ttft_p50_s", "TTFT p50", "s", True, True),
    Figure("ttft_p99_s", "TTFT p99", "s", True, True),
    Figure("attainment", "in time", "part", False),
    Figure("cold_starts", "cold starts", "number", True),
    Figure("completed", "completed", "part", False),
)
"""The columns of the table."""
DECIDES = SHOWN[1]  # the figure whose differences are shown and that decides which candidate is best


class Setting(NamedTuple):
    """The conditions under which candidates are compared. `more` is set when files are compared whose runs have different policies."""

    workers: int
    rate_per_s: float | None  # None: a trace has its own
    trace: str
    report_interval_s: float
    more: str = ""

    def describe(self) -> str:
        load = self.trace if self.rate_per_s is None else rate(self.rate_per_s)
        parts = [count(self.workers, "worker"), load, f"reports every {duration(self.report_interval_s)}" if self.report_interval_s else "perfect knowledge"]
        return " · ".join([*parts, self.more] if self.more else parts)


class Sample(NamedTuple):
    """One run: its seed, its setting and candidate, and its figures."""

    candidate: str
    setting: Setting
    seed: int
    figures: Mapping[str, float | None]
    ttft_quantiles_s: Sequence[float]  # at QUANTILES; empty: unknown


class Estimate(NamedTuple):
    """A mean over seeds, and the half width of its 95 % interval (Student's t); None: a single seed has no interval."""

    mean: float
    half_width: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


class Row(NamedTuple):
    """One candidate under one setting."""

    candidate: str
    seeds: int
    means: Mapping[str, Estimate | None]  # by name of figure; None: nothing was measured
    against_first: Mapping[str, Estimate | None]  # paired differences to the first candidate; None for the first one, and without a common seed
    best_at: frozenset[str]  # figures by which the candidate is better than every other, by intervals that leave out zero
    ttft_quantiles_s: Sequence[float]  # means over seeds


class Group(NamedTuple):
    """All candidates under one setting."""

    setting: Setting
    rows: Sequence[Row]


def figures_of(results: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of one run's results, by name. A figure that the results lack is None; unknown keys are ignored."""
    requests, sent = results["requests"], results["requests"]["sent"]
    fleet, slo = results.get("fleet", {}), results.get("slo", {})
    duration_s = results["run"].get("duration_s") or 0.0
    figures: dict[str, float | None] = {}
    for name in TIMES:
        for which in STATISTICS:
            figures[f"{name}_{which}_s"] = results.get(f"{name}_s", {}).get(which)
    return figures | {
        "attainment": slo.get("attainment"),
        "completed": rounded(requests["completed"] / sent) if sent else None,
        "completed_per_s": rounded(requests["completed"] / duration_s) if duration_s else None,
        "sent": float(sent),
        "cold_starts": float(results["actions"]["cold_start"]),
        "cold_start_rate": fleet.get("cold_start_rate"),
        "model_hit_rate": fleet.get("model_hit_rate"),
        "utilisation": fleet.get("utilisation"),
        "load_imbalance": fleet.get("load_imbalance"),
    }


def quantiles(values: Sequence[float]) -> list[float]:
    """The quantiles at QUANTILES, by linear interpolation between order statistics, rounded; empty if there are no values."""
    ordered = sorted(values)
    found = []
    for percent_ in QUANTILES if ordered else ():
        place = (len(ordered) - 1) * percent_ / 100.0
        low, high = ordered[floor(place)], ordered[ceil(place)]
        found.append(rounded(low + (high - low) * (place - floor(place))))
    return found


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """The mean of the values that are not None, with its interval."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return Estimate(known[0], None)
    return Estimate(*interval(known))


def compare(samples: Sequence[Sample]) -> list[Group]:
    """All samples, by setting and candidate, in order of first appearance."""
    candidates = list(dict.fromkeys(sample.candidate for sample in samples))
    by_setting: dict[Setting, dict[str, dict[int, Sample]]] = {}
    for sample in samples:
        by_setting.setdefault(sample.setting, {}).setdefault(sample.candidate, {})[sample.seed] = sample
    groups = []
    for setting, runs in by_setting.items():
        present = [candidate for candidate in candidates if candidate in runs]
        groups.append(Group(setting, [_row(candidate, runs, present) for candidate in present]))
    return groups


def _row(candidate: str, runs: Mapping[str, Mapping[int, Sample]], candidates: Sequence[str]) -> Row:
    mine = [runs[candidate][seed] for seed in sorted(runs[candidate])]
    names = list(dict.fromkeys(name for sample in mine for name in sample.figures))
    first = candidates[0]
    known = [sample.ttft_quantiles_s for sample in mine if sample.ttft_quantiles_s]
    return Row(
        candidate,
        len(mine),
        {name: estimate([sample.figures.get(name) for sample in mine]) for name in names},
        {name: None if candidate == first else difference(runs[candidate], runs[first], name) for name in names},
        frozenset(figure.name for figure in SHOWN if _is_best(candidate, runs, candidates, figure)),
        [sum(column) / len(known) for column in zip(*known, strict=True)],
    )


def difference(runs: Mapping[int, Sample], others: Mapping[int, Sample], name: str) -> Estimate | None:
    """`runs` less `others`, seed by seed, over the seeds that both have."""
    pairs = [(runs[seed].figures.get(name), others[seed].figures.get(name)) for seed in sorted(runs.keys() & others.keys())]
    return estimate([mine - other for mine, other in pairs if mine is not None and other is not None])


def _is_best(candidate: str, runs: Mapping[str, Mapping[int, Sample]], candidates: Sequence[str], figure: Figure) -> bool:
    """Whether a candidate is better than every other, each by a paired difference whose interval leaves out zero."""
    sign = -1.0 if figure.lower_is_better else 1.0
    if len(candidates) < 2:
        return False
    for other in candidates:
        if other == candidate:
            continue
        found = difference(runs[candidate], runs[other], figure.name)
        if found is None or not found.excludes_zero or sign * found.mean <= 0.0:
            return False
        if figure.of_completed:
            completed = difference(runs[candidate], runs[other], "completed")
            if completed is None or completed.mean < -COMPLETED_AS_MANY:
                return False
    return True
