"""The live driver on real loopback sockets: nothing here waits for a time, every loop runs until a condition holds."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import threading
from collections.abc import Iterator
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import pytest
from roles import CATALOG, ToyCodec, configuration, in_turn, judged

from coordinator import Coordinator
from sllm.deploy.keys import ephemeral_keyring
from sllm.engine import LlmEngine
from sllm.live import receiving, sockets, udp
from sllm.live.clock import STEP_MAX_S, Clock
from sllm.live.udp import UdpDriver
from sllm.placement.registry import make_policy
from sllm.protocol.errors import UsageError
from sllm.protocol.events import CoordinatorOverdue, CoordinatorReady, Event
from sllm.protocol.messages import Address, AnyEnvelope, Envelope, Progress
from sllm.protocol.node import Judge, Node, Rejected
from sllm.wire.frame import FrameCodec
from worker import Worker


class TextCodec(ToyCodec):
    """Enough of a codec for nodes that only count: sender, incarnation and sequence as text."""

    def encode(self, envelope: AnyEnvelope) -> bytes:
        sender_id, incarnation, sequence, wall_s = envelope.sender_id, envelope.incarnation, envelope.sequence, envelope.wall_s
        return f"{sender_id} {incarnation} {sequence} {wall_s!r}".encode()

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope:
        try:
            sender, incarnation, sequence, wall_s = bytes(data).decode().split()
            envelope = Envelope(sender, int(incarnation), int(sequence), float(wall_s), Progress(1.0, int(sequence)))
        except ValueError:
            raise Rejected("malformed") from None
        return judged(envelope, judge, now)


class Echo(Node):
    """Answers what it hears; `first` is sent at its first timer, `hops` more answers are given."""

    def __init__(self, name: str, clock: Clock, *, first: Address | None = None, at: float = 0.0, hops: int = 0) -> None:
        super().__init__(name, 1, codec=TextCodec(), wall_offset_s=clock.wall_offset_s)
        self.first, self.hops = first, hops
        if first is not None:
            self.wake_at = at
        self.heard: list[tuple[str, Address, float]] = []
        self.timers: list[float] = []
        self.coordinator: Address = ("127.0.0.1", 1)
        self.handlers = {Progress: self.on_ack}

    def on_ack(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        self.heard.append((envelope.sender_id, addr, now))
        if self.hops > 0:
            self.hops -= 1
            self.send(Progress(1.0, 1), addr, now)

    def handle_timer(self, now: float) -> None:
        self.timers.append(now)
        if self.first is not None:
            self.send(Progress(1.0, 1), self.first, now)
            self.first = None
        self.wake_at = inf


class Steps:
    """A system clock that moves when it is told to."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(clock: Clock) -> Iterator[Any]:
    with UdpDriver(clock) as driver:
        yield driver


def turn(driver: UdpDriver, until: Any) -> None:
    """Run rounds until the condition holds; a bound on the rounds keeps a broken driver from hanging the test."""
    for _ in range(2000):
        if until():
            return
        driver.step(0.05)
    raise AssertionError("the condition never came to hold")


def test_two_nodes_talk(driver: UdpDriver, clock: Clock) -> None:
    b = Echo("b", clock, hops=3)
    host_b = driver.add(b)
    a = Echo("a", clock, first=host_b.address, hops=2)
    host_a = driver.add(a)
    turn(driver, lambda: len(b.heard) == 3 and len(a.heard) == 3)
    assert {addr for _, addr, _ in b.heard} == {host_a.address}
    assert driver.received == driver.sent == 6
    assert not driver.send_errors


def test_a_timer_runs_at_its_deadline_and_not_before(driver: UdpDriver, clock: Clock) -> None:
    node = Echo("a", clock, first=("127.0.0.1", 9), at=0.02)
    driver.add(node)
    turn(driver, lambda: bool(node.timers))
    assert len(node.timers) == 1
    assert node.timers[0] >= 0.02


