"""A run of a whole fleet in real time, over UDP on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import TextIO

from config import Config
from sllm.live.clock import Clock
from sllm.live.host import UdpHost
from sllm.live.sockets import ensure_descriptors
from sllm.live.udp import UdpDriver
from sllm.observe.report.outputs import Outputs
from sllm.protocol.capabilities import CarriesRequests, HasEngine, TracksWorkers, capable
from sllm.protocol.errors import UsageError
from sllm.protocol.events import InternalErrorCaught
from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.run.architecture import Participant
from sllm.run.command_line import Options
from sllm.run.run import Run
from sllm.verify.all import Checkers
from sllm.workload import Request
from sllm.workload.pump import Pump

LOOPBACK: Address = ("127.0.0.1", 0)
DESCRIPTORS_BESIDES = 64  # files, the coordinator's and the client's sockets
PROGRESS_WALL_S = 0.2
LAST_REPORTS_WALL_S = 1.0  # a report that takes longer on loopback was dropped
START_WALL_S, START_REPORTS = 60.0, 3.0  # seconds and report intervals; a live fleet that is not up after their sum never will be
SETTLE_S = 10.0  # of the run's clock, after the time at which the last request has timed out
RECEIVE_BUFFER_BYTES = 8 << 20  # asked for where a whole fleet may speak at once: at who tracks workers, and at the client


class LiveRun(Run):
    """A run in real time: the UDP driver runs the same roles on loopback, one socket each, `--speedup` times as fast as the wall clock."""

    mode = "udp"
    driver: UdpDriver

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        ensure_descriptors(config.workers + DESCRIPTORS_BESIDES)
        self.clock = Clock(config.speedup)
        super().__init__(config, options, progress_to, outputs)
        self._incarnation = time.time_ns()  # of every node

    def make_driver(self) -> UdpDriver:
        driver = UdpDriver(self.clock)
        driver.bus.subscribe(self._on_internal_error, InternalErrorCaught)
        return driver

    def make_checkers(self) -> Checkers:
        return Checkers.live(self.config.seed, self.driver.bus, lambda: self.now)

    @property
    def clock_lag(self) -> float:
        return self.clock.lag

    def _on_internal_error(self, node: Node, event: InternalErrorCaught) -> None:
        self.violations.append(f"internal error in {event.node_id}, {event.what} was dropped: {event.problem}\n{event.trace}")

    def conduct(self) -> None:
        with self.driver:
            super().conduct()
        if self.falls_behind:
            behind = f"the run's clock fell behind by {100 * self.clock.lag:.0f} %"
            self.warnings.append(f"this machine cannot keep up with --speedup {self.config.speedup:.12g}: {behind}")

    def _run_until(self, done: Callable[[], bool]) -> None:
        """Let time pass until done() is true. Interrupted after `interrupt`."""
        self.driver.run_until(lambda: self.interrupted or done())
        self.check_interrupted()

    def add(self, participant: Participant) -> UdpHost:
        """A socket for the participant, at whatever address there is."""
        node = self.system.make(participant.name, self._incarnation, self.now, self.clock.wall_offset_s)
        tracks, server = capable(node, TracksWorkers) is not None, capable(node, HasEngine)
        hears_all = tracks or capable(node, CarriesRequests) is not None
        host = self.driver.add(node, LOOPBACK, count_drops=tracks, receive_buffer_bytes=RECEIVE_BUFFER_BYTES if hears_all else 0)
        node.relocate(host.address)
        if server is not None:
            server.engine.wake = host.wake
        return host

    def await_fleet(self) -> None:
        """Wait until the fleet is up, for a wall time that is long enough on any machine that can run the fleet."""
        driver = self.driver
        driver.every(PROGRESS_WALL_S * self.clock.speedup, self.show_progress)
        self.serve_page(driver, lambda: sum(host.kernel_drops for host in driver.hosts.values()), lambda step: driver.call_at(self.now, step))
        began = time.perf_counter()
        limit_s = START_WALL_S + START_REPORTS * self.config.report_interval_s / self.clock.speedup
        self._run_until(lambda: self.system.started or time.perf_counter() - began > limit_s)
        if not self.system.started:
            raise UsageError(f"{self.not_started} after {limit_s:,.0f} s: too many for this machine (--workers)")

    def feed(self) -> None:
        self._hand_in(Pump(self.arrivals(), self.submit, lambda: self.now, lambda: self.interrupted))

    def _hand_in(self, pump: Pump[Request]) -> None:
        """Hand in the requests whose time has come, and come back for the next."""
        at = pump.hand_in()
        if pump.exhausted:
            self.exhaust()
        elif at < inf:
            self.driver.call_at(at, partial(self._hand_in, pump))
        self.handles[self.system.client].touch()

    def feed_one(self, at: float, request: Request) -> None:
        def come() -> None:
            if not self.interrupted:
                self.submit(request, self.now)
                self.handles[self.system.client].touch()

        self.driver.call_at(at, come)

    def await_arrivals(self) -> None:
        self._run_until(lambda: self._exhausted)

    def settle(self) -> None:
        """Wait for the last answer, for no longer than requests live."""
        limit_s = self.now + self.config.request_timeout_s + SETTLE_S
        self._run_until(lambda: not self.system.in_flight or self.now >= limit_s)

    def await_last_reports(self) -> None:
        until = time.perf_counter() + LAST_REPORTS_WALL_S

        def heard() -> bool:
            books = self.system.report_figures()
            return books.sent == books.accepted + sum(books.rejected.values()) or time.perf_counter() > until

        self.driver.run_until(heard)
