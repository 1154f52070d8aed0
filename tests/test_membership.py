"""Membership as a plain object, without a node: what it makes of reports and of silence, what it tells, and whom it wants written to."""

from __future__ import annotations

from typing import Any

import pytest
from roles import CATALOG, configuration, report

from sllm.fleet import membership as module
from sllm.fleet.hold import Hold
from sllm.fleet.membership import FIRST, NEWER, OLD_INCARNATION, OUT_OF_ORDER, RENUMBERED, REPLAYED, RESTARTED, Membership
from sllm.fleet.states import DEAD, SUSPECT
from sllm.protocol.events import Event, ExpiryHeld, ExpiryResumed, HardwareUnknown, TableFull, WorkerDisplaced, WorkerStateChanged
from sllm.protocol.messages import READY, STOPPED, WorkerLost

HOST = ("10.0.0.1", 8000)
CLIENT = ("10.0.0.9", 7000)


def make(**changes: Any) -> tuple[Membership, list[Event]]:
    events: list[Event] = []
    return Membership(configuration(**changes), CATALOG, "holder", 7, events, 0.0), events


def run_to(members: Membership, now: float) -> None:
    while members.wake_at <= now:
        members.handle_timer(members.wake_at)


@pytest.mark.parametrize(
    ("incarnation", "sequence", "after_s", "standing"),
    [
        (5, 11, 1.0, NEWER),
        (5, 20, 1.0, NEWER),
        (5, 10, 1.0, REPLAYED),
        (5, 9, 1.0, OUT_OF_ORDER),
        (6, 1, 1.0, RESTARTED),
        (4, 99, 1.0, OLD_INCARNATION),
        (4, 99, 9.9, OLD_INCARNATION),
        (4, 1, 10.0, RESTARTED),
        (5, 10, 60.1, RENUMBERED),
        (5, 1, 60.1, RENUMBERED),
    ],
)
def test_a_report_is_classified_by_its_numbers_and_by_the_silence_before_it(incarnation: int, sequence: int, after_s: float, standing: str) -> None:
    members, _ = make(worker_timeout_s=10.0)
    assert members.classify(members.fleet.rows.get("w"), 5, 10, 1.0) == FIRST
    row = members.hear("w", 5, 10, report(running=1), HOST, 1.0)
    assert members.classify(row, incarnation, sequence, 1.0 + after_s) == standing
    applied = members.hear("w", incarnation, sequence, report(running=2), HOST, 1.0 + after_s)
    assert row is not None
    refused = standing in module.REFUSED
    assert (applied is None, members.accepted, dict(members.rejected)) == (refused, 1 if refused else 2, {standing: 1} if refused else {})
    assert (row.engine.running, row.lost) == ((1, 0) if refused else (2, max(0, sequence - 11) if standing == NEWER else 0))
    assert members.forgotten == (["w"] if refused else [])


def test_only_repeated_and_late_numbers_are_refused_before_the_report_is_read() -> None:
    members, _ = make()
    members.hear("w", 5, 10, report(), HOST, 1.0)
    judged = [members.judge("w", incarnation, sequence, 1.5) for incarnation, sequence in ((5, 10), (5, 3), (4, 10), (5, 11), (6, 1))]
    assert judged == [REPLAYED, OUT_OF_ORDER, "", "", ""]
    assert members.judge("stranger", 1, 1, 1.5) == ""
    assert members.rejected == {REPLAYED: 1, OUT_OF_ORDER: 1}


def test_silence_makes_suspect_then_dead_then_forgotten_and_those_who_wait_are_told() -> None:
    members, events = make(worker_timeout_s=10.0, forget_after_s=60.0)
    for second in range(1, 71):
        for name in ("a", "b", "c"):
            if name != "a" or second == 1:
                row = members.hear(name, 1, second, report(), HOST, float(second))
                assert row is not None
                if name == "a":
                    row.note_client("c", CLIENT, 1.0)
        run_to(members, float(second))
    moves = [(e.at, e.new, e.reason) for e in events if isinstance(e, WorkerStateChanged) and e.worker_id == "a"]
    assert moves == [(1.0, READY, "reported"), (4.0, SUSPECT, "silent for 3.0 s"), (11.0, DEAD, "silent for 10.0 s")]
    assert members.notices == [(WorkerLost("a", 1), CLIENT)] * 2
    assert (set(members.fleet.rows), members.forgotten) == ({"b", "c"}, ["a"])