def test_what_waits_in_a_socket_is_heard_before_a_timer_runs() -> None:
    system = Steps()
    clock = Clock(monotonic=system, wall=system)
    with UdpDriver(clock) as driver:
        sink = driver.add(Echo("sink", clock))
        order: list[str] = []
        node = Echo("n", clock, first=sink.address, at=5.0)
        node.handle_timer = lambda now: in_turn(lambda: order.append("timer"), lambda: setattr(node, "wake_at", inf))()  # type: ignore[method-assign]
        node.handlers = {Progress: lambda envelope, addr, now: order.append("heard")}
        host = driver.add(node)
        sender = Echo("s", clock, first=host.address)
        driver.add(sender)
        driver.step(0)  # the sender's timer: its datagram is in the socket now
        assert order == []
        system.at += 20  # the process was stopped for a while
        driver.step(0)
        assert order == ["heard", "timer"]


def test_a_socket_that_is_not_read_empty_holds_its_timers_back_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    system = Steps()
    clock = Clock(monotonic=system, wall=system)
    with UdpDriver(clock) as driver:
        node = Echo("n", clock, first=("127.0.0.1", 9), at=5.0)
        host = driver.add(node, receive_buffer_bytes=1 << 20)
        host.inlet.batch = receiving.BATCH
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            for _ in range(3 * receiving.BATCH):
                flood.sendto(b"x", host.address)
        system.at += 60
        driver.step(0)
        driver.step(0)
        assert not node.timers
        monkeypatch.setattr(udp, "CATCH_UP_WALL_S", 0.0)  # ... but not for ever
        driver.step(0)
        assert len(node.timers) == 1
        turn(driver, lambda: node.rejected["malformed"] == 3 * receiving.BATCH)


def test_batches_grow_with_the_load_and_shrink_again(driver: UdpDriver, clock: Clock) -> None:
    node = Echo("n", clock)
    host = driver.add(node, receive_buffer_bytes=1 << 20)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
        for _ in range(200):
            flood.sendto(b"x", host.address)
        turn(driver, lambda: node.rejected["malformed"] >= 150)
        assert host.inlet.batch == receiving.BATCH
        turn(driver, lambda: node.rejected["malformed"] == 200)
        flood.sendto(b"x", host.address)
        turn(driver, lambda: node.rejected["malformed"] == 201)
        assert host.inlet.batch == 1


def test_kernel_drops_are_counted(driver: UdpDriver, clock: Clock) -> None:
    node = Echo("n", clock)
    host = driver.add(node, count_drops=True, receive_buffer_bytes=4096)
    sent = 500
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
        for _ in range(sent):
            flood.sendto(b"x" * 1000, host.address)
        turn(driver, lambda: not select.select([host.socket], [], [], 0)[0])
        heard = node.rejected["malformed"]
        assert heard < sent
        flood.sendto(b"last", host.address)  # the next one to get through brings the count
        turn(driver, lambda: node.rejected["malformed"] == heard + 1)
    assert host.kernel_drops == sent - heard


@pytest.mark.skipif(not Path("/proc/sys/net/core/rmem_max").exists(), reason="only Linux says how large a receive buffer may be")
@pytest.mark.parametrize("may_force", [True, False])
@pytest.mark.parametrize("part", [0.1, 1.0, 4.0])
def test_a_receive_buffer_is_as_large_as_the_kernel_allows(
    driver: UdpDriver, clock: Clock, monkeypatch: pytest.MonkeyPatch, may_force: bool, part: float
) -> None:  # fmt: skip
    """As large as asked for with CAP_NET_ADMIN, and up to the kernel's limit without. The kernel gives twice what is asked for."""
    usual_bytes, most_bytes = (int(Path(f"/proc/sys/net/core/rmem_{name}").read_text(encoding="ascii")) for name in ("default", "max"))
    asked_bytes = int(part * most_bytes)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, sockets.SO_RCVBUFFORCE, asked_bytes)
        except PermissionError:
            may_force = False
    if not may_force:
        monkeypatch.setattr(sockets, "SO_RCVBUFFORCE", -1)  # an option that no kernel has
    host = driver.add(Echo("b", clock), receive_buffer_bytes=asked_bytes)
    assert host.receive_buffer_bytes == 2 * (asked_bytes if may_force else min(asked_bytes, most_bytes))
    assert driver.add(Echo("a", clock)).receive_buffer_bytes == usual_bytes


