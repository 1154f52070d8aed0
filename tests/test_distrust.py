"""What a holder of the key may say of itself and is not believed: slow start, acknowledgements, addresses, the size of the table."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import pytest
from roles import CATALOG, MODEL, Talk, ask, changed, configuration, coordinator, report
from simulated import COORDINATOR, Fleet

from entrypoint_worker import own_host
from experiments.harness import silent
from sllm.engine import LlmEngine
from sllm.fleet import table
from sllm.fleet.index import Bag
from sllm.fleet.ledger import Entry, Ledger
from sllm.fleet.row import ALLOWANCES, NEWCOMER, PROVEN
from sllm.fleet.table import EXPIRED_MAX
from sllm.live.sockets import local_address
from sllm.models.catalogue import Catalog
from sllm.placement.registry import policies
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected, RequestRetried, RequestRouted, RequestSent, TableFull
from sllm.protocol.limits import NUMBER_MAX, SLOTS_MAX
from sllm.protocol.messages import (
    READY,
    SATURATED,
    STOPPED,
    Address,
    AnyEnvelope,
    Envelope,
    InferenceRequest,
    LoadReport,
    ReportAck,
    ScheduleError,
    ScheduleResponse,
)
from sllm.protocol.node import Node
from sllm.run.live import LiveRun
from sllm.run.virtual import VirtualRun
from sllm.wire.frame import FrameCodec
from sllm.wire.keys import Keyring
from worker import Worker

# --- slow start and distrust ------------------------------------------------------------------------------------------------------------


def placed(talk: Any, count: int, now: float, begin: int = 0, **changes: Any) -> list[str]:
    """Where so many requests go."""
    talk.node.outbox.clear()
    for number in range(begin, begin + count):
        talk.say("c", ask(f"r{number}", **changes), now)
    return [answer.worker_id for answer in talk.heard(ScheduleResponse)]


def prove(talk: Any, worker_id: str, now: float, **changes: Any) -> None:
    """A worker acknowledges everything that it was sent."""
    node = talk.node
    high = node.fleet.rows[worker_id].ledger.next_number - 1
    talk.say(worker_id, report(epoch=node.incarnation, dispatch_high=high, **changes), now)


@pytest.mark.parametrize("policy", policies())
def test_a_worker_that_is_not_proven_gets_four_at_a_time_while_another_is(policy: str) -> None:
    node, talk = coordinator(policy, queue_threshold=100)
    talk.say("old", report(), 1.0)
    assert placed(talk, 10, 1.1) == ["old"] * 10, "where nobody is proven nobody is held back"
    prove(talk, "old", 1.2)
    talk.say("new", report(), 1.2)
    assert placed(talk, 60, 1.3, 10).count("new") == ALLOWANCES[NEWCOMER]
    prove(talk, "new", 1.4)
    assert placed(talk, 60, 1.5, 70).count("new") > ALLOWANCES[NEWCOMER]
    assert node.fleet.rows["new"].proven


@pytest.mark.parametrize("policy", policies())
def test_a_worker_whose_dispatches_expire_gets_one_at_a_time_and_is_believed_again_when_it_acknowledges(policy: str) -> None:
    node, talk = coordinator(policy, queue_threshold=100)
    for name in ("good", "bad"):
        talk.say(name, report(), 1.0)
    placed(talk, 40, 1.1)
    for name in ("good", "bad"):
        prove(talk, name, 1.2)
    bad = node.fleet.rows["bad"]
    number = 40
    while bad.pending < EXPIRED_MAX:
        placed(talk, 1, 1.3, number)
        number += 1
    lost = bad.pending
    prove(talk, "good", 5.0)
    talk.say("bad", report(), 5.0)
    assert (bad.pending, bad.expired, bad.proven) == (0, lost, False)
    assert placed(talk, 40, 5.1, 200).count("bad") == 1
    prove(talk, "bad", 5.2)
    assert (bad.expired, bad.proven) == (0, True)
    assert placed(talk, 40, 5.3, 300).count("bad") > ALLOWANCES[NEWCOMER]


@pytest.mark.parametrize("policy", policies())
def test_a_second_attempt_goes_to_a_proven_worker_unless_it_has_failed_there_or_all_are_full(policy: str) -> None:
    _, talk = coordinator(policy, queue_threshold=100)
    talk.say("old", report(), 1.0)
    placed(talk, 1, 1.1)
    prove(talk, "old", 1.2)
    for number in range(20):
        talk.say(f"new-{number}", report(), 1.2)
    assert set(placed(talk, 10, 1.3, 10, attempt=1)) == {"old"}
    assert "old" not in placed(talk, 1, 1.3, 30, attempt=1, exclude=("old",))
    prove(talk, "old", 1.4, running=256, waiting=100, blocked=100)
    assert len(placed(talk, 1, 1.5, 40, attempt=1)) == 1, "better one that is not proven than none"


def test_a_new_life_must_prove_itself_again_and_the_counts_hold() -> None:
    node, talk = coordinator()
    talk.say("w", report(), 1.0)
    placed(talk, 1, 1.1)
    prove(talk, "w", 1.2)
    kind = node.fleet.rows["w"].kind
    assert kind.trusted[PROVEN] == 1
    talk.say("w", report(), 1.3, incarnation=2, sequence=1)
    assert (kind.trusted[PROVEN], node.fleet.rows["w"].proven) == (0, False)
    placed(talk, 1, 1.4, 5)
    talk.say("w", report(epoch=node.incarnation, dispatch_high=2), 1.5, incarnation=2, sequence=2)
    talk.run_to(9.0)  # silent
    assert kind.trusted[PROVEN] == 0
    talk.say("w", report(), 9.1, incarnation=2, sequence=3)
    assert kind.trusted[PROVEN] == 1


def test_what_was_never_given_out_cannot_be_acknowledged() -> None:
    node, talk = coordinator()
    talk.say("w", report(), 1.0)
    placed(talk, 3, 1.1)
    row = node.fleet.rows["w"]
    for lie in (4, 1000, 1000, NUMBER_MAX):
        talk.say("w", report(epoch=node.incarnation, dispatch_high=lie), 1.2)
        assert (row.pending, row.proven) == (3, False)
    placed(talk, 1, 1.3, begin=3)
    talk.say("w", report(epoch=node.incarnation, dispatch_high=1001), 1.4)
    assert (row.pending, row.proven) == (3, True), "what was sent before the lie is acknowledged by nothing"


def test_a_worker_that_was_forgotten_and_comes_back_is_numbered_on() -> None:
    """Its receipts go on from what it has; numbers from 1 would look as if they had arrived long ago."""
    node, talk = coordinator()
    talk.say("w", report(epoch=node.incarnation, dispatch_high=50), 1.0)
    placed(talk, 1, 1.1)
    row = node.fleet.rows["w"]
    assert list(row.ledger.entries) == [51]
    talk.say("liar", report(epoch=node.incarnation, dispatch_high=NUMBER_MAX), 1.0)
    assert node.fleet.rows["liar"].ledger.next_number == 1


class Fake(Node):
    """Reports, with the right key, that it is READY and idle and has these models; takes everything and answers nothing."""

    def __init__(self, name: str, begin: float, models: tuple[str, ...]) -> None:
        super().__init__(name, 1)
        self.models = models
        self.wake_at = begin
        self.handlers = {InferenceRequest: lambda envelope, addr, now: None, ReportAck: lambda envelope, addr, now: None}

    def handle_timer(self, now: float) -> None:
        self.send(report(host=self.node_id, slots=SLOTS_MAX, gpu_models=self.models, host_models=()), COORDINATOR, now)
        self.wake_at = now + 1.0


@pytest.mark.parametrize(
    ("begin", "models"), [(0.0, ()), (10.0, Catalog.demo(8).names), (0.0, Catalog.demo(8).names)],
    ids=["idle", "later, with every model", "with every model"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(1, 6))
def test_six_fakes_among_six_honest_workers_fail_next_to_no_request(seed: int, begin: float, models: tuple[str, ...]) -> None:
    fleet = Fleet(seed, workers=6, rate_per_s=3.0, duration_s=30.0, check=False).record()
    for number in range(6):
        fleet.world.add(Fake(f"fake-{number}", begin, models), (f"fake-{number}", 8000))
    fleet.world.run(120.0)
    sent = [event for event in fleet.trace if isinstance(event, RequestSent)]
    assert len(sent) > 60
    failed = [event for event in fleet.trace if isinstance(event, RequestFailed | RequestRejected)]
    # While nobody is proven yet, all that is known speaks for those who claim every model: one of the very first requests may meet three of them.
    assert len(failed) <= (1 if models and not begin else 0)
    assert all(event.arrival_s < 3.0 for event in failed)
    assert len([event for event in fleet.trace if isinstance(event, RequestCompleted)]) == len(sent) - len(failed)
    to_fakes = [event for event in fleet.trace if isinstance(event, RequestRouted) and event.worker_id.startswith("fake")]
    assert to_fakes, "they did get something"
    again = {event.request_id: event for event in fleet.trace if isinstance(event, RequestRetried)}
    assert again


# --- bounds -----------------------------------------------------------------------------------------------------------------------------


def test_a_full_table_refuses_newcomers_says_so_once_a_minute_and_forgets_the_gone_first() -> None:
    node, talk = coordinator(workers_max=3)
    for name in ("a", "b", "c", "d", "e"):
        talk.say(name, report(), 1.0)
    assert list(node.fleet.rows) == ["a", "b", "c"]
    assert node.reports_rejected == {"table_full": 2}
    assert talk.told(TableFull) == [TableFull(1.0, "coordinator", 3)]
    talk.say("a", report(), 2.0)
    talk.say("d", report(), 62.0)
    assert talk.told(TableFull) == [TableFull(62.0, "coordinator", 3)]
    for name in ("c", "b"):
        talk.say(name, report(state=STOPPED), 62.0)
    talk.run_to(67.0)
    talk.say("d", report(), 67.0)
    assert list(node.fleet.rows) == ["a", "b", "d"]
    talk.say("f", report(), 67.0)
    assert list(node.fleet.rows) == ["a", "d", "f"]
    assert list(node.fleet.gone) == ["a"], "it has been silent since, and goes next"


STRANGERS = tuple(f"stranger-{i}" for i in range(300))


def test_a_row_keeps_the_catalogues_models_only_and_knows_how_many_others_could_leave() -> None:
    node, talk = coordinator()
    first, second = CATALOG.names[:2]
    listed = {"gpu_models": (first, *STRANGERS[:2]), "busy_models": (first, STRANGERS[0]), "host_models": (*STRANGERS, second), "disk_models": STRANGERS}
    talk.say("w", report(**listed, loading=((STRANGERS[2], 1.0), (second, 2.0)), partial=True), 1.0)
    row = node.fleet.rows["w"]
    kept = row.report
    engine = kept.engine
    assert (engine.gpu_models, engine.busy_models, engine.host_models, engine.disk_models) == ((first,), (first,), (second,), ())
    assert engine.loading == ((second, 2.0),)
    assert kept.partial
    assert row.has_idle_model, "the idle stranger could leave"
    said = changed(kept, running=1)
    talk.say("w", said, 2.0)
    assert row.report is said, "a report that names the catalogue's models only is kept as it is"
    assert not row.has_idle_model, "the stranger has left"


def test_the_codec_remembers_no_report_that_is_not_in_the_table() -> None:
    node, _ = coordinator(workers_max=2)
    codec = node.codec = FrameCodec(Keyring(1, {1: b"k" * 32}))

    def say(sender: str, sequence: int, now: float, incarnation: int = 10, **changes: Any) -> None:
        node.receive_datagram(codec.encode(Envelope(sender, incarnation, sequence, now, report(**changes))), (sender, 8000), now)

    say("refused", 1, 1.0, hardware="tpu")
    say("fat", 1, 1.0, host_models=STRANGERS)
    say("a", 1, 1.0)
    say("too-many", 1, 1.0)
    assert set(node.fleet.rows) == {"fat", "a"}
    assert set(codec._repeated) == {b"a"}
    assert codec._repeated[b"a"][1] is node.fleet.rows["a"].report
    say("a", 2, 1.5, incarnation=9, host_models=STRANGERS)  # of a life before the present one
    assert node.reports_rejected == {"unknown_hardware": 1, "table_full": 1, "old_incarnation": 1}
    assert not codec._repeated
    say("fat", 2, 2.0)
    say("a", 2, 2.0, state=STOPPED)
    assert set(codec._repeated) == {b"fat", b"a"}
    Talk(node).run_to(2.0 + node.config.forget_after_s)
    say("fat", 3, 3.0 + node.config.forget_after_s)
    Talk(node).run_to(5.0 + node.config.forget_after_s)
    assert set(node.fleet.rows) == {"fat"}
    assert set(codec._repeated) == {b"fat"}


def test_newcomers_that_leave_at_once_leave_nothing_behind() -> None:
    node, talk = coordinator(workers_max=5)
    talk.say("w", report(), 1.0)
    for number in range(1000):
        talk.say(f"n{number}", report(state=STOPPED), 1.0)
    assert len(node.fleet) == len(node.fleet.gone) + 1 == 5
    assert sum(len(slot) for slot in node.membership._silence._slots.values()) == 1
    assert sum(node.fleet.states.values()) == 5


def test_the_ledger_of_a_worker_that_never_acknowledges_has_a_bound() -> None:
    """However many requests come, it holds what the worker says it runs at once, and the queue; a report writes off a part of it."""
    node, talk = coordinator(queue_threshold=10)
    slots, asked = 3000, 10_000
    talk.say("w", report(slots=slots, gpu_free_bytes=1 << 60), 1.0)
    row = node.fleet.rows["w"]
    for number in range(asked):
        talk.say("c", ask(f"r{number}"), 1.0 + number / asked)
    assert row.pending == slots + 10
    assert {error.code for error in talk.heard(ScheduleError)} == {SATURATED}
    for later in range(1, 5):
        before = row.pending
        talk.say("w", report(slots=slots, gpu_free_bytes=1 << 60), 6.0 + later)
        assert before - row.pending == min(before, table.WRITTEN_OFF_MAX)
    assert row.pending == 0


def test_a_report_costs_what_it_acknowledges_however_much_was_sent_since() -> None:
    """350,000 entries, of which a report names the last 64 as missing: only those below its number are looked at."""
    ledger = Ledger()
    looked = 0

    class Counted(dict[int, Entry]):
        def __iter__(self) -> Any:
            nonlocal looked
            for number in super().__iter__():
                looked += 1
                yield number

    ledger.entries = Counted()
    for number in range(1, 350_001):
        ledger.add(Entry(f"r{number}", MODEL, 0.1, 0.0, 1, 0.0, 100.0))
    assert not ledger.acknowledge(64, tuple(range(1, 65)))
    assert ledger.acknowledge(100, tuple(range(1, 65)))
    assert looked <= 65 + 101
    assert len(ledger) == 350_000 - 36
    assert ledger.expire(1.0, 10) == 10


class Name(str):
    """A name that counts how often it is hashed or compared."""

    looked = 0

    def __hash__(self) -> int:
        Name.looked += 1
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        Name.looked += 1
        return super().__eq__(other)


def test_names_that_all_change_with_every_report_cost_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(map(Name, Catalog.demo(1000).names))

    def cost(count: int) -> tuple[int, int]:
        """(names looked at, rows put into an index or taken out) of a report with so many others than the last."""
        moved = 0
        fleet = table.Fleet(frozenset(names), 1)
        row = fleet.admit("w", CATALOG.get_hardware("h100-80g"), report(gpu_models=names[:count], host_models=names[:count]))
        fleet.step(row, READY)

        def counted(self: Bag[Any], one: Any, plain: Any) -> None:
            nonlocal moved
            moved += 1
            plain(self, one)

        for what in ("add", "remove"):
            plain = getattr(Bag, what)
            monkeypatch.setattr(Bag, what, lambda self, one, plain=plain: counted(self, one, plain))
        Name.looked = 0
        fleet.apply(row, 1, 2, report(gpu_models=names[500 : 500 + count], host_models=names[500 : 500 + count]), 1.0)
        looked = Name.looked
        monkeypatch.undo()
        return looked, moved

    few, many = cost(100), cost(500)
    assert few[0] > 100
    assert many[0] <= 5.5 * few[0]
    assert many[1] <= 4 * 500 + 10


# --- addresses --------------------------------------------------------------------------------------------------------------------------


def signed_address(run: VirtualRun | LiveRun) -> Address:
    """Where the one worker of a run was reached, by the last report that its coordinator applied."""
    run.conduct()
    (row,) = run.system.tracker.fleet
    return row.report.host, row.report.port


def test_workers_of_a_run_say_where_they_are_reached() -> None:
    config = configuration(workers=1, rate_per_s=1.0, duration_s=2.0, speedup=50.0)
    assert signed_address(VirtualRun(config, silent())) == ("worker-0", 8000)
    live = LiveRun(config, silent(virtual=False))
    assert signed_address(live) == live.handles["worker-0"].address


def make_worker(**changes: Any) -> Worker:
    """A worker as its process makes it."""
    config = configuration(**changes)
    engine = LlmEngine(CATALOG, CATALOG.get_hardware("h100-80g"))
    address, find = ("coordinator", 9000), partial(own_host, config)
    return Worker(config, CATALOG, engine, address, Random(1), 1, node_id="w", advertise=("", 8123), own_host=find)


def last_report(worker: Worker, now: float) -> AnyEnvelope:
    worker.outbox.clear()
    worker.handle_timer(now)
    return next(envelope for envelope, _ in worker.outbox if isinstance(envelope.message, LoadReport))


def test_a_worker_process_finds_its_own_address_towards_the_coordinator_and_finds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(bind_host="0.0.0.0")
    assert last_report(worker, 0.0).message.host == "", "the coordinator's name has no address yet"
    own = {"192.0.2.1": "198.51.100.7", "192.0.2.2": "198.51.100.8", "127.0.0.1": "127.0.0.1"}
    monkeypatch.setattr("entrypoint_worker.local_address", lambda towards: own[towards[0]])
    for now, (coordinator_host, address) in enumerate(own.items(), 1):
        worker.coordinator = (coordinator_host, 9000)
        said = "" if address == "127.0.0.1" else address  # a published port of a container is reached so as well
        assert (last_report(worker, 2.0 * now).message.host, worker.reporter.advertise) == (said, (said, 8123))


def test_the_own_address_towards_another_is_that_of_the_way_there() -> None:
    assert local_address(("127.0.0.1", 9000)) == "127.0.0.1"
    assert local_address(("::1", 9000)) in ("::1", "")  # "": this machine has no IPv6
    assert local_address(("no-such-name", 1)) == local_address(("127.0.0.1", 70000)) == ""


@pytest.mark.parametrize(("told", "said"), [("192.0.2.7", "192.0.2.7"), ("source", ""), ("", "127.0.0.1")])
def test_what_advertise_host_says_comes_first(told: str, said: str) -> None:
    worker = make_worker(bind_host="127.0.0.1", advertise_host=told)
    assert last_report(worker, 0.0).message.host == said


def test_a_report_replayed_from_elsewhere_after_a_restart_moves_no_worker() -> None:
    """A coordinator that has just started knows no sequence, so what was sent before is new to it. The address is the signed one."""
    worker = make_worker(bind_host="127.0.0.1")
    old, newer = last_report(worker, 0.0), last_report(worker, 2.0)
    node, _ = coordinator()
    node.receive(old, ("10.6.6.6", 666), 2.0)
    assert node.fleet.rows["w"].address == ("127.0.0.1", 8123)
    node.receive(newer, ("127.0.0.1", 8123), 2.1)
    node.receive(old, ("10.6.6.6", 666), 2.2)
    assert node.fleet.rows["w"].address == ("127.0.0.1", 8123)


def test_placements_that_are_kept_to_be_said_again_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.routing.router.DECISIONS_MAX", 3)
    node, talk = coordinator()
    talk.say("w", report(), 1.0)
    placed(talk, 20, 1.1)
    numbers = [node.fleet.rows["w"].ledger.next_number]
    placed(talk, 3, 1.2, begin=17)
    numbers.append(node.fleet.rows["w"].ledger.next_number)
    placed(talk, 1, 1.2)
    numbers.append(node.fleet.rows["w"].ledger.next_number)
    assert numbers == [21, 21, 22], "the last ones are said again, the first is forgotten"
