"""What every run of a fleet has in common, live or in virtual time: what it measures, looks at, shows and hands out at its end."""

from __future__ import annotations

import io
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TextIO

from client import Client
from config import Config
from sllm import __version__
from sllm.engine.base import NOTHING_USED, EngineUsage
from sllm.live.bridge import Loop
from sllm.observe.coordinatorview import CoordinatorView
from sllm.observe.recorder import Recorder
from sllm.observe.report.outputs import Outputs
from sllm.observe.report.plots import Mark
from sllm.observe.report.progress import Progress, Snapshot
from sllm.observe.results import Begun, FleetFigures, Invariants, ReportFigures, RunInfo, Slo, make_results, total
from sllm.observe.series import BINS_MIN
from sllm.observe.timeline import LOOKS_MAX, Look, UsageTimeline
from sllm.placement.registry import broken_policies
from sllm.protocol.driver import Driver
from sllm.protocol.errors import UsageError
from sllm.run.assemble import check_models_fit, profile_names
from sllm.run.command_line import Options, settings_of
from sllm.run.system import System
from sllm.run.thresholds import judge, parse_thresholds
from sllm.run.watch import Watch
from sllm.verify.all import Checkers
from sllm.virtual.world import Interrupted
from sllm.workload import Request
from sllm.workload.traces import BROKEN