def test_a_full_send_buffer_loses_nothing(driver: UdpDriver, clock: Clock) -> None:
    sink = Echo("sink", clock)
    sink_host = driver.add(sink)
    node = Echo("n", clock)
    host = driver.add(node)

    class Full:
        """A socket whose send buffer is full for a while."""

        def __init__(self, real: socket.socket) -> None:
            self.real, self.full = real, True

        def sendto(self, data: bytes, target: Address) -> int:
            if self.full:
                raise BlockingIOError(errno.EAGAIN, "full")
            return self.real.sendto(data, target)

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    full = Full(host.socket)
    host.socket = full  # type: ignore[assignment]
    for _ in range(5):
        node.send(Progress(1.0, 1), sink_host.address, clock.now)
    host.touch()
    assert driver.sends_deferred == 5
    driver.step(0)
    assert driver.sent == 0
    full.full = False
    node.send(Progress(1.0, 1), sink_host.address, clock.now)
    host.touch()
    turn(driver, lambda: len(sink.heard) == 6)
    assert driver.sent == 6
    assert not host.backlog


def test_errors_of_sending_are_counted_and_survived(driver: UdpDriver, clock: Clock) -> None:
    node = Echo("n", clock)
    host = driver.add(node)
    node.send(Progress(1.0, 1), ("no-such-host", 9000), 0.0)
    node.send(Progress(1.0, 1), ("", 9000), 0.0)
    node.send(Progress(1.0, 1), ("127.0.0.1", 0), 0.0)
    node.send(Progress(1.0, 1), ("255.255.255.255", 9), 0.0)  # broadcast is not permitted on this socket
    host.touch()
    assert driver.send_errors["unresolved"] == 3
    assert sum(driver.send_errors.values()) == 4


def test_an_icmp_error_does_not_disturb_the_socket(driver: UdpDriver, clock: Clock) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        address = gone.getsockname()
    node = Echo("n", clock)
    host = driver.add(node)
    host.socket.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: even the errors an unconnected socket is usually spared
    for _ in range(3):
        node.send(Progress(1.0, 1), address, 0.0)
        host.touch()
        driver.step(0)
    other = Echo("o", clock, first=host.address)
    driver.add(other)
    turn(driver, lambda: len(node.heard) == 1)
    assert set(driver.send_errors) | set(driver.receive_errors) <= {"econnrefused"}


def test_events_reach_the_observer(clock: Clock) -> None:
    seen: list[tuple[str, Event]] = []
    with UdpDriver(clock) as driver:
        driver.bus.subscribe(lambda node, event: seen.append((node.node_id, event)))
        node = Echo("n", clock)
        host = driver.add(node)
        node.events.append(CoordinatorReady(0.0, 1))
        node.events.append(CoordinatorReady(1.0, 2))
        host.touch()
    assert seen == [("n", CoordinatorReady(0.0, 1)), ("n", CoordinatorReady(1.0, 2))]


def test_the_uplink_has_its_own_port_and_can_be_renewed(driver: UdpDriver, clock: Clock) -> None:
    coordinator = Echo("c", clock, hops=2)
    coordinator_host = driver.add(coordinator)
    other = Echo("o", clock)
    other_host = driver.add(other)
    node = Echo("n", clock)
    node.coordinator = coordinator_host.address
    host = driver.add(node, uplink=True)
    node.send(Progress(1.0, 1), coordinator_host.address, 0.0)
    node.send(Progress(1.0, 1), other_host.address, 0.0)
    host.touch()
    turn(driver, lambda: len(coordinator.heard) == 1 and len(other.heard) == 1 and len(node.heard) == 1)  # and the answer came back
    assert other.heard[0][1] == host.address
    first_port = coordinator.heard[0][1][1]
    assert first_port != host.address[1]
    host.renew_uplink()
    node.send(Progress(1.0, 1), coordinator_host.address, 0.0)
    host.touch()
    turn(driver, lambda: len(coordinator.heard) == 2 and len(node.heard) == 2)
    assert host.uplink is not None
    assert coordinator.heard[1][1] == host.uplink.getsockname()
    coordinator.send(Progress(1.0, 1), ("127.0.0.1", first_port), 0.0)
    coordinator_host.touch()
    turn(driver, lambda: len(node.heard) == 3)  # an answer to the port before still comes
    host.renew_uplink()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:  # after one more, it is closed
        again.bind(("127.0.0.1", first_port))


