"""The results of a run, schema 2: what its recorder heard and what its fleet says, as one tree of atoms, lists and dicts.

Everything that depends on the machine is under `wall`; two virtual runs of one seed are equal in all else. The schema is only ever added to, so that a reader
accepts keys that it does not know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from math import fsum
from typing import Any, NamedTuple

from sllm.engine.base import EngineUsage
from sllm.observe.recorder import Recorder
from sllm.observe.series import Capacity, make_bins, series_section
from sllm.observe.statistics import percentile, ratio, rounded, rounded_tree, summarize
from sllm.observe.timeline import UsageTimeline
from sllm.protocol.messages import COLD_START

SCHEMA = 2
TTFT_SLO_S = 2.0  # within this a first token counts as in time, unless said otherwise
DISTRIBUTIONS = ("ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "stall_s")
WALL = "wall"  # all else is the same for the same seed in virtual time
ROUNDING_S = 1e-9  # an arrival is a difference of two times


class RunInfo(NamedTuple):
    """What was run. `workload` goes into the results as it is: atoms, lists and dicts."""

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
    loader: str | None = None  # likewise
    duration_asked_s: float | None = None  # what `duration_s` was to be; None: the whole of a trace
    interrupted: bool = False  # ended by a signal before everything had come to its end
    version: str = ""
    settings: Mapping[str, Any] = {}  # every setting in effect, by variable, exactly as it was given
    clock_lag: float = 0.0  # by which part a live run's clock fell behind the speed asked for


class Slo(NamedTuple):
    """What a request is to attain."""

    ttft_s: float = TTFT_SLO_S
    tpot_s: float | None = None  # None: no matter how slowly tokens come


class WorkerFigures(NamedTuple):
    """One worker, all its lives together."""

    worker_id: str
    hardware: str
    slots: int
    memory_bytes: int  # for weights and KV cache; 0: no bound
    usage: EngineUsage  # while it was measured


class FleetFigures(NamedTuple):
    """What only the fleet knows, at the end of the run."""

    ready: int  # workers
    workers: Sequence[WorkerFigures]
    measured_s: float  # from the end of the warm-up to the last arrival
    began_s: float = 0.0  # of the run's clock: when requests began to come
    warmup_s: float = 0.0  # from then on; what arrived in it is in no statistics
    timeline: UsageTimeline | None = None


class ReportFigures(NamedTuple):
    """Load reports. A copy made by the network counts as sent, so that the books close."""

    sent: int
    accepted: int
    rejected: Mapping[str, int] = {}  # by reason
    lost: int | None = None  # None: nobody counted them; all that were neither accepted nor rejected
    under_way: int = 0  # when the books were closed


class Invariants(NamedTuple):
    checked: int = 0
    violations: Sequence[str] = ()


class Begun(NamedTuple):
    """Requests in flight at the end of a run that count, by what is known of their targets: met, or not to be told yet. All others are late."""

    in_time: int = 0
    undecided: int = 0


class Selection:
    """The completed requests that statistics are of: those that did not arrive in the warm-up."""

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

    `in_flight` is what the clients count; without it, it is what was sent and did not end, and the books balance by definition. Counts (`requests`,
    `actions`, `reasons`, `reports`, those of `models` and `workers`) and `series` are of the whole run; distributions, `slo`, `throughput` and what the
    fleet had in use leave the warm-up out. docs/results.md says what each key means.
    """
    completed, failed, rejected = len(recorder.done_at), recorder.failed.total(), recorder.rejected.total()
    sent = len(recorder.sent_at)
    if in_flight is None:
        in_flight = sent - completed - failed - rejected
    chosen = Selection(recorder, fleet)
    span_s = max(max(recorder.done_at, default=0.0) - chosen.from_s, fleet.measured_s)
    return {
        "schema": SCHEMA,
        "run": _run_section(run, fleet),
        WALL: {
            "wall_s": rounded(run.wall_s), "requests_per_wall_s": ratio(completed, run.wall_s) or 0.0, "clock_lag": rounded(run.clock_lag),
            "decision_s": summarize(recorder.decision_s),
        },
        "requests": {
            "sent": sent, "completed": completed, "failed": failed, "rejected": rejected, "in_flight": in_flight, "duplicates": recorder.duplicates,
        },
        "actions": recorder.actions,
        **{name: summarize(chosen.of(getattr(recorder, name))) for name in DISTRIBUTIONS[:-1]},
        "stall_s": summarize(chosen.of_stalls(recorder)),
        "slo": _slo_section(recorder, chosen, slo, begun, span_s),
        "throughput": _throughput_section(recorder, chosen, span_s),
        "fleet": _fleet_section(recorder, fleet),
        "models": _model_rows(recorder, chosen),
        "workers": _worker_rows(recorder, fleet),
        "reasons": {name: dict(sorted(getattr(recorder, name).items())) for name in ("failed", "rejected", "retried")},
        "series": series_section(recorder, make_bins(recorder, fleet.began_s, fleet.timeline), fleet.timeline, _capacity(fleet.workers)),
        "reports": _reports_section(reports),
        "invariants": {"checked": invariants.checked, "violations": list(invariants.violations)},
    }  # fmt: skip


