"""The coordinator: hears load reports, tracks workers, and says where each model request goes.

It is made of two parts and keeps nothing but what the reports tell it. It is never in the path of a request's data.

    LoadReport       -> Membership: the worker's row, its member state, its acknowledged dispatches; now and then a ReportAck
    ScheduleRequest  -> Router: the policy's placement and a ScheduleResponse, or a ScheduleError that says why not
    every tick       -> Membership: silent workers become SUSPECT, then DEAD, unless too many fell silent at once; their clients are told (WorkerLost)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from random import Random
from typing import Protocol

from sllm.fleet.membership import Membership, MembershipSettings
from sllm.models.catalogue import Catalog
from sllm.placement.base import Policy
from sllm.placement.costs import make_costs
from sllm.protocol.events import CoordinatorReady, RivalGone, RivalSeen
from sllm.protocol.messages import COORDINATOR_ID, READY, Address, Envelope, LoadReport, Message, ReportAck, ScheduleRequest
from sllm.protocol.node import Codec, Node
from sllm.routing.router import Router, RouterSettings

RIVAL_KEPT_INTERVALS = 10.0  # report intervals for which a worker's word of a second coordinator holds


class CoordinatorSettings(MembershipSettings, RouterSettings, Protocol):
    """What a coordinator and its parts read of the configuration of their process."""

    @property
    def report_interval_s(self) -> float: ...
    @property
    def life_timeout_s(self) -> float: ...
    @property
    def engine(self) -> str: ...
    @property
    def service_mean_s(self) -> float: ...
    @property
    def service_load_s(self) -> float: ...


class Coordinator(Node):
    """One coordinator. `stopwatch` (seconds, any origin) measures how long placements take; without it they count as 0."""

    __slots__ = ("_rival_at", "catalog", "config", "fleet", "membership", "policy", "rival", "router")

    def __init__(
        self,
        config: CoordinatorSettings,
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
        self.membership = Membership(config, catalog, node_id, incarnation, self.events, now)
        self.fleet = self.membership.fleet
        costs = make_costs(config.engine, config.service_mean_s, config.service_load_s)
        self.router = Router(config, catalog, self.fleet, policy, costs, rng, self.events, now, stopwatch)
        self.rival = False  # workers say that another coordinator runs beside this one
        self._rival_at = -inf  # when a worker said so last
        self.handlers = {LoadReport: self._on_report, ScheduleRequest: self._on_schedule_request}
        self._plan()

    # --- what others may know of it -------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> tuple[object, ...]:
        """The parts that keep tables."""
        return self.membership, self.fleet, self.router

    @property
    def ready(self) -> bool:
        """Reports of a whole interval have been heard, and requests are placed."""
        return self.router.ready

    @property
    def degraded(self) -> str:
        """Why no worker is declared dead at the moment; "" if there is no reason."""
        return self.membership.degraded

    @property
    def reports_accepted(self) -> int:
        return self.membership.accepted

    @property
    def reports_rejected(self) -> Counter[str]:
        """By reason."""
        return self.membership.rejected

    def set_wall_clock(self, wall_offset_s: float, now: float) -> None:
        super().set_wall_clock(wall_offset_s, now)
        self.fleet.epoch = self.incarnation  # it may have begun a new life

    # --- messages -------------------------------------------------------------------------------------------------------------------

    def judge_order(self, kind: type[Message], sender_id: str, incarnation: int, sequence: int, now: float) -> str:
        return self.membership.judge(sender_id, incarnation, sequence, now)

    def refuse(self, kind: type, reason: str, now: float) -> str:
        if kind is LoadReport:
            self.membership.rejected[reason] += 1
        return reason

    def _on_report(self, envelope: Envelope[LoadReport], addr: Address, now: float) -> None:
        incarnation, sequence, report = envelope.incarnation, envelope.sequence, envelope.message
        membership = self.membership
        row = membership.hear(envelope.sender_id, incarnation, sequence, report, addr, now)
        if membership.notices or membership.forgotten:
            self._pass_on(now)
        if row is None:
            return
        if report.rival:
            self._rival_at = now
            self._look_for_rival(now)
        if sequence == 1 or membership.is_answered(incarnation, sequence):
            self.send(ReportAck(self.incarnation, sequence), addr, now)

    def _on_schedule_request(self, envelope: Envelope[ScheduleRequest], addr: Address, now: float) -> None:
        answer = self.router.answer(envelope.sender_id, addr, envelope.message, now)
        if answer is not None:
            self.send(answer, addr, now)

    def _pass_on(self, now: float) -> None:
        """Send what the membership has to say to others; what a worker said last is needed no more once the membership has forgotten or refused it."""
        membership = self.membership
        for notice, addr in membership.notices:
            self.send(notice, addr, now)
        membership.notices.clear()
        if self.codec is not None:
            for worker_id in membership.forgotten:
                self.codec.forget(worker_id)
        membership.forgotten.clear()

    def _look_for_rival(self, now: float) -> None:
        """Tell when workers first say that another coordinator runs beside this one, and when none has said so for some time."""
        rival = now - self._rival_at < RIVAL_KEPT_INTERVALS * self.membership.tick_s
        if rival != self.rival:
            self.rival = rival
            self.events.append(RivalSeen(now, self.node_id) if rival else RivalGone(now, self.node_id))

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        if not self.ready and now >= self.router.ready_at:
            self.router.ready = True
            self.events.append(CoordinatorReady(now, self.fleet.states[READY]))
        if self.rival:
            self._look_for_rival(now)
        if self.membership.handle_timer(now):
            self.router.tick(now)
        self._pass_on(now)
        self._plan()

    def _plan(self) -> None:
        """When to wake next."""
        self.wake_at = min(self.membership.wake_at, inf if self.ready else self.router.ready_at)
