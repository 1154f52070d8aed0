"""What both drivers offer, held by one script that runs on either: `sllm.protocol.driver`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from math import inf
from typing import Any

import pytest

from sllm.deploy.keys import ephemeral_keyring
from sllm.live.clock import Clock
from sllm.live.udp import UdpDriver
from sllm.protocol.driver import Driver, Handle
from sllm.protocol.events import CoordinatorReady, ExpiryResumed
from sllm.protocol.messages import Address, Envelope, Progress
from sllm.protocol.node import Codec, Node
from sllm.virtual.network import Network
from sllm.virtual.world import World
from sllm.wire.frame import FrameCodec

STEP_S = 0.01  # between the things a script does: more than a round of the live driver takes, most often
KEYS = ephemeral_keyring()


class Echo(Node):
    """Answers a few times, tells of all it hears, and wakes at `at`."""

    def __init__(self, name: str, codec: Codec, wall_offset_s: float, *, at: float = inf, answers: int = 0) -> None:
        super().__init__(name, 1, codec=codec, wall_offset_s=wall_offset_s)
        self.handlers = {Progress: self._on_progress}
        self.wake_at = at
        self.woken: list[float] = []
        self._answers = answers

    def _on_progress(self, envelope: Envelope[Any], addr: Address, now: float) -> None:
        self.events.append(CoordinatorReady(now, len(self.woken)))
        if self._answers:
            self._answers -= 1
            self.send(Progress(1.0, 1), addr, now)

    def handle_timer(self, now: float) -> None:
        self.woken.append(now)
        self.wake_at = inf
        self.events.append(ExpiryResumed(now))


def virtual() -> AbstractContextManager[Any]:
    return nullcontext(World(1, Network()))


def live() -> AbstractContextManager[Any]:
    return UdpDriver(Clock())


@pytest.fixture(params=[virtual, live])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver[Any]]:
    make: Callable[[], AbstractContextManager[Any]] = request.param
    with make() as driver:
        yield driver


def echo(driver: Driver[Any], name: str, **options: Any) -> tuple[Any, Echo]:
    """A node and its handle. Each node of a live driver is at any free port, each of a world at the port 1 of a machine of its own."""
    is_live = isinstance(driver, UdpDriver)
    node = Echo(name, FrameCodec(KEYS), driver.clock.wall_offset_s if isinstance(driver, UdpDriver) else 0.0, **options)
    return driver.add(node, ("127.0.0.1", 0) if is_live else (name, 1)), node


def until(driver: Driver[Any], done: Callable[[], bool]) -> None:
    """Let time pass, step by step, until something has come to be; a bound keeps a broken driver from hanging the test."""
    for _ in range(500):
        if done():
            return
        driver.run(driver.now + STEP_S)
    raise AssertionError("the condition never came to hold")


def test_nodes_talk_and_every_handler_hears_what_they_tell_with_the_node_that_told_it(driver: Driver[Any]) -> None:
    heard: list[tuple[str, Any]] = []
    ready: list[Any] = []
    driver.bus.subscribe(lambda node, event: heard.append((node.node_id, type(event))))
    driver.bus.subscribe(lambda node, event: ready.append(event), CoordinatorReady)
    to, _ = echo(driver, "b", answers=2)
    handle, node = echo(driver, "a", answers=1)
    node.send(Progress(1.0, 1), to.address, driver.now)
    handle.touch()
    until(driver, lambda: len(ready) == 4)
    driver.run(driver.now + STEP_S)
    assert heard == [("b", CoordinatorReady), ("a", CoordinatorReady), ("b", CoordinatorReady), ("a", CoordinatorReady)]
    assert list(driver.bus.recent) == ready


def test_a_handle_has_its_node_and_where_it_is_heard(driver: Driver[Any]) -> None:
    handle: Handle = echo(driver, "a")[0]
    assert handle.node is not None
    assert handle.node.node_id == "a"
    assert handle.address[1] > 0


def test_a_node_wakes_when_it_wants_to_and_touch_says_that_it_wants_to_at_another_time(driver: Driver[Any]) -> None:
    due = driver.now + 2 * STEP_S
    handle, node = echo(driver, "a", at=due)
    driver.run(driver.now + STEP_S / 2)
    until(driver, lambda: len(node.woken) == 1)
    assert node.woken[0] >= due
    node.wake_at = again = driver.now + STEP_S
    handle.touch()
    until(driver, lambda: len(node.woken) == 2)
    assert node.woken[1] >= again


def test_a_handle_wakes_its_node_at_the_time_of_its_clock_and_sends_what_it_says_then(driver: Driver[Any]) -> None:
    """For an engine that cannot know when something will happen."""
    told: list[str] = []
    driver.bus.subscribe(lambda node, event: told.append(node.node_id))
    to, _ = echo(driver, "b")
    handle, node = echo(driver, "a")
    driver.run(driver.now + STEP_S)
    before, now = driver.now, handle.read_clock()
    node.send(Progress(1.0, 1), to.address, now)
    handle.wake()
    assert len(node.woken) == 1
    assert before <= now <= node.woken[0] <= driver.now
    until(driver, lambda: told == ["a", "b"])


def test_calls_are_made_in_order_once_and_not_when_cancelled(driver: Driver[Any]) -> None:
    made: list[Any] = []
    at = driver.now + STEP_S
    first = driver.call_at(at, lambda: made.append("first"))
    driver.call_at(at, lambda: made.append("second"))
    driver.cancel(driver.call_at(at, lambda: made.append("never")))
    driver.call_at(at - 1.0, lambda: made.append("past"))
    later = driver.call_at(at + STEP_S, lambda: made.append("later"))
    driver.call_at(at, lambda: driver.cancel(later))
    reached = driver.run(at)
    assert made == ["past", "first", "second"]
    assert reached == driver.now >= at
    driver.cancel(first)  # it has been made: nothing happens
    driver.run(at + 3 * STEP_S)
    assert made == ["past", "first", "second"]


def test_what_is_due_at_the_end_of_a_run_is_part_of_it(driver: Driver[Any]) -> None:
    made: list[float] = []
    driver.call_at(driver.now, lambda: made.append(1))
    driver.run(driver.now)
    assert made == [1]


def test_what_is_called_every_so_often_is_called_until_it_is_stopped(driver: Driver[Any]) -> None:
    made: list[float] = []
    began = driver.now
    stop = driver.every(STEP_S, lambda: made.append(driver.now))
    until(driver, lambda: len(made) >= 3)
    assert made == sorted(made)
    assert made[0] >= began + STEP_S
    stop()
    stop()
    count = len(made)
    driver.run(driver.now + 3 * STEP_S)
    assert len(made) == count


def test_what_is_called_every_so_often_may_stop_itself(driver: Driver[Any]) -> None:
    made: list[int] = []

    def once() -> None:
        made.append(1)
        stop()

    stop = driver.every(STEP_S, once)
    driver.run(driver.now + 4 * STEP_S)
    assert made == [1]


def test_stop_ends_a_run_that_can_go_on(driver: Driver[Any]) -> None:
    made: list[str] = []
    at = driver.now + STEP_S
    driver.call_at(at, driver.stop)
    driver.call_at(at + 5.0, lambda: made.append("too late"))
    assert at <= driver.run() < at + 5.0
    driver.call_at(driver.now, lambda: made.append("on"))
    driver.run(driver.now + STEP_S)
    assert made == ["on"]


def test_a_removed_node_hears_and_does_nothing_more_and_what_it_sent_arrives(driver: Driver[Any]) -> None:
    told: list[str] = []
    driver.bus.subscribe(lambda node, event: told.append(node.node_id))
    to, _ = echo(driver, "b", answers=1)
    handle, node = echo(driver, "a", at=driver.now + 3 * STEP_S)
    node.send(Progress(1.0, 1), to.address, driver.now)
    handle.touch()
    driver.remove(handle)
    driver.remove(handle)
    until(driver, lambda: bool(told))
    driver.run(driver.now + 5 * STEP_S)
    assert told == ["b"], "neither the answer nor the timer has reached it"
    assert node.woken == []