def test_a_worker_that_says_it_stopped_is_never_looked_at_for_silence() -> None:
    members, events = make()
    members.hear("w", 1, 1, report(), HOST, 1.0)
    members.hear("w", 1, 2, report(state=STOPPED), HOST, 1.5)
    run_to(members, 30.0)
    assert [e.new for e in events if isinstance(e, WorkerStateChanged)] == [READY, "LEFT"]


def test_expiry_is_held_while_most_are_silent_and_told_once() -> None:
    members, events = make(hold_max_s=20.0)
    for name in ("a", "b", "c"):
        members.hear(name, 1, 1, report(), HOST, 1.0)
    run_to(members, 20.0)
    assert (members.degraded, members.fleet.states[SUSPECT]) == ("most of the fleet fell silent at once", 3)
    run_to(members, 40.0)
    assert (members.degraded, members.fleet.states[DEAD]) == ("", 3)
    assert [type(e) for e in events if isinstance(e, ExpiryHeld | ExpiryResumed)] == [ExpiryHeld, ExpiryResumed]


def test_a_hold_has_a_reason_and_an_end() -> None:
    hold = Hold(0.5, 10.0, 0.0)
    assert (hold.look(1, 2, 1.0), hold.why) == (False, "")
    assert (hold.look(2, 2, 2.0), hold.why) == (True, "most of the fleet fell silent at once")
    assert (hold.look(2, 2, 11.9), bool(hold.why)) == (False, True)
    assert (hold.look(2, 2, 12.0), hold.why) == (True, "")
    hold.stall(20.0)
    assert (hold.look(0, 2, 13.0), hold.why, hold.is_stalled(13.0)) == (True, "our own loop stalled", True)
    assert (hold.look(0, 2, 20.0), hold.why, hold.is_stalled(20.0)) == (True, "", False)
    assert (hold.look(1, 1, 30.0), hold.why) == (False, ""), "of one member nothing can be said"


def test_the_older_of_two_lives_is_told_at_first_and_then_now_and_then() -> None:
    members, events = make(ack_every=4)
    members.hear("w", 8, 1, report(), HOST, 1.0)
    for sequence in range(1, 9):
        members.hear("w", 4, sequence, report(), CLIENT, 1.1)
    assert members.notices == [(WorkerLost("w", 4), CLIENT)] * 3, "the first report, the fourth and the eighth"
    assert [e for e in events if isinstance(e, WorkerDisplaced)] == [WorkerDisplaced(1.1, "w", 4, CLIENT[0])]


def test_hardware_unknown_and_a_full_table_are_refused_and_told_once() -> None:
    members, events = make(workers_max=2)
    for number in range(2):
        members.hear("odd", 1, 1 + number, report(hardware="abacus"), HOST, 1.0)
    for number in range(4):
        members.hear(f"w{number}", 1, 1, report(), HOST, 1.0)
    assert members.rejected == {"unknown_hardware": 2, "table_full": 2}
    assert [e for e in events if isinstance(e, HardwareUnknown | TableFull)] == [HardwareUnknown(1.0, "odd", "abacus"), TableFull(1.0, "holder", 2)]
    assert (members.accepted, members.forgotten) == (2, ["odd", "odd", "w2", "w3"])


def test_a_tick_takes_no_more_silent_workers_than_a_datagram_can_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHORES_MAX", 4)
    members, events = make(hold_fraction=1.0)
    for number in range(10):
        members.hear(f"w{number}", 1, 1, report(), HOST, 1.0)
    run_to(members, 3.9)
    counts = []
    for _ in range(3):
        members.handle_timer(members.wake_at)
        counts.append(sum(isinstance(e, WorkerStateChanged) and e.new == SUSPECT for e in events))
    assert counts == [4, 8, 10]
