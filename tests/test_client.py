"""The client, spoken to by hand: it sends again, goes elsewhere, and ends each request exactly once."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from roles import MODEL, Talk, configuration

from client import Client
from sllm.protocol.events import CoordinatorOverdue, CoordinatorSilent, DuplicateResponse, RequestCompleted, RequestFailed, RequestRejected, RequestRetried
from sllm.protocol.messages import (
    CANCELLED,
    COMPLETED,
    NOT_READY,
    REFUSED_DRAINING,
    SATURATED,
    SERVE,
    UNKNOWN_MODEL,
    CancelRequest,
    Dispatch,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    Progress,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
    WorkerLost,
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


def test_a_request_that_nobody_speaks_of_is_asked_after_while_its_worker_lives() -> None:
    """Its response may be lost; the worker tells of its other requests, and answers again when asked."""
    _, talk = client(poll_s=5.0)
    place(talk, "a", 0.1)
    talk.say("a", InferenceAccepted("r0", 1), 0.2)
    talk.heard(InferenceRequest)
    for now in range(1, 5):
        talk.say("a", Progress(1.0, 1), float(now))
        talk.run_to(float(now))
    assert talk.heard(InferenceRequest) == []
    talk.say("a", Progress(1.0, 1), 5.0)
    talk.run_to(5.3)
    assert len(talk.heard(InferenceRequest)) == 1


def test_a_worker_that_says_nothing_is_asked_and_then_given_up() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.say("a", InferenceAccepted("r0", 1), 0.2)
    talk.say("a", Progress(1.0, 1), 1.0)
    talk.heard(InferenceRequest)
    talk.run_to(2.9)
    assert talk.heard(InferenceRequest) == []
    talk.run_to(3.1)
    assert len(talk.heard(InferenceRequest)) == 1
    talk.run_to(3.9)
    assert talk.told(RequestRetried) == []
    talk.run_to(4.0)
    assert [(e.at, e.reason) for e in talk.told(RequestRetried)] == [(4.0, "silent")]
    (asked,) = talk.heard(ScheduleRequest)
    assert (asked.exclude, asked.attempt) == (("a",), 1)


def test_a_worker_that_reports_rarely_has_longer_to_speak() -> None:
    _, talk = client(poll_s=100.0)
    place(talk, "a", 0.1)
    talk.say("a", Progress(12.0, 1), 0.2)
    talk.say("a", InferenceAccepted("r0", 1), 0.2)
    talk.run_to(24.1)
    assert talk.told(RequestRetried) == []
    talk.run_to(30.0)  # it was asked three times
    assert [e.reason for e in talk.told(RequestRetried)] == ["silent"]


def test_a_stall_of_its_own_is_not_taken_for_silence() -> None:
    node, talk = client()
    place(talk, "a", 0.1)
    talk.say("a", InferenceAccepted("r0", 1), 0.2)
    node.handle_timer(30.0)
    assert talk.told(RequestRetried) == []
    talk.run_to(33.1)
    assert [e.reason for e in talk.told(RequestRetried)] == ["silent"]


def test_what_the_coordinator_has_lost_goes_elsewhere_unless_the_client_hears_it() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.say("a", InferenceAccepted("r0", 1), 0.2)
    talk.say("a", Progress(1.0, 1), 3.0)
    talk.say("coordinator", WorkerLost("a", 1), 4.5)
    assert talk.told(RequestRetried) == []
    talk.say("stranger", WorkerLost("a", 1), 5.2)
    talk.say("coordinator", WorkerLost("a", 1), 5.2, addr=("elsewhere", 9000))
    assert talk.told(RequestRetried) == []
    talk.say("coordinator", WorkerLost("a", 1), 5.3)
    assert [e.reason for e in talk.told(RequestRetried)] == ["lost"]
    talk.say("coordinator", WorkerLost("a", 1), 5.4)
    assert talk.told(RequestRetried) == []


def test_a_request_on_its_way_to_a_lost_worker_goes_elsewhere_at_once() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.say("coordinator", WorkerLost("a", 1), 0.3)
    assert [e.reason for e in talk.told(RequestRetried)] == ["lost"]


def test_what_was_given_up_on_suspicion_is_cancelled_when_its_worker_speaks_until_it_answers() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.say("a", FirstToken("r0", 0.1), 0.5)
    talk.run_to(3.6)
    assert [e.reason for e in talk.told(RequestRetried)] == ["silent"]
    place(talk, "b", 3.7)
    talk.node.outbox.clear()
    talk.say("a", Progress(1.0, 1), 5.0)
    assert [(addr, envelope.message) for envelope, addr in talk.node.outbox] == [(("a", 8000), CancelRequest("r0"))]
    talk.node.outbox.clear()
    talk.say("a", Progress(1.0, 1), 5.1)  # it may not have heard yet
    assert talk.heard(CancelRequest) == []
    talk.say("a", Progress(1.0, 1), 6.0)
    assert talk.heard(CancelRequest) == [CancelRequest("r0")]
    respond(talk, "a", 6.1, CANCELLED)
    talk.say("a", Progress(1.0, 1), 7.0)
    assert talk.heard(CancelRequest) == []
    respond(talk, "b", 8.0)
    assert [type(e) for e in ended(talk)] == [RequestCompleted]


def test_the_second_worker_is_cancelled_when_the_first_answers_after_all() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.run_to(3.2)
    place(talk, "b", 3.3)
    talk.say("b", FirstToken("r0", 0.1), 3.5)
    talk.node.outbox.clear()
    respond(talk, "a", 4.0)
    assert [(addr, envelope.message) for envelope, addr in talk.node.outbox] == [(("b", 8000), CancelRequest("r0"))]
    (done,) = talk.told(RequestCompleted)
    assert done.worker_id == "a"
    talk.node.outbox.clear()
    talk.say("b", Progress(1.0, 1), 5.0)  # that datagram was lost
    assert talk.heard(CancelRequest) == [CancelRequest("r0")]


def test_a_request_placed_again_on_the_same_worker_is_not_cancelled_there() -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.run_to(3.2)
    place(talk, "a", 3.3, number=2)
    talk.node.outbox.clear()
    talk.say("a", Progress(1.0, 1), 4.0)
    assert talk.heard(CancelRequest) == []


def test_nobody_works_on_for_a_request_that_was_given_up() -> None:
    _, talk = client(request_timeout_s=5.0)
    place(talk, "a", 0.1)
    for now in range(1, 6):
        talk.say("a", Progress(1.0, 1), float(now))
        talk.say("a", InferenceAccepted("r0", 1), float(now))
        talk.run_to(float(now))
    assert [type(e) for e in ended(talk)] == [RequestFailed]
    assert talk.heard(CancelRequest) == [CancelRequest("r0")]


def test_only_a_worker_that_was_given_the_request_can_end_it() -> None:
    node, talk = client()
    place(talk, "a", 0.1)
    respond(talk, "stranger", 0.2)
    talk.say("stranger", ScheduleResponse("r0", "stranger", "stranger", 1, SERVE, 0.0, Dispatch(1, 9), ""), 0.2)
    talk.say("coordinator", ScheduleError("r0", UNKNOWN_MODEL, 0.0, ""), 0.2, addr=("elsewhere", 9000))
    assert ended(talk) == []
    assert node.rejected["not_asked"] == 3
    respond(talk, "a", 1.0)
    assert [type(e) for e in ended(talk)] == [RequestCompleted]


@pytest.mark.parametrize("winner", ["a", "b"])
def test_the_first_token_is_that_of_the_answer_that_counts(winner: str) -> None:
    _, talk = client()
    place(talk, "a", 0.1)
    talk.say("a", FirstToken("r0", 0.1), 0.5)
    talk.run_to(3.6)
    place(talk, "b", 3.7)
    talk.say("b", FirstToken("r0", 0.1), 4.0)
    respond(talk, winner, 6.0)
    (done,) = talk.told(RequestCompleted)
    assert done.ttft_s == (0.5 if winner == "a" else 4.0)
    assert done.stalled_s == (0.0 if winner == "a" else 3.5)


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


def test_a_late_answer_to_a_request_that_was_given_up_is_no_work_done_twice() -> None:
    node, talk = client(request_timeout_s=5.0, retry_initial_s=30.0)
    place(talk, "w", 0.1)
    talk.run_to(6.0)
    assert [type(event) for event in ended(talk)] == [RequestFailed]
    respond(talk, "w", 7.0)
    respond(talk, "other", 7.0)
    assert not talk.told(DuplicateResponse)
    assert node.in_flight == 0


def test_who_speaks_in_the_coordinators_name_from_elsewhere_does_not_make_its_answers_old() -> None:
    """The incarnation of the forged answer is later than that of the coordinator; only the first would be heard from then on."""
    node, talk = client()
    for kind in (ScheduleResponse("x", "a", "a", 1, SERVE, 0.0, Dispatch(1, 9), ""), ScheduleError("x", UNKNOWN_MODEL, 0.0, "")):
        talk.say("coordinator", kind, 0.05, addr=("elsewhere", 9000), incarnation=20_000_000_000)
    place(talk, "a", 0.1)
    respond(talk, "a", 1.0)
    assert [type(e) for e in ended(talk)] == [RequestCompleted]
    assert dict(node.rejected) == {"not_asked": 2}
