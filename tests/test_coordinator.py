"""The coordinator, spoken to by hand: membership, placements, idempotence, staleness, holding expiry."""

from __future__ import annotations

import dataclasses
import itertools
from random import Random

import pytest
from roles import CATALOG, MODEL, Talk, ask, configuration, coordinator, report

from coordinator import Coordinator
from sllm.fleet.row import CLIENTS_MAX
from sllm.fleet.states import DEAD, LEFT, NEW, STATES, SUSPECT, TRANSITIONS
from sllm.models import cost
from sllm.models.catalogue import Catalog
from sllm.models.model import DISK
from sllm.models.presets import MODELS
from sllm.placement.registry import make_policy, policies
from sllm.protocol.events import (
    CoordinatorReady,
    ExpiryHeld,
    ExpiryResumed,
    HardwareUnknown,
    RequestRefused,
    RequestRouted,
    RivalGone,
    RivalSeen,
    WorkerDisplaced,
    WorkerStateChanged,
)
from sllm.protocol.messages import (
    COLD_START,
    DEADLINE_UNMEETABLE,
    DRAINING,
    HIGH,
    LOW,
    MODEL_TOO_LARGE,
    NO_WORKERS,
    NOT_READY,
    READY,
    REPORTED_STATES,
    REQUEST_TOO_LARGE,
    SATURATED,
    SERVE,
    STARTING,
    STOPPED,
    UNKNOWN_MODEL,
    Address,
    Envelope,
    ReportAck,
    ScheduleError,
    ScheduleResponse,
    WorkerLost,
)


def error_code(talk: Talk) -> str:
    (error,) = talk.heard(ScheduleError)
    return error.code


# --- membership ----------------------------------------------------------------------------------------------------------------------


def test_it_listens_for_an_interval_before_it_answers() -> None:
    node = Coordinator(configuration(), CATALOG, make_policy("random"), Random(1), 100, now=50.0)
    talk = Talk(node)
    talk.say("w", report(), 50.2)
    talk.say("c", ask(), 50.5)
    (error,) = talk.heard(ScheduleError)
    assert error.code == NOT_READY
    assert 0.5 <= error.retry_after_s <= 1.0  # when it will be ready, jittered
    talk.run_to(51.0)
    assert talk.told(CoordinatorReady) == [CoordinatorReady(51.0, 1)]
    talk.say("c", ask(), 51.0)
    assert talk.heard(ScheduleResponse)[0].worker_id == "w"


def test_a_silent_worker_is_suspect_then_dead_then_forgotten_and_comes_back() -> None:
    node, talk = coordinator(worker_timeout_s=10.0, forget_after_s=60.0)
    for second in range(1, 100):
        for name in ("a", "b", "c"):
            if name != "a" or second <= 5:
                talk.say(name, report(), float(second))
        talk.run_to(float(second))
    changes = [(e.at, e.old, e.new) for e in talk.told(WorkerStateChanged) if e.worker_id == "a"]
    assert changes == [(1.0, NEW, READY), (8.0, READY, SUSPECT), (15.0, SUSPECT, DEAD)]
    assert "a" not in node.fleet.rows
    talk.say("a", report(), 100.0, incarnation=2, sequence=1)
    assert node.fleet.rows["a"].state == READY
    talk.run_to(103.0)
    assert node.fleet.rows["a"].state == SUSPECT


def test_a_dead_worker_that_reports_again_is_watched_again() -> None:
    node, talk = coordinator()
    for second in range(1, 40):
        for name in ("a", "b", "c"):
            if name != "a" or second <= 2 or second == 20:
                talk.say(name, report(), float(second))
        talk.run_to(float(second))
    assert [e.new for e in talk.told(WorkerStateChanged) if e.worker_id == "a"] == [READY, SUSPECT, DEAD, READY, SUSPECT, DEAD]
    assert node.fleet.states == {READY: 2, SUSPECT: 0, DEAD: 1}


