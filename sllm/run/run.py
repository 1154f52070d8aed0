"""A run of a whole fleet, live or in virtual time: it starts, requests come, everything comes to its end, the workers go home and the books close."""

from __future__ import annotations

import io
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TextIO

from config import Config
from sllm.engine.base import EngineUsage
from sllm.live.bridge import Loop
from sllm.observe.coordinatorview import CoordinatorView
from sllm.observe.recorder import Recorder
from sllm.observe.report.outputs import Outputs
from sllm.observe.report.plots import Mark
from sllm.observe.report.progress import Progress
from sllm.observe.results import ReportFigures, Slo
from sllm.placement.registry import broken_policies
from sllm.protocol.capabilities import Drainable, capable
from sllm.protocol.driver import Driver, Handle
from sllm.protocol.errors import UsageError
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected
from sllm.protocol.node import Node
from sllm.run.architecture import Architecture, Participant
from sllm.run.books import close_books
from sllm.run.centralized import Centralized
from sllm.run.command_line import Options
from sllm.run.explain import check_workload, why_nothing_came
from sllm.run.meter import Meter, first_step_s
from sllm.run.snapshot import take_snapshot
from sllm.run.system import System
from sllm.run.watch import Watch
from sllm.verify.all import Checkers, InvariantViolation
from sllm.virtual.world import Interrupted
from sllm.workload import Request
from sllm.workload.traces import BROKEN

ENDS = (RequestCompleted, RequestFailed, RequestRejected)  # of a request
LAG_TOLERATED = 0.1  # a sped-up clock waits out every stall of the machine: a few percent of them are usual


