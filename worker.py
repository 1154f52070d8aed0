"""A worker: holds models, serves requests through its engine, and reports its load.

    InferenceRequest -> FirstToken, InferenceResponse; sent again, it is answered again, and the work is done once
    ... and if the first token takes longer than the client would wait in silence, InferenceAccepted before it
    CancelRequest    -> the work stops; InferenceResponse says so
    every interval   -> a LoadReport to the coordinator, and Progress to each client that is owed tokens
    drain()          -> DRAINING: nothing new is taken, what runs is finished, a last report says STOPPED

A worker is made of two parts: its `Service` has the jobs and the engine, its `Reporter` has the reports and what is known of the coordinator.
"""

from __future__ import annotations

from math import inf
from random import Random
from typing import Protocol

from sllm.engine import Engine
from sllm.models.catalogue import Catalog
from sllm.protocol.events import WorkerDrained
from sllm.protocol.messages import (
    STOPPED,
    Address,
    CancelRequest,
    EngineSnapshot,
    Envelope,
    InferenceRequest,
    Message,
    ReportAck,
    WorkerLost,
)
from sllm.protocol.node import Codec, Node
from sllm.service.jobs import Service, ServiceSettings
from sllm.service.reporter import OwnHost, Reporter, ReporterSettings


class WorkerSettings(ServiceSettings, ReporterSettings, Protocol):
    """What a worker reads of the configuration of its process."""

    @property
    def life_timeout_s(self) -> float: ...