@pytest.mark.parametrize(("old", "what"), list(itertools.product((NEW, *STATES), (*REPORTED_STATES, "silent", "expired"))))
def test_every_transition(old: str, what: str) -> None:
    """The table, held against what its words mean."""
    new = TRANSITIONS.get((old, what), old)
    if what in (STARTING, READY, DRAINING):
        assert new == what
    elif what == STOPPED:
        assert new == LEFT
    elif what == "silent":
        assert new == (SUSPECT if old in (STARTING, READY, DRAINING) else old)
    else:
        assert new == (DEAD if old == SUSPECT else old)


def test_a_report_from_another_time_is_refused_and_in_the_books_of_reports() -> None:
    node, _ = coordinator()
    for message in (report(), ask()):
        for wall_s in (1.0, 100.0):
            node.receive(Envelope("w", 1, 1, wall_s, message), ("w", 8000), 1.0)
    assert node.rejected == {"stale_time": 2}
    assert node.reports_rejected == {"stale_time": 1}
    assert node.reports_accepted == 1


def test_a_report_that_is_not_newer_changes_nothing() -> None:
    node, talk = coordinator()
    talk.say("w", report(running=1), 1.0, incarnation=5, sequence=10)
    for incarnation, sequence in ((5, 10), (5, 9), (4, 99)):
        talk.say("w", report(running=9), 1.1, incarnation=incarnation, sequence=sequence)
    assert node.fleet.rows["w"].engine.running == 1
    assert node.reports_rejected == {"replayed": 1, "out_of_order": 1, "old_incarnation": 1}
    talk.say("w", report(running=2), 1.2, incarnation=5, sequence=14)
    assert (node.fleet.rows["w"].engine.running, node.fleet.rows["w"].lost, node.reports_accepted) == (2, 3, 2)
    talk.say("w", report(running=3), 1.3, incarnation=6, sequence=1)
    assert (node.fleet.rows["w"].engine.running, node.fleet.rows["w"].incarnation) == (3, 6)


@pytest.mark.parametrize("incarnation", [0, 1])
@pytest.mark.parametrize("sequence", [0, 1, 7])
def test_before_the_first_report_of_a_worker_none_was_lost(incarnation: int, sequence: int) -> None:
    node, talk = coordinator()
    talk.say("w", report(), 1.0, incarnation=incarnation, sequence=sequence)
    assert (node.reports_accepted, node.fleet.rows["w"].lost) == (1, 0)


def test_it_acknowledges_now_and_then() -> None:
    _, talk = coordinator(ack_every=4)
    for second in range(1, 10):
        talk.say("w", report(), float(second))
    assert [ack.sequence for ack in talk.heard(ReportAck)] == [1, 3, 7]


def test_a_fleet_that_started_together_is_not_acknowledged_all_at_once() -> None:
    """Their numbers are the same at any moment, their incarnations (nanoseconds) are not."""
    _, talk = coordinator(ack_every=4)
    for sequence in range(1, 9):
        for number in range(40):
            talk.say(f"w{number}", report(), 1.0 + sequence, incarnation=1000 + number, sequence=sequence)
        assert len(talk.heard(ReportAck)) == (40 if sequence == 1 else 10)


def test_a_life_that_begins_anew_with_the_wall_clock_is_the_one_that_dispatches() -> None:
    node, talk = coordinator()
    node.incarnation = node.fleet.epoch = int(1e12)  # of a clock a quarter of an hour ahead
    node.set_wall_clock(0.0, 1.0)
    talk.say("w", report(), 1.0)
    talk.say("c", ask(), 1.0)
    (answer,) = talk.heard(ScheduleResponse)
    assert (node.incarnation, answer.dispatch.epoch) == (10**9, 10**9)


def test_unknown_hardware_is_counted() -> None:
    node, talk = coordinator()
    talk.say("w", report(hardware="abacus"), 1.0)
    assert (len(node.fleet), node.reports_rejected) == (0, {"unknown_hardware": 1})


