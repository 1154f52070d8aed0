"""What a run measured: collected from the event stream, and the results of schema 1.

A `Recorder` hears every event and keeps plain columns of numbers, about 70 bytes for each request, so that percentiles are exact and a million requests fit.

Percentiles interpolate linearly between the two nearest order statistics: of n sorted values, percentile p lies at index (n - 1) * p / 100. That is the
`inclusive` method of `statistics.quantiles` and the default of most tools. A figure of nothing (the TTFT of no requests) is null.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import fsum, isfinite
from typing import Any, NamedTuple

from sllm.events import (
    DuplicateResponse,
    Event,
    ModelLoaded,
    ModelLoadStarted,
    RequestAdmitted,
    RequestCompleted,
    RequestFailed,
    RequestRejected,
    RequestRetried,
    RequestRouted,
    RequestSent,
    WorkerStateChanged,
)
from sllm.messages import ACTIONS, COLD_START

SCHEMA = 1
TTFT_SLO_S = 2.0  # within this a first token counts as in time
SIGNIFICANT_DIGITS = 9  # of a float in the results: a nanosecond in a second, and no noise of the last bits
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
DISTRIBUTIONS = ("ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "stall_s", "decision_s")
WALL_CLOCK_KEYS = (("run", "wall_s"), ("run", "requests_per_wall_s"), ("decision_s",))  # all else is the same for the same seed in virtual time
_ACTION_INDEX = {action: index for index, action in enumerate(ACTIONS)}
GLANCE_MAX = 4000  # requests that figures in passing are estimated from
TIMELINE_MAX = 1024  # points of the fleet's states kept over time
WINDOW_SLACK = 1e-9  # a busy second more than the clock had is rounding

Number = int | float
Statistics = dict[str, float | None]


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


class FleetFigures(NamedTuple):
    """What only the fleet knows, at the end of the run."""

    ready: int  # workers
    busy_s: Sequence[float]  # for each worker: time with work running, all its lives together
    elapsed_s: float  # of the run's clock, drain included


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
    """Requests in flight at the end of a run, by their first token: it came in time, or its time is not over. All others are late."""

    in_time: int = 0
    undecided: int = 0


class Glance(NamedTuple):
    """Figures in passing, for progress. Percentiles are estimated from a sample spread evenly over the run."""

    sent: int
    completed: int
    failed: int
    rejected: int
    cold_starts: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None

    @property
    def ended(self) -> int:
        return self.completed + self.failed + self.rejected

    @property
    def in_flight(self) -> int:
        return self.sent - self.ended


def percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The percentile, by linear interpolation, of sorted values; None of no values. `percent` is a whole number from 0 to 100."""
    if not ordered:
        return None
    index, part = divmod((len(ordered) - 1) * percent, 100)
    if part == 0:
        return ordered[index]
    low, high = ordered[index], ordered[index + 1]
    return low + (high - low) * (part / 100.0)


def summarize(values: Sequence[float]) -> Statistics:
    """Mean, percentiles and maximum of values in any order, rounded; None for each if there are none."""
    ordered = sorted(values)
    summary: Statistics = {"mean": fsum(ordered) / len(ordered) if ordered else None}
    for name in STATISTICS[1:-1]:
        summary[name] = percentile(ordered, int(name[1:]))
    summary["max"] = ordered[-1] if ordered else None
    return {name: value if value is None else rounded(value) for name, value in summary.items()}