def without_wall(results: Mapping[str, Any]) -> dict[str, Any]:
    """What does not depend on the machine: the same for two virtual runs of one seed."""
    return {key: value for key, value in results.items() if key != WALL}


def _run_section(run: RunInfo, fleet: FleetFigures) -> dict[str, Any]:
    return {
        "mode": run.mode,
        "architecture": run.architecture,
        "version": run.version,
        "workers": run.workers,
        "hardware": dict(run.hardware),
        "policy": run.policy,
        "seed": run.seed,
        "duration_s": rounded(run.duration_s),
        "duration_asked_s": None if run.duration_asked_s is None else rounded(run.duration_asked_s),
        "warmup_s": rounded(fleet.warmup_s),
        "interrupted": run.interrupted,
        "workload": rounded_tree(run.workload),
        "engine_profile": run.engine_profile,
        "loader": run.loader,
        "settings": dict(run.settings),
    }


def _slo_section(recorder: Recorder, chosen: Selection, slo: Slo, begun: Begun, span_s: float) -> dict[str, Any]:
    """A request that failed or was rejected met no target; of those in flight the ones count of which that is known."""
    if slo.tpot_s is None:
        met = sum(map(slo.ttft_s.__ge__, chosen.of(recorder.ttft_s)))
    else:
        pairs = zip(chosen.of(recorder.ttft_s), chosen.of(recorder.tpot_s), strict=True)
        met = sum(ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s for ttft_s, tpot_s in pairs)
    return {
        "ttft_s": rounded(slo.ttft_s),
        "tpot_s": None if slo.tpot_s is None else rounded(slo.tpot_s),
        "attainment": ratio(met + begun.in_time, chosen.sent - begun.undecided),
        "goodput": ratio(met, span_s),
    }


def _throughput_section(recorder: Recorder, chosen: Selection, span_s: float) -> dict[str, Any]:
    """What was completed a second, from the end of the warm-up to the last answer (or arrival)."""
    return {
        "over_s": rounded(span_s),
        "requests_per_s": ratio(len(chosen.of(recorder.done_at)), span_s),
        "prompt_tokens_per_s": ratio(sum(chosen.of(recorder.prompt_tokens)), span_s),
        "output_tokens_per_s": ratio(sum(chosen.of(recorder.output_tokens)), span_s),
        "output_tokens": sum(recorder.output_tokens),
    }


# --- the fleet ----------------------------------------------------------------------------------------------------------------------


def _capacity(workers: Sequence[WorkerFigures]) -> Capacity:
    return Capacity(len(workers), sum(one.slots for one in workers), sum(one.memory_bytes for one in workers))


def total(usages: Iterable[EngineUsage]) -> EngineUsage:
    """The sum."""
    rows = list(usages)
    return EngineUsage(
        busy_s=fsum([one.busy_s for one in rows]),
        slot_s=fsum([one.slot_s for one in rows]),
        kv_byte_s=fsum([one.kv_byte_s for one in rows]),
        weights_byte_s=fsum([one.weights_byte_s for one in rows]),
    )


def _fleet_section(recorder: Recorder, fleet: FleetFigures) -> dict[str, Any]:
    busy_s = [one.usage.busy_s for one in fleet.workers]
    usage = total(one.usage for one in fleet.workers)
    utilisation, slot_occupancy, kv_occupancy = _capacity(fleet.workers).shares(usage, fleet.measured_s)
    actions = recorder.actions
    return {
        "ready": fleet.ready,
        "utilisation": utilisation,
        "slot_occupancy": slot_occupancy,
        "kv_occupancy": kv_occupancy,
        "load_imbalance": ratio(max(busy_s) * len(busy_s), fsum(busy_s)) if busy_s else None,
        "cold_start_rate": ratio(actions[COLD_START], sum(actions.values())),
        "model_hit_rate": recorder.hit_rate,
        "loads": recorder.loads,
        "loads_by_tier": dict(sorted(recorder.loads_by_tier.items())),
        "load_mean_s": None if recorder.mean_load_s is None else rounded(recorder.mean_load_s),
    }


def _model_rows(recorder: Recorder, chosen: Selection) -> list[dict[str, Any]]:
    """A row for each model that was asked for, the one with the most requests first."""
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


def _reports_section(reports: ReportFigures) -> dict[str, Any]:
    rejected = {reason: reports.rejected[reason] for reason in sorted(reports.rejected) if reports.rejected[reason]}
    lost = reports.lost if reports.lost is not None else reports.sent - reports.accepted - sum(rejected.values()) - reports.under_way
    return {"sent": reports.sent, "accepted": reports.accepted, "lost": lost, "under_way": reports.under_way, "rejected": rejected}