def test_when_most_of_the_fleet_falls_silent_nobody_is_declared_dead() -> None:
    node, talk = coordinator()
    names = [f"w{i}" for i in range(10)]
    for second in range(1, 6):
        for name in names:
            talk.say(name, report(), float(second))
        talk.run_to(float(second))
    for second in range(6, 60):
        for name in names[:3]:
            talk.say(name, report(), float(second))
        talk.run_to(float(second))
    assert node.fleet.states[SUSPECT] == 7
    assert node.degraded
    assert len(talk.told(ExpiryHeld)) == 1
    for name in names:
        talk.say(name, report(), 60.0)
    talk.run_to(61.0)
    assert not node.degraded
    assert len(talk.told(ExpiryResumed)) == 1
    assert node.fleet.states[READY] == 10


def test_a_stall_of_its_own_is_not_taken_for_silence() -> None:
    node, talk = coordinator()
    names = [f"w{i}" for i in range(4)]
    for name in names:
        talk.say(name, report(), 1.0)
    node.handle_timer(30.0)  # the loop stood still for half a minute
    assert node.fleet.states == {READY: 4}
    assert node.degraded
    for second in range(31, 40):
        for name in names[:3]:
            talk.say(name, report(), float(second))
        talk.run_to(float(second))
    assert not node.degraded
    assert node.fleet.rows["w3"].state == DEAD
    assert [e.at for e in talk.told(WorkerStateChanged) if e.worker_id == "w3" and e.new == SUSPECT] == [33.0]


# --- placements ----------------------------------------------------------------------------------------------------------------------


def test_a_model_outside_the_catalogue_is_unknown_whatever_the_fleet() -> None:
    _, talk = coordinator()
    talk.say("c", ask(model="gpt-0"), 1.0)
    assert error_code(talk) == UNKNOWN_MODEL


def test_no_worker_and_only_unready_workers_are_worth_asking_again() -> None:
    _, talk = coordinator()
    talk.say("c", ask(), 1.0)
    assert error_code(talk) == NO_WORKERS
    talk.say("w", report(state=STARTING), 1.0)
    talk.say("v", report(state=DRAINING), 1.0)
    talk.say("c", ask(), 1.1)
    (error,) = talk.heard(ScheduleError)
    assert error.code == NO_WORKERS
    assert error.retry_after_s > 0
    assert [e.code for e in talk.told(RequestRefused)] == [NO_WORKERS, NO_WORKERS]


def test_the_warm_worker_serves_and_another_model_is_a_cold_start() -> None:
    _, talk = coordinator()
    talk.say("a", report(), 1.0)
    talk.say("b", report(gpu_models=(CATALOG.names[1],)), 1.0)
    talk.say("c", ask("r0"), 1.1)
    talk.say("c", ask("r1", CATALOG.names[2]), 1.2)
    first, second = talk.heard(ScheduleResponse)
    assert (first.worker_id, first.action, first.host, first.port) == ("a", SERVE, "a", 8000)
    assert second.action == COLD_START
    assert second.eta_s > first.eta_s > 0
    routed = talk.told(RequestRouted)
    assert [(e.request_id, e.action) for e in routed] == [("r0", SERVE), ("r1", COLD_START)]


def test_one_cold_start_serves_all_who_wait() -> None:
    _, talk = coordinator()
    for name in "abcd":
        talk.say(name, report(gpu_models=()), 1.0)
    for i in range(5):
        talk.say("c", ask(f"r{i}"), 1.1)
    answers = talk.heard(ScheduleResponse)
    assert [a.action for a in answers] == [COLD_START] + [SERVE] * 4
    assert len({a.worker_id for a in answers}) == 1


def test_the_same_question_gets_the_same_answer() -> None:
    node, talk = coordinator()
    for name in "abcdef":
        talk.say(name, report(), 1.0)
    for _ in range(5):
        talk.say("c", ask(), 1.1)
    answers = talk.heard(ScheduleResponse)
    assert len(answers) == 5
    assert len(set(answers)) == 1
    assert sum(row.pending for row in node.fleet) == 1
    talk.say("other", ask(), 1.1)  # another client's r0 is another request
    assert sum(row.pending for row in node.fleet) == 2


