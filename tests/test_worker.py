"""The worker, spoken to by hand: work is done once, reports tell the truth, draining loses nothing."""

from __future__ import annotations

import itertools
from math import inf
from random import Random
from typing import Any

import pytest
from roles import CATALOG, MODEL, Talk, configuration

from sllm.engine import LlmEngine
from sllm.protocol.events import (
    CoordinatorChanged,
    CoordinatorOverdue,
    CoordinatorSilent,
    DisplacedByNamesake,
    ModelLoaded,
    ModelLoadStarted,
    RequestAdmitted,
    RequestCancelled,
    RequestServed,
    RivalSeen,
    WorkerDrained,
)
from sllm.protocol.messages import (
    CANCELLED,
    COMPLETED,
    DRAINING,
    READY,
    REFUSED_DRAINING,
    REFUSED_FULL,
    REFUSED_MISDIRECTED,
    REFUSED_TOO_LARGE,
    REFUSED_UNKNOWN_MODEL,
    STARTING,
    STOPPED,
    CancelRequest,
    Dispatch,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    LoadReport,
    Progress,
    ReportAck,
    WorkerLost,
)
from worker import Worker


def worker(**changes: object) -> tuple[Worker, Talk]:
    config = configuration(**changes)
    engine = LlmEngine(CATALOG, CATALOG.get_hardware(config.hardware))
    node = Worker(config, CATALOG, engine, ("coordinator", 9000), Random(1), 1, node_id="w")
    return node, Talk(node)


def request(request_id: str = "r0", number: int = 1, **changes: object) -> InferenceRequest:
    return InferenceRequest(request_id, MODEL, 1000, 20, Dispatch(7, number), "w").replace(**changes)


def outcomes(talk: Talk) -> list[str]:
    return [response.outcome for response in talk.heard(InferenceResponse)]


def test_a_request_from_load_to_last_token() -> None:
    _, talk = worker()
    talk.say("c", request(), 1.0)
    talk.run_to(1.2)
    assert talk.heard(InferenceAccepted) == [InferenceAccepted("r0", 1)]
    talk.run_to(9.0)
    sent = [envelope.message for envelope, _ in talk.node.outbox]
    (first,) = [m for m in sent if isinstance(m, FirstToken)]
    (response,) = [m for m in sent if isinstance(m, InferenceResponse)]
    assert (response.outcome, response.output_tokens) == (COMPLETED, 20)
    load_s = response.load_s
    assert load_s > 0.1
    assert response.queue_wait_s == pytest.approx(load_s)
    assert first.queue_wait_s == response.queue_wait_s < response.first_token_s < response.total_s
    kinds = [type(e) for e in talk.node.events if not isinstance(e, CoordinatorOverdue)]
    assert kinds == [RequestAdmitted, ModelLoadStarted, ModelLoaded, RequestServed]
    (served,) = talk.told(RequestServed)
    assert served.output_tokens == 20
    assert (served.queue_wait_s, served.first_token_s, served.total_s) == (response.queue_wait_s, response.first_token_s, response.total_s)


def test_a_request_sent_again_is_answered_again_and_served_once() -> None:
    _, talk = worker()
    for _ in range(3):
        talk.say("c", request(), 1.0)
    assert len(talk.heard(InferenceAccepted)) == 2  # the first time, it hears soon enough
    talk.run_to(10.0)
    talk.heard(InferenceResponse)
    talk.say("c", request(), 11.0, addr=("moved", 1))
    assert outcomes(talk) == [COMPLETED]
    assert len(talk.told(RequestServed)) == 1
    talk.say("d", request(), 11.0)  # the same id from another client is another request
    assert len(talk.told(RequestAdmitted)) == 1


def test_a_request_is_accepted_aloud_only_if_its_first_token_takes_long() -> None:
    node, talk = worker(retry_initial_s=0.4)
    node.engine.load(0.0, MODEL)
    talk.run_to(5.0)
    talk.say("c", request(), 6.0)
    talk.run_to(6.09)
    assert [type(envelope.message) for envelope, _ in node.outbox if not isinstance(envelope.message, LoadReport | Progress)] == [FirstToken]
    node.outbox.clear()
    talk.say("c", request("r1", 2, prompt_tokens=60_000), 7.0)
    talk.run_to(7.11)
    assert [message.request_id for message in talk.heard(InferenceAccepted)] == ["r1"]
    talk.run_to(8.0)
    assert talk.heard(InferenceAccepted) == []


