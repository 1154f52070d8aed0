"""When a worker reports its load and what the report says; and what the worker makes of the coordinator's answers, and of their absence.

Reports come at an even interval and at every change of state. The coordinator acknowledges one report in several, so the worker knows when an
acknowledgement is owed: one that does not come is told (CoordinatorOverdue), and the report is made anew; a longer silence is told as well (CoordinatorSilent).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from random import Random
from typing import Protocol

from sllm.fleet.ledger import Receipts
from sllm.protocol.events import CoordinatorChanged, CoordinatorOverdue, CoordinatorSilent, DisplacedByNamesake, Event, RivalGone, RivalSeen
from sllm.protocol.fitting import always_fits, fitted
from sllm.protocol.messages import Address, Dispatch, EngineSnapshot, LoadReport, ReportAck
from sllm.protocol.rivals import Rivals

RIVALS_KEPT_ACKS = 10.0  # acknowledgements due, for the time of which two coordinators that were heard by turns count as two
HEARTBEAT_S = 1.0  # between reports that say nothing new, where every change is reported at once
SILENT_INTERVALS = 3.0  # report intervals: the least time after which the coordinator is called silent

OwnHost = Callable[[Address], str]
"""own_host(coordinator's address): the host that the reports say, found anew for each report."""


class ReporterSettings(Protocol):
    """What a reporter reads of the configuration of its process."""

    @property
    def hardware(self) -> str: ...
    @property
    def queue_max(self) -> int: ...
    @property
    def report_interval_s(self) -> float: ...
    @property
    def reports_per_ack(self) -> int: ...
    @property
    def retry_initial_s(self) -> float: ...
    @property
    def coordinator_silent_s(self) -> float: ...


class Reporter:
    """The reports of one worker, and what is known of the coordinator that hears them. What has happened is appended to `events`, a list of the role that
    owns the reporter. `advertise` is where clients reach the worker ("" and 0: where its datagrams come from); `own_host` finds a host that may change.
    `models` are all that a report may name."""

    __slots__ = (
        "_always_fits", "_events", "_heard_at", "_heard_epoch", "_last", "_owed", "_own_host", "_patience_min_s", "_patience_s", "_receipts", "_rivals",
        "_rng", "_settings", "_silent_s", "_snapshot", "advertise", "at_every_change", "displaced", "due_at", "interval_s", "overdue_at", "reports_sent",
        "rival", "worker_id",
    )  # fmt: skip

    def __init__(
        self,
        worker_id: str,
        settings: ReporterSettings,
        models: tuple[str, ...],
        rng: Random,
        events: list[Event],
        now: float,
        *,
        advertise: Address = ("", 0),
        own_host: OwnHost | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.advertise = advertise
        self.interval_s = settings.report_interval_s or HEARTBEAT_S
        self.at_every_change = settings.report_interval_s == 0.0
        self.reports_sent = 0
        self.due_at = now  # the next report in turn
        self.overdue_at = inf  # when the acknowledgement that is owed has been waited for long enough; inf: none is owed yet
        self.displaced = False  # a newer life has this worker's name
        self.rival = False  # two lives of the coordinator acknowledge reports by turns
        self._settings = settings
        self._rng = rng
        self._events = events
        self._own_host = own_host
        self._always_fits = always_fits(models)
        self._receipts = Receipts()
        self._last: LoadReport | None = None  # None: something beside state and engine has changed since
        self._snapshot: EngineSnapshot | None = None  # of the engine, that `_last` was made from
        self._heard_at = now  # when the coordinator was last heard, or last called silent
        self._silent_s = max(settings.coordinator_silent_s, SILENT_INTERVALS * self.interval_s)
        self._heard_epoch = 0  # the life of the coordinator that answered last; 0: none has
        self._rivals = Rivals(RIVALS_KEPT_ACKS * settings.reports_per_ack * self.interval_s)
        self._owed = settings.reports_per_ack  # the number of the report that is the last to be sent before an acknowledgement is owed
        self._patience_s = self._patience_min_s = max(self.interval_s, settings.retry_initial_s)

    # --- what is said ---------------------------------------------------------------------------------------------------------------

    def report(self, state: str, snapshot: EngineSnapshot, coordinator: Address, now: float) -> LoadReport:
        """The next report, which is counted as sent. A worker with nothing new to say gives the same object again: the codec and the coordinator know it
        again."""
        if self._own_host is not None:
            host, port = self._own_host(coordinator), self.advertise[1]
            if host != self.advertise[0]:
                self.relocate((host, port))
        report = self._last
        if report is None or snapshot is not self._snapshot or state != report.state:
            self._snapshot = snapshot
            receipts, (host, port) = self._receipts, self.advertise
            report = LoadReport(
                state, host, port, self._settings.hardware, self._settings.queue_max, snapshot,
                receipts.epoch, receipts.high, receipts.missing, self.interval_s, self.rival,
            )  # fmt: skip
            self._last = report = report if self._always_fits else fitted(report)
        self.reports_sent += 1
        if self.reports_sent >= self._owed and self.overdue_at == inf:
            self.overdue_at = now + self._patience_s
        return report

    def note_dispatch(self, dispatch: Dispatch) -> None:
        """A request that the coordinator has placed here has arrived, whatever becomes of it: the next report says so."""
        self._receipts.note(dispatch.epoch, dispatch.number)
        self._last = None

    def relocate(self, address: Address) -> None:
        """Clients reach the worker there from now on."""
        self.advertise = address
        self._last = None

    # --- when it is said --------------------------------------------------------------------------------------------------------------

    @property
    def next_at(self) -> float:
        """When a report is due, in turn or because an acknowledgement is overdue, absolute."""
        return self.due_at if self.due_at < self.overdue_at else self.overdue_at

    def plan_next(self, now: float) -> None:
        """Plan the next report in turn: at a random phase after the first, so that a fleet started together does not report together; then evenly. The
        reports missed while the process was held up are not made up for."""
        if self.reports_sent <= 1:
            self.due_at = now + self._rng.random() * self.interval_s
            return
        self.due_at += self.interval_s
        if self.due_at <= now:
            self.due_at = now + self.interval_s

    # --- the coordinator --------------------------------------------------------------------------------------------------------------

    @property
    def acknowledged(self) -> bool:
        """A coordinator has answered a report of this worker."""
        return self._heard_epoch != 0

    def hear_ack(self, ack: ReportAck, now: float) -> None:
        """The newest life of the coordinator has acknowledged a report."""
        self._heard_at = now
        self._rivals.hear_newest(now)
        self.displaced = False
        self._owed = max(self._owed, min(ack.sequence, self.reports_sent) + self._settings.reports_per_ack)
        self.overdue_at, self._patience_s = inf, self._patience_min_s
        if ack.epoch != self._heard_epoch:  # an earlier life is heard after this one only when this one has been silent: its clock was set back
            if self._heard_epoch:
                self._events.append(CoordinatorChanged(now, self.worker_id, ack.epoch))
            self._heard_epoch = ack.epoch
        if ack.epoch < self._receipts.epoch:  # a client named a life that never was: acknowledgements of its dispatches would hide all of this life's
            self._receipts = Receipts()
            self._last = None

    def hear_older_life(self, now: float) -> None:
        """A life of the coordinator older than the newest has acknowledged a report, and was refused."""
        self._rivals.hear_older(now)

    def hear_displaced(self, now: float) -> None:
        """The coordinator refuses this worker's reports, because a newer life has the same name."""
        self._heard_at = now
        if not self.displaced:
            self.displaced = True
            self._events.append(DisplacedByNamesake(now, self.worker_id))

    def suspects_rival(self, now: float) -> bool:
        """An older life of the coordinator has spoken lately: over new sockets each of two would be heard soon."""
        return self._rivals.suspected(now)

    def look_for_rivals(self, now: float) -> None:
        """Tell when two coordinators are first seen, and when they no longer are."""
        seen = self._rivals.seen(now)
        if seen != self.rival:
            self.rival = seen
            self._last = None
            self._events.append(RivalSeen(now, self.worker_id) if seen else RivalGone(now, self.worker_id))

    def look_for_silence(self, now: float) -> None:
        """Tell when the coordinator has been silent for too long, and again after as long."""
        silent_s = now - self._heard_at
        if silent_s >= self._silent_s:
            self._events.append(CoordinatorSilent(now, self.worker_id, silent_s))
            self._heard_at = now

    def tell_overdue(self, now: float) -> None:
        """The acknowledgement that is owed has not come; the report that asks for it anew is the caller's to send. The coordinator may have moved, and what
        keeps track of flows on the way may still lead this socket's datagrams to where it was: a report over a new socket finds it at once."""
        self._events.append(CoordinatorOverdue(now, self.worker_id, now - self._heard_at))
        self._patience_s = min(2.0 * self._patience_s, self._silent_s)
        self.overdue_at = now + self._patience_s