def test_an_excluded_worker_is_released_and_avoided() -> None:
    node, talk = coordinator()
    for name in "ab":
        talk.say(name, report(), 1.0)
    talk.say("c", ask(), 1.1)
    (first,) = talk.heard(ScheduleResponse)
    talk.say("c", ask(exclude=(first.worker_id,), attempt=1), 1.2)
    (second,) = talk.heard(ScheduleResponse)
    assert second.worker_id != first.worker_id
    assert node.fleet.rows[first.worker_id].pending == 0
    talk.say("c", ask(exclude=("a", "b"), attempt=2), 1.3)
    assert talk.heard(ScheduleResponse)  # better one that failed once than none


def test_in_flight_work_is_added_to_what_was_reported_until_a_report_has_counted_it() -> None:
    node, talk = coordinator()
    talk.say("a", report(), 1.0)
    for i in range(3):
        talk.say("c", ask(f"r{i}"), 1.1)
    row = node.fleet.rows["a"]
    assert (row.pending, row.depth) == (3, 3)
    assert row.ledger.live == 3
    talk.say("a", report(running=2, epoch=100, dispatch_high=2), 1.5)
    assert (row.pending, row.depth) == (1, 3)
    talk.say("a", report(running=3, epoch=99, dispatch_high=9), 1.6)  # of another life of the coordinator
    assert row.pending == 1
    talk.say("a", report(running=2, epoch=100, dispatch_high=2), 5.0)  # the third never arrived
    assert (row.pending, row.depth, row.ledger.live) == (0, 2, 0)


def test_saturation_sheds_the_lowest_priority_first() -> None:
    _, talk = coordinator(queue_threshold=10)
    for waiting, served in ((4, (LOW, 1, HIGH)), (7, (1, HIGH)), (15, (HIGH,)), (25, ())):
        talk.say("a", report(waiting=waiting, blocked=waiting, running=256), 10.0 * waiting)
        for priority in (LOW, 1, HIGH):
            talk.say("c", ask(f"{waiting}/{priority}", priority=priority), 10.0 * waiting)
            answer = talk.node.outbox[-1][0].message
            assert isinstance(answer, ScheduleResponse) == (priority in served)
            if isinstance(answer, ScheduleError):
                assert answer.code == SATURATED
                assert answer.retry_after_s > 0


def test_a_deadline_that_cannot_be_met_is_said_so() -> None:
    _, talk = coordinator()
    talk.say("a", report(wait_s=5.0), 1.0)
    talk.say("c", ask("r0", deadline_s=0.01), 1.0)
    assert error_code(talk) == DEADLINE_UNMEETABLE
    talk.say("c", ask("r1", deadline_s=60.0), 1.0)
    assert talk.heard(ScheduleResponse)


def test_a_restarted_worker_has_nothing_in_flight() -> None:
    node, talk = coordinator()
    talk.say("a", report(), 1.0)
    talk.say("c", ask(), 1.1)
    talk.say("a", report(), 1.2, incarnation=2, sequence=1)
    row = node.fleet.rows["a"]
    assert (row.pending, row.ledger.live, row.depth) == (0, 0, 0)
    talk.say("c", ask("r1"), 1.3)
    assert talk.heard(ScheduleResponse)[-1].dispatch.number == 2  # numbers go on growing


