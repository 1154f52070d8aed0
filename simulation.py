"""A whole fleet in one process: the same roles, live over UDP on loopback or in virtual time, and what such a run measured.

`System` makes the roles from a configuration and remembers every life of each, so that the books include those that crashed. A `Run` drives a
system: start the fleet, let the workload come, wait for what is in flight, send the workers home, close the books.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

from client import Client
from config import Config
from coordinator import Coordinator
from sllm.assemble import build_catalog, build_engine, build_workload, check_models_fit, count_trace_models, profile_names
from sllm.cli import Options
from sllm.errors import UsageError
from sllm.events import Event, InternalErrorCaught
from sllm.messages import READY, Address
from sllm.mix import hardware_of_workers
from sllm.node import Codec, Node
from sllm.placement.registry import broken_policies, make_policy
from sllm.report.outputs import Outputs
from sllm.report.progress import Progress, Snapshot
from sllm.results import Begun, FleetFigures, Invariants, Recorder, ReportFigures, RunInfo
from sllm.runtime.clock import Clock
from sllm.runtime.keys import ephemeral_keyring
from sllm.runtime.sockets import ensure_descriptors
from sllm.runtime.udp import UdpDriver, UdpHost
from sllm.sim.busy import BusyTime
from sllm.sim.checkers import Checkers, InvariantViolation
from sllm.sim.faults import load_schedule
from sllm.sim.inject import Injector
from sllm.sim.network import Latency, Link, Network
from sllm.sim.world import Interrupted, World
from sllm.streams import stream
from sllm.wire import PickleCodec
from sllm.workload import Request, Workload
from sllm.workload.traces import BROKEN
from worker import Worker

LOOPBACK: Address = ("127.0.0.1", 0)
DESCRIPTORS_BESIDES = 64  # files, the coordinator's and the client's sockets
PROGRESS_WALL_S = 0.2
SUBMIT_MAX = 1000  # requests that come in one go at most, in a live run
LAST_REPORTS_WALL_S = 1.0  # on loopback a report that has not come by then was dropped
LAG_TOLERATED = 0.1  # a sped-up clock waits out every stall of the machine: a few percent of them are usual
START_STEP_S = 1.0  # of simulated time
START_S, START_INTERVALS, START_LATENCIES = 60.0, 30.0, 4.0  # a fleet that is not up after so long in virtual time, all three together, never will be
START_WALL_S, START_REPORTS = 60.0, 3.0  # a live fleet that is not up after so many seconds and report intervals, added up, never will be
INSPECT_S = 5.0  # of a virtual run, between looks at some nodes and rows; what events tell is checked as it happens
SETTLE_INTERVALS = 2.0  # from the last answer to the last look, beyond those after which a silent worker is suspect and a lost dispatch is written off
RECEIVE_BUFFER_BYTES = 8 << 20  # asked for at the coordinator and the client: all of a fleet's reports may come at once


class System:
    """The roles of one fleet. Every random choice comes from a stream of the configuration's seed, named by role and life."""

    def __init__(self, config: Config, *, wire: bool, stopwatch: Callable[[], float] | None = None) -> None:
        self.config = config
        self._trace_models = count_trace_models(config)
        self.catalog = build_catalog(config, self._trace_models)
        kinds = hardware_of_workers(config.hardware, config.workers)
        configs = {kind: dataclasses.replace(config, hardware=kind) for kind in dict.fromkeys(kinds)}
        self.hardware: Counter[str] = Counter(kinds)  # workers by hardware
        self.coordinator_address: Address = ("coordinator", config.coordinator_port)
        self.coordinators: list[Coordinator] = []  # every life
        self.workers: dict[str, list[Worker]] = {f"worker-{i}": [] for i in range(config.workers)}
        self._worker_configs = {name: configs[kind] for name, kind in zip(self.workers, kinds, strict=True)}
        self.clients: list[Client] = []
        self._stopwatch = stopwatch
        self._keyring = ephemeral_keyring() if wire else None
        make_policy(config.policy)  # a bad one is an error before anything starts
        for worker_config in configs.values():
            build_engine(worker_config, self.catalog, stream(config.seed, "check"))

    def codec(self) -> Codec | None:
        return PickleCodec(self._keyring) if self._keyring is not None else None

    def make_coordinator(self, incarnation: int, now: float, wall_offset_s: float = 0.0) -> Coordinator:
        life = len(self.coordinators) + 1
        node = Coordinator(
            self.config, self.catalog, make_policy(self.config.policy), stream(self.config.seed, f"coordinator/{life}"), incarnation,
            codec=self.codec(), wall_offset_s=wall_offset_s, stopwatch=self._stopwatch, now=now,
        )  # fmt: skip
        self.coordinators.append(node)
        return node

    def make_worker(self, name: str, incarnation: int, now: float, wall_offset_s: float = 0.0, advertise: Address = ("", 0)) -> Worker:
        """The next life of a worker. `advertise` is where it is reached, which its reports say."""
        lives = self.workers[name]
        config = self._worker_configs[name]
        seed, role = config.seed, f"{name}/{len(lives) + 1}"
        engine = build_engine(config, self.catalog, stream(seed, f"{role}/service"))
        node = Worker(
            config, self.catalog, engine, self.coordinator_address, stream(seed, role), incarnation,
            node_id=name, codec=self.codec(), wall_offset_s=wall_offset_s, advertise=advertise, now=now,
        )  # fmt: skip
        lives.append(node)
        return node

    def make_client(self, incarnation: int, now: float, wall_offset_s: float = 0.0) -> Client:
        rng = stream(self.config.seed, f"client/{len(self.clients) + 1}")
        node = Client(self.config, self.coordinator_address, rng, incarnation, codec=self.codec(), wall_offset_s=wall_offset_s, now=now)
        self.clients.append(node)
        return node

    def workload(self) -> Workload:
        """The requests of this run, from the configuration."""
        return build_workload(self.config, self.catalog, self._trace_models)

    @property
    def all_workers(self) -> list[Worker]:
        """Every life of every worker."""
        return [node for lives in self.workers.values() for node in lives]

    @property
    def ready(self) -> int:
        """Workers that the present coordinator would give work to."""
        return self.coordinators[-1].fleet.states[READY]

    @property
    def started(self) -> bool:
        return self.coordinators[-1].ready and self.ready == len(self.workers)

    @property
    def in_flight(self) -> int:
        return sum(client.in_flight for client in self.clients)

    def busy_s(self, now: float) -> list[float]:
        """Seconds each worker was busy, all its lives together, where all go by one clock and none crashes."""
        return [sum(node.engine.busy_s(now) for node in lives) for lives in self.workers.values()]

    def report_figures(self, copies: int = 0, lost: int | None = None, under_way: int = 0) -> ReportFigures:
        """The books of the reports; `copies` the network made count as sent. `lost` is what it lost; None: nobody knows but by what was not heard.
        `under_way` is what the network still has."""
        rejected: Counter[str] = Counter()
        for coordinator in self.coordinators:
            rejected.update(coordinator.reports_rejected)
        sent = sum(worker.reports_sent for worker in self.all_workers) + copies
        return ReportFigures(sent, sum(c.reports_accepted for c in self.coordinators), rejected, lost, under_way)


