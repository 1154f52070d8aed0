"""The fleet table's indexes, held against a plain look at every row."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from roles import CATALOG, report

from sllm.dispatch import Entry
from sllm.fleet import DEPTH_MAX, Bag, Fleet, Row
from sllm.messages import READY

NAMES = CATALOG.names[:4]
HARDWARE = CATALOG.get_hardware("h100-80g")
EPOCH = 5


def row(fleet: Fleet, name: str) -> Row:
    found = fleet.rows.get(name)
    if found is None:
        found = fleet.rows[name] = Row(name, HARDWARE, report())
    return found


def check(fleet: Fleet) -> None:
    ready = [r for r in fleet if r.state == READY]
    assert set(fleet.ready.rows) == set(ready)
    for name in NAMES:
        expected = {r for r in ready if r.load_left_s(name, r.heard_at) is not None}
        bag = fleet.warm.get(name)
        assert set(bag.rows if bag else ()) == expected
        hosted = fleet.hosted.get(name)
        assert set(hosted.rows if hosted else ()) == {r for r in ready if name in r.report.host_models}
    for r in fleet:
        assert r.depth == (r.report.running + r.report.waiting + r.pending if r.state == READY else -1)
    low = min((min(r.depth, DEPTH_MAX) for r in ready), default=None)
    assert set(fleet.least_loaded().rows) == {r for r in ready if min(r.depth, DEPTH_MAX) == low}
    for state in set(fleet.states):
        assert fleet.states[state] == sum(r.state == state for r in fleet)


MODELS = st.lists(st.sampled_from(NAMES), unique=True, max_size=3).map(tuple)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.integers(0, 3), st.tuples(MODELS, MODELS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))),
        st.tuples(st.just("dispatch"), st.integers(0, 3), st.tuples(st.sampled_from(NAMES), st.booleans())),
        st.tuples(st.just("release"), st.integers(0, 3), st.integers(1, 6)),
        st.tuples(st.just("step"), st.integers(0, 3), st.sampled_from(["READY", "DRAINING", "STOPPED", "silent", "expired"])),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS)
def test_the_indexes_are_what_a_scan_would_find(steps: list[tuple[str, int, object]]) -> None:
    fleet = Fleet()
    for now, (what, which, detail) in enumerate(steps):
        one = row(fleet, f"w{which}")
        if what == "report":
            gpu, host, running, waiting, high = detail  # type: ignore[misc]
            loading = tuple((name, 1.0) for name in host[:1] if name not in gpu)
            message = report(
                gpu_models=gpu, host_models=host, loading=loading, running=running, waiting=waiting, epoch=EPOCH, dispatch_high=high, dispatch_seen=3
            )
            fleet.apply(one, 1, one.sequence + 1, message, EPOCH, float(now))
            fleet.step(one, READY)
        elif what == "dispatch" and one.state == READY:
            name, loads = detail  # type: ignore[misc]
            fleet.dispatch(one, Entry("r", 1.0, name, loads, float(now)), EPOCH)
        elif what == "release":
            fleet.release(one, detail)  # type: ignore[arg-type]
        elif what == "step":
            fleet.step(one, detail)  # type: ignore[arg-type]
        check(fleet)


def test_a_huge_number_in_a_report_costs_nothing() -> None:
    fleet = Fleet()
    for name, running in (("a", 1 << 60), ("b", 1 << 61), ("c", 3)):
        one = row(fleet, name)
        message = report(running=running)
        fleet.apply(one, 1, 1, message, EPOCH, 0.0)
        fleet.step(one, READY)
        check(fleet)
    assert len(fleet._buckets) < 100_000
    fleet.step(row(fleet, "c"), "STOPPED")
    assert {one.worker_id for one in fleet.least_loaded().rows} == {"a", "b"}


def test_a_sample_is_uniform_and_without_repeats() -> None:
    bag, rng = Bag(), Random(3)
    rows = [Row(f"w{i}", HARDWARE, report()) for i in range(10)]
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
