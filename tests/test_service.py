"""A worker's jobs, as a plain object over an engine: no node, no driver."""

from __future__ import annotations

import re
from math import inf
from typing import Any

import pytest
from roles import CATALOG, MODEL, configuration

from sllm.engine import Evicted, LlmEngine, ModelTooLarge
from sllm.models.model import DISK
from sllm.protocol.errors import UsageError
from sllm.protocol.events import ModelEvicted, ModelLoaded, ModelLoadStarted, RequestAdmitted, RequestCancelled, RequestServed
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
    REPORTED_STATES,
    STARTING,
    STOPPED,
    Address,
    Dispatch,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    Progress,
)
from sllm.service import jobs
from sllm.service.jobs import ACCEPT_AFTER, Service

CLIENT: Address = ("c", 8000)
OTHER: Address = ("d", 8000)


class At:
    """A service, and what it wants sent and told."""

    def __init__(self, **changes: Any) -> None:
        config = configuration(**changes)
        self.outgoing: list[Any] = []
        self.events: list[Any] = []
        self.engine = LlmEngine(CATALOG, CATALOG.get_hardware(config.hardware))
        self.service = Service("w", config, CATALOG, self.engine, self.outgoing, self.events, 0.0)

    def take(self, now: float, client: str = "c", **changes: Any) -> bool:
        request = InferenceRequest("r0", MODEL, 1000, 20, Dispatch(7, 1), "w").replace(**changes)
        return self.service.take(client, request, (client, 8000), now)

    def run_to(self, now: float) -> None:
        while self.service.next_at <= now and not self.service.has_drained(self.service.next_at):
            self.service.run(self.service.next_at)

    def sent(self) -> list[tuple[Any, Address]]:
        """What is to be sent since last asked."""
        taken = self.outgoing[:]
        self.outgoing.clear()
        return taken

    def told(self) -> list[type]:
        taken = [type(event) for event in self.events]
        self.events.clear()
        return taken


def test_the_table_of_states_is_the_one_that_the_service_goes_by() -> None:
    """Every state that a report can name is in it, and nothing leads out of the last one."""
    assert {state for (state, _), new in jobs.TRANSITIONS.items() for state in (state, new)} == set(REPORTED_STATES)
    assert not [what for state, what in jobs.TRANSITIONS if state == STOPPED]
    at = At(demo_models=1)
    seen = [at.service.state]
    at.run_to(60.0)
    seen.append(at.service.state)
    at.service.drain(60.0)
    seen.append(at.service.state)
    at.service.stop()
    seen.append(at.service.state)
    assert seen == [STARTING, READY, DRAINING, STOPPED]


def test_it_is_starting_until_the_last_of_its_first_models_is_there() -> None:
    at = At(demo_models=2)
    states: list[str] = []
    while len(states) < 2:
        at.service.run(at.service.next_at)
        states += [at.service.state for kind in at.told() if kind is ModelLoaded]
    assert states == [STARTING, READY]


def test_first_models_that_come_while_it_drains_do_not_make_it_ready() -> None:
    at = At(demo_models=2)
    assert at.told() == [ModelLoadStarted] * 2
    at.take(0.1, max_tokens=2000)
    assert at.service.drain(0.1)
    at.run_to(20.0)
    assert ModelLoaded in at.told()
    assert at.service.state == DRAINING


def test_a_first_model_that_can_never_fit_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(engine: LlmEngine, now: float, model: str) -> None:
        raise ModelTooLarge(f"{model} is too large")

    monkeypatch.setattr(LlmEngine, "load", load)
    with pytest.raises(UsageError, match=f"DEMO_MODELS=2: {MODEL} is too large"):
        At(demo_models=2)


def test_a_new_request_is_loaded_for_run_and_answered() -> None:
    at = At()
    assert at.take(1.0)
    assert (at.told(), at.sent()) == ([RequestAdmitted, ModelLoadStarted], [])
    at.run_to(30.0)
    (accepted, to), (first, _), (response, _) = at.sent()
    assert (accepted, to) == (InferenceAccepted("r0", 1), CLIENT)
    assert (type(first), response.outcome, response.output_tokens) == (FirstToken, COMPLETED, 20)
    assert first.queue_wait_s == response.queue_wait_s == pytest.approx(response.load_s)
    assert at.told() == [ModelLoaded, RequestServed]
    assert (at.service.served, at.service.jobs) == (1, {})


def test_the_same_request_again_is_accepted_then_answered_and_the_same_id_of_another_client_is_another_request() -> None:
    at = At()
    at.take(1.0)
    assert at.take(1.1)
    assert at.sent() == [(InferenceAccepted("r0", 1), CLIENT)]
    at.take(1.1, client="d")
    assert len(at.service.jobs) == 2
    at.run_to(60.0)
    answers = {addr: message for message, addr in at.sent() if isinstance(message, InferenceResponse)}
    assert set(answers) == {CLIENT, OTHER}
    at.take(61.0)
    assert at.sent() == [(answers[CLIENT], CLIENT)]
    assert at.told().count(RequestServed) == 2


def test_clients_are_told_that_their_requests_have_arrived_each_in_time_unless_they_know() -> None:
    at = At(retry_initial_s=1.6)
    wait_s = 1.6 * ACCEPT_AFTER  # the model takes longer to load than all of this
    for number in range(4):
        at.take(1.0 + 0.05 * number, request_id=f"r{number}")
    at.take(1.2, request_id="r1")
    at.service.cancel("c", "r0", 1.2)
    assert [message.request_id for message, _ in at.sent()] == ["r1"]
    assert at.service.next_at == pytest.approx(1.1 + wait_s)
    at.run_to(1.11 + wait_s)
    assert [message for message, _ in at.sent()] == [InferenceAccepted("r2", 3)]
    at.run_to(1.16 + wait_s)
    assert [message for message, _ in at.sent()] == [InferenceAccepted("r3", 3)]