class Run(ABC):
    """One run of a system. `conduct` does it all; what was measured is in `results`."""

    mode = ""

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        """`progress_to` None: stderr. `outputs`: where rows and the recording go; the caller commits them."""
        self.config = config
        self.options = options
        self.violations: list[str] = []
        self.warnings: list[str] = [f"not readable, and passed over: {problem}" for problem in (*broken_policies(), *BROKEN.values())]
        self.system = System(config, wire=options.wire or self.mode == "udp", stopwatch=time.perf_counter)
        self.workload = self.system.workload()
        check_models_fit(config, self.system.catalog, self.workload)
        self.warnings += self.workload.warnings
        if "--zipf" in options.given and self.workload.trace is not None and self.workload.trace.format.exact:
            self.warnings.append("--zipf: has no effect: a recording says which model each request is for")
        self.recorder = Recorder()
        self.requests_csv = outputs.requests_csv if outputs else None
        self.recording = outputs.recording if outputs else None
        stream = progress_to or sys.stderr
        self.progress = Progress(
            stream or io.StringIO(), time.monotonic,
            virtual=options.virtual, quiet=options.quiet or stream is None, no_color=options.no_color, dumb=options.dumb_terminal,
        )  # fmt: skip
        self.interrupted = False
        self._drawing = False  # in the middle of making the next request
        self.began_s = 0.0  # of the run's clock: when requests began to come
        self.window_s = 0.0  # for how long they came
        self.ready_workers = 0  # just before they were sent home
        self._busy_before: list[float] = []
        self._busy_after: list[float] = []
        self._started_wall = time.perf_counter()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._started_wall

    @property
    @abstractmethod
    def now(self) -> float:
        """The run's clock."""

    @abstractmethod
    def conduct(self) -> None:
        """Run to the end, or until `interrupt`."""

    def interrupt(self) -> None:
        """Take no new arrivals, stop at once and close the books on what there is. A signal's handler may call it at any time while `conduct` runs."""
        self.interrupted = True
        if self._drawing:  # a trace may have millions of rows without a request in them
            raise Interrupted

    @abstractmethod
    def checkers(self) -> Checkers: ...

    def busy_s(self) -> list[float]:
        """Seconds each worker was busy until now."""
        return self.system.busy_s(self.now)

    def report_figures(self) -> ReportFigures:
        """The books of the reports."""
        return self.system.report_figures()

    def arrivals(self) -> Iterator[tuple[float, Request]]:
        """When each request comes, on the run's clock, and the request. To be made at any time, to be taken from once the run has begun."""
        requests = iter(self.workload)
        try:
            while True:
                self._drawing = True
                request = next(requests, None)
                self._drawing = False
                if request is None or self.interrupted:
                    return
                yield self.began_s + request.arrival_s, request
        except Interrupted:
            self._drawing = False

    def submit(self, client: Client, request: Request, now: float) -> None:
        """The request comes."""
        if self.recording is not None:
            self.recording.write(request)
        client.submit(request, now)

    def begin(self) -> None:
        """The fleet is up: requests come from now on."""
        self.began_s = self.now
        self._busy_before = self.busy_s()

    def arrivals_ended(self) -> None:
        """The last request has come; utilisation is measured up to here."""
        if self._busy_before and not self._busy_after:
            self.window_s = self.now - self.began_s
            self._busy_after = self.busy_s()
            if not (self.recorder.sent_at or self.interrupted or self.options.faults):
                self.warnings.append(f"no request was sent: {self._why_nothing_came()}")

    def _why_nothing_came(self) -> str:
        """For a user who asked for a run and got an empty one."""
        within_s = self.workload.spec.duration_s or self.window_s
        if self.workload.trace is not None:
            return f"{self.config.trace} has none before {within_s:.12g} s (--duration)"
        rate = "--rate" if self.config.rate_per_s else "the default rate, which keeps this fleet about half busy (--rate, --catalog)"
        return f"none came within {within_s:.12g} s at {rate}: one in {1.0 / self.workload.spec.rate_per_s:,.0f} s"

    def close(self) -> None:
        """Close what was read, and leave the terminal as it was, whatever happened."""
        self.workload.close()
        self.progress.close()

    def snapshot(self) -> Snapshot:
        """The state of the run, for progress."""
        states = self.system.coordinators[-1].fleet.states
        phase = "starting" if not self._busy_before else "draining" if self._busy_after else ""
        return Snapshot(
            self.now - self.began_s if self._busy_before else 0.0, self.workload.spec.duration_s or 0.0,
            {name: count for name, count in states.items() if count}, self.recorder.glance(), phase,
            warning="this machine cannot keep up" if self.falls_behind else "",
        )  # fmt: skip

    def _show_progress(self) -> None:
        if self.progress.due():
            self.progress.update(self.snapshot())

    def _check_interrupted(self) -> None:
        if self.interrupted:
            raise Interrupted

    def _not_started(self) -> str:
        return f"only {self.system.ready:,} of {len(self.system.workers):,} workers were ready"

    @property
    def falls_behind(self) -> bool:
        """The machine is too slow for the speed asked for."""
        return False

    def begun(self) -> Begun:
        """What is known of the first tokens of requests in flight."""
        goal_s, ended_s, in_time, undecided = self.recorder.ttft_slo_s, self.now, 0, 0
        for client in self.system.clients:
            for pending in client.unfinished():
                first_s = pending.first_tokens.get(pending.worker_id)
                in_time += first_s is not None and first_s - pending.arrival_s <= goal_s
                undecided += first_s is None and ended_s - pending.arrival_s < goal_s
        return Begun(in_time, undecided)

    def put_in_flight(self) -> None:
        """Give a row to each request that had not ended when the run did."""
        reason = "interrupted" if self.interrupted else "the run ended"
        if self.requests_csv is not None:
            for client in self.system.clients:
                for pending in client.unfinished():
                    self.requests_csv.put_in_flight(pending, reason)

    def results(self) -> dict[str, Any]:
        """The results, schema 1."""
        self.arrivals_ended()  # for a run that a violation stopped before the last arrival
        config, window_s, asked_s = self.config, self.window_s, self.workload.spec.duration_s
        busy_s = [after - before for after, before in zip(self._busy_after, self._busy_before, strict=True)]
        engine_profile, loader = profile_names(config, map(self.system.catalog.get_hardware, self.system.hardware))
        info = RunInfo(
            self.mode, "centralized", config.workers, config.policy, config.seed, window_s if self.interrupted else asked_s or window_s, self.wall_s,
            self.workload.describe(), self.system.hardware, engine_profile, loader, asked_s, self.interrupted,
        )  # fmt: skip
        return self.recorder.results(
            info,
            FleetFigures(self.ready_workers, busy_s, window_s),
            self.report_figures(),
            Invariants(self.checkers().checked, self.violations),
            self.system.in_flight,
            self.begun(),
        )


