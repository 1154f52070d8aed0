"""What a placement policy is given and what it answers.

A policy is one file in this folder: a frozen dataclass that derives from `Policy`, has a `name`, and whose fields are its parameters. It is found by
listing the folder (`sllm.placement.registry`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from random import Random
from typing import ClassVar, NamedTuple, Protocol

from sllm.catalog import Hardware, Model
from sllm.fleet import Bag, Fleet, Row
from sllm.messages import COLD_START, HIGH, LOW, SERVE


class Costs(Protocol):
    """Seconds of the cost model, as the coordinator knows it."""

    def prefill_s(self, model: Model, hardware: Hardware, prompt_tokens: int) -> float: ...

    def load_s(self, model: Model, hardware: Hardware, tier: int) -> float: ...

    def fits(self, model: Model, hardware: Hardware) -> bool: ...

    def tier(self, model: Model, row: Row) -> int:
        """The nearest storage tier from which a worker can load the model, by its last report."""


class Query(NamedTuple):
    """A request to be placed."""

    model: Model
    prompt_tokens: int
    max_tokens: int
    priority: int
    exclude: tuple[str, ...]
    now: float
    rng: Random


class Placement(NamedTuple):
    """Where to, and at what estimated cost."""

    row: Row
    action: str
    eta_s: float  # estimated time to first token
    cost_s: float  # what the dispatch adds to the worker's wait (SERVE), or the load to come (COLD_START)
    reason: str


class FleetView:
    """The fleet as a policy sees it: read-only, and only those workers that may be given this request."""

    def __init__(self, fleet: Fleet, costs: Costs, queue_threshold: int, memory_threshold: float) -> None:
        self.costs = costs
        self.memory_threshold = memory_threshold
        self._fleet = fleet
        # Under saturation the lowest priority is shed first: it may fill half of the queue, the highest twice as much.
        self._waiting_max = {LOW: max(1, queue_threshold // 2), HIGH: 2 * queue_threshold}
        self._waiting_normal = queue_threshold

    def waiting_max(self, query: Query) -> int:
        """A worker with so many requests waiting gets none of this priority."""
        return self._waiting_max.get(query.priority, self._waiting_normal)

    def admits(self, row: Row, query: Query) -> bool:
        """The worker's queue has room for a request of this priority, it was not excluded, and the model fits its hardware."""
        return (
            row.waiting() < self._waiting_max.get(query.priority, self._waiting_normal)
            and row.worker_id not in query.exclude
            and self.costs.fits(query.model, row.hardware)
        )

    def admitted(self, rows: Iterable[Row], query: Query) -> list[Row]:
        return [row for row in rows if self.admits(row, query)]

    @property
    def ready(self) -> Bag:
        """Every READY worker."""
        return self._fleet.ready

    def warm(self, model: Model) -> Bag:
        """READY workers that have the model on the GPU, are loading it, or are about to."""
        return self._fleet.warm.get(model.name, _EMPTY)

    def hosted(self, model: Model) -> Bag:
        """READY workers that have the model in host memory."""
        return self._fleet.hosted.get(model.name, _EMPTY)

    def least_loaded(self) -> Bag:
        """READY workers with the fewest requests running, waiting or in flight."""
        return self._fleet.least_loaded()

    def any_admitting(self, query: Query, tries: int = 8) -> Row | None:
        """Some worker that admits the request: a few at random, else among the least loaded; None means the fleet is saturated."""
        for bag in (self.ready, self.least_loaded()):
            for row in bag.sample(tries, query.rng):
                if self.admits(row, query):
                    return row
        # Exclusions or unfit hardware may hide the few that remain; this is the rare slow path.
        return next((row for row in self.ready.rows if self.admits(row, query)), None) if query.exclude or len(self.ready) <= 64 else None


_EMPTY = Bag()


class Policy(ABC):
    """Chooses a worker. State, if any, is its own; randomness comes with the query."""

    name: ClassVar[str]

    @abstractmethod
    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        """The placement, or None when no worker admits the request."""


def placed_on(row: Row, query: Query, fleet: FleetView, reason: str) -> Placement:
    """The placement on a worker chosen without regard to cost: SERVE if the model is there or coming, else COLD_START."""
    costs, model = fleet.costs, query.model
    prefill_s = costs.prefill_s(model, row.hardware, query.prompt_tokens)
    left_s = row.load_left_s(model.name, query.now)
    if left_s is not None:
        return Placement(row, SERVE, max(left_s, row.wait_s(query.now)) + prefill_s, prefill_s, reason)
    load_s = row.report.load_queue_s + costs.load_s(model, row.hardware, costs.tier(model, row))
    return Placement(row, COLD_START, max(load_s, row.wait_s(query.now)) + prefill_s, load_s, reason)
