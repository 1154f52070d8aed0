"""Keeps the events of a run as columns of numbers, about 100 bytes per request, so that percentiles are exact and a million requests fit into memory."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import NamedTuple

from sllm.observe.statistics import percentile, ratio
from sllm.observe.timeline import StateTimeline
from sllm.protocol.bus import Handler
from sllm.protocol.events import (
    DuplicateResponse,
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
from sllm.protocol.messages import ACTIONS, COLD_START

_ACTION_INDEX = {action: index for index, action in enumerate(ACTIONS)}
GLANCE_MAX = 4000  # requests from which the percentiles of a `Glance` are estimated


class Glance(NamedTuple):
    """Figures of a run that is still going on, for progress. Percentiles are estimated from a sample spread evenly over the run."""

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


class Recorder:
    """Records the events of a run; `handlers` maps each kind of event to its handler, for `EventBus.subscribe_all`.

    Columns with one entry for each request sent: `sent_at`; for each completed request: `done_at`, `ttft_s`, `e2e_s`, `tpot_s`, `queue_wait_s`, `served_by`,
    `of_model`, `prompt_tokens`, `output_tokens`; for each completed request that stalled: `stalled` (index into the columns before) and `stall_s`;
    for each placement: `routed_at`, `routed_action` (index into ACTIONS); for each measured placement: `decision_s`.
    """

    def __init__(self) -> None:
        self.sent_at = array("d")
        self.done_at = array("d")
        self.ttft_s = array("d")
        self.e2e_s = array("d")
        self.tpot_s = array("d")
        self.queue_wait_s = array("d")
        self.stalled = array("l")
        self.stall_s = array("d")
        self.prompt_tokens = array("l")
        self.output_tokens = array("l")
        self.of_model = array("l")  # index into model_ids
        self.served_by = array("l")  # index into worker_ids
        self.given_up_at = array("d")  # when requests failed or were rejected
        self.worker_ids: dict[str, int] = {}
        self.model_ids: dict[str, int] = {}
        self.sent_by_model: Counter[str] = Counter()
        self.failed_by_model: Counter[str] = Counter()
        self.rejected_by_model: Counter[str] = Counter()
        self.cold_starts_by_model: Counter[str] = Counter()
        self.loads_by_model: Counter[str] = Counter()
        self.loads_by_worker: Counter[str] = Counter()
        self.routed_at = array("d")
        self.routed_action = array("b")
        self.decision_s = array("d")
        self.completed_actions: Counter[str] = Counter()
        self._routed = [0] * len(ACTIONS)
        self.failed: Counter[str] = Counter()  # by reason
        self.rejected: Counter[str] = Counter()  # by code
        self.retried: Counter[str] = Counter()  # failed placements, by reason
        self.duplicates = 0
        self.loads = 0  # loads begun, as are `loads_by_model` and `loads_by_worker`
        self.loads_by_tier: Counter[str] = Counter()  # loads finished, by the tier they came from
        self.load_s = 0.0  # total time of the loads finished
        self._loaded = 0
        self.fleet = StateTimeline()
        self._admitted = 0
        self._missed = 0  # admitted requests whose model was not on the GPU
        self._last_admitted: RequestAdmitted | None = None
        self._loading: set[tuple[str, str]] = set()  # (worker, model)
        self.handlers: dict[type, Handler] = {
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

    # --- events ---------------------------------------------------------------------------------------------------------------------

    def _on_sent(self, node: object, event: RequestSent) -> None:
        self.sent_at.append(event.at)
        self.sent_by_model[event.model] += 1

    def _on_completed(self, node: object, event: RequestCompleted) -> None:
        self.done_at.append(event.at)
        self.ttft_s.append(event.ttft_s)
        self.e2e_s.append(event.e2e_s)
        self.tpot_s.append(event.tpot_s)
        self.queue_wait_s.append(event.queue_wait_s)
        if event.stalled_s > 0.0:
            self.stalled.append(len(self.done_at) - 1)
            self.stall_s.append(event.stalled_s)
        self.prompt_tokens.append(event.prompt_tokens)
        self.output_tokens.append(event.output_tokens)
        self.completed_actions[event.action] += 1
        self.served_by.append(self.worker_ids.setdefault(event.worker_id, len(self.worker_ids)))
        self.of_model.append(self.model_ids.setdefault(event.model, len(self.model_ids)))

    def _on_failed(self, node: object, event: RequestFailed) -> None:
        self.failed[event.reason] += 1
        self.failed_by_model[event.model] += 1
        self.given_up_at.append(event.at)

    def _on_rejected(self, node: object, event: RequestRejected) -> None:
        self.rejected[event.code] += 1
        self.rejected_by_model[event.model] += 1
        self.given_up_at.append(event.at)

    def _on_retried(self, node: object, event: RequestRetried) -> None:
        self.retried[event.reason] += 1

    def _on_duplicate(self, node: object, event: DuplicateResponse) -> None:
        self.duplicates += 1

    def _on_routed(self, node: object, event: RequestRouted) -> None:
        self.routed_at.append(event.at)
        index = _ACTION_INDEX[event.action]
        self.routed_action.append(index)
        self._routed[index] += 1
        if event.action == COLD_START:
            self.cold_starts_by_model[event.model] += 1
        if event.decision_s > 0.0:
            self.decision_s.append(event.decision_s)

    def _on_admitted(self, node: object, event: RequestAdmitted) -> None:
        """Count a miss if the model is still being loaded, even if the load was begun for another request."""
        self._admitted += 1
        self._last_admitted = event
        if self._loading and (event.worker_id, event.model) in self._loading:
            self._missed += 1

    def _on_load_started(self, node: object, event: ModelLoadStarted) -> None:
        """Count a miss if the load was begun for a request: such a load follows the request's admission at once, a preload follows no admission."""
        self._loading.add((event.worker_id, event.model))
        self.loads += 1
        self.loads_by_model[event.model] += 1
        self.loads_by_worker[event.worker_id] += 1
        last = self._last_admitted
        if last is not None and (last.at, last.worker_id, last.model) == (event.at, event.worker_id, event.model):
            self._missed += 1
            self._last_admitted = None

    def _on_loaded(self, node: object, event: ModelLoaded) -> None:
        self._loading.discard((event.worker_id, event.model))
        self.load_s += event.load_s
        self._loaded += 1
        self.loads_by_tier[event.tier_from] += 1

    def _on_state_changed(self, node: object, event: WorkerStateChanged) -> None:
        self.fleet.move(event.at, event.worker_id, event.new)

    # --- figures --------------------------------------------------------------------------------------------------------------------

    @property
    def actions(self) -> dict[str, int]:
        """Placements by action; each further placement of a request counts again. If no coordinator was heard, the actions of completed requests."""
        if any(self._routed):
            return dict(zip(ACTIONS, self._routed, strict=True))
        return {action: self.completed_actions[action] for action in ACTIONS}

    @property
    def mean_load_s(self) -> float | None:
        """Mean seconds of the finished loads; None if there are none."""
        return self.load_s / self._loaded if self._loaded else None

    @property
    def hit_rate(self) -> float | None:
        """The part of the admitted requests that found their model on the GPU; if no worker was heard, the part of placements that were no cold start."""
        if self._admitted:
            return ratio(self._admitted - self._missed, self._admitted)
        actions = self.actions
        placed = sum(actions.values())
        return ratio(placed - actions[COLD_START], placed)

    def glance(self) -> Glance:
        """The figures so far; the cost does not grow with the run."""
        count = len(self.ttft_s)
        sample = sorted(self.ttft_s[:: count // GLANCE_MAX + 1])
        return Glance(
            len(self.sent_at), count, self.failed.total(), self.rejected.total(), self.actions[COLD_START], percentile(sample, 50), percentile(sample, 99)
        )
