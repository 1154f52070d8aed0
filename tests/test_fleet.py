"""The fleet table's indexes, held against a plain look at every row."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import CATALOG, report

from sllm.fleet.index import HEAP_SLACK, Bag, Levels, sample_all
from sllm.fleet.ledger import Entry
from sllm.fleet.row import Kind, Row
from sllm.fleet.table import Fleet
from sllm.protocol.messages import READY

NAMES = CATALOG.names[:4]
HARDWARE = {"w0": CATALOG.get_hardware("a100-80g")}
H100 = CATALOG.get_hardware("h100-80g")
EPOCH = 5


def row(fleet: Fleet, name: str) -> Row:
    return fleet.rows.get(name) or fleet.admit(name, HARDWARE.get(name, H100), report())


def lowest(levels: Levels[Row]) -> set[Row]:
    return set(levels.lowest()[1].rows)


def check(fleet: Fleet) -> None:
    ready = [r for r in fleet if r.state == READY]
    for name in NAMES:
        expected = {r for r in ready if r.load_left_s(name, r.heard_at) is not None}
        bag = fleet.warm.get(name)
        assert set(bag.rows if bag else ()) == expected
        hosted = fleet.hosted.get(name)
        assert set(hosted.rows if hosted else ()) == {r for r in ready if name in r.engine.host_models}
    for r in fleet:
        assert r.depth == (r.count_depth() if r.state == READY else -1)
        assert r.queued == (r.count_queued() if r.state == READY else -1)
    assert sum(kind.members for kind in fleet.kinds.values()) == len(fleet)
    for kind in fleet.kinds.values():
        members = [r for r in fleet if r.kind is kind]
        here = [r for r in members if r.state == READY]
        assert kind.members == len(members)
        assert all(r.hardware is kind.hardware for r in members)
        assert set(kind.ready.rows) == set(here)
        low = min((r.depth for r in here), default=None)
        assert lowest(kind.by_depth) == {r for r in here if r.depth == low}
        assert [r.level for r in kind.by_queued.rising()] == sorted(r.find_level() for r in here if r.queued < r.report.queue_max)
        assert kind.trusted == [sum(r.trust == trust for r in here) for trust in range(3)]
    for state in set(fleet.states):
        assert fleet.states[state] == sum(r.state == state for r in fleet)


MODELS = st.lists(st.sampled_from(NAMES), unique=True, max_size=3).map(tuple)
STEPS: st.SearchStrategy[list[tuple[str, int, Any]]] = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(0, 3), st.tuples(MODELS, MODELS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))),
        st.tuples(st.just("dispatch"), st.integers(0, 3), st.tuples(st.sampled_from(NAMES), st.sampled_from((0.0, 0.5)), st.integers(0, 60))),
        st.tuples(st.just("release"), st.integers(0, 3), st.integers(1, 6)),
        st.tuples(st.just("refit"), st.integers(0, 3), st.booleans()),
        st.tuples(st.just("step"), st.integers(0, 3), st.sampled_from(["READY", "DRAINING", "STOPPED", "silent", "expired"])),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS)
def test_the_indexes_are_what_a_scan_would_find(steps: list[tuple[str, int, Any]]) -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    for now, (what, which, detail) in enumerate(steps):
        one = row(fleet, f"w{which}")
        if what == "report":
            gpu, host, running, waiting, high = detail
            loading = tuple((name, 1.0) for name in host[:1] if name not in gpu)
            message = report(
                gpu_models=gpu, host_models=host, loading=loading, running=running, waiting=waiting, epoch=EPOCH, dispatch_high=high, dispatch_missing=(2,)
            )
            fleet.apply(one, 1, one.sequence + 1, message, float(now))
            fleet.step(one, READY)
        elif what == "dispatch" and one.state == READY:
            name, load_s, kv_gb = detail
            fleet.dispatch(one, Entry("r", name, 1.0, load_s, kv_gb * 10**9, float(now), 100.0))
        elif what == "refit":
            fleet.refit(one, CATALOG.get_hardware("a5000-24g") if detail else H100)
        elif what == "release":
            fleet.give_up(one, detail)
        elif what == "step":
            fleet.step(one, detail)
        check(fleet)


def test_a_huge_number_in_a_report_costs_nothing() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    for name, running in (("a", 1 << 60), ("b", 1 << 61), ("c", 3)):
        one = row(fleet, name)
        fleet.apply(one, 1, 1, report(running=running, blocked=running), 0.0)
        fleet.step(one, READY)
        check(fleet)
    (kind,) = fleet.kinds.values()
    assert len(kind.by_depth.bags) == 3
    assert len(kind.by_queued.bags) == 1, "two of them let nobody wait any more"
    fleet.step(row(fleet, "c"), "STOPPED")
    assert {one.worker_id for one in lowest(kind.by_depth)} == {"a"}


def test_levels_cost_by_who_stands_on_them_not_by_how_high_they_are_nor_by_how_often_somebody_came_and_went() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    low, high = row(fleet, "a"), row(fleet, "b")
    levels: Levels[Row] = Levels()
    levels.move(low, -1, 0)
    at = -1
    for new in [*range(1, 10_000), 1 << 62, *(1, 2) * 5_000]:
        levels.move(high, at, new)
        at = new
    assert len(levels.bags) == 2
    assert len(levels._heap) <= HEAP_SLACK + 6
    assert list(levels.rising()) == [low, high]
    levels.move(low, 0, -1)
    assert levels.lowest()[0] == at
    assert list(levels.rising()) == [high]
    levels.move(high, at, -1)
    assert not list(levels.rising())
    assert not levels.lowest()[1].rows


def test_only_models_of_the_catalogue_are_indexed() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    one = row(fleet, "a")
    fleet.apply(one, 1, 1, report(gpu_models=("made-up", NAMES[0]), host_models=("made-up-too",)), 0.0)
    fleet.step(one, READY)
    assert (set(fleet.warm), set(fleet.hosted)) == ({NAMES[0]}, set())
    fleet.step(one, "silent")
    assert (set(fleet.warm), set(fleet.hosted)) == (set(), set())


def test_what_waits_for_the_end_of_a_round_does_not_make_later_dispatches_wait() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    one = row(fleet, "a")
    fleet.apply(one, 1, 1, report(running=15, waiting=1), 0.0)
    fleet.step(one, READY)
    for i in range(250):
        assert one.queued == max(0, 16 + i - 256)
        fleet.dispatch(one, Entry("r", NAMES[0], 0.01, 0.0, 1000, 0.0, 100.0))
    fleet.apply(one, 1, 2, report(running=15, waiting=9, blocked=9, wait_s=5.0, epoch=EPOCH, dispatch_high=240), 1.0)
    assert one.queued == 9 + 10


def test_dispatches_that_memory_has_no_room_for_wait() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    one = row(fleet, "a")
    fleet.apply(one, 1, 1, report(gpu_free_bytes=1000), 0.0)
    fleet.step(one, READY)
    for _ in range(4):
        fleet.dispatch(one, Entry("r", NAMES[0], 0.01, 0.0, 400, 0.0, 100.0))
    assert one.queued == 2  # 600 bytes of 1600 are missing: more than one of the four, less than three
    assert not one.fits_now(1)


def test_estimates_of_loads_are_what_a_queue_of_loads_takes() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    one = row(fleet, "a")
    fleet.apply(one, 1, 1, report(gpu_models=(), load_queue_s=2.0, loading=((NAMES[3], 2.0),)), 0.0)
    fleet.step(one, READY)
    for name in NAMES[:3]:
        fleet.dispatch(one, Entry("r", name, 0.1, 0.5, 0, 1.0, 100.0))
    assert one.load_left_s(NAMES[3], 1.5) == 0.5
    assert [one.load_left_s(name, 1.5) for name in NAMES[:3]] == [1.0, 1.5, 2.0]
    assert one.load_queue_s(1.5) == 2.0
    assert one.load_queue_s(9.0) == 0.0
    assert one.wait_s(1.1) == pytest.approx(0.2)  # loads run beside what is served, and the queue is worked off meanwhile


def test_a_sample_is_uniform_and_without_repeats() -> None:
    bag, rng = Bag[Row](), Random(3)
    kind = Kind(H100)
    rows = [Row(f"w{i}", kind, report()) for i in range(10)]
    for one in rows:
        bag.add(one)
    counts = dict.fromkeys(rows, 0)
    for _ in range(4000):
        drawn = bag.sample(3, rng)
        assert len(set(drawn)) == 3
        for one in drawn:
            counts[one] += 1
    # 1200 expected of each, standard deviation 29: five of them
    assert all(abs(count - 1200) < 145 for count in counts.values())
    assert len(bag.sample(99, rng)) == 10
    bag.remove(rows[4])
    bag.remove(rows[4])
    assert len(bag) == 9
    assert rows[4] not in bag


def test_a_sample_of_several_bags_is_uniform_over_all_of_them() -> None:
    kind, rng = Kind(H100), Random(4)
    bags: list[Bag[Row]] = [Bag(), Bag(), Bag()]
    rows = [Row(f"w{i}", kind, report()) for i in range(10)]
    for i, one in enumerate(rows):
        bags[0 if i < 2 else 2].add(one)
    counts = dict.fromkeys(rows, 0)
    for _ in range(4000):
        for one in sample_all(bags, 3, rng):
            counts[one] += 1
    assert all(abs(count - 1200) < 145 for count in counts.values())  # 1200 expected, standard deviation 29: five of them
    assert set(sample_all(bags, 99, rng)) == set(rows)


def test_what_a_worker_had_goes_on_between_its_reports() -> None:
    fleet = Fleet(CATALOG.models, EPOCH)
    one = row(fleet, "a")
    fleet.apply(one, 1, 1, report(running=256, waiting=9, blocked=9, wait_s=2.0, left_s=5.0, round_s=0.02, kv_bytes=1000, gpu_free_bytes=0), 0.0)
    fleet.step(one, READY)
    assert (one.depth, one.queued, one.fits_now(500)) == (265, 9, False)
    assert not one.is_stale(1.0)
    assert one.is_stale(2.0)
    for now, depth, queued, fits in ((1.0, 231 + 9, 9, False), (5.0, 128 + 7, 0, True), (30.0, 0, 0, True)):
        fleet.refresh(one, now)
        assert (one.depth, one.queued, one.fits_now(500)) == (depth, queued, fits)
        check(fleet)
    assert not one.is_stale(99.0), "nothing is left to change"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-1, 12)), max_size=120), st.integers(0, 14), st.integers(0, 14))
def test_levels_rise_from_where_one_begins_to_where_one_ends(moves: list[tuple[int, int]], begin: int, end: int) -> None:
    fleet, levels, at = Fleet(CATALOG.models, EPOCH), Levels[Row](), dict.fromkeys(range(31), -1)
    for who, level in moves:
        levels.move(row(fleet, f"x{who}"), at[who], level)
        at[who] = level
    found = [int(r.worker_id[1:]) for r in levels.rising(begin, end)]
    assert sorted(found) == sorted(who for who, level in at.items() if begin <= level < end)
    assert [at[who] for who in found] == sorted(at[who] for who in found)
    assert sorted(int(r.worker_id[1:]) for r in levels.rising()) == sorted(who for who, level in at.items() if level >= 0)


def test_whoever_takes_all_of_several_bags_takes_them_in_random_order() -> None:
    fleet, bags = Fleet(CATALOG.models, EPOCH), [Bag[Row](), Bag[Row]()]
    for number in range(6):
        bags[number % 2].add(row(fleet, f"x{number}"))
    orders = {tuple(r.worker_id for r in sample_all(bags, count, Random(seed))) for seed in range(50) for count in (6, 7)}
    assert len(orders) > 40
    assert {frozenset(order) for order in orders} == {frozenset(fleet.rows)}


def test_a_worker_about_to_load_a_model_is_warm_until_its_reports_say_otherwise() -> None:
    """A report that was sent before the dispatch arrived says nothing of the model."""
    fleet = Fleet(CATALOG.models, EPOCH)
    one = row(fleet, "x")
    fleet.apply(one, 1, 1, report(gpu_models=()), 0.0)
    fleet.step(one, READY)
    assert NAMES[2] not in fleet.warm
    fleet.dispatch(one, Entry("r", NAMES[2], 0.1, 2.0, 0, 0.0, 1.0))
    assert one in fleet.warm[NAMES[2]]
    fleet.apply(one, 1, 2, report(gpu_models=(NAMES[0],)), 1.0)
    assert one in fleet.warm[NAMES[2]]
    assert one in fleet.warm[NAMES[0]]
    fleet.apply(one, 1, 3, report(gpu_models=(NAMES[0],), epoch=EPOCH, dispatch_high=1), 2.0)
    assert NAMES[2] not in fleet.warm, "it has the dispatch and loads nothing"
    fleet.step(one, "STOPPED")
    fleet.forget(one)
    assert (fleet.warm, fleet.gone, len(fleet)) == ({}, {}, 0)
