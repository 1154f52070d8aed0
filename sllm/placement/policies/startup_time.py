"""Shortest time to first token: a warm worker's wait against a cold start's load, both in seconds.

The idea of comparing estimated start-up times, and the estimate of a load as queue + size / bandwidth of the tier, follow ServerlessLLM (OSDI 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

from sllm.fleet.row import Row
from sllm.models.model import HOST
from sllm.placement.base import FleetView, Placement, Policy, Query, placed_on
from sllm.protocol.messages import COLD_START, SERVE


class Choice:
    """One way to serve the request. A last resort is taken only when nothing else is there, however long the wait elsewhere."""

    __slots__ = ("eta_s", "last_resort", "load_s", "prefill_s", "row", "weight_s")

    def __init__(self, last_resort: bool, weight_s: float, eta_s: float, prefill_s: float, load_s: float, row: Row) -> None:
        self.last_resort = last_resort  # other requests must finish there first, and nobody knows when they will
        self.weight_s = weight_s  # what is compared: the estimate, and the price of pushing another model out
        self.eta_s = eta_s  # estimated time to the first token
        self.prefill_s = prefill_s
        self.load_s = load_s  # of the cold start; 0.0: none
        self.row = row

    def beats(self, other: Choice, margin_s: float) -> bool:
        """Better than `other` by more than a margin."""
        if self.last_resort != other.last_resort:
            return other.last_resort
        return self.weight_s + margin_s < other.weight_s

    def placement(self) -> Placement:
        if self.load_s > 0.0:
            return Placement(self.row, COLD_START, self.eta_s, self.prefill_s, self.load_s, "cold")
        return Placement(self.row, SERVE, self.eta_s, self.prefill_s, 0.0, "warm")


@dataclass
class StartupTime(Policy):
    """Cheapest of a sample of warm workers, unless a cold start elsewhere beats it by `margin_s`.

    warm = max(time left of its load, wait) + prefill; cold = load queue + load from the nearest tier + prefill, on a sample of the workers that hold the
    model in host memory and of the least loaded ones of each hardware. `eviction_s` is weighed beside a cold start that pushes a model out; it is a price
    and no time, so it is not part of any estimate.
    """

    name: ClassVar[str] = "startup_time"
    sample: int = 8  # candidates looked at of each kind
    margin_s: float = 0.25  # hysteresis: a cold start must be better than the warm worker by more than this
    eviction_s: float = 0.2  # price of pushing another model off the GPU, which somebody will have to load again

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ValueError(f"sample={self.sample} must be at least 1")
        if self.margin_s < 0 or self.eviction_s < 0:
            raise ValueError("margin_s and eviction_s must not be negative")

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        warm = self._best_warm(query, fleet)
        if warm is not None and self._is_good(warm, query, fleet):
            return warm.placement()
        cold = self._best_cold(query, fleet)
        if cold is not None and (warm is None or cold.beats(warm, self.margin_s)):
            return cold.placement()
        if warm is not None:
            return warm.placement()
        row = fleet.any_admitting(query)
        return placed_on(row, query, fleet, "whoever has room") if row else None

    def _is_good(self, warm: Choice, query: Query, fleet: FleetView) -> bool:
        """No cold start can be better by the margin: none is quicker than one from host memory."""
        if warm.last_resort:
            return False
        return warm.eta_s <= self.margin_s or warm.eta_s <= fleet.costs.load_s(query.model, warm.row.hardware, HOST) + self.margin_s

    def _best_warm(self, query: Query, fleet: FleetView) -> Choice | None:
        now, name = query.now, query.model.name
        best: Row | None = None
        best_rank = (True, inf)
        for row in fleet.warm(query.model).sample(self.sample, query.rng):
            if not fleet.admits(row, query):
                continue
            starts_in_s = row.starts_in_s(name, now)
            if starts_in_s is None:  # the indexes say otherwise; a test holds that they are right
                continue
            rank = fleet.is_crowded(row, query), starts_in_s
            if best is None or rank < best_rank:
                best, best_rank = row, rank
        if best is None:
            return None
        prefill_s = fleet.costs.prefill_s(query.model, best.hardware, query.prompt_tokens)
        eta_s = best_rank[1] + prefill_s
        return Choice(best_rank[0], eta_s, eta_s, prefill_s, 0.0, best)

    def _best_cold(self, query: Query, fleet: FleetView) -> Choice | None:
        """The best of a sample: some of the least loaded workers of each hardware, whose loads take different times, and some that have the model at hand."""
        candidates = dict.fromkeys(fleet.hosted(query.model).sample(self.sample // 2 + 1, query.rng))
        for kind in query.kinds:
            candidates.update(dict.fromkeys(kind.by_depth.lowest()[1].sample(self.sample, query.rng)))
        name = query.model.name
        choices = [self._cold(row, query, fleet) for row in candidates if name not in row.warm and fleet.admits(row, query)]
        return min(choices, key=_rank, default=None)

    def _cold(self, row: Row, query: Query, fleet: FleetView) -> Choice:
        """Loading the model on this worker."""
        costs, model, now = fleet.costs, query.model, query.now
        load_s = costs.load_s(model, row.hardware, costs.tier(model, row))
        prefill_s = costs.prefill_s(model, row.hardware, query.prompt_tokens)
        eta_s = row.starts_cold_in_s(load_s, now) + prefill_s
        weight_s, last_resort = eta_s, fleet.is_crowded(row, query)
        if not row.fits_now(model.size_bytes):  # room must be made
            weight_s += self.eviction_s
            last_resort = last_resort or not row.has_idle_model  # models that serve cannot leave: the load waits for one of them to finish
        return Choice(last_resort, weight_s, eta_s, prefill_s, load_s, row)


def _rank(choice: Choice) -> tuple[bool, float]:
    return choice.last_resort, choice.weight_s