def test_a_question_about_its_load_loses_nothing_of_what_the_engine_did() -> None:
    node, talk = worker()
    talk.run_to(0.5)
    talk.say("c", request(max_tokens=50), 1.0)
    talk.run_to(1.2)
    talk.heard(InferenceAccepted)
    loaded_at = node.engine.next_at
    assert node.wake_at == loaded_at < inf
    snapshot = node.snapshot(loaded_at + 0.01)  # the model is there, and nobody has called handle_timer
    assert (snapshot.running, snapshot.loading) == (1, ())
    assert node.wake_at > loaded_at
    assert len(talk.told(ModelLoaded)) == 1
    assert node.snapshot(60.0).running == 0
    assert [type(envelope.message) for envelope, _ in node.outbox] == [FirstToken, InferenceResponse]


def test_answers_are_not_kept_forever() -> None:
    _, talk = worker(response_keep_s=30.0)
    talk.say("c", request(), 1.0)
    talk.run_to(100.0)
    talk.heard(InferenceResponse)
    talk.told(RequestAdmitted)
    talk.say("c", request(), 101.0)
    assert len(talk.told(RequestAdmitted)) == 1


def test_answers_kept_are_bounded_in_number_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.service.jobs.DONE_MAX", 3)
    _, talk = worker()
    for number in range(1, 9):
        talk.say("c", request(f"r{number}", number), 20.0 * number)
        talk.run_to(20.0 * number + 19.0)
    assert outcomes(talk) == [COMPLETED] * 8
    talk.told(RequestAdmitted)
    for number in range(1, 9):
        talk.say("c", request(f"r{number}", number), 185.0)
    assert [event.request_id for event in talk.told(RequestAdmitted)] == ["r1", "r2", "r3"]
    assert outcomes(talk) == [COMPLETED] * 5


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"worker_id": "other"}, REFUSED_MISDIRECTED),
        ({"model": "gpt-0"}, REFUSED_UNKNOWN_MODEL),
        ({"prompt_tokens": 10_000_000}, REFUSED_TOO_LARGE),
    ],
)
def test_what_it_cannot_do_it_refuses(changes: dict[str, Any], outcome: str) -> None:
    _, talk = worker()
    talk.say("c", request(**changes), 1.0)
    assert outcomes(talk) == [outcome]
    assert talk.told(RequestAdmitted) == []


def test_a_full_queue_refuses() -> None:
    _, talk = worker(queue_max=3)
    for i in range(256 + 4):
        talk.say("c", request(f"r{i}", i + 1), 1.0)
    assert outcomes(talk) == [REFUSED_FULL]


def test_reports_come_evenly_and_tell_what_was_received() -> None:
    node, talk = worker(report_interval_s=1.0)
    talk.run_to(0.0)
    (first,) = talk.heard(LoadReport)
    assert (first.state, first.engine.running, first.epoch, first.engine.slots, first.hardware) == (READY, 0, 0, 256, "h100-80g")
    times: list[float] = []
    for number in (3, 1, 5):
        talk.say("c", request(f"r{number}", number, max_tokens=1000), 0.001)
    while len(times) < 6:
        at = node.next_deadline()
        assert at is not None
        node.handle_timer(at)
        reports = talk.heard(LoadReport)
        if reports:
            times.append(at)
            talk.say("coordinator", ReportAck(7, node.reports_sent), at)
            assert (reports[0].epoch, reports[0].dispatch_high, reports[0].dispatch_missing) == (7, 5, (2, 4))
    assert 0.0 < times[0] < 1.0  # a phase of its own
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([1.0] * 5)
    assert node.reports_sent == 7


def test_with_no_interval_every_change_is_reported_at_once() -> None:
    _, talk = worker(report_interval_s=0.0)
    talk.run_to(0.0)
    talk.heard(LoadReport)
    talk.say("c", request(), 0.5)
    assert talk.heard(LoadReport)
    talk.run_to(0.9)
    assert talk.heard(LoadReport)