class VirtualRun(Run):
    """A run in virtual time: the world drives the roles, deterministically, as fast as it can."""

    mode = "virtual"

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        super().__init__(config, options, progress_to, outputs)
        link = Link(Latency("constant", config.latency_ms / 1000.0), loss=config.loss)
        self.world = World(config.seed, Network(link, instant_reports=config.report_interval_s == 0.0), wire=options.wire)
        for kind, handler in self.recorder.handlers.items():
            self.world.observe(handler, kind)
        if self.requests_csv is not None:
            for kind, handler in self.requests_csv.handlers.items():
                self.world.observe(handler, kind)
        self._checkers = Checkers.watch(self.world, inspect_every_s=INSPECT_S)
        self._busy = BusyTime(self.world)
        self._schedule = load_schedule(options.faults, config.seed) if options.faults else None
        self._injector: Injector | None = None
        self._exhausted = False

    @property
    def now(self) -> float:
        return self.world.now

    def interrupt(self) -> None:
        self.world.interrupt()
        super().interrupt()

    def checkers(self) -> Checkers:
        return self._checkers

    def begin(self) -> None:
        self._busy.begin()
        super().begin()

    def busy_s(self) -> list[float]:
        return [self._busy.busy_s(name) for name in self.system.workers]

    def report_figures(self) -> ReportFigures:
        network = self.world.network
        return self.system.report_figures(network.duplicated_reports, network.lost_reports, self.world.reports_pending())

    def conduct(self) -> None:
        world, system = self.world, self.system
        world.add(system.make_coordinator(1, 0.0), system.coordinator_address, system.make_coordinator)
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
            world.feed(client_host, self.arrivals(), submit, self._stop_at_last_arrival)
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
        self.recorder.fleet.end()
        self.ready_workers = self.system.ready
        for name in self.system.workers:
            host = self.world.hosts[name]
            if isinstance(host.node, Worker):
                host.node.drain(host.read_clock(host.node, self.world.now))
                self.world.touch(host)
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