def test_the_more_are_turned_away_the_later_they_are_told_to_come_back() -> None:
    """Ten a tick for each worker may come back after a tick; a thousand must not ask every second."""
    _, talk = coordinator(queue_threshold=1)
    talk.say("a", report(running=256, waiting=5, blocked=5), 1.0)
    waits = []
    for number in range(1000):
        talk.say("c", ask(f"r{number}"), 1.5)
        (error,) = talk.heard(ScheduleError)
        assert error.code == SATURATED
        waits.append(error.retry_after_s)
    assert all(1.0 <= wait_s <= 2.0 for wait_s in waits[:10])
    assert all(10.0 <= wait_s <= 20.0 for wait_s in waits[99:101])
    assert all(30.0 <= wait_s <= 60.0 for wait_s in waits[300:]), "bounded"
    talk.say("a", report(running=256, waiting=5, blocked=5), 2.0)
    talk.run_to(2.0)
    talk.say("c", ask("again"), 2.1)
    (error,) = talk.heard(ScheduleError)
    assert error.retry_after_s >= 30.0, "the crowd of the last tick is not forgotten at once"
    talk.say("a", report(running=256, waiting=5, blocked=5), 4.0)
    talk.run_to(4.0)
    talk.say("c", ask("later"), 4.1)
    (error,) = talk.heard(ScheduleError)
    assert 1.0 <= error.retry_after_s <= 2.0


def test_a_worker_that_said_goodbye_has_left_and_gets_nothing() -> None:
    node, talk = coordinator()
    talk.say("a", report(), 1.0)
    talk.say("a", report(state=STOPPED), 1.1)
    assert node.fleet.rows["a"].state == LEFT
    assert node.fleet.states[DEAD] == 0
    talk.say("c", ask(), 1.2)
    assert error_code(talk) == NO_WORKERS


def test_workers_that_left_are_forgotten_and_are_nobody_silent() -> None:
    """Two of three that went home are no reason to hold expiry when the third falls silent."""
    node, talk = coordinator(forget_after_s=30.0)
    for name in ("a", "b", "c", "d"):
        talk.say(name, report(), 1.0)
    for name in ("a", "b"):
        talk.say(name, report(state=STOPPED), 1.5)
    for second in range(2, 50):
        talk.say("d", report(), float(second))
        talk.run_to(float(second))
    changes = talk.told(WorkerStateChanged)
    assert [e.new for e in changes if e.worker_id == "a"] == [READY, LEFT]
    assert [e.new for e in changes if e.worker_id == "c"] == [READY, SUSPECT, DEAD]
    assert set(node.fleet.rows) == {"d"}


def test_old_answers_are_dropped() -> None:
    node, talk = coordinator(decision_keep_s=5.0)
    for second in range(1, 30):
        talk.say("a", report(), float(second))
        talk.say("c", ask(f"r{second}"), float(second))
        talk.run_to(float(second))
    assert len(node.router._decisions) <= 11


# --- estimates, and what cannot be placed ---------------------------------------------------------------------------------------------------


def test_forty_cold_starts_on_one_worker_are_estimated_as_a_queue_of_loads() -> None:
    """Each load takes 0.3 s or so and they come one after the other: the last is there after 40 of them, not after a product."""
    catalog = Catalog.demo(40)
    node = Coordinator(configuration(), catalog, make_policy("startup_time"), Random(1), 100)
    talk = Talk(node)
    talk.run_to(1.0)
    talk.say("w", report(gpu_models=(), host_models=()), 1.0)
    for i, name in enumerate(catalog.names):
        talk.say("c", ask(f"r{i}", name), 1.0 + i / 100)
    etas = [answer.eta_s for answer in talk.heard(ScheduleResponse)]
    assert len(etas) == 40
    load_s = [cost.load_s(catalog[name], catalog.get_hardware("h100-80g"), DISK) for name in catalog.names]
    for i in (0, 1, 10, 39):
        assert etas[i] == pytest.approx(sum(load_s[: i + 1]) - i / 100, abs=0.15)  # and a prefill
    assert max(etas) < 30.0


def test_no_penalty_is_part_of_an_estimate() -> None:
    for state in ({"kv_used": 0.99}, {"gpu_free_bytes": 0}, {"gpu_models": (CATALOG.names[1],), "busy_models": (CATALOG.names[1],), "gpu_free_bytes": 0}):
        _, talk = coordinator()
        talk.say("a", report(**state), 1.0)
        talk.say("c", ask(), 1.0)
        (answer,) = talk.heard(ScheduleResponse)
        assert answer.eta_s < 1.0


