"""The ledger and the receipts: what a report has counted in is released, once, whatever was lost or came out of order."""

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.fleet.ledger import JUMP_MAX, Entry, Ledger, Receipts
from sllm.protocol.limits import MISSING_MAX, NUMBER_MAX


def entry(prefill_s: float = 1.0, at: float = 0.0, model: str = "m", load_s: float = 0.0, kv_bytes: int = 10) -> Entry:
    return Entry("r", model, prefill_s, load_s, kv_bytes, at, 100.0)


def test_numbers_grow_and_cost_adds_up() -> None:
    ledger = Ledger()
    assert [ledger.add(entry(2.0)) for _ in range(3)] == [1, 2, 3]
    assert (ledger.begins_at, ledger.live, ledger.kv_bytes) == (6.0, 3, 30)
    assert ledger.release(2)
    assert not ledger.release(2)
    assert (ledger.live, ledger.kv_bytes) == (2, 20)
    ledger.clear()
    assert (len(ledger), ledger.begins_at, ledger.live, ledger.kv_bytes, ledger.add(entry())) == (0, 0.0, 0, 0, 4)


@given(st.lists(st.integers(1, 400), max_size=400), st.integers(1, 400))
def test_a_report_releases_what_arrived_and_only_that(arrivals: list[int], sent: int) -> None:
    ledger, receipts = Ledger(), Receipts()
    for _ in range(sent):
        ledger.add(entry())
    arrived = {n for n in arrivals if n <= sent}
    for number in sorted(arrived, key=arrivals.index):
        receipts.note(7, number)
    ledger.acknowledge(receipts.high, receipts.missing)
    left = set(ledger.entries)
    assert not arrived & left
    assert left >= set(range(receipts.high + 1, sent + 1))
    lost = set(range(1, receipts.high)) - arrived
    if receipts.high <= MISSING_MAX + 1:  # of more losses at a time the oldest count as arrived
        assert left >= lost
    assert len(receipts.missing) <= MISSING_MAX
    assert set(receipts.missing) <= lost
    assert ledger.live == len(left)


def test_any_number_of_dispatches_between_two_reports_is_acknowledged() -> None:
    ledger, receipts = Ledger(), Receipts()
    for number in range(1, 5001):
        ledger.add(entry())
        if number % 2000:
            receipts.note(7, number)
    assert receipts.missing == (2000, 4000)
    assert ledger.acknowledge(receipts.high, receipts.missing)
    assert sorted(ledger.entries) == [2000, 4000]
    receipts.note(7, 2000)  # its datagram comes late
    ledger.acknowledge(receipts.high, receipts.missing)
    assert list(ledger.entries) == [4000]


def test_a_cold_start_costs_its_own_load_and_waits_for_those_before_it() -> None:
    ledger = Ledger()
    for i in range(40):
        ledger.add(entry(at=1.0, model=f"m{i}", load_s=0.4))
    ends = ledger.loads_from(0.5)
    assert [model for model, _ in ends] == [f"m{i}" for i in range(40)]
    assert [end for _, end in ends] == pytest.approx([1.0 + 0.4 * (i + 1) for i in range(40)])
    for number in range(1, 31):
        ledger.release(number)
    model, end_at = ledger.loads_from(13.0)[0]
    assert model == "m30"
    assert end_at == pytest.approx(13.4)


def test_what_nobody_acknowledges_expires_by_age() -> None:
    ledger = Ledger()
    for at in (1.0, 2.0, 3.0):
        ledger.add(entry(at=at))
    assert ledger.expire(2.5, 1) == 1
    assert ledger.expire(2.5, 10) == 1
    assert list(ledger.entries) == [3]


def test_a_new_life_of_the_coordinator_starts_afresh_and_an_old_one_is_ignored() -> None:
    receipts = Receipts()
    receipts.note(5, 10)
    receipts.note(6, 2)
    assert (receipts.epoch, receipts.high, receipts.missing) == (6, 2, (1,))
    receipts.note(5, 99)
    assert receipts.high == 2
    receipts.note(6, 1)
    assert receipts.missing == ()