def test_what_is_said_with_the_news_that_renews_the_uplink_leaves_through_the_new_one(clock: Clock) -> None:
    with UdpDriver(clock) as driver:
        driver.bus.subscribe(lambda node, event: host.renew_uplink())
        coordinator, node = Echo("c", clock), Echo("n", clock)
        node.coordinator = driver.add(coordinator).address
        host = driver.add(node, uplink=True)
        node.send(Progress(1.0, 1), node.coordinator, 0.0)
        node.events.append(CoordinatorOverdue(0.0, "n", 5.0))
        host.touch()
        turn(driver, lambda: len(coordinator.heard) == 1)
        assert host.uplink is not None
        assert coordinator.heard[0][1] == host.uplink.getsockname()


def test_an_uplink_that_cannot_be_renewed_stays(driver: UdpDriver, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, node = Echo("c", clock), Echo("n", clock)
    node.coordinator = driver.add(coordinator).address
    host = driver.add(node, uplink=True)

    def none_left(bind: Address) -> socket.socket:
        raise UsageError("no file descriptor left")

    monkeypatch.setattr(udp, "bound_socket", none_left)
    with pytest.raises(UsageError, match="no file descriptor left"):
        host.renew_uplink()
    node.send(Progress(1.0, 1), node.coordinator, 0.0)
    host.touch()
    turn(driver, lambda: len(coordinator.heard) == 1)


class Moved(Coordinator):
    """A coordinator that datagrams of a flow as old as its predecessor do not reach: what keeps track of it on the way sends them elsewhere."""

    lost_flow: Address | None = None

    def receive_datagram(self, data: bytes | memoryview, addr: Address, now: float) -> None:
        if self.lost_flow is None or addr != self.lost_flow:
            super().receive_datagram(data, addr, now)


def test_a_worker_whose_flow_leads_nowhere_is_back_within_the_time_an_acknowledgement_is_owed() -> None:
    config, clock, codec = configuration(), Clock(20.0), FrameCodec(ephemeral_keyring())
    gaps: list[float] = []

    with UdpDriver(clock) as driver:
        driver.bus.subscribe(lambda node, event: host.renew_uplink(), CoordinatorOverdue)
        moved = Moved(config, CATALOG, make_policy("startup_time"), Random(1), 1, codec=codec, wall_offset_s=clock.wall_offset_s)
        at = driver.add(moved).address
        engine = LlmEngine(CATALOG, CATALOG.get_hardware(config.hardware))
        node = Worker(config, CATALOG, engine, at, Random(1), 1, node_id="w", codec=codec, wall_offset_s=clock.wall_offset_s)
        host = driver.add(node, uplink=True)
        for _ in range(3):
            acknowledged = node.reporter._heard_at
            turn(driver, lambda acknowledged=acknowledged: node.reporter._heard_at > acknowledged)  # just now: the worst time, for the next is an age away
            assert host.uplink is not None
            moved.lost_flow = host.uplink.getsockname()
            cut_s, heard = clock.now, moved.reports_accepted
            turn(driver, lambda heard=heard: moved.reports_accepted > heard)
            gaps.append(clock.now - cut_s)
    assert max(gaps) < (config.ack_every + 1) * config.report_interval_s + 0.5


def test_a_name_is_resolved_without_blocking(clock: Clock) -> None:
    asked: list[str] = []
    answers: list[Any] = []

    class Resolver:
        def resolve(self, name: str, answer: Any) -> None:
            asked.append(name)
            answers.append(answer)

    with UdpDriver(clock, resolver=Resolver()) as driver:
        sink = Echo("sink", clock)
        sink_host = driver.add(sink)
        node = Echo("n", clock)
        host = driver.add(node)
        addr = ("sink.example", sink_host.address[1])
        for _ in range(2):
            node.send(Progress(1.0, 1), addr, clock.now)
            host.touch()
        assert asked == ["sink.example"]
        assert driver.send_errors["unresolved"] == 2  # the sender's own retry comes after the answer
        answers[0]("127.0.0.1")
        node.send(Progress(1.0, 1), addr, clock.now)
        host.touch()
        turn(driver, lambda: len(sink.heard) == 1)


def test_calls_and_intervals(driver: UdpDriver) -> None:
    calls: list[str] = []
    driver.call_at(0.002, lambda: calls.append("second"))
    driver.call_at(0.001, lambda: calls.append("first"))
    driver.cancel(driver.call_at(0.001, lambda: calls.append("never")))
    stop = driver.every(0.003, lambda: calls.append("tick"))
    turn(driver, lambda: calls.count("tick") >= 3)
    stop()
    ticks = calls.count("tick")
    done: list[int] = []
    driver.call_at(driver.clock.now + 0.02, lambda: done.append(1))
    turn(driver, lambda: bool(done))
    assert calls[:2] == ["first", "second"]
    assert calls.count("tick") == ticks
    assert "never" not in calls


def test_an_interval_leaves_out_what_it_missed() -> None:
    system = Steps()
    with UdpDriver(Clock(monotonic=system, wall=system)) as driver:
        ticks: list[float] = []
        driver.every(1.0, lambda: ticks.append(driver.clock.now))
        system.at += 10.5
        driver.step(0)
        driver.step(0)
        assert ticks == [10.5]
        system.at += 0.5
        driver.step(0)
        assert ticks == [10.5, 11.0]


def test_a_reader_wakes_the_loop(driver: UdpDriver) -> None:
    left, right = socket.socketpair()
    with left, right:
        got: list[bytes] = []
        driver.add_reader(left.fileno(), lambda: got.append(left.recv(10)))
        thread = threading.Thread(target=right.send, args=(b"x",))
        thread.start()
        turn(driver, lambda: bool(got))
        thread.join()
        driver.remove_reader(left.fileno())
    assert got == [b"x"]


def test_run_ends_when_told(driver: UdpDriver) -> None:
    driver.call_at(0.001, driver.stop)
    driver.run()
    rounds = iter([False, False, False, True])
    driver.run_until(lambda: next(rounds))
    assert next(rounds, "no more") == "no more", "it was asked until it said yes, and no more"


def test_a_removed_node_is_forgotten(driver: UdpDriver, clock: Clock) -> None:
    node = Echo("n", clock, first=("127.0.0.1", 9), at=0.001)
    host = driver.add(node, uplink=True)
    driver.remove(host)
    driver.remove(host)
    done: list[int] = []
    driver.call_at(0.01, lambda: done.append(1))
    turn(driver, lambda: bool(done))
    assert not node.timers
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(host.address)


def test_everything_is_closed(clock: Clock) -> None:
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    driver = UdpDriver(clock)
    for i in range(10):
        driver.add(Echo(str(i), clock), uplink=True).renew_uplink()
    driver.close()
    driver.close()
    if before:
        assert set(os.listdir("/proc/self/fd")) <= before | {str(max(map(int, before)) + 1)}


def test_an_uplink_stays_when_there_is_no_other(driver: UdpDriver, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    host = driver.add(Echo("a", clock), uplink=True)
    before = host.uplink

    def refuse(*_: object) -> socket.socket:
        raise UsageError("no file descriptor left")

    monkeypatch.setattr(udp, "bound_socket", refuse)
    with pytest.raises(UsageError, match="no file descriptor left"):
        host.renew_uplink()
    assert host.uplink is before
    assert before is not None
    assert before.fileno() >= 0
    driver.step(0.0)


def test_a_port_in_use_is_one_clear_line(driver: UdpDriver, clock: Clock) -> None:
    host = driver.add(Echo("a", clock))
    with pytest.raises(UsageError) as raised:
        driver.add(Echo("b", clock), host.address, setting="COORDINATOR_PORT")
    assert str(raised.value) == f"cannot listen on 127.0.0.1:{host.address[1]} (COORDINATOR_PORT): the port is in use"


@pytest.mark.parametrize("address", ["203.0.113.7", "no such host", "256.1.1.1"])
def test_an_address_of_another_machine_is_one_clear_line(driver: UdpDriver, clock: Clock, address: str) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on .*:0 \(BIND_HOST\): .*not an address of this machine"):
        driver.add(Echo("a", clock), (address, 0), setting="BIND_HOST")


def test_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])

    def set_limit(which: int, pair: tuple[int, int]) -> None:
        if pair[1] > 1000:
            raise ValueError("not allowed to raise maximum limit")
        limits.append(pair)

    monkeypatch.setattr(resource, "setrlimit", set_limit)
    sockets.ensure_descriptors(10)
    assert limits[1:] == []
    sockets.ensure_descriptors(500)
    assert limits[-1] == (564, 1000)
    with pytest.raises(UsageError, match=r"--workers 5000: needs 5064 open files and only 1000 are allowed"):
        sockets.ensure_descriptors(5000, what="--workers 5000")


