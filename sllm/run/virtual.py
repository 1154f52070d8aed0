"""A run of a whole fleet in virtual time."""

from __future__ import annotations

import contextlib
import time
from functools import partial
from typing import TextIO

from config import Config
from sllm.engine.base import EngineUsage
from sllm.observe.busy import BusyTime
from sllm.observe.report.outputs import Outputs
from sllm.observe.report.plots import Mark
from sllm.observe.results import ReportFigures
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import LoadReport
from sllm.run.architecture import Participant
from sllm.run.command_line import Options
from sllm.run.explain import why_not_started
from sllm.run.run import Run
from sllm.run.system import System
from sllm.run.watch import Pacer
from sllm.verify.all import Checkers
from sllm.virtual.faults import Schedule, load_schedule
from sllm.virtual.host import Host
from sllm.virtual.inject import Injector
from sllm.virtual.network import Latency, Link, Network
from sllm.virtual.world import Interrupted, World
from sllm.workload import Request

PACE_WALL_S = 0.05  # between two times at which simulated time is held back
START_STEP_S = 1.0  # of simulated time
START_S, START_INTERVALS, START_LATENCIES = 60.0, 30.0, 4.0  # seconds, report intervals, latencies; a fleet that is not up after their sum never will be
INSPECT_S = 5.0  # of simulated time between two looks of the checkers at some nodes and rows; events are checked as they happen
SETTLE_INTERVALS = 2.0  # report intervals from the last answer to the last look, beyond those that make a silent worker suspect and write a lost dispatch off
SLICE_S = 1.0  # of simulated time between two updates of progress, to begin with
SLICE_WALL_S = (0.05, 0.2)  # the least and the largest wall time of a slice: shorter slices are made longer, and longer ones shorter


def add_to_world(system: System, world: World, participant: Participant) -> Host:
    """Give a participant of the fleet a host of its own, and make its first life there."""
    system.addresses[participant.name] = participant.address
    make = partial(system.make, participant.name)
    return world.add(make(1, world.now), participant.address, make if participant.restarts else None)


class VirtualRun(Run):
    """A run in virtual time: the world drives the roles, deterministically, as fast as it can."""

    mode = "virtual"
    driver: World

    def __init__(
        self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None, *, schedule: Schedule | None = None
    ) -> None:
        """`schedule`: the faults, their times counted from when requests begin to come; None: those of the options."""
        super().__init__(config, options, progress_to, outputs)
        self._busy = BusyTime(self.world)
        self._pacer = Pacer(config.pace) if config.pace else None
        if schedule is None:
            schedule = load_schedule(options.faults, config.seed) if options.faults else Schedule()
        self.schedule = schedule
        self.injector = Injector(self.world, schedule)

    def make_driver(self) -> World:
        config = self.config
        link = Link(Latency("constant", config.latency_ms / 1000.0), loss=config.loss)
        return World(config.seed, Network(link, instant=() if config.report_interval_s else (LoadReport,)), wire=self.options.wire)

    def make_checkers(self) -> Checkers:
        return Checkers.watch(self.world, inspect_every_s=INSPECT_S)

    @property
    def world(self) -> World:
        return self.driver

    def interrupt(self) -> None:
        self.world.interrupt()
        super().interrupt()

    def add(self, participant: Participant) -> Host:
        return add_to_world(self.system, self.world, participant)

    def await_fleet(self) -> None:
        """Let time pass in steps of a fixed length until every worker is counted: when requests begin to come must not depend on the wall clock."""
        self._pace()
        config, world = self.config, self.world
        limit_s = START_S + START_INTERVALS * config.report_interval_s + START_LATENCIES * config.latency_ms / 1000.0
        while not self.system.started:
            if world.now >= limit_s:
                why = why_not_started(config, self.report_figures())
                raise UsageError(f"{self.not_started} after {world.now:,.0f} s of simulated time: {why}")
            world.run(world.now + START_STEP_S)
            self.show_progress()

    def _pace(self) -> None:
        """Hold simulated time back, if that was asked for, and serve the page meanwhile."""
        pacer, world = self._pacer, self.world
        if pacer is None:
            return
        self.serve_page(pacer, lambda: 0, lambda step: step())

        def hold() -> None:
            pacer.hold(world.now, lambda: self.interrupted)
            self.show_progress()

        world.every(PACE_WALL_S * self.config.pace, hold)

    def begin(self) -> None:
        self._busy.begin()
        super().begin()

    def feed(self) -> None:
        """Faults come with the requests."""
        self.inject()
        self.world.feed(self._client_host, self.arrivals(), self.submit, self.exhaust)

    def inject(self) -> None:
        """Schedule the faults, their times counted from now."""
        self.injector.install(origin_s=self.began_s)

    def feed_one(self, at: float, request: Request) -> None:
        self.world.feed(self._client_host, [(at, request)], self.submit)

    @property
    def _client_host(self) -> Host:
        return self.world.hosts[self.system.client]

    def await_arrivals(self) -> None:
        """Let time pass in slices of about a tenth of a second of wall time, showing progress between them. How it is sliced changes nothing."""
        slice_s = SLICE_S
        shortest_s, longest_s = SLICE_WALL_S
        while not self._exhausted:
            before = time.perf_counter()
            self.world.run(self.world.now + slice_s)
            self.show_progress()
            took_s = time.perf_counter() - before
            slice_s *= 2.0 if took_s < shortest_s else 0.5 if took_s > longest_s else 1.0

    def settle(self) -> None:
        """After the last arrival and fault everything must finish."""
        self.world.run(max(self.world.now, self.last_fault_s()))
        self.come_to_rest()

    def last_fault_s(self) -> float:
        """When to wait for no more faults: at the end of the last, but not longer than requests live, for nothing is left then that it could disturb."""
        last_s = self.now + self.config.request_timeout_s
        if self.injector.end_s <= last_s:
            return self.injector.end_s
        count = self.injector.end_by(last_s)
        ended = f"{last_s - self.began_s:,.0f} s, when every request has ended"
        name = self.options.faults or self.schedule.name
        self.warnings.append(f"{name}: faults that begin or end after {ended}: {count:,}; what comes later was passed over")
        return last_s

    def come_to_rest(self) -> None:
        """Let all that was asked for come to an end."""
        config, interval_s = self.config, self.config.report_interval_s or 1.0
        intervals = SETTLE_INTERVALS + max(config.suspect_intervals, config.dispatch_expiry_intervals)
        self.checkers.run_to_rest(config.request_timeout_s + 10.0 * interval_s, intervals * interval_s)

    def send_home(self) -> None:
        """After an interrupt nothing happens any more: what is on its way stays on its way, and the books close on it."""
        if self.interrupted:
            self.ready_workers = self.system.ready
        else:
            super().send_home()

    def await_last_reports(self) -> None:
        with contextlib.suppress(Interrupted):  # it ends this as well
            self.world.run(self.world.now + (self.config.report_interval_s or 1.0))

    def usage(self) -> list[EngineUsage]:
        return [self._busy.usage(name) for name in self.system.workers]

    def report_figures(self) -> ReportFigures:
        network = self.world.network
        return self.system.report_figures(network.duplicated_by_kind[LoadReport], network.lost_by_kind[LoadReport], self.world.pending_of(LoadReport))

    def marks(self) -> list[Mark]:
        return [
            Mark(fault.at_s, None if fault.for_s is None else fault.at_s + fault.for_s, fault.kind.replace("_", " ")) for fault in self.schedule.faults
        ]
