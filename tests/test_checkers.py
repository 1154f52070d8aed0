"""The checkers: silent on a sound fleet, and each planted bug is caught by the checker responsible for it, within fifty seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from roles import in_turn, judged
from simulated import Fleet
from test_world import Registry, bad_network

from client import Client
from coordinator import Coordinator
from sllm import verify
from sllm.fleet.ledger import Ledger
from sllm.fleet.membership import Membership
from sllm.fleet.table import Fleet as Table
from sllm.protocol.bus import EventBus
from sllm.protocol.events import RequestCompleted, RequestSent, WorkerStateChanged
from sllm.protocol.messages import READY, Address, AnyEnvelope, InferenceRequest, InferenceResponse, LoadReport, Message, ReportAck, ScheduleError
from sllm.protocol.node import Judge, Node
from sllm.requests.pending import ABANDONED, Pending
from sllm.routing.router import Router
from sllm.verify.all import Checkers, InvariantViolation, list_checkers
from sllm.verify.world import BoundedMemory
from sllm.virtual.faults import load_schedule
from sllm.virtual.network import RANDOM, Copy, Network
from sllm.workload import Request
from worker import Worker

SEEDS = range(1, 51)
CHURN = str(Path(__file__).parent.parent / "experiments/scenarios/churn.toml")


@pytest.mark.parametrize("seed", range(1, 13))
def test_a_sound_fleet_breaks_nothing_on_a_bad_network_with_churn(seed: int) -> None:
    fleet = Fleet(seed, duration_s=20.0, network=bad_network(), schedule=load_schedule(CHURN, seed)).run()
    assert fleet.checkers is not None
    counts = fleet.checkers.counts
    assert set(counts) == set(list_checkers())
    assert all(counts[name] > 0 for name in counts), counts
    assert fleet.checkers.checked == sum(counts.values())
    assert fleet.client.in_flight == 0


def test_a_sound_fleet_breaks_nothing_on_the_wire() -> None:
    shared = Registry()
    fleet = Fleet(1, duration_s=20.0, network=bad_network(), schedule=load_schedule(CHURN, 1), make_codec=lambda: shared).run()
    assert fleet.checkers is not None
    assert fleet.checkers.counts["invalid-ignored"] > 0
    assert fleet.checkers.counts["invalid-ignored"] <= fleet.network.corrupted


# --- planted bugs -------------------------------------------------------------------------------------------------------------------


class AcceptsReplays(Coordinator):
    """Applies a report again, whatever its number."""

    def judge_order(self, kind: type[Message], sender_id: str, incarnation: int, sequence: int, now: float) -> str:
        row = self.fleet.rows.get(sender_id)
        if row is not None and incarnation == row.incarnation:
            row.sequence = min(row.sequence, sequence - 1)
        return super().judge_order(kind, sender_id, incarnation, sequence, now)


class AcceptsZombies(Coordinator):
    """Takes the old life of a worker for the new one."""

    def _on_report(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        row = self.fleet.rows.get(envelope.sender_id)
        if row is not None and envelope.incarnation < row.incarnation:
            row.incarnation, row.sequence = envelope.incarnation, 0
        super()._on_report(envelope, addr, now)


class CountsTwice(Coordinator):
    def _on_report(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        super()._on_report(envelope, addr, now)
        self.membership.accepted += 1


class DropsReports(Coordinator):
    """Every tenth report is neither applied nor refused."""

    def _on_report(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        if envelope.sequence % 10 != 7:
            super()._on_report(envelope, addr, now)


class CompletesTwice(Client):
    """A response that arrives twice is a completion twice."""

    def _on_response(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        message: Any = envelope.message
        known = message.request_id in self._pending
        super()._on_response(envelope, addr, now)
        if not known:
            self.events.append(
                RequestCompleted(now, message.request_id, "m", envelope.sender_id, "serve", now, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 1, 1, 0)
            )


class ForgetsWhenTurnedAway(Client):
    """A retriable error ends the request without a word."""

    def _on_schedule_error(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        message = envelope.message
        assert type(message) is ScheduleError
        pending = self._pending.get(message.request_id)
        if pending is not None:
            self._end(pending, ABANDONED)


class NeverRetries(Client):
    def handle_timer(self, now: float) -> None:
        while (pending := self._timers.pop_due(now)) is not None:
            self._timers.set(pending, now + 1.0)
        self.wake_at = self._timers.earliest


class WorksTwice(Worker):
    """A request sent again is a new request."""

    def _on_inference_request(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        message = envelope.message
        assert type(message) is InferenceRequest
        self.service.jobs.pop(f"{envelope.sender_id}/{message.request_id}", None)
        super()._on_inference_request(envelope, addr, now)


class LoadsTwice(Worker):
    """Every request for a model that is not there begins a load of its own."""

    def _on_inference_request(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        self.service._present.clear()
        super()._on_inference_request(envelope, addr, now)


class BelievesAnything(Registry):
    """A wrong tag is forgiven: the datagram is taken for a new one of its sender."""

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope:
        body = bytes(data[:20])
        number = int(body) if body.strip().isdigit() and int(body) < len(self.known) else 0
        envelope = self.known[number]
        return judged(envelope if super_tag(self, data) else envelope.replace(sequence=envelope.sequence + 1), judge, now)


def super_tag(codec: Registry, data: bytes | memoryview) -> bool:
    try:
        Registry.decode(codec, data)
    except Exception:
        return False
    return True


class LosesSilently(Network):
    def carry(self, source: str, target: str, envelope: AnyEnvelope, now: float) -> Any:
        copies: list[Copy] = list(super().carry(source, target, envelope, now))
        return [] if copies and self.rng.random() < 0.01 else copies


class CountsCopiesTwice(Network):
    def carry(self, source: str, target: str, envelope: AnyEnvelope, now: float) -> Any:
        before = self.duplicated_by_kind[LoadReport]
        copies = super().carry(source, target, envelope, now)
        self.duplicated_by_kind[LoadReport] += self.duplicated_by_kind[LoadReport] - before
        return copies


class ForgetsLosses(Network):
    """A report that a link dropped is not in its books."""

    def lose(self, cause: str, kind: type[Message]) -> None:
        super().lose(cause, ReportAck if cause == RANDOM else kind)


def leak_cost(patch: pytest.MonkeyPatch) -> None:
    """Work that is acknowledged goes on counting."""

    def release(self: Ledger, number: int) -> bool:
        return self.entries.pop(number, None) is not None

    patch.setattr(Ledger, "release", release)


def never_release(patch: pytest.MonkeyPatch) -> None:
    """In flight once, in flight for ever."""
    patch.setattr(Ledger, "acknowledge", lambda self, high, seen: False)
    patch.setattr(Ledger, "expire", lambda self, before, most: 0)


class CountsTheFirstTokenOfAll(Client):
    """The first token ever seen is the request's, whoever completes it."""

    def _complete(self, pending: Pending, response: InferenceResponse, worker_id: str, now: float) -> None:
        if pending.first_tokens:
            pending.first_tokens = dict.fromkeys([*pending.first_tokens, worker_id], min(pending.first_tokens.values()))
        super()._complete(pending, response, worker_id, now)


