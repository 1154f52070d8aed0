"""Shortest time to first token: a warm worker's wait against a cold start's load, both in seconds.

The idea of comparing estimated start-up times, and the estimate of a load as queue + size / bandwidth of the tier, follow ServerlessLLM (OSDI 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from sllm.catalog import HOST, Hardware
from sllm.fleet import Row
from sllm.messages import COLD_START, SERVE, LoadReport
from sllm.node import new_tuple
from sllm.placement.base import FleetView, Placement, Policy, Query

LAST_RESORT_S = 1000.0  # added where the KV cache is nearly full: taken only if there is nothing else
WEIGHED = slice(LoadReport._fields.index("slots"), LoadReport._fields.index("gpu_models") + 1)


@dataclass
class StartupTime(Policy):
    """Cheapest of a sample of warm workers, unless a cold start elsewhere beats it by `margin_s`.

    warm = max(time left of its load, wait) + prefill; cold = load queue + load from the nearest tier + eviction penalty + prefill, on a sample of the
    workers that hold the model in host memory and of the least loaded ones.
    """

    name: ClassVar[str] = "startup_time"
    sample: int = 8  # candidates looked at of each kind
    margin_s: float = 0.5  # hysteresis: a cold start must be worth its eviction and its memory
    eviction_s: float = 0.2  # cost given to pushing another model off the GPU, which somebody will have to load again

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ValueError(f"sample={self.sample} must be at least 1")
        if self.margin_s < 0 or self.eviction_s < 0:
            raise ValueError("margin_s and eviction_s must not be negative")

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        warm = self._best_warm(query, fleet)
        if warm is not None and (warm.eta_s <= self.margin_s or warm.eta_s <= self._cheapest_load_s(query, fleet, warm.row) + self.margin_s):
            return warm
        cold = self._best_cold(query, fleet)
        if cold is not None and (warm is None or cold.eta_s + self.margin_s < warm.eta_s):
            return cold
        return warm

    def _cheapest_load_s(self, query: Query, fleet: FleetView, row: Row) -> float:
        """No cold start is quicker than one from host memory: below that, none needs to be looked at."""
        return fleet.costs.load_s(query.model, row.hardware, HOST)

    def _best_warm(self, query: Query, fleet: FleetView) -> Placement | None:
        model, now, exclude = query.model, query.now, query.exclude
        name, waiting_max, memory_threshold = model.name, fleet.waiting_max(query), fleet.memory_threshold
        best: Row | None = None
        best_s = 0.0
        for row in fleet.warm(model).sample(self.sample, query.rng):
            # Row.waiting, FleetView.admits (a model it holds fits) and Row.wait_s, without the calls: this loop is most of a placement.
            figures: Any = row.report[WEIGHED]
            slots, running, waiting, cost_s, _, kv_used, _, gpu_models = figures
            ledger = row.ledger
            sent = len(ledger.entries)
            if (waiting + sent if waiting else running + sent - slots) >= waiting_max or (exclude and row.worker_id in exclude):
                continue
            cost_s -= now - row.heard_at
            if cost_s < 0.0:
                cost_s = 0.0
            cost_s += ledger.cost_s
            if name not in gpu_models:
                cost_s = max(cost_s, row.load_left_s(name, now) or 0.0)
            if kv_used > memory_threshold:
                cost_s += LAST_RESORT_S
            if best is None or cost_s < best_s:
                best, best_s = row, cost_s
        if best is None:
            return None
        prefill_s = fleet.costs.prefill_s(model, best.hardware, query.prompt_tokens)
        placement: Placement = new_tuple(Placement, (best, SERVE, best_s + prefill_s, prefill_s, "warm"))
        return placement

    def _best_cold(self, query: Query, fleet: FleetView) -> Placement | None:
        name = query.model.name
        candidates = dict.fromkeys(fleet.hosted(query.model).sample(self.sample // 2 + 1, query.rng))
        candidates.update(dict.fromkeys(fleet.least_loaded().sample(self.sample, query.rng)))
        best: Row | None = None
        best_eta_s = best_load_s = prefill_s = 0.0
        hardware: Hardware | None = None
        for row in candidates:
            if name in row.warm or not fleet.admits(row, query):
                continue
            if row.hardware is not hardware:  # most fleets have one kind
                hardware = row.hardware
                prefill_s = fleet.costs.prefill_s(query.model, hardware, query.prompt_tokens)
            ready_s, load_s = self._cold_s(row, query, fleet)
            if best is None or ready_s + prefill_s < best_eta_s:
                best, best_eta_s, best_load_s = row, ready_s + prefill_s, load_s
        if best is None:
            best = fleet.any_admitting(query)
            if best is None:
                return None
            ready_s, best_load_s = self._cold_s(best, query, fleet)
            best_eta_s = ready_s + fleet.costs.prefill_s(query.model, best.hardware, query.prompt_tokens)
        return Placement(best, COLD_START, best_eta_s, best_load_s, "cold")

    def _cold_s(self, row: Row, query: Query, fleet: FleetView) -> tuple[float, float]:
        """Loading the model on this worker: seconds until the prefill can begin, and of those the load."""
        costs, report, model, ledger = fleet.costs, row.report, query.model, row.ledger
        load_s = report.load_queue_s - (query.now - row.heard_at)
        if load_s < 0.0:
            load_s = 0.0
        load_s += costs.load_s(model, row.hardware, costs.tier(model, row))
        if ledger.entries:
            load_s += sum(entry.cost_s for entry in ledger.entries.values() if entry.loads)
        wait_s = row.wait_s(query.now)
        eta_s = load_s if load_s > wait_s else wait_s
        if report.gpu_free_bytes < model.size_bytes:
            # Room must be made. Models that serve cannot leave: when nothing else is there, the load waits for one of them to finish.
            eta_s += self.eviction_s if len(report.busy_models) < len(report.gpu_models) else wait_s + LAST_RESORT_S
        if report.kv_used > fleet.memory_threshold:
            eta_s += LAST_RESORT_S
        return eta_s, load_s
