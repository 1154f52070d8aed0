"""The client, spoken to by hand: it sends again, goes elsewhere, and ends each request exactly once."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from roles import MODEL, Talk, configuration

from client import Client
from sllm.events import CoordinatorOverdue, CoordinatorSilent, DuplicateResponse, RequestCompleted, RequestFailed, RequestRejected, RequestRetried
from sllm.messages import (
    COMPLETED,
    NOT_READY,
    REFUSED_DRAINING,
    SATURATED,
    SERVE,
    UNKNOWN_MODEL,
    Dispatch,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
)
from sllm.workload.request import Request

COORDINATOR = ("coordinator", 9000)


def client(**changes: object) -> tuple[Client, Talk]:
    node = Client(configuration(**changes), COORDINATOR, Random(1), 1)
    node.submit(Request(0.0, "r0", MODEL, 100, 11), 0.0)
    return node, Talk(node)


def place(talk: Talk, worker: str, now: float, number: int = 1) -> None:
    talk.say("coordinator", ScheduleResponse("r0", worker, worker, 8000, SERVE, 0.1, Dispatch(1, number), ""), now)


def respond(talk: Talk, worker: str, now: float, outcome: str = COMPLETED) -> None:
    tokens = 11 if outcome == COMPLETED else 0
    talk.say(worker, InferenceResponse("r0", outcome, tokens, 0.1, 0.2, 1.2, 0.0), now)


def ended(talk: Talk) -> list[object]:
    return [e for e in talk.node.events if isinstance(e, RequestCompleted | RequestFailed | RequestRejected)]


def test_the_usual_way() -> None:
    node, talk = client()
    assert talk.heard(ScheduleRequest) == [ScheduleRequest("r0", MODEL, 100, 11, 1, 0.0, ())]
    place(talk, "w", 0.1)
    assert talk.heard(InferenceRequest) == [InferenceRequest("r0", MODEL, 100, 11, Dispatch(1, 1), "w")]
    talk.say("w", InferenceAccepted("r0", 1), 0.2)
    talk.say("w", FirstToken("r0", 0.1), 0.5)
    respond(talk, "w", 1.5)
    (done,) = talk.told(RequestCompleted)
    assert (done.worker_id, done.ttft_s, done.e2e_s, done.tpot_s, done.placements, done.retries) == ("w", 0.5, 1.5, 0.1, 1, 0)
    assert node.in_flight == 0
    assert node.next_deadline() is None


def test_what_stays_unanswered_is_sent_again_ever_more_slowly() -> None:
    _, talk = client(retry_initial_s=0.5, retry_max_s=4.0)
    times = [0.0]
    while times[-1] < 60.0:
        talk.heard(ScheduleRequest)
        at = talk.node.next_deadline()
        assert at is not None
        talk.run_to(at)
        times.append(at)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    for gap, nominal in zip(gaps, [0.5, 1.0, 2.0] + [4.0] * len(gaps), strict=False):
        assert 0.75 * nominal <= gap <= 1.25 * nominal
    told = [event for event in talk.node.events if isinstance(event, CoordinatorOverdue | CoordinatorSilent)]
    silences = [event.at for event in told if isinstance(event, CoordinatorSilent)]
    assert silences  # somebody should look the name up again
    overdue = [event.at for event in told if isinstance(event, CoordinatorOverdue) and event.at < silences[0]]
    assert 1.0 <= overdue[0] <= 2.0, "the second try goes another way"
    assert all(later >= 2.0 * earlier for earlier, later in itertools.pairwise(overdue))


def test_a_silent_worker_is_excluded_and_the_request_finishes_elsewhere() -> None:
    _, talk = client(worker_tries=3)
    place(talk, "a", 0.1)
    talk.run_to(8.0)
    assert [e.worker_id for e in talk.told(RequestRetried)] == ["a"]
    assert talk.heard(ScheduleRequest)[-1].exclude == ("a",)
    place(talk, "a", 8.05, number=1)  # the first answer, held up on its way
    assert talk.heard(InferenceRequest) == []
    place(talk, "b", 8.1)
    assert talk.heard(InferenceRequest)[0].worker_id == "b"
    respond(talk, "b", 9.0)
    assert [type(e) for e in ended(talk)] == [RequestCompleted]


def test_an_accepted_request_is_asked_after_and_a_dead_worker_found_out() -> None:
    _, talk = client(worker_tries=3, poll_s=5.0)
    place(talk, "a", 0.1)
    talk.say("a", InferenceAccepted("r0", 1), 0.2)
    talk.heard(InferenceRequest)
    talk.run_to(5.3)
    assert len(talk.heard(InferenceRequest)) == 1
    talk.say("a", InferenceAccepted("r0", 1), 5.4)
    talk.run_to(10.3)
    assert talk.told(RequestRetried) == []
    talk.run_to(20.0)
    assert [e.reason for e in talk.told(RequestRetried)] == ["silent"]


def test_a_refusal_sends_it_elsewhere_at_once() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.heard(InferenceRequest)
    respond(talk, "a", 0.2, REFUSED_DRAINING)
    assert talk.heard(ScheduleRequest)[0].exclude == ("a",)


def test_three_placements_and_no_more() -> None:
    node, talk = client()
    for number, worker in enumerate("abc", 1):
        place(talk, worker, float(number))
        respond(talk, worker, number + 0.5, REFUSED_DRAINING)
    (failed,) = ended(talk)
    assert isinstance(failed, RequestFailed)
    assert "3 workers" in failed.reason
    assert node.in_flight == 0


def test_the_first_response_wins_and_the_second_is_work_done_twice() -> None:
    _, talk = client(worker_tries=1)
    place(talk, "a", 0.1)
    talk.run_to(4.0)
    place(talk, "b", 4.1)
    respond(talk, "a", 4.2)  # given up too early: its answer still counts
    respond(talk, "b", 4.3)
    respond(talk, "a", 4.4)  # the same worker again is only a datagram sent twice
    assert [e.worker_id for e in talk.node.events if isinstance(e, RequestCompleted)] == ["a"]
    assert [e.sender_id for e in talk.node.events if isinstance(e, DuplicateResponse)] == ["b"]


@pytest.mark.parametrize("code", [SATURATED, NOT_READY])
def test_it_asks_again_after_the_time_it_was_told(code: str) -> None:
    _, talk = client()
    talk.heard(ScheduleRequest)
    talk.say("coordinator", ScheduleError("r0", code, 1.5, ""), 0.1)
    talk.run_to(1.5)
    assert talk.heard(ScheduleRequest) == []
    talk.run_to(1.61)
    assert len(talk.heard(ScheduleRequest)) == 1


def test_a_final_refusal_and_one_that_lasts_too_long_are_rejections() -> None:
    _, talk = client()
    talk.say("coordinator", ScheduleError("r0", UNKNOWN_MODEL, 0.0, ""), 0.1)
    assert [e.code for e in talk.told(RequestRejected)] == [UNKNOWN_MODEL]
    node, talk = client(request_timeout_s=20.0)
    while node.in_flight:
        talk.say("coordinator", ScheduleError("r0", SATURATED, 1.0, ""), talk.node.next_deadline() or 0.0)
        talk.run_to(node.next_deadline() or 0.0)
    (rejected,) = talk.told(RequestRejected)
    assert (rejected.at, rejected.code) == (20.0, SATURATED)


def test_a_request_that_is_never_finished_has_failed_once() -> None:
    node, talk = client(request_timeout_s=30.0, poll_s=5.0)
    place(talk, "a", 0.1)
    for second in range(1, 40):
        talk.say("a", InferenceAccepted("r0", 1), float(second))
        talk.run_to(float(second))
    (failed,) = ended(talk)
    assert isinstance(failed, RequestFailed)
    assert failed.at == 30.0
    assert node.in_flight == 0


def test_a_lost_first_token_is_worked_out_from_the_response() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    respond(talk, "a", 1.5)
    (done,) = talk.told(RequestCompleted)
    assert done.ttft_s == pytest.approx(0.5)  # 1.5 less the second between the first token and the last


def test_an_id_cannot_be_used_twice() -> None:
    node, _ = client()
    with pytest.raises(ValueError, match="r0"):
        node.submit(Request(0.0, "r0", MODEL, 1, 1), 1.0)