def test_what_was_sent_begins_in_turn_and_is_over_by_estimate_however_long_the_next_report_takes() -> None:
    ledger = Ledger()
    for i in range(100):
        ledger.add(entry(0.1, at=float(i)))  # a tenth of a second of work each second
    assert ledger.begins_at == 99.1, "the queue has been worked off all the time"
    ledger.count_out(50.0)
    assert ledger.live == 100
    ledger.count_out(120.0)
    assert (ledger.live, ledger.kv_bytes, len(ledger)) == (79, 790, 100)
    ledger.acknowledge(50, ())
    assert (ledger.live, ledger.kv_bytes, len(ledger)) == (50, 500, 50)
    ledger.rebase(130.0)
    assert ledger.begins_at == pytest.approx(135.0)
    ledger.count_out(1000.0)
    assert (ledger.live, ledger.kv_bytes) == (0, 0)


def test_numbers_that_were_never_given_out_do_not_end_acknowledgement_for_good() -> None:
    """Anybody with the key can tell a worker any number."""
    ledger, receipts = Ledger(), Receipts()
    receipts.note(1, ledger.add(entry()))
    receipts.note(1, 2**62)
    assert receipts.high == 1, "no coordinator is so far ahead"
    receipts.note(1, 1_000_000)
    assert not ledger.acknowledge(receipts.high, receipts.missing), "a worker that invents numbers has acknowledged nothing"
    assert not ledger.acknowledge(receipts.high, receipts.missing)
    receipts.note(1, ledger.add(entry()))
    assert ledger.acknowledge(receipts.high, receipts.missing)
    assert list(ledger.entries) == [1]
    assert ledger.expire(inf, 10) == 1


def test_a_new_life_of_a_worker_takes_the_numbers_that_follow_whatever_the_last_one_was_told() -> None:
    ledger, receipts = Ledger(), Receipts()
    for _ in range(3):
        ledger.add(entry())
        receipts.note(1, receipts.high + JUMP_MAX)
        ledger.acknowledge(receipts.high, receipts.missing)
    ledger.renew()
    receipts = Receipts()
    receipts.note(1, ledger.add(entry()))
    assert ledger.acknowledge(receipts.high, receipts.missing)


def test_the_last_entry_leaves_nothing_behind_and_is_told() -> None:
    ledger = Ledger()
    number = ledger.add(entry(2.0, at=5.0))
    assert ledger.release(number)
    assert (len(ledger), ledger.live, ledger.kv_bytes, ledger.begins_at, ledger.loads_from(0.0)) == (0, 0, 0, 0.0, [])
    assert not ledger.release(number)


def test_an_entry_is_over_when_its_load_and_its_service_are() -> None:
    ledger = Ledger()
    ledger.add(entry(at=1.0, load_s=50.0))  # its service takes 100 s
    ledger.count_out(150.9)
    assert ledger.live == 1
    ledger.count_out(151.0)
    assert ledger.live == 0


def test_what_was_sent_at_the_limit_of_age_is_not_written_off() -> None:
    ledger = Ledger()
    for at in (1.0, 2.0):
        ledger.add(entry(at=at))
    assert ledger.expire(2.0, 10) == 1
    assert list(ledger.entries) == [2]


def test_the_number_that_comes_next_acknowledges_nothing_and_numbers_go_on_after_it() -> None:
    ledger = Ledger()
    assert ledger.add(entry()) == 1
    assert not ledger.acknowledge(2, ())
    assert list(ledger.entries) == [1]
    assert ledger.add(entry()) == 3


def test_a_number_is_gone_on_from_unless_it_is_so_high_that_numbers_would_end() -> None:
    ledger = Ledger()
    for number, goes_on in ((NUMBER_MAX // 2, True), (NUMBER_MAX // 2 + 1, False)):
        before = ledger.next_number
        ledger.number_from(number)
        assert ledger.next_number == (number if goes_on else before)


def test_a_new_life_of_a_worker_begins_with_nothing_in_flight() -> None:
    ledger = Ledger()
    ledger.number_from(JUMP_MAX)
    ledger.add(entry())
    ledger.renew()
    assert (len(ledger), ledger.live) == (0, 0)
    assert ledger.add(entry()) == 1, "a first number of a life must not be further than a worker believes"
