"""The coordinator: hears load reports, tracks workers, and says where each model request goes.

It keeps nothing but what the reports tell it, and is never in the path of a request's data:

    LoadReport       -> the worker's row, its member state, its acknowledged dispatches; now and then a ReportAck
    ScheduleRequest  -> the policy's placement and a ScheduleResponse, or a ScheduleError that says why not
    every tick       -> silent workers become SUSPECT, then DEAD, unless too many fell silent at once
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from random import Random
from typing import NamedTuple

from config import Config
from sllm.catalog import Catalog
from sllm.dispatch import Entry
from sllm.errors import UsageError
from sllm.events import CoordinatorReady, ExpiryHeld, ExpiryResumed, RequestRefused, RequestRouted, WorkerStateChanged
from sllm.fleet import DEAD, EXPIRED, SILENT, SUSPECT, Fleet, Row
from sllm.messages import (
    COLD_START,
    DEADLINE_UNMEETABLE,
    NO_WORKERS,
    NOT_READY,
    READY,
    SATURATED,
    UNKNOWN_MODEL,
    Address,
    Enveloped,
    LoadReport,
    ReportAck,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
)
from sllm.node import Codec, Node, new_tuple
from sllm.placement.base import FleetView, Placement, Policy, Query
from sllm.placement.costs import make_costs
from sllm.recent import Recent
from sllm.timers import Wheel

CHORES_MAX = 64  # silent rows looked at in one go; the rest wait for `CHORE_PAUSE_S`, so that no datagram waits for 100,000 of them
CHORE_PAUSE_S = 0.001
SILENCE_STEPS = 8  # of the wheel in which silence comes due, in a tick
CROWD = 10  # requests turned away in a tick for each READY worker; more are told to come back later, so that those who wait are not a load of their own
RETRY_AFTER_MAX_S = 30.0  # before jitter
HOLD_AFTER_STALL_INTERVALS = 3.0  # after a stall of our own, reports get so long to come in before anybody is called silent


class Decision(NamedTuple):
    """An answer given, kept so that the same question gets it again."""

    response: ScheduleResponse
    exclude: tuple[str, ...]


class Coordinator(Node):
    """One coordinator. `stopwatch` (seconds, any origin) measures how long placements take; without it they count as 0."""

    __slots__ = (
        "_ack_every", "_decisions", "_hold_until", "_next_chore", "_next_drop", "_next_tick", "_ready_at", "_rng", "_silence", "_stopwatch", "_tick_s",
        "_turned_away", "_turned_away_before", "_view", "catalog", "config", "degraded", "fleet", "policy", "ready", "reports_accepted", "reports_rejected",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        policy: Policy,
        rng: Random,
        incarnation: int,
        *,
        node_id: str = "coordinator",
        codec: Codec | None = None,
        wall_offset_s: float = 0.0,
        stopwatch: Callable[[], float] | None = None,
        now: float = 0.0,
    ) -> None:
        super().__init__(node_id, incarnation, codec=codec, wall_offset_s=wall_offset_s)
        self.config = config
        self.catalog = catalog
        self.policy = policy
        self.fleet = Fleet()
        self.reports_accepted = 0
        self.reports_rejected: Counter[str] = Counter()
        self.ready = config.report_interval_s == 0.0
        self.degraded = ""  # why expiry is held, or ""
        self._rng = rng
        self._stopwatch = stopwatch
        self._view = FleetView(self.fleet, make_costs(config.engine, config.service_mean_s), config.queue_threshold, config.memory_threshold)
        self._decisions: Recent[tuple[str, str], Decision] = Recent()
        self._tick_s = config.report_interval_s or 1.0
        self._silence: Wheel[Row] = Wheel(self._tick_s / SILENCE_STEPS)
        self._ready_at = now + config.report_interval_s
        self._next_tick = now + self._tick_s
        self._next_drop = now + config.decision_keep_s
        self._next_chore = inf  # when to go on with what the last tick left
        self._hold_until = now
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
        if row is None:
            new = self._admit(sender_id, report, now)
            if new is None:
                return
            row = new
        elif incarnation == row.incarnation:
            if sequence <= row.sequence:
                self.reports_rejected["replayed" if sequence == row.sequence else "out_of_order"] += 1
                return
        elif incarnation < row.incarnation:
            self.reports_rejected["old_incarnation"] += 1
            return
        else:
            how = "restarted"
        self.reports_accepted += 1
        fleet.apply(row, incarnation, sequence, report, self.incarnation, now)
        host, port = report.host, report.port
        row.address = (host or addr[0], port or addr[1]) if host or port else addr
        if row.ledger.entries:
            fleet.expire_dispatches(row, now - self.config.dispatch_expiry_intervals * report.interval_s)
        if row.state != report.state:
            self._step(row, report.state, now, how)
            self._silence.set(row, self._silence_deadline(row))
        if (sequence + incarnation) % self._ack_every == 0 or sequence == 1:  # a fleet that started together is not acknowledged all at once
            self.send(ReportAck(self.incarnation, sequence), addr, now)

    def refuse_stale(self, kind: type) -> str:
        reason = super().refuse_stale(kind)
        if kind is LoadReport:
            self.reports_rejected[reason] += 1
        return reason

    def _admit(self, worker_id: str, report: LoadReport, now: float) -> Row | None:
        """A worker never heard of: a new row, unless it names hardware that we cannot cost."""
        try:
            hardware = self.catalog.get_hardware(report.hardware)
        except UsageError:
            self.reports_rejected["unknown_hardware"] += 1
            return None
        row = self.fleet.rows[worker_id] = Row(worker_id, hardware, report)
        self._silence.set(row, now + self.config.suspect_intervals * report.interval_s)
        return row

    def _step(self, row: Row, what: str, now: float, reason: str) -> None:
        """Apply a member transition and tell of it."""
        moved = self.fleet.step(row, what)
        if moved:
            self.events.append(WorkerStateChanged(now, row.worker_id, row.incarnation, moved[0], moved[1], reason))

    # --- schedule requests ----------------------------------------------------------------------------------------------------------

    def _on_schedule_request(self, envelope: Enveloped[ScheduleRequest], addr: Address, now: float) -> None:
        sender_id, _, _, _, request = envelope
        request_id, model = request.request_id, request.model
        key = (sender_id, request_id)
        before = self._decisions.get(key)
        if before is not None:
            row = self.fleet.rows.get(before.response.worker_id)
            if row is not None and row.state == READY and request.exclude == before.exclude:
                self.send(before.response, addr, now)
                return
            if row is not None:  # the client has given that placement up
                self.fleet.release(row, before.response.dispatch.number)
            self._decisions.discard(key)
        started = self._stopwatch() if self._stopwatch else 0.0
        outcome = self._decide(request, now)
        decision_s = self._stopwatch() - started if self._stopwatch else 0.0
        if isinstance(outcome, ScheduleError):
            self.events.append(RequestRefused(now, request_id, model, outcome.code))
            self.send(outcome, addr, now)
            return
        response = self._dispatch(outcome, request, now)
        self._decisions.new[key] = new_tuple(Decision, (response, request.exclude))
        row, action, eta_s, _, _ = outcome
        self.events.append(new_tuple(RequestRouted, (now, request_id, model, row.worker_id, action, eta_s, decision_s)))
        self.send(response, addr, now)

    def _decide(self, request: ScheduleRequest, now: float) -> Placement | ScheduleError:
        """The policy's placement, or why there is none."""
        request_id, name, prompt_tokens, max_tokens, priority, deadline_s, exclude = request
        model = self.catalog.models.get(name)
        if model is None:
            return ScheduleError(request_id, UNKNOWN_MODEL, 0.0, f"model {name!r} is not in the catalogue"[:200])
        if not self.ready:
            return self._later(request, NOT_READY, self._ready_at - now, "listening for reports after a start")
        if not self.fleet.ready.rows:
            return self._later(request, NO_WORKERS, self._tick_s, "no worker is ready")
        if exclude and all(row.worker_id in exclude for row in self.fleet.ready.rows[: len(exclude) + 1]):
            exclude = ()  # a worker that failed once (it may have restarted since) is better than none
        query = new_tuple(Query, (model, prompt_tokens, max_tokens, priority, exclude, now, self._rng))
        placement = self.policy.place(query, self._view)
        if placement is None:
            self._turned_away += 1
            crowd = max(self._turned_away, self._turned_away_before) / (CROWD * len(self.fleet.ready))
            after_s = min(self._tick_s * max(1.0, crowd), max(RETRY_AFTER_MAX_S, self._tick_s))
            return self._later(request, SATURATED, after_s, "every worker's queue is full for this priority")
        if 0.0 < deadline_s < placement.eta_s:
            return ScheduleError(request_id, DEADLINE_UNMEETABLE, 0.0, f"the best estimate is {placement.eta_s:.3f} s")
        return placement

    def _later(self, request: ScheduleRequest, code: str, after_s: float, detail: str) -> ScheduleError:
        """An error worth asking again after; jittered, so that those turned away do not come back together."""
        return ScheduleError(request.request_id, code, max(after_s, 0.01) * (1.0 + self._rng.random()), detail)

    def _dispatch(self, placement: Placement, request: ScheduleRequest, now: float) -> ScheduleResponse:
        """Enter the placement into the ledger and word the answer."""
        row, action, eta_s, cost_s, reason = placement
        request_id = request.request_id
        entry = new_tuple(Entry, (request_id, cost_s, request.model, action == COLD_START, now))
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
        elif now < self._next_chore:
            return
        self._check_silence(now)
        if now >= self._next_drop:
            self._drop_old_decisions(now)
        self._next_chore = now + CHORE_PAUSE_S if self._silence.has_due(now) else inf

    def _check_silence(self, now: float) -> None:
        """Move silent workers on, some at a time. A worker is looked at only when it would be silent if nothing came, so a report need not touch the wheel."""
        overdue: list[Row] = []
        for row in self._silence.take(now, CHORES_MAX):
            due = self._silence_deadline(row)
            if due > now:
                self._silence.set(row, due)
            elif row.state == DEAD:
                self.fleet.forget(row)
            else:
                overdue.append(row)
        self._hold_or_resume(overdue, now)
        for row in overdue:
            if now >= self._hold_until:
                if row.state != SUSPECT:
                    self._step(row, SILENT, now, f"silent for {now - row.heard_at:.1f} s")
                elif not self.degraded:
                    self._step(row, EXPIRED, now, f"silent for {now - row.heard_at:.1f} s")
            self._silence.set(row, max(self._silence_deadline(row), now + self._tick_s))

    def _silence_deadline(self, row: Row) -> float:
        """When the row's silence means something next."""
        if row.state == DEAD:
            return row.heard_at + self.config.forget_after_s
        if row.state == SUSPECT:
            return row.heard_at + max(self.config.worker_timeout_s, self.config.suspect_intervals * row.report.interval_s)
        return row.heard_at + self.config.suspect_intervals * row.report.interval_s

    def _hold_or_resume(self, overdue: list[Row], now: float) -> None:
        """Our own deafness looks like everybody's death: then nobody is declared dead until reports come again."""
        states = self.fleet.states
        known = len(self.fleet) - states[DEAD]
        silent = states[SUSPECT] + sum(row.state != SUSPECT for row in overdue)
        if now < self._hold_until:
            why = "our own loop stalled"
        elif silent > self.config.hold_fraction * known and known > 1:
            why = "most of the fleet fell silent at once"
        else:
            why = ""
        if why and not self.degraded:
            self.events.append(ExpiryHeld(now, silent, known, why))
        elif self.degraded and not why:
            self.events.append(ExpiryResumed(now))
        self.degraded = why

    def _drop_old_decisions(self, now: float) -> None:
        self._next_drop = now + self.config.decision_keep_s
        self._decisions.turn()
