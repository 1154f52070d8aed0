"""The ledger and the receipts: what a report has counted in is released, once, whatever was lost or came out of order."""

from hypothesis import given
from hypothesis import strategies as st

from sllm.dispatch import Entry, Ledger, Receipts


def entry(cost_s: float = 1.0, at: float = 0.0) -> Entry:
    return Entry("r", cost_s, "m", False, at)


def test_numbers_grow_and_cost_adds_up() -> None:
    ledger = Ledger()
    assert [ledger.add(entry(2.0)) for _ in range(3)] == [1, 2, 3]
    assert ledger.cost_s == 6.0
    assert ledger.release(2)
    assert not ledger.release(2)
    assert ledger.cost_s == 4.0
    ledger.clear()
    assert (len(ledger), ledger.cost_s, ledger.add(entry())) == (0, 0.0, 4)


@given(st.lists(st.integers(1, 90), max_size=90), st.integers(1, 90))
def test_a_report_releases_what_arrived_and_only_that(arrivals: list[int], sent: int) -> None:
    ledger, receipts = Ledger(), Receipts()
    for _ in range(sent):
        ledger.add(entry())
    arrived = [n for n in arrivals if n <= sent]
    for number in arrived:
        receipts.note(7, number)
    ledger.acknowledge(receipts.high, receipts.seen)
    left = set(ledger.entries)
    assert left >= set(range(1, sent + 1)) - set(arrived)
    # Numbers further below the highest than the bitmap is wide cannot be told; all others are.
    assert not {n for n in arrived if receipts.high - n <= 64} & left
    assert ledger.cost_s == len(left)


def test_what_nobody_acknowledges_expires_by_age() -> None:
    ledger = Ledger()
    for at in (1.0, 2.0, 3.0):
        ledger.add(entry(at=at))
    assert ledger.expire(2.5) == 2
    assert list(ledger.entries) == [3]


def test_a_new_life_of_the_coordinator_starts_afresh_and_an_old_one_is_ignored() -> None:
    receipts = Receipts()
    receipts.note(5, 10)
    receipts.note(6, 2)
    assert (receipts.epoch, receipts.high, receipts.seen) == (6, 2, 0)
    receipts.note(5, 99)
    assert receipts.high == 2
    receipts.note(6, 1)
    assert receipts.seen == 1