LOOKED_AT_MAX = 1000  # workers, for progress
LOOKS_BEGIN, FEW_WORKERS = LOOKS_MAX // 2, 200  # looks at what is in use, in a run whose length is known, of so many workers at most
FIRST_LOOK_S, LOOK_INTERVALS = 0.05, 4.0  # else the first look comes after so long; in a larger fleet, after so many report intervals at least
LAG_TOLERATED = 0.1  # a sped-up clock waits out every stall of the machine: a few percent of them are usual


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
        self.workload = self.system.workload(live=self.mode == "udp")
        check_models_fit(config, self.system.catalog, self.workload)
        self.warnings += self.workload.warnings
        if "--zipf" in options.given and self.workload.trace is not None and self.workload.trace.format.exact:
            self.warnings.append("--zipf: has no effect: a recording says which model each request is for")
        asked_s = self.workload.spec.duration_s
        if asked_s and config.warmup_s >= asked_s:
            raise UsageError(f"--warmup {config.warmup_s:.12g}: requests come for {asked_s:.12g} s, so none would be in the statistics (--duration)")
        self.recorder = Recorder()
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
        self.began_s = 0.0  # of the run's clock: when requests began to come
        self.window_s = 0.0  # for how long they came
        self.ready_workers = 0  # just before they were sent home
        self.timeline = UsageTimeline()
        self._used_before: list[EngineUsage] = []  # when requests began to come, or the warm-up ended
        self._used_after: list[EngineUsage] = []
        self._looking = False
        self._started_wall = time.perf_counter()

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._started_wall

    @property
    @abstractmethod
    def driver(self) -> Driver[Any]:
        """What runs the nodes."""

    @property
    def now(self) -> float:
        """The run's clock."""
        return self.driver.now

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

    def usage(self) -> list[EngineUsage]:
        """What each worker had in use until now."""
        return self.system.usage(self.now)

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

    def following(self, request_id: str) -> tuple[float, Request] | None:
        """What closed-loop load sends next because a request has ended just now: when, on the run's clock, and the request. None: nothing."""
        request = None if self.interrupted else self.workload.following(request_id, self.now - self.began_s)
        return None if request is None else (self.began_s + request.arrival_s, request)

    def begin(self) -> None:
        """The fleet is up: requests come from now on."""
        self.began_s = self.now
        self._measure()
        self.timeline.begin(self._look(), self._first_step_s())
        self._looking = True
        self.driver.call_at(self.timeline.next_at, self._look_again)
        if self.config.warmup_s:
            self.driver.call_at(self.began_s + self.config.warmup_s, self._measure)

    def _first_step_s(self) -> float:
        """Between looks at what is in use. In a large fleet they are rare beside reports, for both cost something for each worker."""
        duration_s = self.workload.spec.duration_s
        if len(self.system.workers) <= FEW_WORKERS:
            return duration_s / LOOKS_BEGIN if duration_s else FIRST_LOOK_S
        return max((duration_s or 0.0) / BINS_MIN, LOOK_INTERVALS * (self.config.report_interval_s or 1.0))

    def _measure(self) -> None:
        """What is in use counts from now on, unless nothing comes any more."""
        if not self._used_after:
            self._used_before = self.usage()

    def _look(self) -> Look:
        return Look(self.now, total(self.usage()), self.system.waiting)

    def _look_again(self) -> None:
        if self._looking:
            self.timeline.add(self._look())
            self.driver.call_at(self.timeline.next_at, self._look_again)

    def stop_looking(self) -> None:
        """Nothing that is to be seen in use happens any more."""
        if self._looking:
            self._looking = False
            self.timeline.add(self._look())

    def arrivals_ended(self) -> None:
        """The last request has come; what was in use is measured up to here."""
        if self._used_before and not self._used_after:
            self.window_s = self.now - self.began_s
            self._used_after = self.usage()
            if not (self.recorder.sent_at or self.interrupted or self.options.faults):
                self.warnings.append(f"no request was sent: {self._why_nothing_came()}")

    def _why_nothing_came(self) -> str:
        """For a user who asked for a run and got an empty one."""
        within_s = self.workload.spec.duration_s or self.window_s
        if self.workload.trace is not None:
            return f"{self.config.trace} has none before {within_s:.12g} s (--duration)"
        if self.config.stages or self.config.concurrency:
            return f"none came within {within_s:.12g} s"
        rate = "--rate" if self.config.rate_per_s else "the default rate, half of what this fleet can serve (--rate, --catalog)"
        return f"none came within {within_s:.12g} s at {rate}: one in {1.0 / self.workload.spec.rate_per_s:,.0f} s"

    def close(self) -> None:
        """Close what was read and served, and leave the terminal as it was, whatever happened."""
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        self.workload.close()
        self.progress.close()

    def _serve_page(self, loop: Loop, kernel_drops: Callable[[], int], later: Callable[[Callable[[], None]], Any]) -> None:
        """Serve the fleet's page if it was asked for, or if somebody watches a terminal, and say where."""
        options = self.options
        if not options.page and (options.no_page or options.quiet or not self.progress.is_live):
            return
        coordinators = self.system.coordinators
        view = CoordinatorView(self.config.policy, lambda: coordinators[-1], lambda: self.now, later, kernel_drops, time.time())
        self.watch = Watch(loop, view, lambda: coordinators[-1], lambda: self.now)
        view.subscribe(self.driver.bus)
        self.driver.every(1.0, view.tick)
        self.progress.note(f"the fleet's page, while the run lasts: {self.watch.url}")

    def snapshot(self) -> Snapshot:
        """The state of the run, for progress. Slots and KV cache are as the coordinator has heard of them; of a large fleet some workers stand for all."""
        fleet = self.system.coordinators[-1].fleet
        step = len(fleet.rows) // LOOKED_AT_MAX + 1
        engines = [row.engine for row in islice(fleet.rows.values(), 0, None, step)]
        slots = sum(engine.slots for engine in engines)
        phase = "starting" if not self._used_before else "draining" if self._used_after else ""
        return Snapshot(
            self.now - self.began_s if self._used_before else 0.0, self.workload.spec.duration_s or 0.0,
            {name: count for name, count in fleet.states.items() if count}, self.recorder.glance(),
            sum(engine.running for engine in engines) / slots if slots else None,
            sum(engine.kv_used for engine in engines) / len(engines) if engines else None,
            step * sum(engine.waiting for engine in engines) if engines else None,
            phase, warning="this machine cannot keep up" if self.falls_behind else "",
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
    def clock_lag(self) -> float:
        """By which part the run's clock fell behind the speed asked for."""
        return 0.0

    @property
    def falls_behind(self) -> bool:
        """The machine is too slow for the speed asked for."""
        return self.clock_lag > LAG_TOLERATED

    def begun(self) -> Begun:
        """What is known of the first tokens of requests in flight."""
        slo, ended_s, in_time, undecided = self.slo, self.now, 0, 0
        since = self.began_s + self.config.warmup_s if self.config.warmup_s else 0.0
        for client in self.system.clients:
            for pending in client.unfinished():
                if pending.arrival_s < since:
                    continue
                first_s = pending.first_tokens.get(pending.worker_id)
                if first_s is None:
                    undecided += ended_s - pending.arrival_s < slo.ttft_s
                elif first_s - pending.arrival_s <= slo.ttft_s:
                    in_time += slo.tpot_s is None
                    undecided += slo.tpot_s is not None
        return Begun(in_time, undecided)

    def marks(self) -> list[Mark]:
        """What befell the run on purpose, for plots over time."""
        return []

    def put_in_flight(self) -> None:
        """Give a row to each request that had not ended when the run did."""
        reason = "interrupted" if self.interrupted else "the run ended"
        if self.requests_csv is not None:
            for client in self.system.clients:
                for pending in client.unfinished():
                    self.requests_csv.put_in_flight(pending, reason)

    def results(self) -> dict[str, Any]:
        """The results, schema 2."""
        self.arrivals_ended()  # for a run that a violation stopped before the last arrival
        self.stop_looking()
        config, window_s, asked_s = self.config, self.window_s, self.workload.spec.duration_s
        measured_s = max(0.0, window_s - config.warmup_s)
        used = [after - before if measured_s else NOTHING_USED for after, before in zip(self._used_after, self._used_before, strict=True)]
        engine_profile, loader = profile_names(config, map(self.system.catalog.get_hardware, self.system.hardware))
        info = RunInfo(
            self.mode, "centralized", config.workers, config.policy, config.seed, window_s if self.interrupted else asked_s or window_s, self.wall_s,
            self.workload.describe(), self.system.hardware, engine_profile, loader, asked_s, self.interrupted,
            __version__, settings_of(config, self.options), self.clock_lag,
        )  # fmt: skip
        workers = self.system.worker_figures(used) if used else []
        results = make_results(
            self.recorder,
            info,
            FleetFigures(self.ready_workers, workers, measured_s, self.began_s, config.warmup_s, self.timeline),
            self.report_figures(),
            Invariants(self.checkers().checked, self.violations),
            self.system.in_flight,
            self.begun(),
            self.slo,
        )
        results["slo"]["thresholds"] = judge(parse_thresholds(self.options.fail_if), results)
        return results
