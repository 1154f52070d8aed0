"""Membership: which workers there are, by their reports and by their silence.

    hear(report)     -> the worker's row, brought up to date; or the report is refused and counted by reason
    handle_timer()   -> silent workers become SUSPECT, then DEAD, unless too many fell silent at once; workers long gone are forgotten

The membership belongs to whoever hears reports. It has no socket and knows no role: it tells events into the list that its owner gives, and collects whom to
write to (`notices`) and whose last words need not be kept any more (`forgotten`) until the owner takes them.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from typing import Protocol

from sllm.fleet.hold import Hold
from sllm.fleet.row import NO_CLIENTS, Row
from sllm.fleet.states import DEAD, EXPIRED, GONE, LEFT, SILENT, SUSPECT
from sllm.fleet.table import Fleet
from sllm.models.catalogue import Catalog
from sllm.protocol.errors import UsageError
from sllm.protocol.events import Event, ExpiryHeld, ExpiryResumed, HardwareUnknown, TableFull, WorkerDisplaced, WorkerStateChanged
from sllm.protocol.messages import Address, LoadReport, WorkerLost
from sllm.protocol.replay import FRESH_WITHIN_S
from sllm.protocol.timers import NEVER, Wheel

CHORES_MAX = 64  # silent rows looked at in one go; the rest wait for `CHORE_PAUSE_S`, so that no datagram waits for 100,000 rows
CHORE_PAUSE_S = 0.001
SILENCE_STEPS = 8  # steps of the silence wheel in a tick
FULL_TOLD_EVERY_S = 60.0
UNKNOWN_HARDWARE_MAX = 100  # names of hardware told of, so that a peer cannot fill our memory with names
HOLD_AFTER_STALL_INTERVALS = 3.0  # report intervals that reports have to come in, after a stall of our own, before any worker is called silent

# How a report stands to what its worker's row has heard (`Membership.classify`); the words are those of the counters and of the events.
FIRST = "first"  # of a worker without a row
NEWER = "newer"
RESTARTED = "restarted"  # of another life, which takes the place of the known one
RENUMBERED = "renumbered"  # of the known life, with a lower number, and valid all the same
REPLAYED = "replayed"
OUT_OF_ORDER = "out_of_order"
OLD_INCARNATION = "old_incarnation"  # of an earlier life
REFUSED = (REPLAYED, OUT_OF_ORDER, OLD_INCARNATION)


class MembershipSettings(Protocol):
    """What a membership reads of the configuration of its process."""

    @property
    def report_interval_s(self) -> float: ...
    @property
    def reports_per_ack(self) -> int: ...
    @property
    def worker_timeout_s(self) -> float: ...
    @property
    def suspect_intervals(self) -> float: ...
    @property
    def forget_after_s(self) -> float: ...
    @property
    def workers_max(self) -> int: ...
    @property
    def dispatch_expiry_intervals(self) -> float: ...
    @property
    def hold_fraction(self) -> float: ...
    @property
    def hold_max_s(self) -> float: ...
    @property
    def stall_s(self) -> float: ...


class Membership:
    """The workers known to one node. `owner_id` and `epoch` are the node's id and its incarnation, `events` is where the membership tells what happens."""

    __slots__ = (
        "_catalog", "_dispatch_expiry_intervals", "_forget_after_s", "_full_told_at", "_hold", "_next_chore", "_next_tick", "_owner_id",
        "_reports_per_ack", "_silence", "_stall_s", "_suspect_intervals", "_unknown_hardware", "_worker_timeout_s", "_workers_max", "accepted", "events",
        "fleet", "forgotten", "notices", "rejected", "tick_s", "wake_at",
    )  # fmt: skip

    def __init__(self, settings: MembershipSettings, catalog: Catalog, owner_id: str, epoch: int, events: list[Event], now: float) -> None:
        self._reports_per_ack = settings.reports_per_ack
        self._worker_timeout_s = settings.worker_timeout_s
        self._suspect_intervals = settings.suspect_intervals
        self._forget_after_s = settings.forget_after_s
        self._workers_max = settings.workers_max
        self._dispatch_expiry_intervals = settings.dispatch_expiry_intervals
        self._stall_s = settings.stall_s
        self._catalog = catalog
        self._owner_id = owner_id
        self.tick_s = settings.report_interval_s or 1.0
        self.fleet = Fleet(catalog.models, epoch)
        self.events = events
        self.notices: list[tuple[WorkerLost, Address]] = []  # to be sent by the owner, who then empties the list
        self.forgotten: list[str] = []  # workers whose last words need not be kept any more; the owner empties the list
        self.accepted = 0  # reports
        self.rejected: Counter[str] = Counter()  # reports, by reason
        self._hold = Hold(settings.hold_fraction, settings.hold_max_s, now)
        self._silence: Wheel[Row] = Wheel(self.tick_s / SILENCE_STEPS)
        self._next_tick = now + self.tick_s
        self._next_chore = inf  # when to go on with what the last tick left; inf: it left nothing
        self._unknown_hardware: set[str] = set()  # names told of already
        self._full_told_at = -inf  # when an event last told that the table is full
        self.wake_at = self._next_tick  # when `handle_timer` is to be called

    @property
    def degraded(self) -> str:
        """Why no worker is declared dead at the moment; "" if there is no reason."""
        return self._hold.why

    # --- reports --------------------------------------------------------------------------------------------------------------------

    def classify(self, row: Row | None, incarnation: int, sequence: int, now: float) -> str:
        """How a report with these numbers stands to what its worker's row has heard."""
        if row is None:
            return FIRST
        if incarnation > row.incarnation:
            return RESTARTED
        if incarnation < row.incarnation:  # either a late report, or the known life is over and the next one began with a clock that was set back
            return OLD_INCARNATION if now - row.heard_at < self.timeout_s(row) else RESTARTED
        if sequence > row.sequence:
            return NEWER
        if now - row.heard_at > 2.0 * FRESH_WITHIN_S:  # whatever could be replayed is stale by now: somebody else had used a number that was too high
            return RENUMBERED
        return REPLAYED if sequence == row.sequence else OUT_OF_ORDER

    def judge(self, worker_id: str, incarnation: int, sequence: int, now: float) -> str:
        """Why a report is refused for its number, before anybody looks at the report itself; "" if it is not. Replays are what a flood without the key can
        make of real reports, and so they are to cost little."""
        standing = self.classify(self.fleet.rows.get(worker_id), incarnation, sequence, now)
        if standing != REPLAYED and standing != OUT_OF_ORDER:  # a report of an earlier life is read: its sender is told
            return ""
        self.rejected[standing] += 1
        return standing

    def hear(self, worker_id: str, incarnation: int, sequence: int, report: LoadReport, addr: Address, now: float) -> Row | None:
        """Apply a report that is newer, by (incarnation, sequence), than the last one applied. Returns the worker's row; None: the report was refused."""
        row = self.fleet.rows.get(worker_id)
        standing = self.classify(row, incarnation, sequence, now)
        if standing != NEWER and row is not None:
            if standing in REFUSED:
                self._refuse(worker_id, standing)
                if standing == OLD_INCARNATION:
                    self._tell_displaced(row, incarnation, sequence, addr, now)
                return None
            if standing == RENUMBERED:
                row.sequence = sequence - 1
        if row is None or report.hardware != row.kind.hardware.name:
            row = self._fit_in(worker_id, row, report, now)
            if row is None:
                return None
        self.accepted += 1
        self.fleet.apply(row, incarnation, sequence, report, now)
        if row.report is not report:  # it named models outside the catalogue, and the row has a report without them
            self.forgotten.append(worker_id)
        host, port = report.host, report.port
        row.address = (host or addr[0], port or addr[1]) if host or port else addr
        if row.ledger.entries:
            self.fleet.expire_dispatches(row, now - self._dispatch_expiry_intervals * report.interval_s)
        if row.state != report.state:
            self._step(row, report.state, now, RESTARTED if standing == RESTARTED else "reported")
            if row.state not in GONE:
                self._silence.set(row, self._silence_deadline(row))
        return row

    def is_answered(self, incarnation: int, sequence: int) -> bool:
        """A report is one of those that get an answer, one in `reports_per_ack`. Lives have different ones, so that a fleet that started together is not
        answered all at once."""
        return (sequence + incarnation) % self._reports_per_ack == 0

    def _refuse(self, worker_id: str, reason: str) -> None:
        """A report was read and is not applied: nothing of the report stays, so that refused reports fill no memory."""
        self.rejected[reason] += 1
        self.forgotten.append(worker_id)

    def _tell_displaced(self, row: Row, incarnation: int, sequence: int, addr: Address, now: float) -> None:
        """Two lives report under one name. The older one is told now and then, so that it knows why it gets nothing; it may come back when the newer is
        silent for the timeout."""
        if row.displaced != incarnation:
            row.displaced = incarnation
            self.events.append(WorkerDisplaced(now, row.worker_id, incarnation, addr[0]))
            self.notices.append((WorkerLost(row.worker_id, incarnation), addr))
        elif self.is_answered(incarnation, sequence):
            self.notices.append((WorkerLost(row.worker_id, incarnation), addr))

    def _fit_in(self, worker_id: str, row: Row | None, report: LoadReport, now: float) -> Row | None:
        """The row of a worker never heard of, or of a worker that has other hardware now. None: the report is refused, because the catalogue has no such
        hardware or the table has no room."""
        try:
            hardware = self._catalog.get_hardware(report.hardware)
        except UsageError:
            if report.hardware not in self._unknown_hardware and len(self._unknown_hardware) < UNKNOWN_HARDWARE_MAX:
                self._unknown_hardware.add(report.hardware)
                self.events.append(HardwareUnknown(now, worker_id, report.hardware))
            self._refuse(worker_id, "unknown_hardware")
            return None
        if row is not None:
            self.fleet.refit(row, hardware)
            return row
        if len(self.fleet) >= self._workers_max and not self._make_room(now):
            self._refuse(worker_id, "table_full")
            return None
        return self.fleet.admit(worker_id, hardware, report)

    def _make_room(self, now: float) -> bool:
        """The table is full: forget the worker that went first. False when every row is still wanted."""
        oldest = next(iter(self.fleet.gone.values()), None)
        if oldest is not None and oldest.due == NEVER:  # a row that is due is in the wheel, which would keep it in memory until its slot
            self._forget(oldest)
            return True
        if now - self._full_told_at >= FULL_TOLD_EVERY_S:
            self._full_told_at = now
            self.events.append(TableFull(now, self._owner_id, self._workers_max))
        return False

    # --- states ---------------------------------------------------------------------------------------------------------------------

    def _step(self, row: Row, what: str, now: float, reason: str) -> None:
        """Apply what happened to a member, and tell of its new state."""
        moved = self.fleet.step(row, what)
        if moved is None:
            return
        self.events.append(WorkerStateChanged(now, row.worker_id, row.incarnation, moved[0], moved[1], reason))
        if row.clients and (moved[1] == SUSPECT or moved[1] == DEAD):
            self._tell_clients(row, now)

    def _tell_clients(self, row: Row, now: float) -> None:
        """Clients whose requests may be on a worker that is not heard any more should place them again."""
        for client_addr, placed_at in row.clients.values():
            if now - placed_at < self._forget_after_s:
                self.notices.append((WorkerLost(row.worker_id, row.incarnation), client_addr))
        if row.state == DEAD:
            row.clients = NO_CLIENTS

    def _forget(self, row: Row) -> None:
        """Drop a worker that is gone."""
        self.fleet.forget(row)
        self.forgotten.append(row.worker_id)

    # --- silence --------------------------------------------------------------------------------------------------------------------

    def timeout_s(self, row: Row) -> float:
        """Seconds of silence after which a life of a worker is over: the timeout, or more where reports are so rare that a timeout between two is usual."""
        return max(self._worker_timeout_s, self._suspect_intervals * row.report.interval_s)

    def _silence_deadline(self, row: Row) -> float:
        """When the row's silence means something next."""
        if row.state == SUSPECT:
            return row.heard_at + self.timeout_s(row)
        return row.heard_at + self._suspect_intervals * row.report.interval_s

    def handle_timer(self, now: float) -> bool:
        """Do what every tick brings, and what the last one left. True at a tick."""
        ticks = now >= self._next_tick
        if ticks:
            if now - self._next_tick > self._stall_s:
                self._hold.stall(now + HOLD_AFTER_STALL_INTERVALS * self.tick_s)
            self._next_tick = now + self.tick_s
        elif now < self._next_chore:
            return False
        self._check_silence(now)
        more = self._forget_gone(now) or self._silence.has_due(now)
        self._next_chore = now + CHORE_PAUSE_S if more else inf
        self.wake_at = min(self._next_tick, self._next_chore)
        return ticks

    def _check_silence(self, now: float) -> None:
        """Move silent workers on, some at a time. A row is in the wheel at the time when its worker would be silent if no report came; a report leaves it
        there, and the row is set anew when that time has come."""
        overdue: list[Row] = []
        for row in self._silence.take(now, CHORES_MAX):
            if row.state in GONE:  # `_forget_gone` sees to the row
                continue
            due = self._silence_deadline(row)
            if due > now:
                self._silence.set(row, due)
            else:
                overdue.append(row)
        self._hold_or_resume(overdue, now)
        stalled = self._hold.is_stalled(now)
        for row in overdue:
            if not stalled:
                if row.state != SUSPECT:
                    self._step(row, SILENT, now, f"silent for {now - row.heard_at:.1f} s")
                elif not self._hold.why:
                    self._step(row, EXPIRED, now, f"silent for {now - row.heard_at:.1f} s")
            if row.state not in GONE:
                self._silence.set(row, max(self._silence_deadline(row), now + self.tick_s))

    def _hold_or_resume(self, overdue: list[Row], now: float) -> None:
        """Hold expiry or let it go on, and tell of it when that changes."""
        states = self.fleet.states
        members = len(self.fleet) - states[DEAD] - states[LEFT]
        silent = states[SUSPECT] + len([row for row in overdue if row.state != SUSPECT])
        if self._hold.look(silent, members, now):
            why = self._hold.why
            self.events.append(ExpiryHeld(now, silent, members, why) if why else ExpiryResumed(now))

    def _forget_gone(self, now: float) -> bool:
        """Drop workers that went long ago, some at a time. True: there are more."""
        for _ in range(CHORES_MAX):
            row = next(iter(self.fleet.gone.values()), None)
            if row is None or row.heard_at + self._forget_after_s > now:
                return False
            self._forget(row)
            row.due = NEVER
        return True