class Worker(Node):
    """One worker. `advertise` is where clients reach it ("" and 0: where its reports come from); `own_host`, if given, finds a host that may change."""

    __slots__ = ("_outgoing", "_reported_state", "catalog", "config", "reporter", "service")

    def __init__(
        self,
        config: WorkerSettings,
        catalog: Catalog,
        engine: Engine,
        coordinator: Address,
        rng: Random,
        incarnation: int,
        *,
        node_id: str,
        codec: Codec | None = None,
        wall_offset_s: float = 0.0,
        advertise: Address = ("", 0),
        own_host: OwnHost | None = None,
        now: float = 0.0,
    ) -> None:
        super().__init__(node_id, incarnation, codec=codec, wall_offset_s=wall_offset_s, life_timeout_s=config.life_timeout_s)
        self.config = config
        self.catalog = catalog
        self.coordinator = coordinator
        self._outgoing: list[tuple[Message, Address]] = []  # what the parts want sent, in order, until `_flush`
        self.service = Service(node_id, config, catalog, engine, self._outgoing, self.events, now)
        self.reporter = Reporter(node_id, config, catalog.names, rng, self.events, now, advertise=advertise, own_host=own_host)
        self._reported_state = self.service.state  # the first report is due at once, whatever the state
        self.handlers = {
            InferenceRequest: self._on_inference_request,
            CancelRequest: self._on_cancel,
            ReportAck: self._on_report_ack,
            WorkerLost: self._on_worker_lost,
        }
        self._flush(now)

    # --- what others may ask ----------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """STARTING, READY, DRAINING or STOPPED (`sllm.service.jobs.TRANSITIONS`)."""
        return self.service.state

    @property
    def drained(self) -> bool:
        """The last report is sent, and nothing more will happen here."""
        return self.service.state == STOPPED

    @property
    def engine(self) -> Engine:
        return self.service.engine

    @property
    def acknowledged(self) -> bool:
        """A coordinator has answered a report of this worker."""
        return self.reporter.acknowledged

    @property
    def reports_sent(self) -> int:
        return self.reporter.reports_sent

    @property
    def parts(self) -> tuple[object, ...]:
        return self.service, self.reporter

    def snapshot(self, now: float) -> EngineSnapshot:
        """The state of the engine at `now`. What the engine did until then is told first, and the next deadline is set anew; so ask here, never the engine's
        own `snapshot`."""
        if not self.drained:
            self.service.advance(now)
            self._flush(now)
        return self.service.engine.snapshot(now)

    # --- what is heard --------------------------------------------------------------------------------------------------------------

    def _on_inference_request(self, envelope: Envelope[InferenceRequest], addr: Address, now: float) -> None:
        request: InferenceRequest = envelope.message
        if request.worker_id == self.node_id:
            self.reporter.note_dispatch(request.dispatch)
        if self.service.take(envelope.sender_id, request, addr, now):
            self._report_change(now)
        self._flush(now)

    def _on_cancel(self, envelope: Envelope[CancelRequest], addr: Address, now: float) -> None:
        cancel: CancelRequest = envelope.message
        if self.service.cancel(envelope.sender_id, cancel.request_id, now):
            self._report_change(now)
        self.service.tell_cancelled(cancel.request_id, addr)
        self._flush(now)

    def _on_report_ack(self, envelope: Envelope[ReportAck], addr: Address, now: float) -> None:
        """The deadline stays where it is, perhaps earlier than need be: `handle_timer` does what is due and nothing else."""
        self.reporter.hear_ack(envelope.message, now)

    def _on_worker_lost(self, envelope: Envelope[WorkerLost], addr: Address, now: float) -> None:
        """The coordinator refuses the reports of a life of this worker, because a newer life has its name."""
        lost: WorkerLost = envelope.message
        if lost.worker_id == self.node_id and lost.incarnation == self.incarnation:
            self.reporter.hear_displaced(now)

    def refuse(self, kind: type, reason: str, now: float) -> str:
        if kind is ReportAck and reason == "old_incarnation":
            self.reporter.hear_older_life(now)
        return super().refuse(kind, reason, now)

    def relocate(self, address: Address) -> None:
        self.reporter.relocate(address)

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        service, reporter = self.service, self.reporter
        if service.state == STOPPED:
            return
        service.run(now)
        if now >= reporter.due_at:
            self._report_in_turn(now)
        else:
            self._report_change(now)
        if now >= reporter.overdue_at:
            reporter.tell_overdue(now)
            self._report(now)
        if service.has_drained(now):
            self._stop(now)
        self._flush(now)

    def _flush(self, now: float) -> None:
        """Send what the parts have made, and say when to wake next."""
        outgoing = self._outgoing
        if outgoing:
            for message, addr in outgoing:
                self.send(message, addr, now)
            outgoing.clear()
        at, report_at = self.service.next_at, self.reporter.next_at
        if report_at < at:
            at = report_at
        self.wake_at = at if self.service.state != STOPPED else inf

    # --- reports --------------------------------------------------------------------------------------------------------------------

    def _report(self, now: float) -> None:
        service = self.service
        report = self.reporter.report(service.state, service.engine.snapshot(now), self.coordinator, now)
        self._outgoing.append((report, self.coordinator))
        self._reported_state = service.state
        service.changed = False

    def _report_in_turn(self, now: float) -> None:
        """The report of this interval, and what else is done once an interval."""
        service, reporter = self.service, self.reporter
        reporter.look_for_rivals(now)
        self._report(now)
        if service.jobs:
            service.tell_progress(reporter.interval_s)
        reporter.plan_next(now)
        reporter.look_for_silence(now)
        service.forget_old(now)

    def _report_change(self, now: float) -> None:
        """Report a change of state at once; where reports have no interval, every other change too."""
        service = self.service
        if service.state != self._reported_state or (self.reporter.at_every_change and service.changed):
            self._report(now)

    # --- leaving --------------------------------------------------------------------------------------------------------------------

    def drain(self, now: float) -> None:
        """Take nothing new, finish what runs within the drain timeout, then send a last report."""
        if self.service.drain(now):
            self._report_change(now)
            if self.service.has_drained(now):
                self._stop(now)
            self._flush(now)

    def _stop(self, now: float) -> None:
        """Send what is not finished elsewhere, and the last report."""
        self.service.stop()
        self._report(now)
        self.events.append(WorkerDrained(now, self.node_id))
