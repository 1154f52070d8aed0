"""What must not end a process: an exception of ours while a live role hears, wakes or speaks. In virtual time the same exception ends the run."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from math import inf
from typing import Any

import pytest
from roles import ToyCodec, judged

from config import Config
from experiments.harness import configuration, silent
from sllm.live.clock import Clock
from sllm.live.udp import TIMER_PAUSE_WALL_S, UdpDriver
from sllm.observe import logs
from sllm.observe.metrics import CoordinatorMetrics
from sllm.protocol.errors import UsageError
from sllm.protocol.events import CoordinatorReady, Event, InternalErrorCaught
from sllm.protocol.messages import Address, AnyEnvelope, Envelope, Progress
from sllm.protocol.node import Judge, Node
from sllm.routing.router import Router
from sllm.run.live import LiveRun
from sllm.run.virtual import VirtualRun


class EpochCodec(ToyCodec):
    """Packs the epoch and the sequence; will not pack the epoch 13."""

    def encode(self, envelope: AnyEnvelope) -> bytes:
        progress = envelope.message
        if progress.requests == 13:
            raise ValueError("Progress.requests=13: is bad luck")
        return f"{progress.requests} {envelope.sequence}".encode()

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope:
        epoch, sequence = map(int, bytes(data).split())
        return judged(Envelope("mouth", 1, sequence, now + 100.0, Progress(1.0, epoch)), judge, now)


class Brittle(Node):
    """Raises when it hears the epoch 7, and at each timer while `timer_breaks`."""

    def __init__(self, name: str = "brittle") -> None:
        super().__init__(name, 1, codec=EpochCodec(), wall_offset_s=100.0)
        self.heard: list[int] = []
        self.timers = 0
        self.timer_breaks = False
        self.handlers = {Progress: self._on_progress}

    def _on_progress(self, envelope: Envelope[Progress], addr: Address, now: float) -> None:
        if envelope.message.requests == 7:
            raise BlockingIOError("a handler's error must not be taken for the socket's")
        self.heard.append(envelope.message.requests)

    def handle_timer(self, now: float) -> None:
        self.timers += 1
        if self.timer_breaks:
            raise KeyError("row")
        self.wake_at = inf


@pytest.fixture
def seen() -> list[Event]:
    return []


@pytest.fixture
def driver(seen: list[Event]) -> Iterator[UdpDriver]:
    with UdpDriver(Clock()) as driver:
        driver.bus.subscribe(lambda node, event: seen.append(event))
        yield driver


def turn(driver: UdpDriver, until: Any) -> None:
    for _ in range(2000):
        if until():
            return
        driver.step(0.05)
    raise AssertionError("the condition never came to hold")


def test_an_exception_costs_the_datagram_it_came_with_and_is_told_once(driver: UdpDriver, seen: list[Event]) -> None:
    ear, mouth = Brittle("ear"), Brittle("mouth")
    address = driver.add(ear).address
    host = driver.add(mouth)
    for epoch in (1, 7, 2, 7, 7, 3):
        mouth.send(Progress(1.0, epoch), address, 0.0)
    host.touch()
    turn(driver, lambda: len(ear.heard) == 3)
    assert ear.heard == [1, 2, 3]
    ((place, count),) = driver.internal_errors.items()
    assert (place.split(":")[0], count) == ("test_guard.py", 3)
    assert not driver.receive_errors
    (told,) = seen
    assert isinstance(told, InternalErrorCaught)
    assert (told.node_id, told.place, told.what) == ("ear", place, "a datagram")
    assert "_on_progress" in told.trace


def test_a_message_that_cannot_be_packed_or_sent_costs_no_other(driver: UdpDriver, seen: list[Event]) -> None:
    ear, mouth = Brittle("ear"), Brittle("mouth")
    address = driver.add(ear).address
    host = driver.add(mouth)
    host.routes.known["nowhere", 1] = ("::1%a\0b", 1)  # sendto raises TypeError, and in other cases UnicodeError or OverflowError
    mouth.send(Progress(1.0, 13), address, 0.0)
    mouth.send(Progress(1.0, 1), ("nowhere", 1), 0.0)
    mouth.send(Progress(1.0, 2), address, 0.0)
    host.touch()
    turn(driver, lambda: ear.heard == [2])
    assert sum(driver.internal_errors.values()) == len(seen) == 1
    assert sum(driver.send_errors.values()) == 1


def test_a_timer_that_raises_is_tried_again_after_a_pause(driver: UdpDriver) -> None:
    node = Brittle()
    node.timer_breaks, node.wake_at = True, 0.0
    driver.add(node)
    turn(driver, lambda: node.timers == 2)
    assert driver.clock.now >= TIMER_PAUSE_WALL_S
    node.timer_breaks = False
    turn(driver, lambda: node.timers == 3)
    assert node.wake_at == inf
    assert sum(driver.internal_errors.values()) == 2


def raiser(error: Exception) -> Any:
    def observe(node: Node, event: Event) -> None:
        if not isinstance(event, InternalErrorCaught):
            raise error

    return observe


@pytest.mark.parametrize("survive", [False, True])
def test_observers_and_calls_end_only_a_loop_that_is_not_to_survive(survive: bool) -> None:
    with UdpDriver(Clock(), survive=survive) as driver:
        driver.bus.subscribe(raiser(ZeroDivisionError()))
        node = Brittle()
        host = driver.add(node)
        driver.call_at(0.0, lambda: 1 // 0)
        node.events.append(CoordinatorReady(0.0, 1))
        if not survive:
            with pytest.raises(ZeroDivisionError):
                host.touch()
            with pytest.raises(ZeroDivisionError):
                turn(driver, lambda: False)
            return
        host.touch()
        turn(driver, lambda: sum(driver.internal_errors.values()) == 2)


def test_what_the_user_must_mend_still_ends_the_loop() -> None:
    with UdpDriver(Clock(), survive=True) as driver:
        driver.bus.subscribe(raiser(UsageError("mend me")))
        node = Brittle()
        host = driver.add(node)
        node.events.append(CoordinatorReady(0.0, 1))
        with pytest.raises(UsageError):
            host.touch()


def test_it_is_in_the_metrics_and_in_the_log_with_its_stack(driver: UdpDriver, seen: list[Event]) -> None:
    ear, mouth = Brittle("ear"), Brittle("mouth")
    target = driver.add(ear)
    host = driver.add(mouth)
    mouth.send(Progress(1.0, 7), target.address, 0.0)
    host.touch()
    turn(driver, lambda: bool(seen))
    metrics = CoordinatorMetrics(0.0)
    metrics.collect_driver(driver, target)
    (place,) = driver.internal_errors
    assert f'sllm_internal_errors_total{{place="{place}"}} 1' in metrics.render()
    for form in ("text", "json"):
        stream = io.StringIO()
        logs.EventLog(logs.setup("info", form, stream))(ear, seen[0])
        text = stream.getvalue()
        assert place in text
        assert "Traceback" in text
        if form == "json":
            assert "_on_progress" in json.loads(text)["trace"]
        else:
            first, *stack = text.splitlines()
            assert "error" in first
            assert stack
            assert all(line.startswith("  ") for line in stack), "a peer's words in an exception cannot look like a line of their own"


# --- whole runs -----------------------------------------------------------------------------------------------------------------------


def config_of(**changes: Any) -> Config:
    return configuration(workers=2, rate_per_s=4.0, duration_s=2.0, models=2, **changes)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator whose first placement raises."""
    place, calls = Router.place, []

    def broken_place(self: Router, request: Any, now: float) -> Any:
        calls.append(now)
        if len(calls) == 1:
            raise RuntimeError("half done")
        return place(self, request, now)

    monkeypatch.setattr(Router, "place", broken_place)


@pytest.mark.usefixtures("broken")
def test_in_virtual_time_it_ends_the_run_and_says_seed_and_time() -> None:
    run = VirtualRun(config_of(seed=5), silent())
    run.conduct()
    run.close()
    (violation,) = run.results()["invariants"]["violations"]
    assert violation.startswith("internal error at ")
    assert "s with seed 5: RuntimeError: half done\nTraceback" in violation
    assert run.results()["requests"]["completed"] == 0


@pytest.mark.usefixtures("broken")
def test_a_live_run_goes_on_and_says_so_at_the_end() -> None:
    run = LiveRun(config_of(speedup=10.0, retry_initial_s=0.1), silent(virtual=False))
    run.conduct()
    run.close()
    results = run.results()
    (violation,) = results["invariants"]["violations"]
    assert violation.startswith("internal error in coordinator, a datagram was dropped: RuntimeError: half done\nTraceback")
    assert results["requests"]["completed"] == results["requests"]["sent"] > 0
