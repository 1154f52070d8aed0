"""What a placement policy is given and what it answers.

A policy is one file in this folder: a frozen dataclass that derives from `Policy`, has a `name`, and whose fields are its parameters. It is found by
listing the folder (`sllm.placement.registry`).
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Protocol

from sllm.fleet.index import Bag, sample_all
from sllm.fleet.row import DOUBTFUL, NEWCOMER, PROVEN, Kind, Row, band_of
from sllm.fleet.table import Fleet
from sllm.models.model import Hardware, Model
from sllm.placement.policy import Policy as Policy
from sllm.protocol.messages import COLD_START, HIGH, LOW, SERVE
from sllm.protocol.record import Record

LOOKED_AT_AGAIN = 64  # workers, before a request is turned away


class Costs(Protocol):
    """Seconds and bytes of the cost model, as the coordinator knows it."""

    def prefill_s(self, model: Model, hardware: Hardware, prompt_tokens: int) -> float: ...

    def service_s(self, model: Model, hardware: Hardware, prompt_tokens: int, output_tokens: int, round_s: float) -> float:
        """Seconds from the start of the prefill to the last token where a token takes `round_s`, or longer if it takes longer alone."""

    def load_s(self, model: Model, hardware: Hardware, tier: int) -> float: ...

    def kv_bytes(self, model: Model, tokens: int) -> int:
        """KV cache of a request with so many tokens, prompt and output."""

    def fits(self, model: Model, hardware: Hardware, kv_bytes: int) -> bool:
        """The model and so much KV cache fit the hardware when nothing else is there."""

    def tier(self, model: Model, row: Row) -> int:
        """The nearest storage tier from which a worker can load the model, by its last report."""


class Query(Record):
    """A request to be placed."""

    FIELDS = ("model", "prompt_tokens", "max_tokens", "kv_bytes", "priority", "exclude", "kinds", "now", "rng", "trust", "again")
    __slots__ = FIELDS

    def __init__(
        self, model: Model, prompt_tokens: int, max_tokens: int, kv_bytes: int, priority: int, exclude: tuple[str, ...], kinds: tuple[Kind, ...], now: float,
        rng: Random, trust: int = DOUBTFUL, again: bool = False,
    ) -> None:  # fmt: skip
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.kv_bytes = kv_bytes  # most KV cache that prompt and output may need
        self.priority = priority
        self.exclude = exclude
        self.kinds = kinds  # the hardware that can hold the request and has READY workers; never empty
        self.now = now
        self.rng = rng
        self.trust = trust  # trust of the most trusted worker of `kinds` that is not excluded; workers trusted less get little (`sllm.fleet.row`)
        self.again = again  # the request has failed before: workers trusted less get nothing of it


class Placement(Record):
    """Where to, and at what estimated cost."""

    FIELDS = ("row", "action", "eta_s", "prefill_s", "load_s", "reason")
    __slots__ = FIELDS

    def __init__(self, row: Row, action: str, eta_s: float, prefill_s: float, load_s: float, reason: str) -> None:
        self.row = row
        self.action = action
        self.eta_s = eta_s  # estimated time to first token
        self.prefill_s = prefill_s  # what the request adds to the worker's wait
        self.load_s = load_s  # of the request's own cold start, without the loads before it; 0.0 for SERVE
        self.reason = reason


class FleetView:
    """The fleet as a policy sees it: read-only, and only those workers that may be given this request."""

    def __init__(self, fleet: Fleet, costs: Costs, queue_threshold: int, memory_threshold: float) -> None:
        self.costs = costs
        self._memory_threshold = memory_threshold
        self._fleet = fleet
        # Under saturation the lowest priority is shed first: it may fill half of the queue, the highest twice as much.
        self._queued_max = {LOW: max(1, queue_threshold // 2), HIGH: 2 * queue_threshold}
        self._queued_normal = queue_threshold

    def queued_max(self, query: Query) -> int:
        """How many requests wait for a place on a worker that gets no more of this priority."""
        return self._queued_max.get(query.priority, self._queued_normal)

    def admits(self, row: Row, query: Query) -> bool:
        """The worker's hardware can hold the request, its queue has room for one of this priority, the worker was not excluded, and is trusted with it."""
        if row.is_stale(query.now):
            self._fleet.refresh(row, query.now)
        queued = row.queued
        return (
            queued < self.queued_max(query)
            and queued < row.report.queue_max
            and (row.proven or self._trusts(row, query))
            and row.kind in query.kinds
            and row.worker_id not in query.exclude
        )  # fmt: skip

    @staticmethod
    def _trusts(row: Row, query: Query) -> bool:
        """A worker that is not proven may be given the request. A request that failed before goes to no worker that owes a first acknowledgement."""
        if query.again:
            return row.trust >= query.trust and not row.ledger.entries
        return row.trust >= query.trust or row.has_allowance

    def admitted(self, rows: Iterable[Row], query: Query) -> list[Row]:
        return [row for row in rows if self.admits(row, query)]

    def is_crowded(self, row: Row, query: Query) -> bool:
        """The worker's KV cache is nearly full, or has no room for the request now: the request would wait for others to finish."""
        return row.kv_used() > self._memory_threshold or not row.fits_now(query.kv_bytes)

    def warm(self, model: Model) -> Bag[Row]:
        """READY workers that have the model on the GPU, are loading it, or are about to load it."""
        return self._fleet.warm.get(model.name, _NOBODY)

    def hosted(self, model: Model) -> Bag[Row]:
        """READY workers that have the model in host memory."""
        return self._fleet.hosted.get(model.name, _NOBODY)

    def count(self, query: Query) -> int:
        """How many READY workers have hardware that can hold the request."""
        return sum(len(kind.ready) for kind in query.kinds)

    def row_at(self, place: int, query: Query) -> Row:
        """One of those workers, by its place below `count`."""
        for kind in query.kinds:
            if place < len(kind.ready):
                return kind.ready.rows[place]
            place -= len(kind.ready)
        raise IndexError(place)

    def sample(self, count: int, query: Query) -> list[Row]:
        """READY workers whose hardware can hold the request, `count` at random."""
        return sample_all([kind.ready for kind in query.kinds], count, query.rng)

    def sample_least_loaded(self, count: int, query: Query) -> list[Row]:
        """`count` at random of the workers with the fewest requests running, waiting or in flight."""
        levels = [kind.by_depth.lowest() for kind in query.kinds]
        low = min(level for level, _ in levels)
        return sample_all([bag for level, bag in levels if level == low], count, query.rng)

    def any_admitting(self, query: Query, tries: int = 8) -> Row | None:
        """Some worker that admits the request: a few at random, else one with the shortest queue. None: no worker admits it."""
        for row in self.sample(tries, query):
            if self.admits(row, query):
                return row
        found = min(filter(None, [self._shortest_queue(kind, query) for kind in query.kinds]), key=_queued, default=None)
        if found is not None:
            return found
        # The indexes may be behind: of those that looked full at their last report, some are looked at again.
        return next((row for row in self.sample(LOOKED_AT_AGAIN, query) if self.admits(row, query)), None)

    def _shortest_queue(self, kind: Kind, query: Query) -> Row | None:
        """The first worker by queue that admits the request; a less trusted one only when no other does. Only excluded workers are passed over."""
        for trust in (PROVEN, NEWCOMER, DOUBTFUL):
            for has_allowance in (True, False):
                if trust < query.trust and (query.again or not has_allowance):
                    continue
                begin = band_of(trust, has_allowance)
                for row in kind.by_queued.rising(begin, begin + self.queued_max(query)):
                    if self.admits(row, query):
                        return row
        return None


def _queued(row: Row) -> int:
    return row.queued


_NOBODY: Bag[Row] = Bag()


def placed_on(row: Row, query: Query, fleet: FleetView, reason: str) -> Placement:
    """The placement on a worker chosen without regard to cost: SERVE if the model is there or coming, else COLD_START."""
    costs, model, now = fleet.costs, query.model, query.now
    prefill_s = costs.prefill_s(model, row.hardware, query.prompt_tokens)
    starts_in_s = row.starts_in_s(model.name, now)
    if starts_in_s is not None:
        return Placement(row, SERVE, starts_in_s + prefill_s, prefill_s, 0.0, reason)
    load_s = costs.load_s(model, row.hardware, costs.tier(model, row))
    return Placement(row, COLD_START, row.starts_cold_in_s(load_s, now) + prefill_s, prefill_s, load_s, reason)
