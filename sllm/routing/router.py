"""The router: from a question to a placement, entered into the ledger of its worker, or to an error that says why there is none.

    answer()    -> what to say to a question: the same again when it is asked again, else place() and dispatch()
    place()     -> the policy's placement, or why there is none
    dispatch()  -> the placement in the worker's ledger, and the answer in words

The router belongs to whoever keeps a table of workers. It has no socket and knows no role: it returns what to say, and tells events into the list that its
owner gives.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Protocol

from sllm.fleet.ledger import Entry
from sllm.fleet.row import DOUBTFUL, NEWCOMER, PROVEN, Kind
from sllm.fleet.table import Fleet
from sllm.models.catalogue import Catalog
from sllm.models.model import Model
from sllm.placement.base import Costs, FleetView, Placement, Policy, Query
from sllm.protocol.events import Event, RequestRefused, RequestRouted
from sllm.protocol.messages import (
    DEADLINE_UNMEETABLE,
    MODEL_TOO_LARGE,
    NO_WORKERS,
    NOT_READY,
    READY,
    REQUEST_TOO_LARGE,
    SATURATED,
    UNKNOWN_MODEL,
    Address,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
)
from sllm.protocol.recent import Recent

CROWD = 10  # requests turned away in a tick for each READY worker; with more, retry-after grows, so that those who ask again are no load of their own
RETRY_AFTER_MIN_S = 0.01  # before jitter
RETRY_AFTER_MAX_S = 30.0  # before jitter
SURE_INTERVALS = 3.0  # report intervals after a start: one of listening, two more; a request that no worker heard of by then can hold is refused for good
DECISIONS_MAX = 200_000  # kept answers in each of two generations; a usual fleet makes fewer in `decision_keep_s`


class RouterSettings(Protocol):
    """What a router reads of the configuration of its process."""

    @property
    def report_interval_s(self) -> float: ...
    @property
    def decision_keep_s(self) -> float: ...
    @property
    def queue_threshold(self) -> int: ...
    @property
    def memory_threshold(self) -> float: ...


class Decision:
    """An answer given, kept so that the same question gets the same answer."""

    __slots__ = ("attempt", "response")

    def __init__(self, response: ScheduleResponse, attempt: int) -> None:
        self.response = response
        self.attempt = attempt


class Router:
    """Places requests on the workers of one table; `events` is where the router tells what happens.

    `stopwatch` (seconds, any origin) measures how long placements take; without it they count as 0.
    """

    __slots__ = (
        "_catalog", "_costs", "_decision_keep_s", "_decisions", "_events", "_fleet", "_next_drop", "_policy", "_rng", "_stopwatch", "_sure_at",
        "_tick_s", "_turned_away", "_turned_away_before", "_view", "ready", "ready_at",
    )  # fmt: skip

    def __init__(
        self, settings: RouterSettings, catalog: Catalog, fleet: Fleet, policy: Policy, costs: Costs, rng: Random, events: list[Event], now: float,
        stopwatch: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        self._catalog = catalog
        self._fleet = fleet
        self._policy = policy
        self._costs = costs
        self._rng = rng
        self._events = events
        self._stopwatch = stopwatch
        self._view = FleetView(fleet, costs, settings.queue_threshold, settings.memory_threshold)
        self._tick_s = settings.report_interval_s or 1.0
        self.ready = settings.report_interval_s == 0.0  # reports of a whole interval have been heard; until then the owner of the router sets it
        self.ready_at = now + settings.report_interval_s  # when that is
        self._sure_at = now + SURE_INTERVALS * self._tick_s  # by then every worker that lives has been heard
        self._decisions: Recent[tuple[str, str], Decision] = Recent()  # by (client, request)
        self._decision_keep_s = settings.decision_keep_s
        self._next_drop = now + settings.decision_keep_s
        self._turned_away = 0  # requests in this tick that found every worker's queue full
        self._turned_away_before = 0  # such requests in the last tick

    # --- questions ------------------------------------------------------------------------------------------------------------------

    def answer(self, client_id: str, addr: Address, request: ScheduleRequest, now: float) -> ScheduleResponse | ScheduleError | None:
        """What to say to a client's question; None: nothing, because the question is older than one that has been answered."""
        kept = self._decisions.get((client_id, request.request_id))
        if kept is not None:
            if request.attempt < kept.attempt:
                return None  # the question was sent twice and comes late: its answer was used and given up
            if self._still_holds(kept, request, client_id):
                return kept.response
        started = self._stopwatch() if self._stopwatch else 0.0
        outcome = self.place(request, now)
        decision_s = self._stopwatch() - started if self._stopwatch else 0.0
        if isinstance(outcome, ScheduleError):
            self._events.append(RequestRefused(now, request.request_id, request.model, outcome.code))
            return outcome
        return self.dispatch(outcome, request, client_id, addr, decision_s, now)

    def _still_holds(self, kept: Decision, request: ScheduleRequest, client_id: str) -> bool:
        """The same question is asked again and its worker is READY. Otherwise the answer is forgotten, and the dispatch given up."""
        row = self._fleet.rows.get(kept.response.worker_id)
        if row is not None:
            if row.state == READY and request.attempt == kept.attempt:
                return True
            self._fleet.give_up(row, kept.response.dispatch.number)
        self._decisions.discard((client_id, request.request_id))
        return False

    def place(self, request: ScheduleRequest, now: float) -> Placement | ScheduleError:
        """The policy's placement, or why there is none. Nothing is entered anywhere but in the count of those turned away."""
        name, exclude = request.model, request.exclude
        tokens = request.prompt_tokens + request.max_tokens
        model = self._catalog.models.get(name)
        if model is None:
            return ScheduleError(request.request_id, UNKNOWN_MODEL, 0.0, f"model {name!r} is not in the catalogue"[:200])
        if not self.ready:
            return self._later(request, NOT_READY, self.ready_at - now, "listening for reports after a start")
        costs = self._costs
        kv_bytes = costs.kv_bytes(model, tokens)
        kinds = tuple([kind for kind in self._fleet.kinds.values() if kind.ready.rows and costs.fits(model, kind.hardware, kv_bytes)])
        if not kinds or 0 < model.context_tokens < tokens:
            return self._not_fitting(request, model, kv_bytes, now)
        if exclude and _are_all_excluded(kinds, exclude):
            exclude = ()  # a worker that failed once, and may have restarted since, is better than none
        trust, again = self._most_trusted(kinds, exclude), request.attempt > 0
        query = Query(model, request.prompt_tokens, request.max_tokens, kv_bytes, request.priority, exclude, kinds, now, self._rng, trust, again)
        placement = self._policy.place(query, self._view)
        if placement is None and again:  # a worker that is trusted less is better than none
            placement = self._policy.place(query.replace(again=False), self._view)
        if placement is None:
            return self._saturated(request, self._view.queued_max(query))
        if 0.0 < request.deadline_s < placement.eta_s:
            return ScheduleError(request.request_id, DEADLINE_UNMEETABLE, 0.0, f"the best estimate is {placement.eta_s:.3f} s")
        return placement

    def dispatch(
        self, placement: Placement, request: ScheduleRequest, client_id: str, addr: Address, decision_s: float, now: float
    ) -> ScheduleResponse:
        """Enter a placement into its worker's ledger, keep the decision, tell of it, and word the answer."""
        row, request_id, attempt = placement.row, request.request_id, request.attempt
        model, costs = self._catalog.models[request.model], self._costs
        kv_bytes = costs.kv_bytes(model, request.prompt_tokens + request.max_tokens)
        service_s = costs.service_s(model, row.hardware, request.prompt_tokens, request.max_tokens, row.engine.round_s)
        entry = Entry(request_id, request.model, placement.prefill_s, placement.load_s, kv_bytes, now, service_s)
        dispatch = self._fleet.dispatch(row, entry)
        row.note_client(client_id, addr, now)
        host, port = row.address
        response = ScheduleResponse(request_id, row.worker_id, host, port, placement.action, placement.eta_s, dispatch, placement.reason)
        if len(self._decisions.new) >= DECISIONS_MAX:
            self._decisions.turn()
        self._decisions.new[client_id, request_id] = Decision(response, attempt)
        self._events.append(RequestRouted(now, request_id, request.model, row.worker_id, placement.action, placement.eta_s, decision_s))
        return response

    def _most_trusted(self, kinds: tuple[Kind, ...], exclude: tuple[str, ...]) -> int:
        """The trust of the most trusted READY worker of these kinds that was not excluded."""
        excluded = [0, 0, 0]
        for worker_id in exclude:
            row = self._fleet.rows.get(worker_id)
            if row is not None and row.counted_as >= 0 and row.kind in kinds:
                excluded[row.counted_as] += 1
        for trust in (PROVEN, NEWCOMER):
            if sum([kind.trusted[trust] for kind in kinds]) > excluded[trust]:
                return trust
        return DOUBTFUL

    # --- errors ---------------------------------------------------------------------------------------------------------------------

    def _not_fitting(self, request: ScheduleRequest, model: Model, kv_bytes: int, now: float) -> ScheduleError:
        """No READY worker can hold the request. That is final when no worker heard of lately could, and every worker has had time to be heard."""
        request_id, tokens = request.request_id, request.prompt_tokens + request.max_tokens
        if 0 < model.context_tokens < tokens:
            detail = f"{request.prompt_tokens} + {request.max_tokens} tokens, the context of {model.name} is {model.context_tokens}"
            return ScheduleError(request_id, REQUEST_TOO_LARGE, 0.0, detail)
        known, fits = [kind.hardware for kind in self._fleet.kinds.values()], self._costs.fits
        if not known:
            return self._later(request, NO_WORKERS, self._tick_s, "no worker has been heard of")
        if any(fits(model, hardware, kv_bytes) for hardware in known):
            return self._later(request, NO_WORKERS, self._tick_s, "no worker that can hold it is ready")
        if now < self._sure_at:
            return self._later(request, NO_WORKERS, self._tick_s, "no worker heard of so far can hold it")
        largest = max(hardware.usable_gpu_bytes for hardware in known)
        if not any(fits(model, hardware, 0) for hardware in known):
            detail = f"{model.name} has {model.size_bytes} bytes of weights, the largest worker has room for {largest}"
            return ScheduleError(request_id, MODEL_TOO_LARGE, 0.0, detail)
        detail = f"{tokens} tokens need {kv_bytes} bytes of KV cache beside {model.size_bytes} of {model.name}, the largest worker has room for {largest}"
        return ScheduleError(request_id, REQUEST_TOO_LARGE, 0.0, detail)

    def _saturated(self, request: ScheduleRequest, limit: int) -> ScheduleError:
        """On every worker `limit` requests wait already. The more requests are turned away, the later they are to ask again."""
        self._turned_away += 1
        crowd = max(self._turned_away, self._turned_away_before) / (CROWD * self._fleet.states[READY])
        after_s = min(self._tick_s * max(1.0, crowd), max(RETRY_AFTER_MAX_S, self._tick_s))
        detail = f"on every worker that can hold it {limit} requests wait already, the limit for priority {request.priority}"
        return self._later(request, SATURATED, after_s, detail)

    def _later(self, request: ScheduleRequest, code: str, after_s: float, detail: str) -> ScheduleError:
        """An error that says when to ask again; jittered, so that the clients turned away do not come back together."""
        return ScheduleError(request.request_id, code, max(after_s, RETRY_AFTER_MIN_S) * (1.0 + self._rng.random()), detail)

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Once a report interval: count those turned away anew, and forget answers that nobody will ask for again."""
        self._turned_away_before, self._turned_away = self._turned_away, 0
        if now >= self._next_drop:
            self._drop_old_decisions(now)

    def _drop_old_decisions(self, now: float) -> None:
        self._next_drop = now + self._decision_keep_s
        self._decisions.turn()


def _are_all_excluded(kinds: tuple[Kind, ...], exclude: tuple[str, ...]) -> bool:
    """Every READY worker of these kinds is excluded. A kind with more workers than are excluded has another one among the first."""
    return all(row.worker_id in exclude for kind in kinds for row in kind.ready.rows[: len(exclude) + 1])
