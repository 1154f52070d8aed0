"""The world of virtual time: order, wake-ups, hosts that fail and return, and one run per seed whatever carries the messages."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
from roles import ToyCodec, judged, report
from simulated import Fleet

from sllm.deploy.keys import ephemeral_keyring
from sllm.protocol.events import CoordinatorReady, ExpiryResumed, RequestSent
from sllm.protocol.messages import Address, AnyEnvelope, Envelope, LoadReport, Progress, ScheduleRequest
from sllm.protocol.node import Judge, Node, Rejected
from sllm.virtual.carrier import LinkCarrier
from sllm.virtual.datagram import flip_bit
from sllm.virtual.faults import load_schedule
from sllm.virtual.feed import AHEAD
from sllm.virtual.host import SPINS_MAX
from sllm.virtual.network import Latency, Link, Network
from sllm.virtual.world import World
from sllm.wire.frame import FrameCodec

ROOT = Path(__file__).parent.parent
ASK = ScheduleRequest("r", "m", 1, 1, 1, 0.0, ())
REPORT = report(host="", port=1, hardware="h")


class Echo(Node):
    """Answers each question with an acknowledgement, and notes what it heard and when."""

    def __init__(self, name: str = "echo", incarnation: int = 1, now: float = 0.0) -> None:
        super().__init__(name, incarnation)
        self.heard: list[tuple[float, str, int]] = []
        self.handlers = {ScheduleRequest: self._on_any, Progress: self._on_ack, LoadReport: self._on_any}

    def _on_any(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        sender_id, sequence = envelope.sender_id, envelope.sequence
        self.heard.append((now, sender_id, sequence))
        self.send(Progress(1.0, sequence), addr, now)

    def _on_ack(self, envelope: Envelope[Progress], addr: Address, now: float) -> None:
        sender_id, sequence = envelope.sender_id, envelope.sequence
        self.heard.append((now, sender_id, sequence))
        self.events.append(CoordinatorReady(now, sequence))


class Ticker(Echo):
    """Asks `to` every `period_s`."""

    def __init__(self, name: str = "ticker", incarnation: int = 1, now: float = 0.0, *, to: Address = ("echo", 1), period_s: float = 1.0) -> None:
        super().__init__(name, incarnation)
        self.to = to
        self.period_s = period_s
        self.wake_at = now + period_s
        self.woken: list[float] = []

    def handle_timer(self, now: float) -> None:
        self.woken.append(now)
        if now >= self.wake_at:
            self.wake_at += self.period_s
            self.send(ASK, self.to, now)


def pair(network: Network | None = None, **options: Any) -> tuple[World, Ticker, Echo]:
    world = World(1, network or Network(), **options)
    echo, ticker = Echo(), Ticker()
    world.add(echo, ("echo", 1), lambda incarnation, now: Echo("echo", incarnation, now))
    world.add(ticker, ("ticker", 1), lambda incarnation, now: Ticker("ticker", incarnation, now))
    return world, ticker, echo


# --- order and time -----------------------------------------------------------------------------------------------------------------


def test_messages_take_the_latency_and_timers_fire_on_time() -> None:
    world, ticker, echo = pair(Network(Link(Latency("constant", 0.25))))
    assert world.run(2.6) == world.now == 2.6
    assert ticker.woken == [1.0, 2.0]
    assert echo.heard == [(1.25, "ticker", 1), (2.25, "ticker", 2)]
    assert ticker.heard == [(1.5, "echo", 1), (2.5, "echo", 2)]
    assert (world.network.sent, world.network.delivered, world.network.in_flight) == (4, 4, 0)


def test_until_is_inclusive_and_a_run_can_go_on() -> None:
    world, ticker, _ = pair()
    world.run(1.0)
    assert ticker.woken == [1.0]
    assert world.network.in_flight == world.datagrams_pending() == 1
    world.run(0.5)
    assert world.now == 1.0, "time never goes back"
    world.run(3.0)
    assert ticker.woken == [1.0, 2.0, 3.0]


def test_what_is_simultaneous_happens_in_the_order_in_which_it_was_scheduled() -> None:
    world = World(1, Network())
    done: list[str] = []
    for name in "abc":
        world.call_at(1.0, partial(done.append, name))
    world.call_at(0.5, lambda: world.call_at(1.0, lambda: done.append("d")))
    world.call_at(0.1, lambda: done.append("first"))
    world.run(1.0)
    assert done == ["first", "a", "b", "c", "d"]


def test_stop_ends_the_run_before_anything_else_and_once() -> None:
    world, ticker, _ = pair()
    world.call_at(1.5, world.stop)
    world.call_at(1.5, world.stop)
    assert world.run(10.0) == 1.5
    assert world.run(10.0) == 1.5, "the second call of stop came due after the first run had ended"
    assert world.run(10.0) == 10.0
    assert len(ticker.woken) == 10


def test_an_exception_leaves_a_world_that_can_go_on() -> None:
    world, ticker, _ = pair()
    world.call_at(1.5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.run(3.0)
    world.run(5.0)
    assert ticker.woken == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert world.network.in_flight == world.datagrams_pending()


def test_a_deadline_that_moves_earlier_wakes_earlier_and_one_that_moves_later_does_no_harm() -> None:
    world, ticker, _ = pair()
    host = world.hosts["ticker"]

    def move(due: float) -> None:
        ticker.wake_at = due
        host.touch()

    world.call_at(0.1, lambda: move(0.4))
    world.call_at(0.5, lambda: move(7.0))
    world.call_at(0.6, lambda: move(inf))
    world.call_at(9.0, lambda: move(9.0))
    world.run(10.0)
    assert [at for at in ticker.woken if at in (0.4, 9.0, 10.0)] == [0.4, 9.0, 10.0]
    assert world.network.sent >= 4


def test_a_deadline_in_the_past_is_due_now() -> None:
    world = World(1, Network())
    ticker = Ticker()
    ticker.wake_at = -5.0
    world.add(ticker, ("ticker", 1))
    world.run(0.0)
    assert ticker.woken == [0.0] * 6, "time never goes back to what was missed"


def test_a_deadline_that_never_moves_is_an_error_not_an_endless_loop() -> None:
    class Stuck(Node):
        woken = 0

        def handle_timer(self, now: float) -> None:
            Stuck.woken += 1

    world = World(1, Network())
    stuck = Stuck("stuck", 1)
    stuck.wake_at = 1.0
    world.add(stuck, ("stuck", 1))
    with pytest.raises(RuntimeError, match=r"stuck asks to be woken at 1\.0"):
        world.run(2.0)
    assert Stuck.woken >= SPINS_MAX


def test_an_unknown_address_is_a_loss_like_any_other() -> None:
    world = World(1, Network())
    world.add(Ticker(to=("nobody", 1)), ("ticker", 1))
    world.run(3.0)
    assert world.network.lost == {"unroutable": 3}
    assert world.network.in_flight == 0


def test_two_hosts_cannot_share_a_name() -> None:
    world, _, _ = pair()
    with pytest.raises(ValueError, match="'echo'"):
        world.add(Echo(), ("echo", 2))


def test_reports_arrive_at_once_under_perfect_knowledge() -> None:
    world = World(1, Network(Link(Latency("constant", 0.5), loss=1.0), instant=(LoadReport,)))
    sender, echo = Echo("sender"), Echo()
    world.add(echo, ("echo", 1))
    host = world.add(sender, ("sender", 1))

    def report() -> None:
        sender.send(REPORT, ("echo", 1), world.now)
        sender.send(ASK, ("echo", 1), world.now)
        host.touch()
        assert echo.heard == [(1.0, "sender", 1)], "before anything else happens"

    world.call_at(1.0, report)
    world.run(5.0)
    assert len(echo.heard) == 1
    assert world.network.lost == {"random": 2}, "the question and the acknowledgement"


def test_observers_hear_what_they_asked_for_in_order() -> None:
    everything: list[object] = []
    ready: list[object] = []
    world, _, _ = pair()
    world.bus.subscribe(lambda node, event: everything.append((node.node_id, event)))
    world.bus.subscribe(lambda node, event: ready.append(event), CoordinatorReady)
    world.bus.subscribe(lambda node, event: ready.append(None), ExpiryResumed)
    world.run(2.5)
    assert len(everything) == len(ready) == 2
    assert everything[0] == ("ticker", ready[0])
    assert list(world.bus.recent) == ready


def test_feed_takes_arrivals_as_time_goes_by() -> None:
    world, _, _ = pair()
    taken: list[int] = []

    def arrivals() -> Iterator[tuple[float, int]]:
        for number in range(3 * AHEAD):
            taken.append(number)
            yield number * 0.5, number

    got: list[tuple[int, float]] = []
    world.feed(world.hosts["ticker"], arrivals(), lambda item, now: got.append((item, now)))
    world.run(1.2)
    assert got == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert len(taken) == AHEAD, "some in advance, never all"
    world.hosts["ticker"].freeze()
    world.run(1.7)
    assert len(got) == 3
    world.hosts["ticker"].thaw()
    assert got[3] == (3, 1.7), "late, as it would be for a process that stood still"
    world.hosts["ticker"].crash()
    world.run(2.2)
    assert len(got) == 4
    assert world.unsubmitted == 1


def test_a_host_that_crashes_as_it_thaws_loses_the_rest_of_what_waited_and_the_books_balance() -> None:
    world, _, echo = pair()
    host = world.hosts["echo"]
    host.freeze()
    world.run(4.5)
    world.bus.subscribe(lambda node, event: host.crash(), CoordinatorReady)
    echo.handlers[ScheduleRequest] = lambda envelope, addr, now: echo.events.append(CoordinatorReady(now, 0))
    host.thaw()
    assert host.node is None
    assert world.network.lost == {"down": 3}
    assert world.network.in_flight == world.datagrams_pending() == 0


def test_feed_tells_when_the_last_has_come() -> None:
    world, _, _ = pair()
    got: list[tuple[float, str]] = []
    arrivals = [(0.5 * number, str(number)) for number in range(AHEAD + 2)]
    world.feed(world.hosts["ticker"], arrivals, lambda item, now: got.append((now, item)), lambda: got.append((world.now, "ended")))
    world.run(1000.0)
    assert got == [*arrivals, (arrivals[-1][0], "ended")]


# --- hosts that fail ----------------------------------------------------------------------------------------------------------------


def test_a_crashed_host_loses_what_is_on_its_way_and_a_new_life_has_a_higher_incarnation() -> None:
    world, _, echo = pair(Network(Link(Latency("constant", 0.25))))
    host = world.hosts["echo"]
    told: list[str] = []
    world.lifecycle.append(lambda what, which: told.append(f"{what} {which.name} {which.node is not None}"))
    world.call_at(1.1, host.crash)
    world.call_at(2.5, host.restart)
    world.run(4.0)
    assert echo.heard == []
    assert world.network.lost == {"down": 2}
    assert isinstance(host.node, Echo)
    assert [at for at, _, _ in host.node.heard] == [3.25]
    assert host.node.incarnation == host.incarnation > 1
    assert told == ["crash echo True", "restart echo True"]


def test_a_host_without_a_factory_cannot_restart() -> None:
    world = World(1, Network())
    host = world.add(Echo(), ("echo", 1))
    with pytest.raises(ValueError, match="echo cannot restart"):
        host.restart()


def test_two_restarts_at_one_moment_still_have_growing_incarnations() -> None:
    world, _, _ = pair()
    host = world.hosts["echo"]
    lives = [host.restart().incarnation for _ in range(3)]
    assert lives == sorted(set(lives))


def test_a_clock_set_back_between_lives_gives_the_later_one_a_lower_incarnation() -> None:
    world, _, _ = pair()
    host = world.hosts["echo"]
    lives: list[int] = []
    world.call_at(10.0, lambda: host.jump_wall_clock(20.0))
    world.call_at(11.0, lambda: lives.append(host.restart().incarnation))
    world.call_at(12.0, lambda: host.jump_wall_clock(-20.0))
    world.call_at(13.0, lambda: lives.append(host.restart().incarnation))
    world.call_at(14.0, lambda: host.jump_wall_clock(-1000.0))
    world.call_at(15.0, lambda: lives.extend(host.restart().incarnation for _ in range(2)))
    world.run(16.0)
    assert [round(life / 1e9, 3) for life in lives] == [31.0, 13.0, 0.0, 0.0]
    assert len(set(lives)) == 4, "no two lives have the same"


def test_a_frozen_host_hears_late_and_its_timers_wait() -> None:
    world, ticker, echo = pair()
    world.call_at(0.5, lambda: world.hosts["echo"].freeze())
    world.call_at(3.5, lambda: world.hosts["echo"].thaw())
    world.call_at(3.6, lambda: world.hosts["ticker"].freeze())
    world.call_at(6.2, lambda: world.hosts["ticker"].thaw())
    world.run(3.4)
    assert echo.heard == []
    assert world.network.in_flight == world.datagrams_pending() == 3
    world.run(6.3)
    assert [at for at, _, _ in echo.heard[:3]] == [3.5, 3.5, 3.5]
    assert ticker.woken == [1.0, 2.0, 3.0, 6.2, 6.2, 6.2]


def test_a_zombie_goes_on_beside_its_replacement_with_its_old_incarnation() -> None:
    world, ticker, echo = pair()
    host = world.hosts["ticker"]
    ghosts: list[Any] = []
    world.call_at(1.5, host.freeze)
    world.call_at(2.5, lambda: ghosts.append(host.supplant()))
    world.call_at(4.2, lambda: ghosts[0].thaw())
    world.call_at(6.7, lambda: ghosts[0].crash())
    world.run(9.0)
    assert isinstance(host.node, Ticker)
    assert host.node is not ticker
    assert ticker.woken == [1.0, 4.2, 4.2, 4.2, 5.0, 6.0]
    assert host.node.woken == [3.5, 4.5, 5.5, 6.5, 7.5, 8.5]
    assert ticker.incarnation < host.node.incarnation
    assert echo.rejected["old_incarnation"] == 5, "the guard of every node refuses the old life"
    assert len(host.node.heard) == 6, "answers to the replacement go to the replacement"


def test_a_wall_clock_that_jumps_takes_the_next_lives_with_it() -> None:
    world, _, echo = pair()
    world.hosts["ticker"].jump_wall_clock(100.0)
    world.call_at(2.5, lambda: world.hosts["ticker"].restart())
    world.run(4.0)
    assert echo.heard == []
    assert echo.rejected["stale_time"] == 3
    world.hosts["ticker"].jump_wall_clock(-100.0)
    world.run(5.0)
    assert len(echo.heard) == 1


def test_a_slow_clock_stretches_timers_and_a_steady_wall_clock_stays_true() -> None:
    for steady, late in ((True, 0), (False, 1)):
        world, ticker, echo = pair()
        world.call_at(0.5, partial(world.hosts["ticker"].set_clock_rate, 0.01, wall_steady=steady))
        world.call_at(80.5, partial(world.hosts["ticker"].set_clock_rate, 1.0))
        world.run(81.0)
        assert ticker.woken == [pytest.approx(1.0)], "half a second of its own time was fifty of the world's"
        assert echo.rejected["stale_time"] == late


def test_a_full_socket_buffer_loses_what_does_not_fit() -> None:
    world = World(1, Network())
    sender, echo = Echo("sender"), Echo()
    world.add(echo, ("echo", 1)).limit_buffer(5, 10.0)
    host = world.add(sender, ("sender", 1))

    def burst() -> None:
        for _ in range(20):
            sender.send(ASK, ("echo", 1), world.now)
        host.touch()

    world.call_at(1.0, burst)
    world.call_at(1.2, burst)
    world.run(2.0)
    assert len(echo.heard) == 5 + 2, "five at once, then two more have been read after 0.2 s"
    assert world.network.lost == {"overflow": 33}


def test_changing_the_network_keeps_what_is_on_its_way() -> None:
    world, _, echo = pair(Network(Link(Latency("constant", 0.5))))
    world.call_at(1.1, lambda: world.network.set_link(Link(Latency("constant", 0.001))))
    world.call_at(1.2, lambda: world.network.degrade(None, None, loss=0.0, duplicate=1.0))
    world.run(2.2)
    assert [at for at, _, _ in echo.heard] == [1.5, 2.001]
    assert world.network.in_flight == world.datagrams_pending() == 0
    assert world.network.duplicated == 1 + 2


# --- one run per seed ---------------------------------------------------------------------------------------------------------------


class Registry(ToyCodec):
    """Bytes for envelopes, and back, without a wire format: a number into a shared list, and a tag over it."""

    def __init__(self) -> None:
        self.known: list[AnyEnvelope] = []

    def encode(self, envelope: AnyEnvelope) -> bytes:
        self.known.append(envelope)
        body = str(len(self.known) - 1).encode().rjust(20)
        return body + hashlib.blake2b(body, digest_size=16).digest()

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope:
        body, tag = bytes(data[:20]), bytes(data[20:])
        if hashlib.blake2b(body, digest_size=16).digest() != tag:
            raise Rejected("tag")
        return judged(self.known[int(body)], judge, now)


def bad_network() -> Network:
    return Network(Link(Latency("lognormal", 0.002, 1.0), loss=0.05, duplicate=0.1, reorder=0.1, reorder_extra_s=0.5, corrupt=0.05))


def fingerprint(fleet: Fleet) -> tuple[Any, ...]:
    network = fleet.network
    nodes = {name: dict(host.node.rejected) if host.node else None for name, host in fleet.world.hosts.items()}
    reports = network.duplicated_by_kind[LoadReport], network.lost_by_kind[LoadReport], fleet.world.pending_of(LoadReport)
    return fleet.trace, nodes, network.sent, network.delivered, dict(network.lost), network.duplicated, network.corrupted, reports, fleet.world.now


@pytest.mark.parametrize("scenario", ["", "churn", "flaky-network"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(scenario: str) -> None:
    def run(seed: int) -> tuple[Any, ...]:
        schedule = load_schedule(str(ROOT / f"experiments/scenarios/{scenario}.toml"), seed) if scenario else None
        return fingerprint(Fleet(seed, duration_s=15.0, schedule=schedule, network=bad_network()).record().run())

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]


def signed() -> Callable[[], Any]:
    """A maker of codecs of the real wire format, all with one key."""
    keyring = ephemeral_keyring()
    return lambda: FrameCodec(keyring)


def registered() -> Callable[[], Any]:
    shared = Registry()
    return lambda: shared


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("codecs", [signed, registered])
def test_objects_and_bytes_give_the_same_run(codecs: Callable[[], Callable[[], Any]], plain: bool) -> None:
    """On a plain network and under loss, duplication, reordering and corruption, with faults."""
    schedule = load_schedule(str(ROOT / "experiments/scenarios/churn.toml"), 3)

    def run(make_codec: Any) -> tuple[Any, ...]:
        return fingerprint(Fleet(3, duration_s=15.0, schedule=schedule, network=Network() if plain else bad_network(), make_codec=make_codec).record().run())

    as_objects, as_bytes = run(None), run(codecs())
    assert as_objects == as_bytes
    assert plain or as_objects[6] > 0, "some were corrupted"
    assert plain or min(as_objects[7][:2]) > 0, "reports were copied and lost"


@pytest.mark.parametrize("scenario", ["", "churn", "thundering-herd"])
@pytest.mark.parametrize("forced", ["hosts", "network", "both"])
def test_the_short_way_and_the_careful_way_give_the_same_run(forced: str, scenario: str) -> None:
    """A socket buffer that never fills makes hosts look at everything that might be wrong, a cut between nobody and nobody makes the network do so."""

    def run(*careful: str) -> tuple[Any, ...]:
        schedule = load_schedule(str(ROOT / f"experiments/scenarios/{scenario}.toml"), 4) if scenario else None
        fleet = Fleet(4, duration_s=20.0, schedule=schedule).record()
        for host in fleet.world.hosts.values() if "hosts" in careful else ():
            host.limit_buffer(1_000_000_000, 1e9)
        if "network" in careful:
            fleet.network.cut(["nobody"], ["nobody"])
        assert all((host.sound is None) == ("hosts" in careful) for host in fleet.world.hosts.values())
        assert isinstance(fleet.world.carrier, LinkCarrier) == ("network" in careful)
        return fingerprint(fleet.run())

    assert run() == run(*(("hosts", "network") if forced == "both" else (forced,)))


def test_the_hash_seed_makes_no_difference() -> None:
    program = (
        "import hashlib; from simulated import Fleet; from sllm.virtual.faults import load_schedule; from test_world import bad_network, ROOT\n"
        "fleet = Fleet(5, duration_s=10.0, schedule=load_schedule(str(ROOT / 'experiments/scenarios/churn.toml'), 5), network=bad_network()).record().run()\n"
        "print(hashlib.sha256(repr(fleet.trace).encode()).hexdigest())\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(digests) == 1


def test_flip_bit_changes_one_bit_of_the_second_half() -> None:
    data = bytes(range(40))
    for where in (0.0, 0.3, 0.999999, 1.0):
        changed = flip_bit(data, where)
        difference = [a ^ b for a, b in zip(data, changed, strict=True)]
        assert sum(byte.bit_count() for byte in difference) == 1
        assert not any(difference[:20])


def test_sent_requests_pass_through_untouched_by_watching() -> None:
    """Checkers only look: a run with them has the same events as one without."""

    def sent(check: bool) -> list[Any]:
        fleet = Fleet(2, duration_s=10.0, network=bad_network(), check=check).record()
        fleet.world.run(60.0)
        return fleet.trace

    with_checkers = sent(True)
    assert with_checkers == sent(False)
    assert any(type(event) is RequestSent for event in with_checkers)