def test_literal_addresses() -> None:
    assert sockets.literal_address("10.1.2.3", socket.AF_INET) == "10.1.2.3"
    assert sockets.literal_address("::1", socket.AF_INET) is None
    assert sockets.literal_address("::1", socket.AF_INET6) == "::1"
    assert sockets.literal_address("10.1.2.3", socket.AF_INET6) == "::ffff:10.1.2.3"
    assert sockets.literal_address("central-coordinator", socket.AF_INET) is None
    assert sockets.literal_address("a\0b", socket.AF_INET6) is None
    assert sockets.literal_address("fe80::1%eth0", socket.AF_INET6) == "fe80::1%eth0"
    for zone in ("a\0b", "", "a b", "ü", "a" * 16, "%"):
        assert sockets.literal_address(f"::1%{zone}", socket.AF_INET6) is None


def test_ipv6(driver: UdpDriver, clock: Clock) -> None:
    b = Echo("b", clock, hops=1)
    with contextlib.suppress(UsageError):
        host_b = driver.add(b, ("::1", 0))
        a = Echo("a", clock, first=host_b.address)
        driver.add(a, ("::1", 0))
        turn(driver, lambda: len(a.heard) == 1)
        assert a.heard[0][1] == host_b.address


# --- the clock ----------------------------------------------------------------------------------------------------------------------


