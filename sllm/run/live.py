"""A run of a whole fleet in real time, over UDP on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

from config import Config
from sllm.live.clock import Clock
from sllm.live.host import UdpHost
from sllm.live.sockets import ensure_descriptors
from sllm.live.udp import UdpDriver
from sllm.observe.report.outputs import Outputs
from sllm.protocol.errors import UsageError
from sllm.protocol.events import (
    InternalErrorCaught,
    RequestCompleted,
    RequestFailed,
    RequestRejected,
)
from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.run.command_line import Options
from sllm.run.run import Run
from sllm.verify.all import Checkers, InvariantViolation
from sllm.virtual.world import Interrupted
from sllm.workload import Request
from worker import Worker

LOOPBACK: Address = ("127.0.0.1", 0)
DESCRIPTORS_BESIDES = 64  # files, the coordinator's and the client's sockets
PROGRESS_WALL_S = 0.2
SUBMIT_MAX = 1000  # requests that come in one go at most, in a live run
LAST_REPORTS_WALL_S = 1.0  # on loopback a report that has not come by then was dropped
START_WALL_S, START_REPORTS = 60.0, 3.0  # a live fleet that is not up after so many seconds and report intervals, added up, never will be
ENDS = (RequestCompleted, RequestFailed, RequestRejected)  # of a request
RECEIVE_BUFFER_BYTES = 8 << 20  # asked for at the coordinator and the client: all of a fleet's reports may come at once


class LiveRun(Run):
    """A run in real time: the UDP driver runs the same roles on loopback, one socket each, `--speedup` times as fast as the wall clock."""

    mode = "udp"

    def __init__(self, config: Config, options: Options, progress_to: TextIO | None = None, outputs: Outputs | None = None) -> None:
        super().__init__(config, options, progress_to, outputs)
        ensure_descriptors(config.workers + DESCRIPTORS_BESIDES)
        self.clock = Clock(config.speedup)
        self._driver = UdpDriver(self.clock)
        bus = self._driver.bus
        self._checkers = Checkers.live(config.seed, bus, lambda: self.clock.now)
        bus.subscribe_all(self.recorder.handlers)
        if self.requests_csv is not None:
            bus.subscribe_all(self.requests_csv.handlers)
        bus.subscribe(self._go_on, *ENDS)
        bus.subscribe(self._on_internal_error, InternalErrorCaught)
        self._upcoming = self.arrivals()
        self._exhausted = False
        self._hosts: list[tuple[Worker, UdpHost]] = []

    @property
    def driver(self) -> UdpDriver:
        return self._driver

    @property
    def clock_lag(self) -> float:
        return self.clock.lag

    def checkers(self) -> Checkers:
        return self._checkers

    def _on_internal_error(self, node: Node, event: InternalErrorCaught) -> None:
        self.violations.append(f"internal error in {event.node_id}, {event.what} was dropped: {event.problem}\n{event.trace}")

    def _go_on(self, node: Node, event: RequestCompleted | RequestFailed | RequestRejected) -> None:
        """A request has ended: closed-loop load sends its next one."""
        following = self.following(event.request_id)
        if following is not None:
            self.driver.call_at(following[0], partial(self._submit_one, following[1]))

    def _submit_one(self, request: Request) -> None:
        if not self.interrupted:
            self.submit(self.client, request, self.now)
            self._client_host.touch()

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
        self._serve_page(driver, lambda: host.kernel_drops, lambda step: driver.call_at(self.now, step))
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
                self._end_arrivals()
                break
            at, request = following
            if at > self.now:
                self.driver.call_at(at, partial(self._submit_and_go_on, request))
                break
            self.submit(self.client, request, self.now)
        else:
            self.driver.call_at(self.now, self._submit_due)
        self._client_host.touch()

    def _end_arrivals(self) -> None:
        """No more requests come; those of closed-loop load come until the time is over."""
        users = self.workload.users
        end_s = self.now if users is None else self.began_s + self.workload.spec.until_s
        if end_s <= self.now:
            self._exhausted = True
        else:
            self.driver.call_at(end_s, self._end_arrivals)

    def _submit_and_go_on(self, request: Request) -> None:
        if not self.interrupted:
            self.submit(self.client, request, self.now)
            self._submit_due()

    def _run_until(self, done: Callable[[], bool]) -> None:
        self.driver.run_until(lambda: self.interrupted or done())
        self._check_interrupted()

    def _send_home(self) -> None:
        """Drain the workers; wait until their last reports have been heard, or cannot be expected any more."""
        self.stop_looking()
        self.recorder.fleet.end()
        self.ready_workers = self.system.ready
        for worker, host in self._hosts:
            worker.drain(self.now)
            host.touch()
        until = time.perf_counter() + LAST_REPORTS_WALL_S

        def heard() -> bool:
            books = self.system.report_figures()
            return books.sent == books.accepted + sum(books.rejected.values()) or time.perf_counter() > until

        self.driver.run_until(heard)
