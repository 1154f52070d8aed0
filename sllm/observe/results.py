"""The results of a run, schema 2: the figures of its recorder and its fleet, as one tree of atoms, lists and dicts.

All figures that depend on this computer are under `wall`; two virtual runs of one seed are equal in all other sections. Later versions only add keys, and a
reader has to accept unknown keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from math import fsum
from typing import Any, NamedTuple

from sllm import COMPILED
from sllm.engine.base import EngineUsage
from sllm.observe import values
from sllm.observe.recorder import Recorder
from sllm.observe.series import Capacity, make_bins, series_section
from sllm.observe.statistics import percentile, ratio, rounded, rounded_tree, summarize
from sllm.observe.timeline import UsageTimeline
from sllm.observe.values import Check
from sllm.protocol.messages import COLD_START, MIGRATE, SERVE

SCHEMA = 2
TTFT_SLO_S = 2.0  # default target for the time to first token
WALL = "wall"  # the section that differs between two virtual runs of the same seed
ROUNDING_S = 1e-9  # tolerance for arrivals, which are computed as a difference of two times


class RunInfo(NamedTuple):
    """The description of the run. `workload` goes into the results unchanged: atoms, lists and dicts."""

    mode: str  # "udp" or "virtual"
    architecture: str  # "centralized" or "decentralized"
    workers: int
    policy: str
    seed: int
    duration_s: float  # time in which requests arrived, of the run's clock
    wall_s: float  # wall time of the whole run
    workload: Mapping[str, Any] = {}
    hardware: Mapping[str, int] = {}  # workers by hardware
    engine_profile: str | None = None  # of the workers' hardware; None: their engine has none
    loader: str | None = None  # loader profile of the workers' hardware; None: their engine has none
    duration_asked_s: float | None = None  # the duration asked for; None: the whole of a trace
    interrupted: bool = False  # a signal ended the run early
    version: str = ""
    settings: Mapping[str, Any] = {}  # every setting in effect, by variable, exactly as given
    clock_lag: float = 0.0  # the part by which a live run's clock fell behind the speed asked for


class Slo(NamedTuple):
    """The targets of a request (service level objectives)."""

    ttft_s: float = TTFT_SLO_S
    tpot_s: float | None = None  # None: no target


class WorkerFigures(NamedTuple):
    """One worker, over all its lives."""

    worker_id: str
    hardware: str
    slots: int
    memory_bytes: int  # for weights and KV cache; 0: no bound
    usage: EngineUsage  # in the measured time


class FleetFigures(NamedTuple):
    """Figures that only the fleet knows, at the end of the run."""

    ready: int  # workers
    workers: Sequence[WorkerFigures]
    measured_s: float  # from the end of the warm-up to the last arrival
    began_s: float = 0.0  # time of the run's clock at which requests began to arrive
    warmup_s: float = 0.0  # seconds from `began_s`; requests that arrive in them are in no statistics
    timeline: UsageTimeline | None = None


class ReportFigures(NamedTuple):
    """Counts of load reports. A copy made by the network counts as sent, so that sent = accepted + lost + under way + rejected."""

    sent: int
    accepted: int
    rejected: Mapping[str, int] = {}  # by reason
    lost: int | None = None  # None: lost reports were not counted, and every report neither accepted nor rejected counts as lost
    under_way: int = 0  # at the end of the run


class Invariants(NamedTuple):
    checked: int = 0
    violations: Sequence[str] = ()


class Begun(NamedTuple):
    """Requests in flight at the end of a run, outside the warm-up: those that met their targets, and those whose targets are undecided. All others in flight
    are late."""

    in_time: int = 0
    undecided: int = 0


class Selection:
    """The completed requests that count in statistics, which are those that did not arrive in the warm-up."""

    def __init__(self, recorder: Recorder, fleet: FleetFigures) -> None:
        self.from_s = fleet.began_s + fleet.warmup_s
        self.whole = fleet.warmup_s == 0.0
        since = self.from_s - ROUNDING_S
        self.sent = len(recorder.sent_at) if self.whole else sum(at >= since for at in recorder.sent_at)
        self._kept = [] if self.whole else [at - e2e_s >= since for at, e2e_s in zip(recorder.done_at, recorder.e2e_s, strict=True)]

    def of(self, column: Sequence[Any]) -> Sequence[Any]:
        """The part of a column with one entry for each completed request."""
        return column if self.whole else list(compress(column, self._kept))

    def of_stalls(self, recorder: Recorder) -> Sequence[float]:
        return recorder.stall_s if self.whole else [value for value, place in zip(recorder.stall_s, recorder.stalled, strict=True) if self._kept[place]]


class Facts:
    """The inputs from which the figures of a run are computed, and intermediate figures."""

    def __init__(
        self, recorder: Recorder, run: RunInfo, fleet: FleetFigures, reports: ReportFigures, invariants: Invariants, in_flight: int | None, begun: Begun,
        slo: Slo,
    ) -> None:  # fmt: skip
        self.recorder, self.run, self.fleet, self.reports, self.invariants, self.begun, self.slo = recorder, run, fleet, reports, invariants, begun, slo
        self.sent, self.completed = len(recorder.sent_at), len(recorder.done_at)
        self.failed, self.rejected = recorder.failed.total(), recorder.rejected.total()
        self.in_flight = self.sent - self.completed - self.failed - self.rejected if in_flight is None else in_flight
        self.actions = recorder.actions
        self.chosen = Selection(recorder, fleet)
        self.span_s = max(max(recorder.done_at, default=0.0) - self.chosen.from_s, fleet.measured_s)  # to the last answer or arrival
        self.met = self._count_met()
        usage = total(one.usage for one in fleet.workers)
        self.utilisation, self.slot_occupancy, self.kv_occupancy = _capacity(fleet.workers).shares(usage, fleet.measured_s)
        self.reports_rejected = {reason: reports.rejected[reason] for reason in sorted(reports.rejected) if reports.rejected[reason]}

    def per_s(self, amount: float) -> float | None:
        """An amount as a rate over the time from the end of the warm-up to the last answer or arrival."""
        return ratio(amount, self.span_s)

    def _count_met(self) -> int:
        """Completed requests that met every target."""
        slo, ttft_s = self.slo, self.chosen.of(self.recorder.ttft_s)
        if slo.tpot_s is None:
            return sum(map(slo.ttft_s.__ge__, ttft_s))
        pairs = zip(ttft_s, self.chosen.of(self.recorder.tpot_s), strict=True)
        return sum(first_s <= slo.ttft_s and further_s <= slo.tpot_s for first_s, further_s in pairs)

    @property
    def load_imbalance(self) -> float | None:
        """The longest busy time of a worker, divided by the mean busy time."""
        busy_s = [one.usage.busy_s for one in self.fleet.workers]
        return ratio(max(busy_s) * len(busy_s), fsum(busy_s)) if busy_s else None

    @property
    def reports_lost(self) -> int:
        """Reports that the network lost; if lost reports were not counted, all reports neither accepted nor rejected."""
        reports = self.reports
        if reports.lost is not None:
            return reports.lost
        return reports.sent - reports.accepted - sum(self.reports_rejected.values()) - reports.under_way


class Figure(NamedTuple):
    """One figure of the results."""

    of: Callable[[Facts], Any]  # computes the value
    check: Check  # checks the value in a results file
    threshold: str = ""  # the figure's name in `--fail-if`; "": users can set no threshold on it


DISTRIBUTIONS: dict[str, Callable[[Facts], Sequence[float]]] = {
    "ttft_s": lambda facts: facts.chosen.of(facts.recorder.ttft_s),
    "e2e_s": lambda facts: facts.chosen.of(facts.recorder.e2e_s),
    "tpot_s": lambda facts: facts.chosen.of(facts.recorder.tpot_s),
    "queue_wait_s": lambda facts: facts.chosen.of(facts.recorder.queue_wait_s),
    "stall_s": lambda facts: facts.chosen.of_stalls(facts.recorder),
}
"""Sections that are distributions, and the values of each. Users can set a threshold on each of their statistics, such as `ttft_p99`."""

SECTIONS: dict[str, dict[str, Figure]] = {
    "run": {
        "mode": Figure(lambda facts: facts.run.mode, values.text),
        "architecture": Figure(lambda facts: facts.run.architecture, values.text),
        "version": Figure(lambda facts: facts.run.version, values.text_or_empty),
        "workers": Figure(lambda facts: facts.run.workers, values.count),
        "hardware": Figure(lambda facts: dict(facts.run.hardware), values.counts_by_name),
        "policy": Figure(lambda facts: facts.run.policy, values.text),
        "seed": Figure(lambda facts: facts.run.seed, values.count),
        "duration_s": Figure(lambda facts: rounded(facts.run.duration_s), values.number),
        "duration_asked_s": Figure(lambda facts: _rounded_or_none(facts.run.duration_asked_s), values.number_or_null),
        "warmup_s": Figure(lambda facts: rounded(facts.fleet.warmup_s), values.number),
        "interrupted": Figure(lambda facts: facts.run.interrupted, values.flag),
        "workload": Figure(lambda facts: rounded_tree(facts.run.workload), values.mapping),
        "engine_profile": Figure(lambda facts: facts.run.engine_profile, values.text_or_null),
        "loader": Figure(lambda facts: facts.run.loader, values.text_or_null),
        "settings": Figure(lambda facts: dict(facts.run.settings), values.mapping),
    },
    WALL: {
        "wall_s": Figure(lambda facts: rounded(facts.run.wall_s), values.number),
        "requests_per_wall_s": Figure(lambda facts: ratio(facts.completed, facts.run.wall_s) or 0.0, values.number),
        "clock_lag": Figure(lambda facts: rounded(facts.run.clock_lag), values.number),
        "compiled": Figure(lambda facts: COMPILED, values.flag),
        "decision_s": Figure(lambda facts: summarize(facts.recorder.decision_s), values.distribution),
    },
    "requests": {
        "sent": Figure(lambda facts: facts.sent, values.count, "sent"),
        "completed": Figure(lambda facts: facts.completed, values.count, "completed"),
        "failed": Figure(lambda facts: facts.failed, values.count, "failed"),
        "rejected": Figure(lambda facts: facts.rejected, values.count, "rejected"),
        "in_flight": Figure(lambda facts: facts.in_flight, values.count, "in_flight"),
        "duplicates": Figure(lambda facts: facts.recorder.duplicates, values.count, "duplicates"),
    },
    "actions": {
        SERVE: Figure(lambda facts: facts.actions[SERVE], values.count),
        COLD_START: Figure(lambda facts: facts.actions[COLD_START], values.count, "cold_start"),
        MIGRATE: Figure(lambda facts: facts.actions[MIGRATE], values.count, "migrate"),
    },
    "slo": {  # a request that failed or was rejected met no target; a request in flight counts once it has met or missed its targets
        "ttft_s": Figure(lambda facts: rounded(facts.slo.ttft_s), values.number),
        "tpot_s": Figure(lambda facts: _rounded_or_none(facts.slo.tpot_s), values.number_or_null),
        "attainment": Figure(
            lambda facts: ratio(facts.met + facts.begun.in_time, facts.chosen.sent - facts.begun.undecided), values.part_or_null, "attainment"
        ),
        "goodput": Figure(lambda facts: facts.per_s(facts.met), values.number_or_null, "goodput"),
    },
    "throughput": {  # from the end of the warm-up to the last answer or arrival
        "over_s": Figure(lambda facts: rounded(facts.span_s), values.number_or_null),
        "requests_per_s": Figure(lambda facts: facts.per_s(len(facts.chosen.of(facts.recorder.done_at))), values.number_or_null, "requests"),
        "prompt_tokens_per_s": Figure(lambda facts: facts.per_s(sum(facts.chosen.of(facts.recorder.prompt_tokens))), values.number_or_null, "prompt_tokens"),
        "output_tokens_per_s": Figure(lambda facts: facts.per_s(sum(facts.chosen.of(facts.recorder.output_tokens))), values.number_or_null, "output_tokens"),
        "output_tokens": Figure(lambda facts: sum(facts.recorder.output_tokens), values.count),
    },
    "fleet": {
        "ready": Figure(lambda facts: facts.fleet.ready, values.count),
        "utilisation": Figure(lambda facts: facts.utilisation, values.part_or_null, "utilisation"),
        "slot_occupancy": Figure(lambda facts: facts.slot_occupancy, values.part_or_null, "slot_occupancy"),
        "kv_occupancy": Figure(lambda facts: facts.kv_occupancy, values.part_or_null, "kv_occupancy"),
        "load_imbalance": Figure(lambda facts: facts.load_imbalance, values.number_or_null, "load_imbalance"),
        "cold_start_rate": Figure(lambda facts: ratio(facts.actions[COLD_START], sum(facts.actions.values())), values.part_or_null, "cold_start_rate"),
        "model_hit_rate": Figure(lambda facts: facts.recorder.hit_rate, values.part_or_null, "model_hit_rate"),
        "loads": Figure(lambda facts: facts.recorder.loads, values.count, "loads"),
        "loads_by_tier": Figure(lambda facts: dict(sorted(facts.recorder.loads_by_tier.items())), values.counts_by_name),
        "load_mean_s": Figure(lambda facts: _rounded_or_none(facts.recorder.mean_load_s), values.number_or_null, "load_mean_s"),
    },
    "reasons": {
        "failed": Figure(lambda facts: dict(sorted(facts.recorder.failed.items())), values.counts_by_name),
        "rejected": Figure(lambda facts: dict(sorted(facts.recorder.rejected.items())), values.counts_by_name),
        "retried": Figure(lambda facts: dict(sorted(facts.recorder.retried.items())), values.counts_by_name),
    },
    "reports": {
        "sent": Figure(lambda facts: facts.reports.sent, values.count),
        "accepted": Figure(lambda facts: facts.reports.accepted, values.count),
        "lost": Figure(lambda facts: facts.reports_lost, values.count, "reports_lost"),
        "under_way": Figure(lambda facts: facts.reports.under_way, values.count),
        "rejected": Figure(lambda facts: facts.reports_rejected, values.counts_by_name),
    },
    "invariants": {
        "checked": Figure(lambda facts: facts.invariants.checked, values.count),
        "violations": Figure(lambda facts: list(facts.invariants.violations), values.texts),
    },
}
"""Sections that are objects with one key for each figure, in order. A new figure is one entry here, and its meaning a line in docs/results.md."""

TOP_KEYS = (
    "schema", "run", WALL, "requests", "actions", *DISTRIBUTIONS, "slo", "throughput", "fleet", "models", "workers", "reasons", "series", "reports",
    "invariants",
)  # fmt: skip


def make_results(
    recorder: Recorder,
    run: RunInfo,
    fleet: FleetFigures,
    reports: ReportFigures,
    invariants: Invariants = Invariants(),  # noqa: B008
    in_flight: int | None = None,
    begun: Begun = Begun(),  # noqa: B008
    slo: Slo = Slo(),  # noqa: B008
) -> dict[str, Any]:
    """The results in the order of their keys.

    `in_flight`: the number of requests that the clients count as in flight; None: sent requests that did not end, so that the sum of `requests` holds by
    definition. Counts (`requests`, `actions`, `reasons`, `reports`, the counts in `models` and `workers`) and `series` cover the whole run; distributions,
    `slo`, `throughput` and the usage of the fleet leave the warm-up out. docs/results.md gives the meaning of each key.
    """
    facts = Facts(recorder, run, fleet, reports, invariants, in_flight, begun, slo)
    made: dict[str, Any] = {section: {key: figure.of(facts) for key, figure in figures.items()} for section, figures in SECTIONS.items()}
    made |= {name: summarize(column(facts)) for name, column in DISTRIBUTIONS.items()}
    bins = make_bins(recorder, fleet.began_s, fleet.timeline)
    made |= {
        "schema": SCHEMA, "models": _model_rows(recorder, facts.chosen), "workers": _worker_rows(recorder, fleet),
        "series": series_section(recorder, bins, fleet.timeline, _capacity(fleet.workers)),
    }  # fmt: skip
    return {key: made[key] for key in TOP_KEYS}


def without_wall(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results without the section `wall`: equal for two virtual runs of one seed."""
    return {key: value for key, value in results.items() if key != WALL}