def test_it_is_starting_until_its_demo_models_are_there() -> None:
    _, talk = worker(demo_models=2)
    talk.run_to(0.0)
    assert talk.heard(LoadReport)[0].state == STARTING
    talk.run_to(5.0)
    reports = talk.heard(LoadReport)
    assert reports[-1].state == READY
    assert set(CATALOG.names[:2]) <= set(reports[-1].engine.gpu_models)
    assert len(talk.told(ModelLoadStarted)) == 2


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    node, talk = worker(drain_timeout_s=30.0)
    talk.say("c", request(max_tokens=200), 1.0)
    talk.run_to(2.0)
    talk.heard(LoadReport)
    node.drain(2.0)
    assert talk.heard(LoadReport)[0].state == DRAINING
    talk.say("c", request("r1", 2), 2.1)
    assert outcomes(talk) == [REFUSED_DRAINING]
    assert not node.drained
    talk.run_to(20.0)
    messages = [envelope.message for envelope, _ in talk.node.outbox]
    assert [m.outcome for m in messages if isinstance(m, InferenceResponse)] == [COMPLETED]
    assert isinstance(messages[-1], LoadReport)
    assert messages[-1].state == STOPPED
    assert node.drained
    assert talk.told(WorkerDrained)
    assert node.next_deadline() is None


def test_what_is_not_finished_in_time_is_sent_elsewhere() -> None:
    node, talk = worker(drain_timeout_s=1.0)
    talk.say("c", request(max_tokens=2000), 1.0)
    talk.run_to(2.0)
    talk.heard(InferenceResponse)
    node.drain(2.0)
    talk.run_to(3.0)
    assert node.drained
    assert outcomes(talk) == [REFUSED_DRAINING]
    talk.say("c", request("r9", 9), 50.0)  # hours of engine time later nothing surprising happens
    assert outcomes(talk) == [REFUSED_DRAINING]


def test_an_idle_worker_is_drained_at_once() -> None:
    node, talk = worker()
    node.drain(1.0)
    assert node.drained
    assert [r.state for r in talk.heard(LoadReport)] == [DRAINING, STOPPED]


def test_it_notices_a_silent_coordinator_and_a_new_one() -> None:
    _, talk = worker(coordinator_silent_s=10.0)
    talk.say("coordinator", ReportAck(100, 1), 1.0)
    talk.run_to(10.0)
    assert talk.told(CoordinatorSilent) == []
    talk.run_to(12.5)
    assert len(talk.told(CoordinatorSilent)) == 1
    talk.say("coordinator", ReportAck(200, 1), 13.0, incarnation=2)
    assert [e.epoch for e in talk.told(CoordinatorChanged)] == [200]


def test_each_client_that_is_owed_tokens_hears_once_an_interval_that_the_worker_lives() -> None:
    node, talk = worker()
    node.engine.load(0.0, MODEL)
    talk.run_to(5.0)
    talk.heard(Progress)
    for i in range(5):
        talk.say("c", request(f"r{i}", i + 1, max_tokens=2000), 5.0)
    talk.say("d", request("r9", 9, max_tokens=1), 5.0)
    talk.run_to(8.0)
    told = [(addr, envelope.message) for envelope, addr in node.outbox if isinstance(envelope.message, Progress)]
    assert [progress for addr, progress in told if addr == ("c", 8000)] == [Progress(1.0, 5)] * 3
    assert len([addr for addr, _ in told if addr == ("d", 8000)]) <= 1  # it has its answer
    talk.run_to(100.0)
    talk.heard(Progress)
    talk.run_to(105.0)
    assert talk.heard(Progress) == []


def test_a_cancelled_request_stops_and_frees_its_place() -> None:
    node, talk = worker()
    node.engine.load(0.0, MODEL)
    talk.run_to(5.0)
    talk.say("c", request("r0", 1, max_tokens=5000), 5.0)
    talk.say("c", request("r1", 2, max_tokens=50), 5.0)
    talk.run_to(5.5)
    talk.say("other", CancelRequest("r0"), 5.5)  # another client's r0 is another request
    assert talk.told(RequestCancelled) == []
    talk.say("c", CancelRequest("r0"), 5.5)
    assert [event.request_id for event in talk.told(RequestCancelled)] == ["r0"]
    talk.run_to(20.0)
    assert [event.request_id for event in talk.told(RequestServed)] in ([], ["r1"])
    snapshot = node.snapshot(20.0)
    assert (snapshot.running, snapshot.waiting, snapshot.kv_used) == (0, 0, 0.0)
    assert outcomes(talk).count(CANCELLED) == 2
    talk.say("c", CancelRequest("r0"), 21.0)
    talk.say("c", CancelRequest("never heard of"), 21.0)
    assert outcomes(talk) == [CANCELLED] * 2