class LiveRun(Run):
    """A run in real time: the UDP driver runs the same roles on loopback, one socket each, `--speedup` times as fast as the wall clock."""

    mode = "udp"

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        super().__init__(config, options, progress_to, outputs)
        ensure_descriptors(config.workers + DESCRIPTORS_BESIDES)
        self.clock = Clock(config.speedup)
        self.driver = UdpDriver(self.clock, self._observe)
        self._checkers = Checkers.live(config.seed, lambda: self.clock.now)
        self._upcoming = self.arrivals()
        self._exhausted = False
        self._hosts: list[tuple[Worker, UdpHost]] = []

    @property
    def now(self) -> float:
        return self.clock.now

    @property
    def falls_behind(self) -> bool:
        return self.clock.lag > LAG_TOLERATED

    def checkers(self) -> Checkers:
        return self._checkers

    def _observe(self, node: Node, event: Event) -> None:
        if type(event) is InternalErrorCaught:
            self.violations.append(f"internal error in {event.node_id}, {event.what} was dropped: {event.problem}\n{event.trace}")
            return
        self._checkers.see(node, event)
        self.recorder.observe(event)
        if self.requests_csv is not None:
            self.requests_csv.observe(event)

    def conduct(self) -> None:
        with self.driver:
            try:
                try:
                    self._serve()
                except Interrupted:
                    self.arrivals_ended()
                self._send_home()
            except InvariantViolation as violation:
                self.violations.append(str(violation))
        if self.falls_behind:
            self.warnings.append(
                f"this machine cannot keep up with --speedup {self.config.speedup:.12g}: the run's clock fell behind by {100 * self.clock.lag:.0f} %"
            )

    def _serve(self) -> None:
        """From the start of the fleet to the last answer."""
        self._start_fleet()
        self.begin()
        self._submit_due()
        self._run_until(lambda: self._exhausted)
        self.arrivals_ended()
        limit_s = self.now + self.config.request_timeout_s + 10.0
        self._run_until(lambda: not self.system.in_flight or self.now >= limit_s)

    def _start_fleet(self) -> None:
        """Sockets for everybody; wait until the coordinator counts every worker."""
        system, driver, now, offset_s, incarnation = self.system, self.driver, self.now, self.clock.wall_offset_s, time.time_ns()
        host = driver.add(
            system.make_coordinator(incarnation, now, offset_s), LOOPBACK, count_drops=True, receive_buffer_bytes=RECEIVE_BUFFER_BYTES
        )  # fmt: skip
        self._coordinator_host = host
        system.coordinator_address = host.address
        for name in system.workers:
            self._check_interrupted()
            worker = system.make_worker(name, incarnation, self.now, offset_s)
            worker_host = driver.add(worker, LOOPBACK)
            worker.relocate(worker_host.address)
            self._hosts.append((worker, worker_host))
        self.client = system.make_client(incarnation, self.now, offset_s)
        self._client_host = driver.add(self.client, LOOPBACK, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
        driver.every(PROGRESS_WALL_S * self.clock.speedup, self._show_progress)
        began = time.perf_counter()
        limit_s = START_WALL_S + START_REPORTS * self.config.report_interval_s / self.clock.speedup
        self._run_until(lambda: system.started or time.perf_counter() - began > limit_s)
        if not system.started:
            raise UsageError(f"{self._not_started()} after {limit_s:,.0f} s: too many for this machine (--workers)")

    def _submit_due(self) -> None:
        """Hand in every request whose time has come, some at a time so that the fleet has its turns, and come back for the next."""
        for _ in range(SUBMIT_MAX):
            if self.interrupted:
                break
            following = next(self._upcoming, None)
            if following is None:
                self._exhausted = True
                break
            at, request = following
            if at > self.now:
                self.driver.call_at(at, partial(self._submit_and_go_on, request))
                break
            self.submit(self.client, request, self.now)
        else:
            self.driver.call_at(self.now, self._submit_due)
        self._client_host.touch()

    def _submit_and_go_on(self, request: Request) -> None:
        if not self.interrupted:
            self.submit(self.client, request, self.now)
            self._submit_due()

    def _run_until(self, done: Callable[[], bool]) -> None:
        self.driver.run(until=lambda: self.interrupted or done())
        self._check_interrupted()

    def _send_home(self) -> None:
        """Drain the workers; wait until their last reports have been heard, or cannot be expected any more."""
        self.recorder.fleet.end()
        self.ready_workers = self.system.ready
        for worker, host in self._hosts:
            worker.drain(self.now)
            host.touch()
        until = time.perf_counter() + LAST_REPORTS_WALL_S

        def heard() -> bool:
            books = self.system.report_figures()
            return books.sent == books.accepted + sum(books.rejected.values()) or time.perf_counter() > until

        self.driver.run(until=heard)
