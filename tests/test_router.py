"""The router as a plain object, without a node: questions, answers that are said again, what is entered, and when to ask again."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from roles import CATALOG, MODEL, ask, configuration, report

from sllm.fleet.ledger import Entry
from sllm.fleet.states import SILENT
from sllm.fleet.table import Fleet
from sllm.placement.base import FleetView, Placement, Query
from sllm.placement.costs import EngineCosts
from sllm.placement.policies.startup_time import StartupTime
from sllm.placement.registry import make_policy
from sllm.protocol.events import Event, RequestRefused, RequestRouted
from sllm.protocol.messages import NO_WORKERS, NORMAL, NOT_READY, SATURATED, UNKNOWN_MODEL, LoadReport, ScheduleError, ScheduleResponse
from sllm.routing.router import RETRY_AFTER_MAX_S, Router

CLIENT = ("10.0.0.9", 7000)
EPOCH = 7


class Routed:
    """A router over a table that is filled by hand."""

    def __init__(self, policy: str = "startup_time", **changes: Any) -> None:
        self.fleet = Fleet(CATALOG.models, EPOCH)
        self.events: list[Event] = []
        self.router = Router(configuration(**changes), CATALOG, self.fleet, make_policy(policy), EngineCosts(), Random(1), self.events, 0.0)
        self.router.ready = True

    def add(self, name: str, message: LoadReport, now: float = 1.0) -> None:
        row = self.fleet.rows.get(name) or self.fleet.admit(name, CATALOG.get_hardware(message.hardware), message)
        row.address = (name, 8000)
        self.fleet.apply(row, 1, row.sequence + 1, message, now)
        self.fleet.step(row, message.state)

    def ask(self, request_id: str = "r", now: float = 1.0, **changes: Any) -> ScheduleResponse | ScheduleError | None:
        return self.router.answer("c", CLIENT, ask(request_id, **changes), now)


def test_a_placement_is_entered_told_and_answered() -> None:
    routed = Routed()
    routed.add("w", report())
    answer = routed.ask()
    assert isinstance(answer, ScheduleResponse)
    assert (answer.worker_id, answer.host, answer.port, answer.dispatch.epoch, answer.dispatch.number) == ("w", "w", 8000, EPOCH, 1)
    row = routed.fleet.rows["w"]
    assert (row.pending, row.clients) == (1, {"c": (CLIENT, 1.0)})
    assert routed.events == [RequestRouted(1.0, "r", MODEL, "w", answer.action, answer.eta_s, 0.0)]


def test_to_place_enters_nothing() -> None:
    routed = Routed()
    routed.add("w", report())
    assert isinstance(routed.router.place(ask(), 1.0), Placement)
    assert (routed.fleet.rows["w"].pending, routed.events) == (0, [])


def test_the_same_question_gets_the_same_answer_and_a_new_attempt_another() -> None:
    routed = Routed()
    routed.add("w", report())
    first = routed.ask()
    assert routed.ask(now=1.5) is first
    second = routed.ask(now=2.0, attempt=1)
    assert isinstance(first, ScheduleResponse)
    assert isinstance(second, ScheduleResponse)
    assert (second.dispatch.number, routed.fleet.rows["w"].pending) == (2, 1), "the first dispatch was given up"
    assert routed.ask(now=2.1) is None, "the first attempt's question was sent twice, and comes late"
    assert len(routed.events) == 2


def test_an_answer_does_not_hold_when_its_worker_is_not_ready_any_more() -> None:
    routed = Routed()
    routed.add("w", report())
    routed.ask()
    routed.fleet.step(routed.fleet.rows["w"], SILENT)
    routed.add("v", report())
    answer = routed.ask(now=2.0)
    assert isinstance(answer, ScheduleResponse)
    assert answer.worker_id == "v"


def test_answers_are_forgotten_after_a_while() -> None:
    routed = Routed(decision_keep_s=5.0)
    routed.add("w", report())
    first = routed.ask()
    for second in range(1, 12):
        routed.router.tick(float(second))
    again = routed.ask(now=12.0)
    assert isinstance(first, ScheduleResponse)
    assert isinstance(again, ScheduleResponse)
    assert (first.dispatch.number, again.dispatch.number) == (1, 2)


def test_why_there_is_no_placement() -> None:
    routed = Routed()
    codes = []
    for changes in [{"model": "gpt-0"}, {}]:
        answer = routed.ask(**changes)  # type: ignore[arg-type]
        assert isinstance(answer, ScheduleError)
        codes.append(answer.code)
    routed.router.ready = False
    answer = routed.ask()
    assert isinstance(answer, ScheduleError)
    assert [*codes, answer.code] == [UNKNOWN_MODEL, NO_WORKERS, NOT_READY]
    assert [e.code for e in routed.events if isinstance(e, RequestRefused)] == [*codes, answer.code]


def test_the_more_are_turned_away_in_a_tick_the_later_they_are_to_ask_again() -> None:
    routed = Routed(queue_threshold=1)
    routed.add("w", report(running=256, waiting=1, blocked=1))

    def turned_away(count: int) -> float:
        after_s = 0.0
        for number in range(count):
            answer = routed.ask(f"r{number}")
            assert isinstance(answer, ScheduleError)
            assert answer.code == SATURATED
            after_s = answer.retry_after_s
        return after_s

    assert 1.0 <= turned_away(1) <= 2.0
    assert 10.0 <= turned_away(99) <= 20.0
    routed.router.tick(2.0)
    assert 10.0 <= turned_away(1) <= 20.0, "the last tick counts as well"
    routed.router.tick(3.0)
    assert 1.0 <= turned_away(1) <= 2.0
    assert turned_away(1000) <= 2.0 * RETRY_AFTER_MAX_S


NAMES = CATALOG.names[:3]
Sent = list[tuple[str, float, float]]  # model, seconds of a cold start, seconds of a prefill
WORKERS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(NAMES), unique=True, max_size=2),  # on the GPU
        st.sampled_from((0.0, 0.5, 3.0)),  # its wait
        st.sampled_from((0.0, 1.0, 4.0)),  # until the first model that is not on the GPU is loaded; 0.0: none is loading
        st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from((0.0, 0.7)), st.sampled_from((0.1, 0.9))), max_size=4),  # sent since
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(WORKERS, st.sampled_from((1.0, 1.2, 2.0, 9.0)))
def test_the_estimate_of_a_warm_worker_is_what_its_row_measures(workers: list[tuple[list[str], float, float, Sent]], now: float) -> None:
    """With a sample that has everybody, the best warm worker is the one whose own wait and load end first, whatever was reported and sent."""
    routed, costs = Routed(), EngineCosts()
    for number, (on_gpu, wait_s, load_s, sent) in enumerate(workers):
        absent = [name for name in NAMES if name not in on_gpu]
        loading = ((absent[0], load_s),) if load_s and absent else ()
        routed.add(f"w{number}", report(gpu_models=tuple(on_gpu), host_models=(), loading=loading, wait_s=wait_s, load_queue_s=load_s if loading else 0.0))
        for name, cold_s, prefill_s in sent:
            routed.fleet.dispatch(routed.fleet.rows[f"w{number}"], Entry("r", name, prefill_s, cold_s, 0, 1.0, 100.0))
    view = FleetView(routed.fleet, costs, 10, 0.9)
    for name in NAMES:
        model = CATALOG.models[name]
        query = Query(model, 1000, 200, 0, NORMAL, (), tuple(routed.fleet.kinds.values()), now, Random(1), trust=0)
        choice = StartupTime(sample=len(workers))._best_warm(query, view)
        measured = [max(row.wait_s(now), left_s) for row in view.admitted(routed.fleet, query) if (left_s := row.load_left_s(name, now)) is not None]
        assert (choice is None) == (not measured)
        if choice is not None:
            assert choice.eta_s == min(measured) + costs.prefill_s(model, choice.row.hardware, 1000)
            assert choice.row.starts_in_s(name, now) == min(measured)
