"""The coordinator: hears load reports, tracks workers, and says where each model request goes.

It keeps nothing but what the reports tell it, and is never in the path of a request's data:

    LoadReport       -> the worker's row, its member state, its acknowledged dispatches; now and then a ReportAck
    ScheduleRequest  -> the policy's placement and a ScheduleResponse, or a ScheduleError that says why not
    every tick       -> silent workers become SUSPECT, then DEAD, unless too many fell silent at once; their clients are told (WorkerLost)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from random import Random
from typing import NamedTuple

from config import Config
from sllm.fleet.ledger import Entry
from sllm.fleet.table import DEAD, DOUBTFUL, EXPIRED, GONE, NEWCOMER, NO_CLIENTS, PROVEN, SILENT, SUSPECT, Fleet, Kind, Row, note_client
from sllm.models.catalogue import Catalog, Model
from sllm.placement.base import FleetView, Placement, Policy, Query
from sllm.placement.costs import make_costs
from sllm.protocol.errors import UsageError
from sllm.protocol.events import (
    CoordinatorReady,
    ExpiryHeld,
    ExpiryResumed,
    HardwareUnknown,
    RequestRefused,
    RequestRouted,
    RivalGone,
    RivalSeen,
    TableFull,
    WorkerDisplaced,
    WorkerStateChanged,
)
from sllm.protocol.messages import (
    COORDINATOR_ID,
    DEADLINE_UNMEETABLE,
    MODEL_TOO_LARGE,
    NO_WORKERS,
    NOT_READY,
    READY,
    REQUEST_TOO_LARGE,
    SATURATED,
    UNKNOWN_MODEL,
    Address,
    Enveloped,
    LoadReport,
    ReportAck,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
    WorkerLost,
)
from sllm.protocol.node import FRESH_WITHIN_S, Codec, Node, new_tuple
from sllm.protocol.recent import Recent
from sllm.protocol.timers import NEVER, Wheel

CHORES_MAX = 64  # silent rows looked at in one go; the rest wait for `CHORE_PAUSE_S`, so that no datagram waits for 100,000 of them
CHORE_PAUSE_S = 0.001
SILENCE_STEPS = 8  # of the wheel in which silence comes due, in a tick
CROWD = 10  # requests turned away in a tick for each READY worker; more are told to come back later, so that those who wait are not a load of their own
RIVAL_KEPT_INTERVALS = 10.0  # report intervals for which a worker's word of a second coordinator holds
RETRY_AFTER_MAX_S = 30.0  # before jitter
SURE_INTERVALS = 3.0  # report intervals after a start: one of listening, two more; what nobody can hold by then is refused for good
FULL_TOLD_EVERY_S = 60.0
DECISIONS_MAX = 200_000  # placements in each of two generations that are said again when asked again: a usual fleet makes fewer in `DECISION_KEEP`
UNKNOWN_HARDWARE_MAX = 100  # names of hardware told of, so that a peer cannot fill our memory with them
HOLD_AFTER_STALL_INTERVALS = 3.0  # after a stall of our own, reports get so long to come in before anybody is called silent


class Decision(NamedTuple):
    """An answer given, kept so that the same question gets it again."""

    response: ScheduleResponse
    attempt: int


class Coordinator(Node):
    """One coordinator. `stopwatch` (seconds, any origin) measures how long placements take; without it they count as 0."""

    __slots__ = (
        "_ack_every", "_decisions", "_full_told_at", "_held_since", "_hold_until", "_next_chore", "_next_drop", "_next_tick", "_ready_at", "_rival_at", "_rng",
        "_silence", "_stopwatch", "_sure_at", "_tick_s", "_turned_away", "_turned_away_before", "_unknown_hardware", "_view", "catalog", "config", "degraded",
        "fleet", "policy", "ready", "reports_accepted", "reports_rejected", "rival",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        policy: Policy,
        rng: Random,
        incarnation: int,
        *,
        node_id: str = COORDINATOR_ID,
        codec: Codec | None = None,
        wall_offset_s: float = 0.0,
        stopwatch: Callable[[], float] | None = None,
        now: float = 0.0,
    ) -> None:
        super().__init__(node_id, incarnation, codec=codec, wall_offset_s=wall_offset_s, life_timeout_s=config.life_timeout_s)
        self.config = config
        self.catalog = catalog
        self.policy = policy
        self.fleet = Fleet(catalog.models)
        self.reports_accepted = 0
        self.reports_rejected: Counter[str] = Counter()
        self.ready = config.report_interval_s == 0.0
        self.rival = False  # workers say that another coordinator runs beside this one
        self.degraded = ""  # why expiry is held, or ""
        self._rng = rng
        self._stopwatch = stopwatch
        costs = make_costs(config.engine, config.service_mean_s, config.service_load_s)
        self._view = FleetView(self.fleet, costs, config.queue_threshold, config.memory_threshold)
        self._decisions: Recent[tuple[str, str], Decision] = Recent()
        self._tick_s = config.report_interval_s or 1.0
        self._silence: Wheel[Row] = Wheel(self._tick_s / SILENCE_STEPS)
        self._ready_at = now + config.report_interval_s
        self._next_tick = now + self._tick_s
        self._next_drop = now + config.decision_keep_s
        self._next_chore = inf  # when to go on with what the last tick left
        self._hold_until = now
        self._rival_at = -inf  # when a worker said so last
        self._held_since = inf  # most of the fleet has been silent since then
        self._unknown_hardware: set[str] = set()  # told of already
        self._full_told_at = -inf  # when it was last told that the table is full
        self._sure_at = now + SURE_INTERVALS * self._tick_s  # by then every worker that lives has been heard
        self._turned_away = 0  # requests, in this tick: every worker's queue was full
        self._turned_away_before = 0  # in the last one
        self._ack_every = config.reports_per_ack
        self.handlers = {LoadReport: self._on_report, ScheduleRequest: self._on_schedule_request}
        self._plan()

    # --- reports --------------------------------------------------------------------------------------------------------------------

    def _on_report(self, envelope: Enveloped[LoadReport], addr: Address, now: float) -> None:
        """A report is applied only if its (incarnation, sequence) is newer than the last one applied."""
        sender_id, incarnation, sequence, _, report = envelope
        fleet = self.fleet
        row = fleet.rows.get(sender_id)
        how = "reported"
        if row is not None and incarnation == row.incarnation:
            if sequence <= row.sequence and now - row.heard_at > 2.0 * FRESH_WITHIN_S:  # whatever could be replayed is stale by now:
                row.sequence = sequence - 1  # somebody else had spoken for this life with too high a number
            if sequence <= row.sequence:
                reason = "replayed" if sequence == row.sequence else "out_of_order"
                self.rejected[reason] += 1  # as `judge_report` would: an envelope is refused like the same bytes
                self._refuse_report(sender_id, reason)
                return
        elif row is not None:
            if incarnation < row.incarnation and now - row.heard_at < self._timeout_s(row):
                self._refuse_report(sender_id, "old_incarnation")
                self._tell_displaced(row, incarnation, sequence, addr, now)
                return
            how = "restarted"  # a lower number: the known life has been silent for the timeout, so the clock was set back
        if row is None or report.hardware != row.kind.hardware.name:
            row = self._fit_in(sender_id, row, report, now)
            if row is None:
                return
        self.reports_accepted += 1
        if report.rival:
            self._rival_at = now
            self._look_for_rival(now)
        fleet.apply(row, incarnation, sequence, report, self.incarnation, now)
        if row.report is not report and self.codec is not None:  # it named models outside the catalogue
            self.codec.forget(sender_id)
        host, port = report.host, report.port
        row.address = (host or addr[0], port or addr[1]) if host or port else addr
        if row.ledger.entries:
            fleet.expire_dispatches(row, now - self.config.dispatch_expiry_intervals * report.interval_s)
        if row.state != report.state:
            self._step(row, report.state, now, how)
            if row.state not in GONE:
                self._silence.set(row, self._silence_deadline(row))
        if (sequence + incarnation) % self._ack_every == 0 or sequence == 1:  # a fleet that started together is not acknowledged all at once
            self.send(ReportAck(self.incarnation, sequence), addr, now)

    def _refuse_report(self, sender_id: str, reason: str) -> None:
        """A report was read and is not applied: nothing of it stays, so that refused reports fill no memory."""
        self.reports_rejected[reason] += 1
        if self.codec is not None:
            self.codec.forget(sender_id)

    def _forget(self, row: Row) -> None:
        """Drop a worker that is gone."""
        self.fleet.forget(row)
        if self.codec is not None:
            self.codec.forget(row.worker_id)

    def _tell_displaced(self, row: Row, incarnation: int, sequence: int, addr: Address, now: float) -> None:
        """Two lives report under one name. The older one is told now and then, so that it knows why it gets nothing; it may come back when the newer is
        silent for the timeout."""
        if row.displaced != incarnation:
            row.displaced = incarnation
            self.events.append(WorkerDisplaced(now, row.worker_id, incarnation, addr[0]))
            self.send(WorkerLost(row.worker_id, incarnation), addr, now)
        elif (sequence + incarnation) % self._ack_every == 0:
            self.send(WorkerLost(row.worker_id, incarnation), addr, now)

    def judge_report(self, sender_id: str, incarnation: int, sequence: int, now: float) -> str:
        """A report that is not newer costs no look at its body: replays are what a flood without the key can make of real reports."""
        row = self.fleet.rows.get(sender_id)
        if row is None or incarnation != row.incarnation or sequence > row.sequence:
            return ""
        reason = "replayed" if sequence == row.sequence else "out_of_order"
        self.reports_rejected[reason] += 1
        return reason

    def refuse(self, kind: type, reason: str, now: float) -> str:
        if kind is LoadReport:
            self.reports_rejected[reason] += 1
        return reason

    def _fit_in(self, worker_id: str, row: Row | None, report: LoadReport, now: float) -> Row | None:
        """The row of a worker never heard of, or of one that has other hardware now. None: it names hardware that we cannot cost."""
        try:
            hardware = self.catalog.get_hardware(report.hardware)
        except UsageError:
            self._refuse_report(worker_id, "unknown_hardware")
            if report.hardware not in self._unknown_hardware and len(self._unknown_hardware) < UNKNOWN_HARDWARE_MAX:
                self._unknown_hardware.add(report.hardware)
                self.events.append(HardwareUnknown(now, worker_id, report.hardware))
            return None
        if row is not None:
            self.fleet.refit(row, hardware)
            return row
        if len(self.fleet) >= self.config.workers_max and not self._make_room(now):
            self._refuse_report(worker_id, "table_full")
            return None
        return self.fleet.admit(worker_id, hardware, report, self.incarnation)

    def _make_room(self, now: float) -> bool:
        """The table is full: forget the worker that went first. False, and the report is refused, when every row is still wanted."""
        oldest = next(iter(self.fleet.gone.values()), None)
        if oldest is not None and oldest.due == NEVER:  # else the wheel would hold it until its slot: what is forgotten must be gone from memory too
            self._forget(oldest)
            return True
        if now - self._full_told_at >= FULL_TOLD_EVERY_S:
            self._full_told_at = now
            self.events.append(TableFull(now, self.node_id, self.config.workers_max))
        return False

    def _step(self, row: Row, what: str, now: float, reason: str) -> None:
        """Apply a member transition and tell of it."""
        moved = self.fleet.step(row, what)
        if moved:
            self.events.append(WorkerStateChanged(now, row.worker_id, row.incarnation, moved[0], moved[1], reason))
            if row.clients and moved[1] in (SUSPECT, DEAD):
                self._tell_clients(row, now)

    def _tell_clients(self, row: Row, now: float) -> None:
        """Those whose requests may be on a worker that is not heard any more should place them again."""
        for client_addr, placed_at in row.clients.values():
            if now - placed_at < self.config.forget_after_s:
                self.send(WorkerLost(row.worker_id, row.incarnation), client_addr, now)
        if row.state == DEAD:
            row.clients = NO_CLIENTS

    def _look_for_rival(self, now: float) -> None:
        """Tell when workers first say that another coordinator runs beside this one, and when none has said so for some time."""
        rival = now - self._rival_at < RIVAL_KEPT_INTERVALS * self._tick_s
        if rival != self.rival:
            self.rival = rival
            self.events.append(RivalSeen(now, self.node_id) if rival else RivalGone(now, self.node_id))

    # --- schedule requests ----------------------------------------------------------------------------------------------------------

    def _on_schedule_request(self, envelope: Enveloped[ScheduleRequest], addr: Address, now: float) -> None:
        sender_id, _, _, _, request = envelope
        request_id, model = request.request_id, request.model
        key = (sender_id, request_id)
        before = self._decisions.get(key)
        if before is not None:
            if request.attempt < before.attempt:
                return  # a question sent twice, late: its answer was used and given up
            row = self.fleet.rows.get(before.response.worker_id)
            if row is not None and row.state == READY and request.attempt == before.attempt:
                self.send(before.response, addr, now)
                return
            if row is not None:  # the client has given that placement up
                self.fleet.give_up(row, before.response.dispatch.number)
            self._decisions.discard(key)
        started = self._stopwatch() if self._stopwatch else 0.0
        outcome = self._decide(request, now)
        decision_s = self._stopwatch() - started if self._stopwatch else 0.0
        if isinstance(outcome, ScheduleError):
            self.events.append(RequestRefused(now, request_id, model, outcome.code))
            self.send(outcome, addr, now)
            return
        response = self._dispatch(outcome, request, now)
        note_client(outcome.row, sender_id, addr, now)
        if len(self._decisions.new) >= DECISIONS_MAX:
            self._decisions.turn()
        self._decisions.new[key] = new_tuple(Decision, (response, request.attempt))
        row, action, eta_s = outcome.row, outcome.action, outcome.eta_s
        self.events.append(RequestRouted(now, request_id, model, row.worker_id, action, eta_s, decision_s))
        self.send(response, addr, now)

    def _decide(self, request: ScheduleRequest, now: float) -> Placement | ScheduleError:
        """The policy's placement, or why there is none."""
        request_id, name, prompt_tokens, max_tokens, priority, deadline_s, exclude, attempt = request
        model = self.catalog.models.get(name)
        if model is None:
            return ScheduleError(request_id, UNKNOWN_MODEL, 0.0, f"model {name!r} is not in the catalogue"[:200])
        if not self.ready:
            return self._later(request, NOT_READY, self._ready_at - now, "listening for reports after a start")
        kv_bytes = self._view.costs.kv_bytes(model, prompt_tokens + max_tokens)
        kinds = tuple([kind for kind in self.fleet.kinds.values() if kind.ready.rows and self._view.costs.fits(model, kind.hardware, kv_bytes)])
        if not kinds or 0 < model.context_tokens < prompt_tokens + max_tokens:
            return self._not_fitting(request, model, kv_bytes, now)
        if exclude and self._are_all_excluded(kinds, exclude):
            exclude = ()  # a worker that failed once (it may have restarted since) is better than none
        trust, again = self._most_trusted(kinds, exclude), attempt > 0
        query = new_tuple(Query, (model, prompt_tokens, max_tokens, kv_bytes, priority, exclude, kinds, now, self._rng, trust, again))
        placement = self.policy.place(query, self._view)
        if placement is None and again:  # a worker that is trusted less is better than none
            placement = self.policy.place(query._replace(again=False), self._view)
        if placement is None:
            self._turned_away += 1
            crowd = max(self._turned_away, self._turned_away_before) / (CROWD * self.fleet.states[READY])
            after_s = min(self._tick_s * max(1.0, crowd), max(RETRY_AFTER_MAX_S, self._tick_s))
            limit = self._view.queued_max(query)
            return self._later(
                request, SATURATED, after_s, f"on every worker that can hold it {limit} requests wait already, the limit for priority {priority}"
            )
        if 0.0 < deadline_s < placement.eta_s:
            return ScheduleError(request_id, DEADLINE_UNMEETABLE, 0.0, f"the best estimate is {placement.eta_s:.3f} s")
        return placement

    def _most_trusted(self, kinds: tuple[Kind, ...], exclude: tuple[str, ...]) -> int:
        """How far the most trusted READY worker of these kinds is that was not excluded."""
        excluded = [0, 0, 0]
        for worker_id in exclude:
            row = self.fleet.rows.get(worker_id)
            if row is not None and row.counted_as >= 0 and row.kind in kinds:
                excluded[row.counted_as] += 1
        for trust in (PROVEN, NEWCOMER):
            if sum(kind.trusted[trust] for kind in kinds) > excluded[trust]:
                return trust
        return DOUBTFUL

    @staticmethod
    def _are_all_excluded(kinds: tuple[Kind, ...], exclude: tuple[str, ...]) -> bool:
        return all(row.worker_id in exclude for kind in kinds for row in kind.ready.rows[: len(exclude) + 1])

    def _not_fitting(self, request: ScheduleRequest, model: Model, kv_bytes: int, now: float) -> ScheduleError:
        """No READY worker can hold the request. That is final when no worker heard of lately could, and everybody has had time to be heard."""
        request_id, tokens = request.request_id, request.prompt_tokens + request.max_tokens
        if 0 < model.context_tokens < tokens:
            detail = f"{request.prompt_tokens} + {request.max_tokens} tokens, the context of {model.name} is {model.context_tokens}"
            return ScheduleError(request_id, REQUEST_TOO_LARGE, 0.0, detail)
        known, fits = [kind.hardware for kind in self.fleet.kinds.values()], self._view.costs.fits
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

    def _later(self, request: ScheduleRequest, code: str, after_s: float, detail: str) -> ScheduleError:
        """An error worth asking again after; jittered, so that those turned away do not come back together."""
        return ScheduleError(request.request_id, code, max(after_s, 0.01) * (1.0 + self._rng.random()), detail)

    def _dispatch(self, placement: Placement, request: ScheduleRequest, now: float) -> ScheduleResponse:
        """Enter the placement into the ledger and word the answer."""
        row, action, eta_s, prefill_s, load_s, reason = placement
        request_id, model = request.request_id, self.catalog.models[request.model]
        kv_bytes = self._view.costs.kv_bytes(model, request.prompt_tokens + request.max_tokens)
        service_s = self._view.costs.service_s(model, row.hardware, request.prompt_tokens, request.max_tokens, row.report.round_s)
        entry = new_tuple(Entry, (request_id, request.model, prefill_s, load_s, kv_bytes, now, service_s))
        dispatch = self.fleet.dispatch(row, entry, self.incarnation)
        host, port = row.address
        fields = request_id, row.worker_id, host, port, action, eta_s, dispatch, reason
        response: ScheduleResponse = new_tuple(ScheduleResponse, fields)
        return response

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        if not self.ready and now >= self._ready_at:
            self.ready = True
            self.events.append(CoordinatorReady(now, self.fleet.states[READY]))
        self._do_chores(now)
        self._plan()

    def _plan(self) -> None:
        """When to wake next."""
        self.wake_at = min(self._next_tick, self._next_chore, inf if self.ready else self._ready_at)

    def _do_chores(self, now: float) -> None:
        """What every tick brings, and what the last one left."""
        if now >= self._next_tick:
            if now - self._next_tick > self.config.stall_s:
                self._hold_until = now + HOLD_AFTER_STALL_INTERVALS * self._tick_s
            self._next_tick = now + self._tick_s
            self._turned_away_before, self._turned_away = self._turned_away, 0
            if self.rival:
                self._look_for_rival(now)
        elif now < self._next_chore:
            return
        self._check_silence(now)
        more = self._forget_gone(now) or self._silence.has_due(now)
        if now >= self._next_drop:
            self._drop_old_decisions(now)
        self._next_chore = now + CHORE_PAUSE_S if more else inf

    def _check_silence(self, now: float) -> None:
        """Move silent workers on, some at a time. A worker is looked at only when it would be silent if nothing came, so a report need not touch the wheel."""
        overdue: list[Row] = []
        for row in self._silence.take(now, CHORES_MAX):
            if row.state in GONE:  # `_forget_gone` sees to it
                continue
            due = self._silence_deadline(row)
            if due > now:
                self._silence.set(row, due)
            else:
                overdue.append(row)
        self._hold_or_resume(overdue, now)
        for row in overdue:
            if now >= self._hold_until:
                if row.state != SUSPECT:
                    self._step(row, SILENT, now, f"silent for {now - row.heard_at:.1f} s")
                elif not self.degraded:
                    self._step(row, EXPIRED, now, f"silent for {now - row.heard_at:.1f} s")
            if row.state not in GONE:
                self._silence.set(row, max(self._silence_deadline(row), now + self._tick_s))

    def _forget_gone(self, now: float) -> bool:
        """Drop workers that went long ago, some at a time. True: there are more."""
        for _ in range(CHORES_MAX):
            row = next(iter(self.fleet.gone.values()), None)
            if row is None or row.heard_at + self.config.forget_after_s > now:
                return False
            self._forget(row)
            row.due = NEVER
        return True

    def _silence_deadline(self, row: Row) -> float:
        """When the row's silence means something next."""
        if row.state == SUSPECT:
            return row.heard_at + self._timeout_s(row)
        return row.heard_at + self.config.suspect_intervals * row.report.interval_s

    def _timeout_s(self, row: Row) -> float:
        """Silent for so long, a life of a worker is over. Longer than the timeout where reports are so rare that a timeout between two of them is usual."""
        return max(self.config.worker_timeout_s, self.config.suspect_intervals * row.report.interval_s)

    def _hold_or_resume(self, overdue: list[Row], now: float) -> None:
        """Our own deafness looks like everybody's death: then nobody is declared dead until reports come again."""
        states = self.fleet.states
        known = len(self.fleet) - sum(states[state] for state in GONE)
        silent = states[SUSPECT] + sum(row.state != SUSPECT for row in overdue)
        why = ""
        if now < self._hold_until:
            why = "our own loop stalled"
        if silent <= self.config.hold_fraction * known or known <= 1:
            self._held_since = inf
        elif not why:
            self._held_since = min(self._held_since, now)
            if now - self._held_since < self.config.hold_max_s:
                why = "most of the fleet fell silent at once"
        if why and not self.degraded:
            self.events.append(ExpiryHeld(now, silent, known, why))
        elif self.degraded and not why:
            self.events.append(ExpiryResumed(now))
        self.degraded = why

    def _drop_old_decisions(self, now: float) -> None:
        self._next_drop = now + self.config.decision_keep_s
        self._decisions.turn()