# --- the fleet ----------------------------------------------------------------------------------------------------------------------


def _capacity(workers: Sequence[WorkerFigures]) -> Capacity:
    return Capacity(len(workers), sum(one.slots for one in workers), sum(one.memory_bytes for one in workers))


def total(usages: Iterable[EngineUsage]) -> EngineUsage:
    """The sum of the usages."""
    rows = list(usages)
    return EngineUsage(
        busy_s=fsum([one.busy_s for one in rows]),
        slot_s=fsum([one.slot_s for one in rows]),
        kv_byte_s=fsum([one.kv_byte_s for one in rows]),
        weights_byte_s=fsum([one.weights_byte_s for one in rows]),
    )


def _model_rows(recorder: Recorder, chosen: Selection) -> list[dict[str, Any]]:
    """A row for each model that had requests, the model with the most requests first."""
    of_model, ttft_s = chosen.of(recorder.of_model), chosen.of(recorder.ttft_s)
    by_index: dict[int, list[float]] = defaultdict(list)
    for index, value in zip(of_model, ttft_s, strict=True):
        by_index[index].append(value)
    completed: dict[int, int] = defaultdict(int)
    tokens: dict[int, int] = defaultdict(int)
    for index, count in zip(recorder.of_model, recorder.output_tokens, strict=True):
        completed[index] += 1
        tokens[index] += count
    rows = []
    for name, sent in sorted(recorder.sent_by_model.items(), key=lambda item: (-item[1], item[0])):
        index = recorder.model_ids.get(name, -1)
        ordered = sorted(by_index[index])
        rows.append({
            "model": name, "sent": sent, "completed": completed[index], "failed": recorder.failed_by_model[name],
            "rejected": recorder.rejected_by_model[name], "cold_starts": recorder.cold_starts_by_model[name], "loads": recorder.loads_by_model[name],
            "output_tokens": tokens[index], "ttft_p50_s": _rounded_or_none(percentile(ordered, 50)), "ttft_p99_s": _rounded_or_none(percentile(ordered, 99)),
        })  # fmt: skip
    return rows


def _rounded_or_none(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def _worker_rows(recorder: Recorder, fleet: FleetFigures) -> list[dict[str, Any]]:
    """A row for each worker, in the order of the fleet."""
    completed: dict[int, int] = defaultdict(int)
    tokens: dict[int, int] = defaultdict(int)
    for index, count in zip(recorder.served_by, recorder.output_tokens, strict=True):
        completed[index] += 1
        tokens[index] += count
    rows = []
    for one in fleet.workers:
        index = recorder.worker_ids.get(one.worker_id, -1)
        utilisation, slot_occupancy, kv_occupancy = _capacity([one]).shares(one.usage, fleet.measured_s)
        rows.append({
            "worker": one.worker_id, "hardware": one.hardware, "completed": completed[index], "output_tokens": tokens[index],
            "loads": recorder.loads_by_worker[one.worker_id], "utilisation": utilisation, "slot_occupancy": slot_occupancy, "kv_occupancy": kv_occupancy,
        })  # fmt: skip
    return rows