def test_a_request_goes_to_hardware_that_can_hold_it() -> None:
    _, talk = coordinator()
    for i in range(8):
        talk.say(f"small-{i}", report(hardware="a5000-24g"), 1.0)
    for i in range(2):
        talk.say(f"large-{i}", report(hardware="h100-80g", running=50), 1.0)
    for i in range(30):
        talk.say("c", ask(f"r{i}", prompt_tokens=60_000), 1.0)
    assert {answer.worker_id for answer in talk.heard(ScheduleResponse)} == {"large-0", "large-1"}


@pytest.mark.parametrize("policy", policies())
def test_the_one_worker_that_fits_is_found_among_a_thousand(policy: str) -> None:
    _, talk = coordinator(policy)
    for i in range(1000):
        talk.say(f"w{i}", report(hardware="a5000-24g", gpu_models=()), 1.0)
    talk.say("rare", report(hardware="h100-80g", gpu_models=(), host_models=(), disk_complete=False), 1.0)
    talk.say("c", ask(prompt_tokens=100_000), 1.0)
    (answer,) = talk.heard(ScheduleResponse)
    assert answer.worker_id == "rare"


@pytest.mark.parametrize("policy", policies())
def test_the_one_worker_with_room_is_found_among_a_thousand(policy: str) -> None:
    _, talk = coordinator(policy)
    for i in range(1000):
        talk.say(f"w{i}", report(running=256, waiting=20, blocked=20), 1.0)
    talk.say("roomy", report(running=256, waiting=9, blocked=9), 1.0)
    talk.say("c", ask(), 1.0)
    assert [answer.worker_id for answer in talk.heard(ScheduleResponse)] == ["roomy"]


def test_what_no_hardware_can_hold_is_refused_for_good_once_everybody_could_have_been_heard() -> None:
    catalog = Catalog({name: MODELS[name] for name in (MODEL, "llama-2-70b")})
    node = Coordinator(configuration(), catalog, make_policy("startup_time"), Random(1), 100)
    talk = Talk(node)
    talk.run_to(1.0)
    cases = [("llama-2-70b", 1000, MODEL_TOO_LARGE, "140000000000"), (MODEL, 1_000_000, REQUEST_TOO_LARGE, "1000200 tokens")]
    for now, final in ((1.5, False), (3.5, True)):
        talk.say("a", report(), now)
        for model, tokens, code, says in cases:
            talk.say("c", ask(f"{now}/{model}", model, prompt_tokens=tokens), now)
            (error,) = talk.heard(ScheduleError)
            assert (error.retry_after_s == 0.0) == final
            assert error.code == (code if final else NO_WORKERS)
            assert not final or says in error.detail
    talk.say("b", report(state=DRAINING, hardware="h100-80g-tp4"), 4.0)  # heard of, if not ready: another may come
    talk.say("c", ask("again", "llama-2-70b"), 4.0)
    (error,) = talk.heard(ScheduleError)
    assert (error.code, error.retry_after_s > 0.0) == (NO_WORKERS, True)


def test_a_context_limit_of_the_catalogue_is_final_at_once() -> None:
    model = dataclasses.replace(MODELS[MODEL], context_tokens=4096)
    node = Coordinator(configuration(), Catalog({MODEL: model}), make_policy("startup_time"), Random(1), 100)
    talk = Talk(node)
    talk.run_to(1.0)
    talk.say("a", report(), 1.0)
    talk.say("c", ask("fits", prompt_tokens=3896, max_tokens=200), 1.0)
    assert talk.heard(ScheduleResponse)
    talk.say("c", ask("long", prompt_tokens=3897, max_tokens=200), 1.0)
    (error,) = talk.heard(ScheduleError)
    assert (error.code, error.retry_after_s) == (REQUEST_TOO_LARGE, 0.0)
    assert "4096" in error.detail