def route_to_the_dead(patch: pytest.MonkeyPatch) -> None:
    """A worker that leaves READY stays where placement looks."""

    def step(self: Table, row: Any, what: str) -> tuple[str, str] | None:
        moved = original(self, row, what)
        if moved and moved[0] == READY:
            row.state = READY
            self.reindex(row)
            row.state = moved[1]
        return moved

    original = Table.step
    patch.setattr(Table, "step", step)
    patch.setattr(Table, "reindex", _reindex_all(Table.reindex))


def _reindex_all(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def reindex(self: Any, row: Any) -> None:
        state, row.state = row.state, READY
        original(self, row)
        row.state = state

    return reindex


BUGS: list[tuple[str, str, dict[str, Any], Callable[[pytest.MonkeyPatch], None] | None]] = [
    ("in-flight cost is not released", "in-flight", {}, leak_cost),
    ("in-flight work is never released", "in-flight", {}, never_release),
    ("a replayed report is accepted", "member-order", {"coordinator_kind": AcceptsReplays}, None),
    ("a report of an old life is accepted", "member-order", {"coordinator_kind": AcceptsZombies}, None),
    ("a dead worker is routed to", "live-dispatch", {"policy": "random"}, route_to_the_dead),
    ("a request completes twice", "conservation", {"client_kind": CompletesTwice}, None),
    ("a request is forgotten", "conservation", {"client_kind": ForgetsWhenTurnedAway}, None),
    ("a request is never asked for again", "liveness", {"client_kind": NeverRetries}, None),
    ("work is done twice", "work-once", {"worker_kind": WorksTwice}, None),
    ("a model is loaded twice", "single-flight", {"worker_kind": LoadsTwice}, None),
    ("another worker's first token is counted", "first-token", {"client_kind": CountsTheFirstTokenOfAll}, None),
    ("a report is counted twice", "report-books", {"coordinator_kind": CountsTwice}, None),
    ("a replayed report is accepted, in the books", "report-books", {"coordinator_kind": AcceptsReplays}, None),
    ("a report is dropped silently", "report-books", {"coordinator_kind": DropsReports}, None),
    ("a report copied once is counted twice", "report-books", {"network": CountsCopiesTwice}, None),
    ("a lost report is not in the books", "report-books", {"network": ForgetsLosses}, None),
    ("a forged datagram is believed", "invalid-ignored", {"make_codec": "BelievesAnything"}, None),
    ("a datagram vanishes without a cause", "network-books", {"network": LosesSilently}, None),
]


def broken(seed: int, options: dict[str, Any], check: tuple[str, ...]) -> InvariantViolation | None:
    """What a run with these checkers breaks, if anything."""
    given = dict(options)
    if given.pop("make_codec", None):
        shared = BelievesAnything()
        given["make_codec"] = lambda: shared
    network = given.pop("network", Network)(bad_network().link)
    fleet = Fleet(seed, workers=6, duration_s=15.0, network=network, schedule=load_schedule(CHURN, seed), check=check, **given)
    try:
        fleet.run(within_s=600.0)
    except InvariantViolation as violation:
        return violation
    return None


@pytest.mark.parametrize(("bug", "checker", "options", "plant"), BUGS, ids=[bug for bug, *_ in BUGS])
def test_a_planted_bug_is_caught_by_the_checker_responsible(
    bug: str, checker: str, options: dict[str, Any], plant: Callable[[pytest.MonkeyPatch], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plant is not None:
        plant(monkeypatch)
    alone = ("conservation",) if checker == "liveness" else (checker,)
    for seed in SEEDS:
        violation = broken(seed, options, alone)
        if violation is not None:
            assert violation.checker == checker
            assert f"with seed {seed}" in str(violation)
            assert str(broken(seed, options, alone)) == str(violation), "the same seed breaks again, to the byte"
            return
    pytest.fail(f"{bug}: not caught in {len(SEEDS)} seeds")


@pytest.mark.parametrize(("report_interval_s", "timeout_s"), [(1.0, 10.0), (15.0, 45.0)])
def test_a_life_with_a_lower_incarnation_is_right_once_the_known_one_has_been_silent_for_the_timeout(report_interval_s: float, timeout_s: float) -> None:
    fleet = set_back(report_interval_s, timeout_s)
    row, node = fleet.coordinator.fleet.rows["worker-1"], fleet.world.hosts["worker-1"].node
    assert node is not None
    assert (row.state, row.incarnation) == (READY, node.incarnation)
    assert fleet.coordinator.reports_rejected["old_incarnation"] > 0


@pytest.mark.parametrize(("report_interval_s", "timeout_s"), [(1.0, 10.0), (15.0, 45.0)])
def test_a_life_with_a_lower_incarnation_is_wrong_before_that(report_interval_s: float, timeout_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Membership.timeout_s
    monkeypatch.setattr(Membership, "timeout_s", lambda self, row: original(self, row) / 2.0)
    with pytest.raises(InvariantViolation, match=r"worker-1 went from .* and had been silent for") as caught:
        set_back(report_interval_s, timeout_s)
    assert caught.value.checker == "member-order"


def set_back(report_interval_s: float, timeout_s: float) -> Fleet:
    """A worker's clock is ahead, its next life begins, and the one after that begins with a clock that is behind, in less than the timeout."""
    fleet = Fleet(1, workers=2, rate_per_s=0.1, duration_s=0.0, check=("member-order",), report_interval_s=report_interval_s)
    world, host = fleet.world, fleet.world.hosts["worker-1"]
    world.call_at(3.0, in_turn(lambda: host.jump_wall_clock(25.0), host.restart))
    world.call_at(5.0, in_turn(host.crash, lambda: host.jump_wall_clock(-50.0)))
    world.call_at(5.0 + 0.7 * timeout_s, host.restart)
    world.run(5.0 + timeout_s + 2.0 * report_interval_s)
    return fleet


def test_a_table_that_only_grows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst, then ten minutes in which every trace of it must go."""
    monkeypatch.setattr(BoundedMemory, "SLACK", 60)
    monkeypatch.setattr(BoundedMemory, "PER_HOST", 4)

    def idle_after_a_burst() -> None:
        fleet = Fleet(1, rate_per_s=20.0, duration_s=20.0, check=("bounded-memory",))
        fleet.world.run(720.0)

    idle_after_a_burst()
    monkeypatch.setattr(Router, "tick", lambda self, now: None)
    with pytest.raises(InvariantViolation, match=r"coordinator: Router\._decisions has \d+ entries"):
        idle_after_a_burst()


# --- the pieces ---------------------------------------------------------------------------------------------------------------------


def test_a_violation_tells_seed_time_and_the_last_events() -> None:
    bus = EventBus()
    Checkers.live(7, bus, lambda: 12.5)
    node = Node("client", 1)
    bus.publish(node, [RequestSent(12.0, "r1", "m")])
    with pytest.raises(InvariantViolation) as caught:
        bus.publish(node, [RequestSent(12.5, "r1", "m")])
    violation = caught.value
    assert (violation.checker, violation.seed, violation.at_s) == ("conservation", 7, 12.5)
    assert violation.recent == (RequestSent(12.0, "r1", "m"), RequestSent(12.5, "r1", "m"))
    assert str(violation).splitlines()[0] == "invariant 'conservation' broken at 12.500000 s with seed 7: request r1 was sent while it was still open"


def test_live_checkers_need_no_world() -> None:
    bus = EventBus()
    checkers = Checkers.live(1, bus, lambda: 0.0)
    node = Node("coordinator", 1)
    bus.publish(node, [WorkerStateChanged(0.0, "w", 1, "", READY, "reported")])
    checkers.inspect()
    checkers.finish(at_rest=True)
    assert checkers.at_rest


def test_a_run_is_not_at_rest_while_what_was_given_up_runs_on_to_the_end_of_its_round() -> None:
    """The client gives a request up in the middle of a prompt that takes the worker many report intervals."""
    fleet = Fleet(1, workers=1, duration_s=0.0, hardware="a5000-24g", report_interval_s=0.3, request_timeout_s=4.0)
    world, host = fleet.world, fleet.world.hosts["client"]
    world.run(2.0)
    fleet.client.submit(Request(0.0, "long", "qwen2.5-7b", 100_000, 1), world.now)
    host.touch()
    checkers = fleet.checkers
    assert checkers is not None
    assert checkers.run_to_rest(60.0, 1.5) > 10.0


NEW_CHECKER = '''
from sllm.protocol.events import RequestSent
from sllm.verify.base import Checker

class Soberness(Checker):
    """Nobody asks for nothing."""

    name = "soberness"

    def handlers(self):
        return {RequestSent: lambda node, event: event.model or self.fail("a request without a model")}
'''


def test_a_new_checker_is_one_file_and_a_broken_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "__path__", [*verify.__path__, str(tmp_path)])
    monkeypatch.setattr("sllm.verify.all.list_checkers", list_checkers.__wrapped__)  # without what it remembers
    (tmp_path / "sober.py").write_text(NEW_CHECKER)
    bus = EventBus()
    Checkers.live(1, bus, lambda: 0.0)
    with pytest.raises(InvariantViolation, match=r"'soberness' broken .* a request without a model"):
        bus.publish(Node("client", 1), [RequestSent(0.0, "r1", "")])
    (tmp_path / "halfway.py").write_text("class Half(\n")
    with pytest.raises(ImportError, match=r"sllm/verify/halfway\.py, line 1: SyntaxError"):
        Checkers.live(1, EventBus(), lambda: 0.0)


def test_an_unknown_checker_is_an_error() -> None:
    with pytest.raises(KeyError):
        Fleet(1, check=("no-such",))


def test_what_a_frozen_worker_could_not_say_is_on_its_way_and_dies_with_it() -> None:
    """It was told to go home while it stood still: its last report is made, and never sent."""
    fleet = Fleet(1, duration_s=5.0, check=("report-books",)).run()
    world, host = fleet.world, fleet.world.hosts["worker-1"]
    worker: Any = host.node
    host.freeze()
    worker.drain(world.now)
    host.touch()
    assert world.pending_of(LoadReport) == len(worker.outbox) == 2, "that it drains, and that it has stopped"
    assert fleet.checkers is not None
    fleet.checkers.finish(at_rest=False)
    host.crash()
    assert (world.pending_of(LoadReport), world.network.lost_by_kind[LoadReport]) == (0, 2)
    fleet.checkers.finish(at_rest=False)


def test_reports_to_nobody_are_no_violation() -> None:
    """A fleet whose coordinator is not there: on a plain network nobody looks at what cannot be delivered."""
    fleet = Fleet(1, duration_s=0.0, check=("report-books",))
    del fleet.world.routes["coordinator", 9000]
    fleet.world.run(5.0)
    assert fleet.checkers is not None
    fleet.checkers.finish(at_rest=False)
    assert fleet.network.lost["unroutable"] > 0
    assert fleet.checkers.checked > 0