def test_the_real_clock_is_the_real_clock() -> None:
    system = Steps()
    clock = Clock(monotonic=system, wall=lambda: system() + 1000.0)
    system.at += 500.0
    assert clock.advance() == 500.0
    assert clock.behind_s == 0.0
    assert clock.now + clock.wall_offset_s == system() + 1000.0


def test_a_sped_up_clock_takes_bounded_steps_and_says_how_far_it_fell_behind() -> None:
    system = Steps()
    clock = Clock(60.0, monotonic=system, wall=system)
    system.at += 0.001
    assert clock.advance() == pytest.approx(0.06)
    system.at += 1.0
    assert clock.advance(planned_s=60.0) == pytest.approx(60.06)  # a wait that was meant
    assert clock.behind_s == 0.0
    system.at += 1.0
    assert clock.advance() == pytest.approx(60.06 + STEP_MAX_S)  # a stall
    assert clock.behind_s == pytest.approx(60.0 - STEP_MAX_S)
    assert clock.lag == pytest.approx((60.0 - STEP_MAX_S) / 120.06)
    assert clock.wall_offset_s == 100.0


def test_a_sped_up_run_keeps_time() -> None:
    clock = Clock(50.0)
    with UdpDriver(clock) as driver:
        ticks: list[float] = []
        driver.every(0.01, lambda: ticks.append(clock.now))
        turn(driver, lambda: len(ticks) >= 20)
    assert clock.now <= 50.0 * clock.elapsed_wall_s + 1e-6
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("speedup", [0.0, -1.0, float("nan")])
def test_a_clock_cannot_stand_still(speedup: float) -> None:
    with pytest.raises(ValueError, match="speedup"):
        Clock(speedup)