def rounded(value: float) -> float:
    """A float with the digits that go into the results."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _ratio(part: float, whole: float) -> float | None:
    return rounded(part / whole) if whole > 0 else None


class StateTimeline:
    """How many workers were in each state over time, in at most `TIMELINE_MAX` points: when there are more, the time step doubles."""

    def __init__(self) -> None:
        self.points: list[tuple[float, dict[str, int]]] = []  # (since, workers by state)
        self.counts: Counter[str] = Counter()
        self._states: dict[str, str] = {}
        self._step_s = 0.01
        self._ended = False

    def end(self) -> None:
        """What happens from now on is the end of the run itself, in which all workers go home: no part of what it was about."""
        self._ended = True

    def move(self, at: float, worker_id: str, state: str) -> None:
        """A worker is in a state now. What it was in before is remembered here: a coordinator that restarts has forgotten it."""
        old = self._states.get(worker_id)
        if old == state or self._ended:
            return
        self._states[worker_id] = state
        self.counts[state] += 1
        if old is not None:
            self.counts[old] -= 1
        points = self.points
        if points and int(points[-1][0] / self._step_s) == int(at / self._step_s):
            points.pop()
        points.append((at, {name: count for name, count in self.counts.items() if count}))
        if len(points) > TIMELINE_MAX:
            self._thin()

    def _thin(self) -> None:
        """Keep the last point of each step, twice as long as before until half are gone."""
        while len(self.points) > TIMELINE_MAX // 2:
            self._step_s *= 2.0
            last = {int(point[0] / self._step_s): point for point in self.points}
            self.points = list(last.values())


class Recorder:
    """Hears the events of a run and works out its results.

    `handlers` maps each type of event it wants to what takes it, for drivers that dispatch by type themselves; `observe` takes any event.
    Columns with one entry for each request sent: `sent_at`; for each completed: `done_at`, `ttft_s`, `e2e_s`, `tpot_s`, `queue_wait_s`, `served_by`;
    for each placement: `routed_at`, `routed_action` (index into ACTIONS); for each measured placement: `decision_s`.
    """

    def __init__(self, ttft_slo_s: float = TTFT_SLO_S) -> None:
        self.ttft_slo_s = ttft_slo_s
        self.sent_at = array("d")
        self.done_at = array("d")
        self.ttft_s = array("d")
        self.e2e_s = array("d")
        self.tpot_s = array("d")
        self.queue_wait_s = array("d")
        self.stall_s = array("d")  # of those whose stream broke off
        self.served_by = array("l")  # index into worker_ids
        self.given_up_at = array("d")  # when requests failed or were rejected
        self.worker_ids: dict[str, int] = {}
        self.routed_at = array("d")
        self.routed_action = array("b")
        self.decision_s = array("d")
        self.completed_actions: Counter[str] = Counter()
        self._routed = [0] * len(ACTIONS)
        self.failed: Counter[str] = Counter()  # by reason
        self.rejected: Counter[str] = Counter()  # by code
        self.retried: Counter[str] = Counter()  # placements that came to nothing, by reason
        self.duplicates = 0
        self.output_tokens = 0
        self.loads = 0
        self.load_s = 0.0  # of all loads that were finished, together
        self._loaded = 0
        self.fleet = StateTimeline()
        self._admitted = 0
        self._missed = 0  # of those admitted: the model was not on the GPU
        self._last_admitted: RequestAdmitted | None = None
        self._loading: set[tuple[str, str]] = set()  # (worker, model)
        self.handlers: dict[type, Callable[[object, Any], None]] = {
            RequestSent: self._on_sent,
            RequestCompleted: self._on_completed,
            RequestFailed: self._on_failed,
            RequestRejected: self._on_rejected,
            RequestRetried: self._on_retried,
            DuplicateResponse: self._on_duplicate,
            RequestRouted: self._on_routed,
            RequestAdmitted: self._on_admitted,
            ModelLoadStarted: self._on_load_started,
            ModelLoaded: self._on_loaded,
            WorkerStateChanged: self._on_state_changed,
        }

    def observe(self, event: Event) -> None:
        """Hear an event of any type; those that do not matter here cost a look-up."""
        handler = self.handlers.get(type(event))
        if handler is not None:
            handler(None, event)

    # --- events ---------------------------------------------------------------------------------------------------------------------

    def _on_sent(self, node: object, event: RequestSent) -> None:
        self.sent_at.append(event[0])

    def _on_completed(self, node: object, event: RequestCompleted) -> None:
        at, _, _, worker_id, action, _, ttft_s, e2e_s, tpot_s, queue_wait_s, _, _, output_tokens, _, _, stalled_s = event
        self.done_at.append(at)
        self.ttft_s.append(ttft_s)
        self.e2e_s.append(e2e_s)
        self.tpot_s.append(tpot_s)
        self.queue_wait_s.append(queue_wait_s)
        if stalled_s > 0.0:
            self.stall_s.append(stalled_s)
        self.output_tokens += output_tokens
        self.completed_actions[action] += 1
        index = self.worker_ids.get(worker_id)
        if index is None:
            index = self.worker_ids[worker_id] = len(self.worker_ids)
        self.served_by.append(index)

    def _on_failed(self, node: object, event: RequestFailed) -> None:
        self.failed[event.reason] += 1
        self.given_up_at.append(event.at)

    def _on_rejected(self, node: object, event: RequestRejected) -> None:
        self.rejected[event.code] += 1
        self.given_up_at.append(event.at)

    def _on_retried(self, node: object, event: RequestRetried) -> None:
        self.retried[event.reason] += 1

    def _on_duplicate(self, node: object, event: DuplicateResponse) -> None:
        self.duplicates += 1

    def _on_routed(self, node: object, event: RequestRouted) -> None:
        at, _, _, _, action, _, decision_s = event
        self.routed_at.append(at)
        index = _ACTION_INDEX[action]
        self.routed_action.append(index)
        self._routed[index] += 1
        if decision_s > 0.0:
            self.decision_s.append(decision_s)

    def _on_admitted(self, node: object, event: RequestAdmitted) -> None:
        """A request that finds its model still loading misses the GPU, whoever the load was begun for."""
        self._admitted += 1
        self._last_admitted = event
        if self._loading and (event[1], event[3]) in self._loading:
            self._missed += 1

    def _on_load_started(self, node: object, event: ModelLoadStarted) -> None:
        """A load begun by a request follows its admission at once; a preload follows nothing."""
        self._loading.add((event.worker_id, event.model))
        self.loads += 1
        last = self._last_admitted
        if last is not None and (last.at, last.worker_id, last.model) == event:
            self._missed += 1
            self._last_admitted = None

    def _on_loaded(self, node: object, event: ModelLoaded) -> None:
        self._loading.discard((event.worker_id, event.model))
        self.load_s += event.load_s
        self._loaded += 1

    def _on_state_changed(self, node: object, event: WorkerStateChanged) -> None:
        self.fleet.move(event.at, event.worker_id, event.new)

    # --- figures --------------------------------------------------------------------------------------------------------------------

    @property
    def actions(self) -> dict[str, int]:
        """Placements by action, a request placed again counted again; where no coordinator was heard, those that completed requests ended up with."""
        if any(self._routed):
            return dict(zip(ACTIONS, self._routed, strict=True))
        return {action: self.completed_actions[action] for action in ACTIONS}

    @property
    def mean_load_s(self) -> float | None:
        """Of the loads that were finished; None if none was."""
        return self.load_s / self._loaded if self._loaded else None

    def glance(self) -> Glance:
        """Figures so far; cheap however long the run is."""
        count = len(self.ttft_s)
        sample = sorted(self.ttft_s[:: count // GLANCE_MAX + 1])
        return Glance(
            len(self.sent_at), count, self.failed.total(), self.rejected.total(), self.actions[COLD_START], percentile(sample, 50), percentile(sample, 99)
        )

    def results(
        self,
        run: RunInfo,
        fleet: FleetFigures,
        reports: ReportFigures,
        invariants: Invariants = Invariants(),  # noqa: B008
        in_flight: int | None = None,
        begun: Begun = Begun(),  # noqa: B008
    ) -> dict[str, Any]:
        """The results, schema 1, in the order of its keys.

        `in_flight` is what the clients count; without it, it is what was sent and did not end, and the books balance by definition.
        `slo.attainment` is the part of the requests sent whose first token came in time; one that failed or was rejected had none. Of those in flight it
        counts the ones of which that is known, by `begun`.
        `fleet.utilisation` is the mean over workers of busy time / elapsed time; `load_imbalance` the longest busy time / the mean one (1: even).
        `cold_start_rate` is cold starts / placements; `model_hit_rate` the part of requests that found their model on the GPU when they came to the worker.
        """
        completed, failed, rejected = len(self.done_at), self.failed.total(), self.rejected.total()
        sent = len(self.sent_at)
        if in_flight is None:
            in_flight = sent - completed - failed - rejected
        in_time = sum(map(self.ttft_slo_s.__ge__, self.ttft_s))
        return {
            "schema": SCHEMA,
            "run": _run_section(run, completed),
            "requests": {
                "sent": sent, "completed": completed, "failed": failed, "rejected": rejected, "in_flight": in_flight, "duplicates": self.duplicates,
            },
            "actions": self.actions,
            **{name: summarize(getattr(self, name)) for name in DISTRIBUTIONS},
            "slo": {"ttft_s": rounded(self.ttft_slo_s), "attainment": _ratio(in_time + begun.in_time, sent - begun.undecided)},
            "fleet": self._fleet_section(fleet),
            "reports": _reports_section(reports),
            "invariants": {"checked": invariants.checked, "violations": list(invariants.violations)},
        }  # fmt: skip

    def _fleet_section(self, fleet: FleetFigures) -> dict[str, Any]:
        busy_s, count = fsum(fleet.busy_s), len(fleet.busy_s)
        utilisation = _ratio(busy_s, count * fleet.elapsed_s)
        if utilisation is not None and 1.0 < utilisation <= 1.0 + WINDOW_SLACK:
            utilisation = 1.0
        actions = self.actions
        placed = sum(actions.values())
        if self._admitted:
            hit_rate = _ratio(self._admitted - self._missed, self._admitted)
        else:
            hit_rate = _ratio(placed - actions[COLD_START], placed)
        return {
            "ready": fleet.ready,
            "utilisation": utilisation,
            "load_imbalance": _ratio(max(fleet.busy_s) * count, busy_s) if count else None,
            "cold_start_rate": _ratio(actions[COLD_START], placed),
            "model_hit_rate": hit_rate,
        }


def _run_section(run: RunInfo, completed: int) -> dict[str, Any]:
    return {
        "mode": run.mode,
        "architecture": run.architecture,
        "workers": run.workers,
        "hardware": dict(run.hardware),
        "policy": run.policy,
        "seed": run.seed,
        "duration_s": rounded(run.duration_s),
        "duration_asked_s": None if run.duration_asked_s is None else rounded(run.duration_asked_s),
        "interrupted": run.interrupted,
        "wall_s": rounded(run.wall_s),
        "requests_per_wall_s": _ratio(completed, run.wall_s) or 0.0,
        "workload": _rounded_tree(run.workload),
        "engine_profile": run.engine_profile,
        "loader": run.loader,
    }


def _reports_section(reports: ReportFigures) -> dict[str, Any]:
    rejected = {reason: reports.rejected[reason] for reason in sorted(reports.rejected) if reports.rejected[reason]}
    lost = reports.lost if reports.lost is not None else reports.sent - reports.accepted - sum(rejected.values()) - reports.under_way
    return {"sent": reports.sent, "accepted": reports.accepted, "lost": lost, "under_way": reports.under_way, "rejected": rejected}


def _rounded_tree(value: Any) -> Any:
    """The same with every float rounded, tuples as lists."""
    if isinstance(value, float):
        return rounded(value) if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded_tree(item) for item in value]
    return value