class Run(ABC):
    """One run of a system. `conduct` does it all; what was measured is in `results`. What differs between live and virtual time is in the abstract steps."""

    mode: ClassVar[str]
    architecture: type[Architecture] = Centralized
    driver: Driver[Any]

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        """`progress_to` None: stderr. `outputs`: where rows and the recording go; the caller commits them."""
        self.config = config
        self.options = options
        self.violations: list[str] = []
        self.warnings: list[str] = [f"not readable, and passed over: {problem}" for problem in (*broken_policies(), *BROKEN.values())]
        live = self.mode == "udp"
        self.system = System(config, wire=options.wire or live, architecture=self.architecture, stopwatch=time.perf_counter)
        self.workload = self.system.workload(live=live)
        self.warnings += check_workload(config, options, self.system.catalog, self.workload)
        self.slo = Slo(config.slo_ttft_s, config.slo_tpot_s or None)
        self.requests_csv = outputs.requests_csv if outputs else None
        self.recording = outputs.recording if outputs else None
        stream = progress_to or sys.stderr
        self.progress = Progress(
            stream or io.StringIO(), time.monotonic,
            virtual=options.virtual, quiet=options.quiet or stream is None, no_color=options.no_color, dumb=options.dumb_terminal,
        )  # fmt: skip
        self.watch: Watch | None = None
        self.interrupted = False
        self._drawing = False  # in the middle of making the next request
        self._exhausted = False  # the last request has come
        self.ready_workers = 0  # just before they were sent home
        self.handles: dict[str, Handle] = {}  # of the participants, by name
        self.driver = self.make_driver()
        self.recorder = Recorder()
        self.driver.bus.subscribe_all(self.recorder.handlers)
        if self.requests_csv is not None:
            self.driver.bus.subscribe_all(self.requests_csv.handlers)
        self.checkers = self.make_checkers()
        self.meter = Meter(self.driver, self.usage, lambda: self.system.waiting)
        self._started_wall = time.perf_counter()

    # --- what live and virtual time do in their own way -----------------------------------------------------------------------------

    @abstractmethod
    def make_driver(self) -> Driver[Any]:
        """What runs the nodes. Called once."""

    @abstractmethod
    def make_checkers(self) -> Checkers:
        """The checkers, which hear the driver's bus from now on. Called once."""

    @abstractmethod
    def add(self, participant: Participant) -> Handle:
        """Make the first life of a participant and let the driver drive it; says at which address it is heard."""

    @abstractmethod
    def await_fleet(self) -> None:
        """Let time pass until the fleet is up. UsageError if it does not come up."""

    @abstractmethod
    def feed(self) -> None:
        """From now on hand each request of `arrivals` to the client at its time, and call `exhaust` after the last."""

    @abstractmethod
    def feed_one(self, at: float, request: Request) -> None:
        """Hand this request to the client at `at`."""

    @abstractmethod
    def await_arrivals(self) -> None:
        """Let time pass until `exhaust` has stopped the driver for good."""

    @abstractmethod
    def settle(self) -> None:
        """Let time pass until all that was asked for has come to its end, or cannot be expected to."""

    @abstractmethod
    def await_last_reports(self) -> None:
        """Let time pass until no report of the workers that went home is on its way any more, or none can be expected."""

    # --- the run --------------------------------------------------------------------------------------------------------------------

    def conduct(self) -> None:
        """Run to the end, or until `interrupt`."""
        try:
            try:
                self.start_fleet()
                self.begin()
                self.take_arrivals()
                self.end_arrivals()
                self.settle()
            except Interrupted:
                self.end_arrivals()
            self.send_home()
        except InvariantViolation as violation:
            self.violations.append(str(violation))
        except UsageError:
            raise
        except Exception as error:  # a bug of ours: the run is worth nothing from here on; in virtual time the seed shows the bug again
            where = f"internal error at {self.now:.6f} s with seed {self.config.seed}"
            self.violations.append(f"{where}: {type(error).__name__}: {error}\n{traceback.format_exc().rstrip()}")

    def interrupt(self) -> None:
        """Take no new arrivals, stop at once and close the books on what there is. A signal's handler may call it at any time while `conduct` runs."""
        self.interrupted = True
        if self._drawing:  # a trace may have millions of rows without a request in them
            raise Interrupted

    def check_interrupted(self) -> None:
        if self.interrupted:
            raise Interrupted

    def start_fleet(self) -> None:
        """Add every participant, each after those that it talks to, and wait until requests may come."""
        for name, participant in self.system.participants.items():
            self.check_interrupted()
            handle = self.handles[name] = self.add(participant)
            self.system.addresses[name] = handle.address
        self.await_fleet()

    def begin(self) -> None:
        """The fleet is up: requests come from now on."""
        config = self.config
        self.meter.begin(first_step_s(config.workers, self.workload.spec.duration_s, config.report_interval_s), config.warmup_s)

    def take_arrivals(self) -> None:
        """Let requests come, to the last."""
        if self.workload.users is not None:
            self.driver.bus.subscribe(self._go_on, *ENDS)
        self.feed()
        self.await_arrivals()

    def arrivals(self) -> Iterator[tuple[float, Request]]:
        """When each request comes, on the run's clock, and the request. May be made at any time; requests may be taken from it once the run has begun."""
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

    def submit(self, request: Request, now: float) -> None:
        """The request comes. `now`: what the clock of the client's machine shows."""
        if self.recording is not None:
            self.recording.write(request)
        self.system.carrier.submit(request, now)

    def _go_on(self, node: Node, event: RequestCompleted | RequestFailed | RequestRejected) -> None:
        """A request has ended: closed-loop load sends its next one."""
        request = None if self.interrupted else self.workload.following(event.request_id, self.now - self.began_s)
        if request is not None:
            self.feed_one(self.began_s + request.arrival_s, request)

    def exhaust(self) -> None:
        """No more requests come; those of closed-loop load come until the time is over."""
        end_s = self.now if self.workload.users is None else self.began_s + self.workload.spec.until_s
        if end_s > self.now:
            self.driver.call_at(end_s, self.exhaust)
        else:
            self._exhausted = True
            self.driver.stop()  # at this very moment: the phases of a run in virtual time do not depend on how its time was sliced

    def end_arrivals(self) -> None:
        """The last request has come; what was in use is measured up to here."""
        if self.meter.has_begun and not self.meter.has_ended:
            self.meter.end()
            if not (self.recorder.sent_at or self.interrupted or self.options.faults):
                why = why_nothing_came(self.config, self.workload, self.workload.spec.duration_s or self.window_s)
                self.warnings.append(f"no request was sent: {why}")

    def send_home(self) -> None:
        """Drain the workers, so that no report is on its way when the books close."""
        self.meter.stop_looking()
        self.recorder.fleet.end()
        self.ready_workers = self.system.ready
        for name in self.system.workers:
            handle = self.handles.get(name)  # None: the run was interrupted before the worker was added
            if handle is not None and (worker := capable(handle.node, Drainable)) is not None:
                worker.drain(handle.read_clock())
                handle.touch()
        self.await_last_reports()

    def close(self) -> None:
        """Close what was read and served, and leave the terminal as it was, whatever happened."""
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        self.workload.close()
        self.progress.close()

    # --- what is to be seen meanwhile -----------------------------------------------------------------------------------------------

    def serve_page(self, loop: Loop, kernel_drops: Callable[[], int], later: Callable[[Callable[[], None]], Any]) -> None:
        """Serve the fleet's page if it was asked for, or if somebody watches a terminal, and say where."""
        options, system = self.options, self.system
        if options.page or (self.progress.is_live and not options.no_page and not options.quiet):
            view = CoordinatorView(self.config.policy, lambda: system.tracker, lambda: self.now, later, kernel_drops, time.time())
            self.watch = Watch(loop, view, lambda: system.tracker, self.driver)
            self.progress.note(f"the fleet's page, while the run lasts: {self.watch.url}")

    def show_progress(self) -> None:
        if self.progress.due():
            warning = "this machine cannot keep up" if self.falls_behind else ""
            self.progress.update(take_snapshot(self.system.tracker.fleet, self.meter, self.recorder, self.workload.spec.duration_s, warning))

    @property
    def not_started(self) -> str:
        return f"only {self.system.ready:,} of {len(self.system.workers):,} workers were ready"

    @property
    def now(self) -> float:
        """The run's clock."""
        return self.driver.now

    @property
    def wall_s(self) -> float:
        """Wall time since the run was made."""
        return time.perf_counter() - self._started_wall

    @property
    def began_s(self) -> float:
        """When requests began to come, on the run's clock; 0 before they do."""
        return self.meter.began_s

    @property
    def window_s(self) -> float:
        """For how long requests came; 0 before the last has come."""
        return self.meter.window_s

    @property
    def clock_lag(self) -> float:
        """By which part the run's clock fell behind the speed asked for."""
        return 0.0

    @property
    def falls_behind(self) -> bool:
        """The machine is too slow for the speed asked for."""
        return self.clock_lag > LAG_TOLERATED

    # --- the books ------------------------------------------------------------------------------------------------------------------

    def usage(self) -> list[EngineUsage]:
        """What each worker had in use until now."""
        return self.system.usage(self.now)

    def report_figures(self) -> ReportFigures:
        """The books of the reports."""
        return self.system.report_figures()

    def marks(self) -> list[Mark]:
        """What befell the run on purpose, for plots over time."""
        return []

    def put_in_flight(self) -> None:
        """Give a row to each request that had not ended when the run did."""
        if self.requests_csv is not None:
            for pending in self.system.unfinished():
                self.requests_csv.put_in_flight(pending, "interrupted" if self.interrupted else "the run ended")

    def results(self) -> dict[str, Any]:
        """The results, schema 2."""
        self.end_arrivals()  # for a run that a violation stopped before the last arrival
        self.meter.stop_looking()
        return close_books(self)