def test_a_worker_gets_no_more_than_it_lets_wait_whatever_the_fleet_allows() -> None:
    _, talk = coordinator(queue_threshold=1000)
    talk.say("a", report(running=256, queue_max=5), 1.0)
    for i in range(20):
        talk.say("c", ask(f"r{i}"), 1.0)
    assert len(talk.heard(ScheduleResponse)) == 5


# --- lives and holds ------------------------------------------------------------------------------------------------------------------------


def test_a_life_that_has_been_silent_may_be_followed_by_one_whose_clock_was_set_back() -> None:
    node, talk = coordinator(worker_timeout_s=10.0)
    talk.say("a", report(), 1.0, incarnation=100)
    talk.say("a", report(), 10.9, incarnation=80, sequence=1)
    assert node.reports_rejected["old_incarnation"] == 1
    talk.say("a", report(running=1), 11.0, incarnation=80, sequence=2)
    row = node.fleet.rows["a"]
    assert (row.incarnation, row.engine.running, row.state) == (80, 1, READY)


def test_a_life_that_reports_rarely_is_not_over_between_two_of_its_reports() -> None:
    """The life before it stands still, and comes back when the present one has said nothing for longer than the timeout, as is usual for it."""
    node, talk = coordinator(worker_timeout_s=10.0, suspect_intervals=3.0)
    talk.say("a", report(interval_s=15.0), 1.0, incarnation=100)
    talk.say("a", report(interval_s=15.0, running=1), 15.0, incarnation=80, sequence=1)
    assert node.fleet.rows["a"].incarnation == 100
    talk.say("a", report(interval_s=15.0, running=1), 46.0, incarnation=80, sequence=2)
    assert node.fleet.rows["a"].incarnation == 80


def test_a_worker_that_comes_back_with_other_hardware_is_another_worker_to_placement() -> None:
    node, talk = coordinator()
    talk.say("a", report(hardware="a5000-24g"), 1.0)
    talk.say("a", report(hardware="h100-80g"), 2.0, incarnation=2, sequence=1)
    assert node.fleet.rows["a"].hardware.name == "h100-80g"
    talk.say("c", ask(prompt_tokens=100_000), 2.0)
    assert talk.heard(ScheduleResponse)


def test_unknown_hardware_is_told_once_for_each_name() -> None:
    node, talk = coordinator()
    for now in range(1, 5):
        for name in ("tpu", "npu"):
            talk.say(f"w-{name}", report(hardware=name), float(now))
    assert [event.hardware for event in talk.told(HardwareUnknown)] == ["tpu", "npu"]
    assert node.reports_rejected["unknown_hardware"] == 8


def test_a_hold_ends_so_that_those_who_are_dead_for_good_are_dead() -> None:
    node, talk = coordinator(hold_max_s=60.0)
    for now in range(1, 6):
        for i in range(10):
            talk.say(f"w{i}", report(), float(now))
    held_s = 0.0
    for now in range(6, 120):
        for i in range(3):
            talk.say(f"w{i}", report(), float(now))
        talk.run_to(float(now))
        held_s += bool(node.degraded)
    assert 55.0 <= held_s <= 65.0
    assert not node.degraded
    assert node.fleet.states["DEAD"] == 7
    assert node.fleet.states[READY] == 3


def test_a_question_of_an_attempt_that_is_over_gets_no_answer() -> None:
    node, talk = coordinator()
    for name in "ab":
        talk.say(name, report(), 1.0)
    talk.say("c", ask(), 1.1)
    talk.say("c", ask(exclude=("a",), attempt=1), 1.2)
    talk.heard(ScheduleResponse)
    talk.say("c", ask(), 1.3)  # the network held it up
    assert talk.heard(ScheduleResponse) == []
    assert sum(row.pending for row in node.fleet) == 1


def lost(talk: Talk) -> list[tuple[Address, WorkerLost]]:
    """What was told of lost workers, and to whom."""
    found = [(addr, envelope.message) for envelope, addr in talk.node.outbox if isinstance(envelope.message, WorkerLost)]
    talk.node.outbox.clear()
    return found


