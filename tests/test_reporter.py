"""A worker's reporter, as a plain object: what reports say, when they are due, and what follows from the coordinator's answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from roles import configuration, report

from sllm.protocol.events import CoordinatorChanged, CoordinatorOverdue, CoordinatorSilent, DisplacedByNamesake, RivalGone, RivalSeen
from sllm.protocol.limits import NAMES_MAX
from sllm.protocol.messages import READY, STARTING, Address, Dispatch, EngineSnapshot, LoadReport, ReportAck
from sllm.service.reporter import HEARTBEAT_S, OwnHost, Reporter

COORDINATOR: Address = ("coordinator", 9000)
SNAPSHOT = report().engine


class At:
    """A reporter, and what it has told."""

    def __init__(self, *, models: tuple[str, ...] = ("m",), advertise: Address = ("", 0), own_host: OwnHost | None = None, **changes: Any) -> None:
        self.events: list[Any] = []
        settings = configuration(**changes)
        self.reporter = Reporter("w", settings, models, Random(1), self.events, 0.0, advertise=advertise, own_host=own_host)

    def report(self, now: float, state: str = READY, snapshot: EngineSnapshot = SNAPSHOT, coordinator: Address = COORDINATOR) -> LoadReport:
        return self.reporter.report(state, snapshot, coordinator, now)

    def in_turn(self) -> float:
        """Report when that is due next, and say when it was."""
        now = self.reporter.due_at
        self.report(now)
        self.reporter.plan_next(now)
        return now

    def told(self, kind: type) -> list[Any]:
        """Events of one kind since last asked; the others are dropped."""
        taken = [event for event in self.events if isinstance(event, kind)]
        self.events.clear()
        return taken


# --- what is said ---------------------------------------------------------------------------------------------------------------------


def test_a_report_says_what_it_is_given_and_what_it_is_configured_to() -> None:
    at = At(hardware="a100-80g", queue_max=7, report_interval_s=2.5, advertise=("10.0.0.1", 8001))
    said = at.report(0.0, STARTING)
    assert (said.state, said.host, said.port, said.hardware, said.queue_max) == (STARTING, "10.0.0.1", 8001, "a100-80g", 7)
    assert (said.engine, said.epoch, said.interval_s, said.rival, said.partial) == (SNAPSHOT, 0, 2.5, False, False)


def test_a_worker_with_nothing_new_to_say_gives_the_same_object() -> None:
    at = At()
    first = at.report(0.0)
    assert at.report(1.0) is first
    changes: list[Callable[[], object]] = [
        lambda: at.report(2.0, STARTING), lambda: at.report(2.0, snapshot=SNAPSHOT.replace(running=1)), lambda: at.reporter.note_dispatch(Dispatch(7, 1)),
        lambda: at.reporter.relocate(("x", 1)),
    ]  # fmt: skip
    for change in changes:
        before = at.report(2.0)
        change()
        after = at.report(2.0)
        assert after is not before
        assert at.report(3.0) is after


def test_dispatches_that_have_arrived_are_named_with_those_that_are_missing() -> None:
    at = At()
    for number in (3, 1, 5):
        at.reporter.note_dispatch(Dispatch(7, number))
    said = at.report(0.0)
    assert (said.epoch, said.dispatch_high, said.dispatch_missing) == (7, 5, (2, 4))


def test_receipts_of_a_life_that_the_coordinator_never_had_are_dropped_at_its_next_answer() -> None:
    at = At()
    at.reporter.note_dispatch(Dispatch(1 << 60, 5))
    assert at.report(0.0).epoch == 1 << 60
    at.reporter.hear_ack(ReportAck(7, 1), 0.5)
    assert (at.report(1.0).epoch, at.report(1.0).dispatch_high) == (0, 0)
    at.reporter.note_dispatch(Dispatch(7, 3))
    assert (at.report(1.0).epoch, at.report(1.0).dispatch_high) == (7, 3)


def test_a_host_that_changes_is_found_anew_for_each_report_by_the_way_to_the_coordinator() -> None:
    own = {"a": "10.0.0.1", "b": "10.0.0.2"}
    at = At(advertise=("", 8123), own_host=lambda towards: own[towards[0]])
    for host in ("a", "a", "b"):
        said = at.report(0.0, coordinator=(host, 9000))
        assert (said.host, said.port) == at.reporter.advertise == (own[host], 8123)


def test_a_report_too_long_for_a_datagram_is_cut() -> None:
    models = tuple(f"model-{'x' * 100}-{number}" for number in range(NAMES_MAX))
    at = At(models=models)
    said = at.report(0.0, snapshot=SNAPSHOT.replace(gpu_models=models, host_models=models))
    assert said.partial
    assert len(said.engine.gpu_models) < len(models)
    assert At(models=models).report(0.0).partial is False


# --- when it is said --------------------------------------------------------------------------------------------------------------------


def test_reports_come_evenly_after_a_random_phase_and_missed_ones_are_not_made_up_for() -> None:
    at = At(report_interval_s=2.0)
    times = [at.in_turn() for _ in range(6)]
    assert times[0] == 0.0
    assert 0.0 < times[1] < 2.0
    assert [later - earlier for earlier, later in pairwise(times[1:])] == pytest.approx([2.0] * 4)
    at.report(50.0)
    at.reporter.plan_next(50.0)
    assert at.reporter.due_at == 52.0


def test_where_every_change_is_reported_there_is_a_report_now_and_then_all_the_same() -> None:
    assert (At().reporter.at_every_change, At(report_interval_s=0.0).reporter.at_every_change) == (False, True)
    at = At(report_interval_s=0.0)
    times = [at.in_turn() for _ in range(4)]
    assert [later - earlier for earlier, later in pairwise(times[1:])] == pytest.approx([HEARTBEAT_S] * 2)
    assert at.report(9.0).interval_s == HEARTBEAT_S


def test_an_acknowledgement_that_is_owed_is_waited_for_and_asked_for_ever_more_rarely() -> None:
    at = At(ack_every=4, report_interval_s=1.0, coordinator_silent_s=10.0)
    for number in range(4):
        assert at.reporter.overdue_at > 1000.0, "none is owed before the fourth report"
        at.report(float(number))
    at.reporter.plan_next(3.5)
    assert (at.reporter.overdue_at, at.reporter.due_at, at.reporter.next_at) == (4.0, 4.5, 4.0)
    told = []
    while at.reporter.overdue_at < 40.0:
        now = at.reporter.overdue_at
        at.reporter.tell_overdue(now)
        at.report(now)
        told.append(now)
    assert told == [4.0, 6.0, 10.0, 18.0, 28.0, 38.0], "doubling, up to what counts as silence"
    assert [event.at for event in at.told(CoordinatorOverdue)] == told
    at.reporter.hear_ack(ReportAck(7, at.reporter.reports_sent), 39.0)
    assert at.reporter.overdue_at > 1000.0
    for number in range(4):
        at.report(40.0 + number)
    assert at.reporter.overdue_at == 44.0, "patience is short again"


def test_an_acknowledgement_of_an_old_report_or_of_one_never_sent_changes_little() -> None:
    at = At(ack_every=4)
    for number in range(6):
        at.report(float(number))
    at.reporter.hear_ack(ReportAck(7, 1 << 60), 6.0)
    for number in range(3):
        at.reporter.hear_ack(ReportAck(7, 1), 6.0 + number)
        at.report(6.0 + number)
        assert at.reporter.overdue_at > 1000.0, "owed by report 10"
    at.report(9.0)
    assert at.reporter.overdue_at < 11.0


# --- the coordinator --------------------------------------------------------------------------------------------------------------------


def test_a_coordinator_that_is_silent_is_told_of_and_again_after_as_long() -> None:
    at = At(coordinator_silent_s=10.0)
    at.reporter.hear_ack(ReportAck(7, 0), 5.0)
    told = []
    for second in range(50):
        at.reporter.look_for_silence(float(second))
        told += [(event.at, event.silent_s) for event in at.told(CoordinatorSilent)]
    assert told == [(15.0, 10.0), (25.0, 10.0), (35.0, 10.0), (45.0, 10.0)]
    rare = At(coordinator_silent_s=10.0, report_interval_s=20.0)
    rare.reporter.look_for_silence(59.0)
    assert rare.told(CoordinatorSilent) == [], "three of its intervals"
    rare.reporter.look_for_silence(60.0)
    assert rare.told(CoordinatorSilent) != []


def test_the_first_life_of_the_coordinator_is_no_change_and_another_one_is() -> None:
    at = At()
    assert not at.reporter.acknowledged
    for epoch in (20, 20, 30, 10):
        at.reporter.hear_ack(ReportAck(epoch, 0), 1.0)
        assert at.reporter.acknowledged
    assert [event.epoch for event in at.told(CoordinatorChanged)] == [30, 10], "one whose clock was set back is heard as well"


def test_a_worker_whose_name_a_newer_one_has_says_so_once_until_it_is_acknowledged() -> None:
    at = At()
    for now in (1.0, 2.0):
        at.reporter.hear_displaced(now)
    assert at.reporter.displaced
    assert [event.at for event in at.told(DisplacedByNamesake)] == [1.0]
    at.reporter.hear_ack(ReportAck(7, 0), 3.0)
    assert not at.reporter.displaced
    at.reporter.hear_displaced(4.0)
    assert len(at.told(DisplacedByNamesake)) == 1


def test_two_coordinators_that_answer_by_turns_are_told_of_and_reported() -> None:
    at = At(ack_every=4, report_interval_s=1.0)
    at.reporter.hear_older_life(1.0)
    assert at.reporter.suspects_rival(2.0)
    at.reporter.look_for_rivals(2.0)
    assert not at.reporter.rival, "a restart looks like that"
    at.reporter.hear_ack(ReportAck(20, 0), 3.0)
    before = at.report(3.0)
    at.reporter.hear_older_life(4.0)
    at.reporter.look_for_rivals(4.0)
    assert at.reporter.rival
    assert (before.rival, at.report(4.0).rival) == (False, True)
    assert len(at.told(RivalSeen)) == 1
    at.reporter.look_for_rivals(43.9)
    assert at.reporter.rival
    at.reporter.look_for_rivals(44.0)
    assert not at.reporter.rival, "ten acknowledgements' time later"
    assert [event.at for event in at.told(RivalGone)] == [44.0]
    assert not at.report(44.0).rival