def test_a_cancelled_request_stops_and_a_cancellation_is_always_answered_alike() -> None:
    at = At()
    at.take(1.0)
    assert not at.service.cancel("d", "r0", 1.1), "another client's"
    assert at.service.cancel("c", "r0", 1.1)
    assert RequestCancelled in at.told()
    assert not at.service.cancel("c", "r0", 1.2)
    at.run_to(30.0)
    assert (at.sent(), at.service.jobs) == ([], {})
    at.service.tell_cancelled("r0", CLIENT)
    assert [(message.outcome, addr) for message, addr in at.sent()] == [(CANCELLED, CLIENT)]


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"worker_id": "x"}, REFUSED_MISDIRECTED), ({"model": "gpt-0"}, REFUSED_UNKNOWN_MODEL), ({"prompt_tokens": 10**7}, REFUSED_TOO_LARGE),
    ],
)  # fmt: skip
def test_a_refusal_is_counted_and_says_why(changes: dict[str, Any], outcome: str) -> None:
    at = At()
    assert not at.take(1.0, **changes)
    assert [message.outcome for message, _ in at.sent()] == [outcome]
    assert (at.service.refused, at.service.jobs, at.told()) == (1, {}, [])


def test_it_takes_as_many_as_its_slots_and_its_queue_hold() -> None:
    at = At(queue_max=2)
    taken = [at.take(1.0, request_id=f"r{number}") for number in range(at.engine.slots + 3)]
    assert taken == [True] * (at.engine.slots + 2) + [False]
    assert [message.outcome for message, _ in at.sent() if isinstance(message, InferenceResponse)] == [REFUSED_FULL]


def test_answers_are_forgotten_after_the_time_that_they_are_kept() -> None:
    at = At(response_keep_s=30.0)
    at.take(1.0)
    at.run_to(20.0)
    at.told()
    at.service.forget_old(31.0)
    at.take(32.0)
    at.service.forget_old(59.0)
    at.take(59.5)
    assert at.told() == [], "kept for one to two times 30 s"
    at.service.forget_old(61.0)
    at.take(62.0)
    assert at.told() == [RequestAdmitted]


def test_an_evicted_model_that_requests_wait_for_is_on_its_way_again(monkeypatch: pytest.MonkeyPatch) -> None:
    at = At()
    at.take(1.0)
    at.told()
    monkeypatch.setattr(LlmEngine, "advance", lambda engine, now: [Evicted(now, MODEL, DISK)])
    at.service.advance(2.0)
    assert at.told() == [ModelEvicted, ModelLoadStarted]
    at.service.stop()
    at.service.advance(3.0)
    assert at.told() == [ModelEvicted], "nobody waits for it"


def test_a_model_that_was_evicted_is_loaded_anew_for_the_next_request() -> None:
    at = At()
    for number, model in enumerate(CATALOG.names * 2):
        at.take(100.0 * (number + 1), request_id=f"r{number}", model=model, max_tokens=2)
        at.run_to(100.0 * (number + 2) - 1.0)
    told = at.told()
    assert ModelEvicted in told, "the models do not fit at once"
    assert told.count(ModelLoadStarted) == told.count(ModelLoaded) > len(CATALOG.names), "each load has one begin"


def test_each_client_is_told_once_that_it_is_owed_tokens() -> None:
    at = At()
    for number in range(3):
        at.take(1.0, request_id=f"r{number}")
    at.take(1.0, client="d")
    at.service.tell_progress(2.5)
    assert at.sent() == [(Progress(2.5, 3), CLIENT), (Progress(2.5, 1), OTHER)]


def test_what_is_not_finished_when_the_time_to_drain_is_over_goes_elsewhere() -> None:
    at = At(drain_timeout_s=5.0)
    at.take(1.0, max_tokens=5000)
    assert at.service.drain(2.0)
    assert not at.service.drain(3.0), "the time runs from the first call"
    assert not at.take(2.5, request_id="r1")
    assert (at.service.has_drained(6.9), at.service.has_drained(7.0)) == (False, True)
    at.run_to(6.9)
    assert at.service.next_at <= 7.0
    at.sent()
    at.service.stop()
    assert [(message.outcome, addr) for message, addr in at.sent()] == [(REFUSED_DRAINING, CLIENT)]
    assert (at.service.state, at.service.jobs, at.service._accept_at) == (STOPPED, {}, inf)
    assert not at.take(50.0, request_id="r2")
    assert at.told().count(RequestServed) == 0, "its engine is not asked any more"


def test_it_says_whether_there_is_anything_new_to_report() -> None:
    at = At()
    assert not at.service.changed
    at.take(1.0)
    assert at.service.changed
    at.service.changed = False
    at.service.run(1.0)
    assert not at.service.changed
    at.run_to(30.0)
    assert at.service.changed


def diagram(text: str | None) -> dict[tuple[str, str], str]:
    """The transitions that a docstring shows, one line for each thing that can happen: `STATE, STATE -- what --> STATE`."""
    lines = re.findall(r"^ +([A-Z_, ]+?) +-- (.+?) --> ([A-Z_]+)$", text or "", re.MULTILINE)
    return {(state, what): new for states, what, new in lines for state in states.split(", ")}


def test_the_documented_states_are_those_of_the_table() -> None:
    assert diagram(jobs.__doc__) == jobs.TRANSITIONS
