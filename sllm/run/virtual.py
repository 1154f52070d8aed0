"""A run of a whole fleet in virtual time."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TextIO

from config import Config
from sllm.engine.base import EngineUsage
from sllm.observe.busy import BusyTime
from sllm.observe.report.outputs import Outputs
from sllm.observe.report.plots import Mark
from sllm.observe.results import ReportFigures
from sllm.protocol.errors import UsageError
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected
from sllm.protocol.messages import LoadReport
from sllm.protocol.node import Node
from sllm.run.command_line import Options
from sllm.run.run import Run
from sllm.run.watch import Pacer
from sllm.verify.all import Checkers, InvariantViolation
from sllm.virtual.faults import load_schedule
from sllm.virtual.host import Host
from sllm.virtual.inject import Injector
from sllm.virtual.network import Latency, Link, Network
from sllm.virtual.world import Interrupted, World
from sllm.workload import Request
from worker import Worker

PACE_WALL_S = 0.05  # between two times at which simulated time is held back
START_STEP_S = 1.0  # of simulated time
START_S, START_INTERVALS, START_LATENCIES = 60.0, 30.0, 4.0  # a fleet that is not up after so long in virtual time, all three together, never will be
INSPECT_S = 5.0  # of a virtual run, between looks at some nodes and rows; what events tell is checked as it happens
SETTLE_INTERVALS = 2.0  # from the last answer to the last look, beyond those after which a silent worker is suspect and a lost dispatch is written off
ENDS = (RequestCompleted, RequestFailed, RequestRejected)  # of a request


class VirtualRun(Run):
    """A run in virtual time: the world drives the roles, deterministically, as fast as it can."""

    mode = "virtual"

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        super().__init__(config, options, progress_to, outputs)
        link = Link(Latency("constant", config.latency_ms / 1000.0), loss=config.loss)
        self.world = World(config.seed, Network(link, instant=() if config.report_interval_s else (LoadReport,)), wire=options.wire)
        self.world.bus.subscribe_all(self.recorder.handlers)
        if self.requests_csv is not None:
            self.world.bus.subscribe_all(self.requests_csv.handlers)
        self._checkers = Checkers.watch(self.world, inspect_every_s=INSPECT_S)
        self._busy = BusyTime(self.world)
        self._pacer = Pacer(config.pace) if config.pace else None
        self._schedule = load_schedule(options.faults, config.seed) if options.faults else None
        self._injector: Injector | None = None
        self._exhausted = False

    @property
    def driver(self) -> World:
        return self.world

    def interrupt(self) -> None:
        self.world.interrupt()
        super().interrupt()

    def checkers(self) -> Checkers:
        return self._checkers

    def begin(self) -> None:
        self._busy.begin()
        super().begin()

    def usage(self) -> list[EngineUsage]:
        return [self._busy.usage(name) for name in self.system.workers]

    def report_figures(self) -> ReportFigures:
        network = self.world.network
        return self.system.report_figures(network.duplicated_by_kind[LoadReport], network.lost_by_kind[LoadReport], self.world.pending_of(LoadReport))

    def marks(self) -> list[Mark]:
        faults = self._schedule.faults if self._schedule is not None else ()
        return [Mark(fault.at_s, None if fault.for_s is None else fault.at_s + fault.for_s, fault.kind.replace("_", " ")) for fault in faults]

    def conduct(self) -> None:
        world, system = self.world, self.system
        world.add(system.make_coordinator(1, 0.0), system.coordinator_address, system.make_coordinator)
        self._pace()
        try:
            for name in system.workers:
                self._check_interrupted()
                address = name, self.config.worker_port
                make = partial(system.make_worker, name, advertise=address)
                world.add(make(1, 0.0), address, make)
            client = system.make_client(1, 0.0)
            client_host = world.add(client, ("client", 7000))
            self._start_fleet()
            self.begin()
            faults_end_s = self._inject()
            submit = client.submit if self.recording is None else partial(self.submit, client)
            if self.workload.users is None:
                world.feed(client_host, self.arrivals(), submit, self._stop_at_last_arrival)
            else:
                self._feed_users(client_host, submit)
            self._advance_to_last_arrival()
            self.arrivals_ended()
            self._settle(faults_end_s)
        except InvariantViolation as violation:
            self.violations.append(str(violation))
        except Interrupted:  # nothing happens any more: what is on its way stays on its way, and the books close as they are
            self.arrivals_ended()
            self.ready_workers = system.ready
        except UsageError:
            raise
        except Exception as error:  # a bug of ours: the run is worth nothing from here on, and the seed shows it again
            where = f"internal error at {self.now:.6f} s with seed {self.config.seed}"
            self.violations.append(f"{where}: {type(error).__name__}: {error}\n{traceback.format_exc().rstrip()}")

    def _pace(self) -> None:
        """Hold simulated time back, if that was asked for, and serve the page meanwhile."""
        pacer, world = self._pacer, self.world
        if pacer is None:
            return
        self._serve_page(pacer, lambda: 0, lambda step: step())

        def hold() -> None:
            pacer.hold(world.now, lambda: self.interrupted)
            self._show_progress()

        world.every(PACE_WALL_S * self.config.pace, hold)

    def _feed_users(self, client_host: Host, submit: Callable[[Request, float], None]) -> None:
        """Closed-loop load: each request that ends brings the next, until the time is over."""
        world, end_s = self.world, self.began_s + self.workload.spec.until_s
        world.feed(client_host, self.arrivals(), submit)

        def go_on(node: Node, event: RequestCompleted | RequestFailed | RequestRejected) -> None:
            following = self.following(event.request_id)
            if following is not None:
                world.feed(client_host, [following], submit)

        world.bus.subscribe(go_on, *ENDS)
        world.call_at(end_s, self._stop_at_last_arrival)

    def _inject(self) -> float:
        """Schedule the faults; returns when the last of them ends."""
        if self._schedule is None:
            return 0.0
        self._injector = Injector(self.world, self._schedule)
        self._injector.install(origin_s=self.began_s)
        return self._injector.end_s

    def _stop_at_last_arrival(self) -> None:
        """The run's phases must not depend on how its time was sliced."""
        self._exhausted = True
        self.world.stop()

    def _start_fleet(self) -> None:
        """Wait until the coordinator counts every worker, in steps of a fixed length: when requests begin to come must not depend on the wall clock."""
        config = self.config
        limit_s = START_S + START_INTERVALS * config.report_interval_s + START_LATENCIES * config.latency_ms / 1000.0
        while not self.system.started:
            if self.world.now >= limit_s:
                raise UsageError(f"{self._not_started()} after {self.world.now:,.0f} s of simulated time: {self._why_not_started()}")
            self.world.run(self.world.now + START_STEP_S)
            self._show_progress()

    def _why_not_started(self) -> str:
        """What became of the reports, and the flag that is to blame."""
        config, books, flags = self.config, self.report_figures(), []
        refused = ", ".join(f"{number:,} were refused ({reason.replace('_', ' ')})" for reason, number in sorted(books.rejected.items()))
        what = f"of {books.sent:,} reports {books.lost:,} were lost and {books.under_way:,} still under way" + (f", {refused}" if refused else "")
        if config.loss > 0.0:
            flags.append(f"--loss {config.loss:.12g}")
        if refused or not flags:
            flags.append(f"--latency-ms {config.latency_ms:.12g}")
        return f"{what} ({', '.join(flags)})"

    def _advance_to_last_arrival(self) -> None:
        """Let time pass in slices of about a tenth of a second of wall time, showing progress between them. How it is sliced changes nothing."""
        slice_s = 1.0
        while not self._exhausted:
            before = time.perf_counter()
            self.world.run(self.world.now + slice_s)
            self._show_progress()
            took_s = time.perf_counter() - before
            slice_s *= 2.0 if took_s < 0.05 else 0.5 if took_s > 0.2 else 1.0

    def _settle(self, faults_end_s: float) -> None:
        """After the last arrival and fault everything must finish; then the workers go home, so that no report is on its way when the books close."""
        self.world.run(max(self.world.now, self._last_fault_s(faults_end_s)))
        self._come_to_rest()
        self.stop_looking()
        self.recorder.fleet.end()
        self.ready_workers = self.system.ready
        for name in self.system.workers:
            host = self.world.hosts[name]
            if isinstance(host.node, Worker):
                host.node.drain(host.read_clock())
                host.touch()
        self.world.run(self.world.now + (self.config.report_interval_s or 1.0))

    def _last_fault_s(self, faults_end_s: float) -> float:
        """When to wait for no more faults: at the end of the last, but not longer than requests live, for nothing is left then that it could disturb."""
        last_s = self.now + self.config.request_timeout_s
        if self._injector is None or faults_end_s <= last_s:
            return faults_end_s
        count = self._injector.end_by(last_s)
        ended = f"{last_s - self.began_s:,.0f} s, when every request has ended"
        self.warnings.append(f"{self.options.faults}: faults that begin or end after {ended}: {count:,}; what comes later was passed over")
        return last_s

    def _come_to_rest(self) -> None:
        """Let all that was asked for come to an end."""
        config, interval_s = self.config, self.config.report_interval_s or 1.0
        intervals = SETTLE_INTERVALS + max(config.suspect_intervals, config.dispatch_expiry_intervals)
        self._checkers.settle(config.request_timeout_s + 10.0 * interval_s, intervals * interval_s)
