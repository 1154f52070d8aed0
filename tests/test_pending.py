"""A client's request and its states, as a plain object."""

from __future__ import annotations

import pytest
from test_service import diagram

from sllm.protocol.messages import COLD_START, SERVE, Dispatch, InferenceResponse, ScheduleResponse
from sllm.protocol.messages import COMPLETED as ANSWER
from sllm.requests import pending as states
from sllm.requests.pending import (
    ABANDONED,
    ANSWERED,
    ASKING,
    BACKING_OFF,
    COMPLETED,
    FAILED,
    HELD,
    LEFT,
    PLACED,
    REFUSED,
    REJECTED,
    SENDING,
    SERVING,
    TRANSITIONS,
    TURNED_AWAY,
    UNFINISHED,
    WAITED,
    Pending,
)
from sllm.workload.request import Request

ENDS = (COMPLETED, REJECTED, FAILED)
HAPPENINGS = (PLACED, TURNED_AWAY, WAITED, HELD, LEFT, ANSWERED, REFUSED, ABANDONED)


def pending() -> Pending:
    return Pending(Request(0.0, "r0", "m", 100, 11), 0.0, 60.0)


def placement(worker_id: str, number: int = 1, action: str = SERVE) -> ScheduleResponse:
    return ScheduleResponse("r0", worker_id, worker_id, 8000, action, 0.1, Dispatch(1, number), "")


def test_the_documented_states_are_those_of_the_table() -> None:
    assert diagram(states.__doc__) == TRANSITIONS


def test_every_state_is_reached_and_a_request_that_has_ended_stays_so() -> None:
    assert {what for _, what in TRANSITIONS} == set(HAPPENINGS)
    assert {state for state, _ in TRANSITIONS} == set(UNFINISHED)
    assert set(TRANSITIONS.values()) == {*UNFINISHED, *ENDS}
    assert all(any(TRANSITIONS[state, what] in ENDS for what in HAPPENINGS if (state, what) in TRANSITIONS) for state in UNFINISHED)


@pytest.mark.parametrize("state", [*UNFINISHED, *ENDS])
@pytest.mark.parametrize("what", HAPPENINGS)
def test_a_step_is_one_of_the_table(state: str, what: str) -> None:
    one = pending()
    one.state, one.tries = state, 5
    assert one.can(what) == ((state, what) in TRANSITIONS)
    if one.can(what):
        one.step(what)
        assert (one.state, one.tries) == (TRANSITIONS[state, what], 0)
        assert one.is_placed == (one.state in (SENDING, SERVING))
    else:
        with pytest.raises(KeyError):
            one.step(what)
        assert (one.state, one.tries) == (state, 5)


def test_a_placement_that_came_to_nothing_is_remembered_and_its_worker_excluded_once() -> None:
    one = pending()
    for number, worker_id in enumerate(("a", "b", "a"), 1):
        one.place(placement(worker_id, number))
        assert (one.state, one.worker_id, one.placements) == (SENDING, worker_id, number)
        one.step(HELD)
        one.leave()
    assert one.state == ASKING
    assert one.exclude == ("a", "b")
    assert [given.dispatch.number for given in one.given_up] == [1, 2, 3]
    assert [one.was_sent_to(name) for name in ("a", "b", "c")] == [True, True, False]


def test_one_that_backs_off_may_be_placed_by_a_late_answer() -> None:
    one = pending()
    one.step(TURNED_AWAY)
    assert one.state == BACKING_OFF
    one.place(placement("a", action=COLD_START))
    assert (one.state, one.action) == (SENDING, COLD_START)


def test_its_times_are_those_of_the_answer_that_counts() -> None:
    response = InferenceResponse("r0", ANSWER, 11, 0.25, 0.5, 1.5, 0.0)
    one = pending()
    one.place(placement("a"))
    done = one.completed(response, "a", 4.0)
    assert (done.ttft_s, done.e2e_s, done.tpot_s, done.stalled_s) == (3.0, 4.0, 0.1, 0.0), "the first token was lost: by the worker's own times"
    one.first_tokens["a"] = 1.0
    assert one.completed(response, "a", 4.0).ttft_s == 1.0
    one.leave()
    one.place(placement("b", 2))
    one.first_tokens["b"] = 3.5
    done = one.completed(response, "b", 4.0)
    assert (done.worker_id, done.ttft_s, done.stalled_s, done.placements) == ("b", 3.5, 2.5, 2)
    assert one.completed(response.replace(output_tokens=1), "b", 4.0).tpot_s == 0.0