def test_the_clients_of_a_worker_that_falls_silent_are_told_each_once_a_state() -> None:
    node, talk = coordinator()
    talk.say("a", report(), 1.0, incarnation=7)
    for i in range(3):
        talk.say("c", ask(f"r{i}"), 1.1)
    talk.say("d", ask("r9"), 1.1)
    told: list[tuple[str, list[tuple[Address, WorkerLost]]]] = []
    for now in range(2, 30):
        talk.say("b", report(), float(now))
        talk.say("b2", report(), float(now))
        talk.run_to(float(now))
        if found := lost(talk):
            told.append((node.fleet.rows["a"].state, found))
    both = [(("c", 8000), WorkerLost("a", 7)), (("d", 8000), WorkerLost("a", 7))]
    assert told == [(SUSPECT, both), (DEAD, both)]
    states = [event.new for event in talk.told(WorkerStateChanged) if event.worker_id == "a"]
    assert states == [READY, SUSPECT, DEAD]


def test_a_worker_that_leaves_in_order_is_lost_to_nobody() -> None:
    _, talk = coordinator()
    talk.say("a", report(), 1.0)
    talk.say("c", ask(), 1.1)
    talk.say("a", report(state=STOPPED), 2.0)
    talk.run_to(60.0)
    assert lost(talk) == []


def test_of_very_many_clients_the_latest_are_told() -> None:
    node, talk = coordinator()
    talk.say("a", report(slots=1000), 1.0)
    for i in range(CLIENTS_MAX + 10):
        talk.say(f"c{i}", ask(), 1.1)
    assert list(node.fleet.rows["a"].clients) == [f"c{i}" for i in range(10, CLIENTS_MAX + 10)]


def test_two_lives_under_one_name_the_older_is_told_and_may_come_back() -> None:
    node, talk = coordinator(worker_timeout_s=10.0)
    talk.say("a", report(), 1.0, incarnation=5, addr=("old", 1))
    talk.say("a", report(), 1.5, incarnation=6, sequence=1, addr=("new", 1))
    talk.node.outbox.clear()
    for now in range(2, 10):
        talk.say("a", report(), now + 0.1, incarnation=5, sequence=now, addr=("old", 1))
    told = lost(talk)
    assert told
    assert set(told) == {(("old", 1), WorkerLost("a", 5))}
    assert [(event.incarnation, event.address) for event in talk.told(WorkerDisplaced)] == [(5, "old")]
    assert node.fleet.rows["a"].address == ("new", 8000)
    for now in range(10, 14):  # the newer one is gone
        talk.say("a", report(), float(now), incarnation=5, sequence=now, addr=("old", 1))
    assert node.fleet.rows["a"].address == ("old", 8000)


def test_a_second_coordinator_is_noticed_by_what_workers_say_and_forgotten_when_they_stop() -> None:
    node, talk = coordinator()
    talk.say("a", report(rival=True), 2.0)
    talk.say("a", report(rival=True), 3.0)
    assert node.rival
    assert [type(event) for event in talk.told(object) if isinstance(event, RivalSeen | RivalGone)] == [RivalSeen]
    for now in range(4, 20):
        talk.say("a", report(), float(now))
        talk.run_to(float(now))
    assert not node.rival
    assert talk.told(RivalGone)


def test_a_number_that_somebody_else_used_up_locks_a_worker_out_for_a_minute_only() -> None:
    node, talk = coordinator(forget_after_s=300.0)
    talk.say("a", report(), 1.0, sequence=1 << 62)
    for now in range(2, 61):
        talk.say("a", report(running=1), float(now), sequence=now)
    assert node.fleet.rows["a"].engine.running == 0
    talk.say("a", report(running=1), 61.5, sequence=62)
    row = node.fleet.rows["a"]
    assert (row.engine.running, row.sequence, row.lost) == (1, 62, 0)