def test_only_the_coordinator_can_acknowledge_or_displace() -> None:
    node, talk = worker()
    talk.say("stranger", ReportAck(100, 1), 1.0)
    talk.say("coordinator", ReportAck(100, 1), 1.0, addr=("elsewhere", 9000))
    talk.say("stranger", WorkerLost(node.node_id, node.incarnation), 1.0)
    assert not node.acknowledged
    assert not node.reporter.displaced
    assert node.rejected["not_asked"] == 3
    talk.say("coordinator", ReportAck(100, 1), 1.0, addr=("elsewhere", 9000), incarnation=20_000_000_000)
    talk.say("coordinator", ReportAck(100, 1), 1.1)
    assert node.acknowledged, "a later life that was heard from elsewhere has made nothing old"


def test_a_worker_whose_name_a_newer_one_has_says_so_until_it_is_acknowledged_again() -> None:
    node, talk = worker()
    talk.say("coordinator", ReportAck(100, 1), 1.0)
    talk.say("coordinator", WorkerLost(node.node_id, node.incarnation), 2.0)
    talk.say("coordinator", WorkerLost(node.node_id, node.incarnation), 3.0)
    talk.say("coordinator", WorkerLost(node.node_id, node.incarnation + 1), 3.0)
    assert node.reporter.displaced
    assert len(talk.told(DisplacedByNamesake)) == 1
    talk.say("coordinator", ReportAck(100, 9), 15.0)
    assert not node.reporter.displaced


def test_two_coordinators_that_answer_by_turns_are_told_of_and_a_restart_is_not() -> None:
    node, talk = worker(report_interval_s=1.0)
    now = 0.0
    for incarnation in (10, 20):  # one life after the other
        for _ in range(5):
            now += 1.0
            talk.say("coordinator", ReportAck(incarnation, int(now)), now, incarnation=incarnation)
            talk.run_to(now)
    talk.say("coordinator", ReportAck(10, 1), now, incarnation=10, sequence=99)  # a datagram that was held up
    talk.run_to(now + 1.0)
    assert not node.reporter.rival
    for _ in range(3):
        for incarnation in (20, 10):
            now += 1.0
            talk.say("coordinator", ReportAck(incarnation, int(now)), now, incarnation=incarnation)
            talk.run_to(now)
    talk.run_to(now + 1.0)
    assert node.reporter.rival
    assert talk.heard(LoadReport)[-1].rival
    assert len(talk.told(RivalSeen)) == 1
    assert node.reporter.suspects_rival(now + 1.0)
    talk.run_to(now + 50.0)
    assert not node.reporter.rival
    assert not node.reporter.suspects_rival(now + 50.0)
    assert not talk.heard(LoadReport)[-1].rival


def test_an_acknowledgement_that_is_owed_is_missed_soon_and_asked_for_ever_more_rarely() -> None:
    """One report in four is acknowledged; the fourth after the last acknowledged one has a report interval for it."""
    node, talk = worker(ack_every=4, coordinator_silent_s=10.0)
    while node.reports_sent < 21:
        assert node.next_deadline() is not None
        talk.run_to(node.next_deadline() or 0.0)
        if node.reports_sent % 4 == 0:
            talk.say("coordinator", ReportAck(100, node.reports_sent), node.reporter.due_at - 0.99)
    assert talk.told(CoordinatorOverdue) == [], "every answer that was owed has come"
    acknowledged_s = node.reporter.due_at - 2.0  # report 20; 21 came an interval later
    talk.heard(LoadReport)
    talk.run_to(acknowledged_s + 19.0)
    overdue = [event.at - acknowledged_s for event in talk.told(CoordinatorOverdue)]
    assert overdue == pytest.approx([5.0, 7.0, 11.0, 19.0])
    assert len(talk.heard(LoadReport)) == 18 + len(overdue), "each time one more report, at once"
    talk.say("coordinator", ReportAck(100, node.reports_sent), acknowledged_s + 19.1)
    talk.run_to(acknowledged_s + 23.0)
    assert talk.told(CoordinatorOverdue) == []


def test_an_acknowledgement_of_an_old_report_owes_nothing_less() -> None:
    node, talk = worker(ack_every=4)
    talk.run_to(6.0)
    talk.say("coordinator", ReportAck(100, 4), 6.1)
    talk.told(CoordinatorOverdue)
    talk.say("coordinator", ReportAck(100, 1), 6.2)
    assert node.reporter._owed == 8
