"""Deadlines by key, against the obvious implementation."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from sllm.protocol.timers import NEVER, Timers, Wheel


class Thing:
    """Something with deadlines of both kinds."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.due = NEVER
        self.due_at = self.entry_at = inf


def test_nothing_set_means_no_deadline() -> None:
    timers: Timers[Thing] = Timers()
    assert timers.earliest == inf
    assert timers.pop_due(1e9) is None


def test_equal_deadlines_come_in_the_order_they_were_set() -> None:
    timers: Timers[Thing] = Timers()
    things = [Thing() for _ in range(3)]
    for thing in things:
        timers.set(thing, 1.0)
    assert [timers.pop_due(1.0) for _ in range(3)] == things


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 4), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 4), st.just(0)),
        st.tuples(st.just("pop"), st.just(0), st.integers(0, 20)),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_agrees_with_a_plain_dictionary(steps: list[tuple[str, int, int]]) -> None:
    timers: Timers[Thing] = Timers()
    things = [Thing() for _ in range(5)]
    plain: dict[Thing, float] = {}
    for what, index, at in steps:
        thing = things[index]
        if what == "set":
            timers.set(thing, float(at))
            plain[thing] = float(at)
        elif what == "cancel":
            timers.cancel(thing)
            plain.pop(thing, None)
        else:
            popped = timers.pop_due(float(at))
            due = [k for k, t in plain.items() if t <= at]
            if not due:
                assert popped is None
            else:
                assert popped is not None
                assert plain[popped] == min(plain[k] for k in due)
                del plain[popped]
        assert timers.earliest == min(plain.values(), default=inf)
        assert {thing for thing in things if thing.due_at < inf} == set(plain)


def test_a_wheel_gives_back_what_is_due_in_the_order_of_its_steps() -> None:
    wheel: Wheel[Thing] = Wheel(0.5)
    one, two, three = Thing("one"), Thing("two"), Thing("three")
    wheel.set(three, 3.0)
    wheel.set(one, 0.9)
    wheel.set(two, 1.0)
    assert not wheel.has_due(0.99)
    assert wheel.take(0.99, 9) == []
    assert [thing.name for thing in wheel.take(1.0, 1)] == ["one"]
    assert [thing.name for thing in wheel.take(2.9, 9)] == ["two"]
    assert [thing.name for thing in wheel.take(3.0, 9)] == ["three"]
    assert not wheel.has_due(1e9)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, 20.0), st.floats(0.0, 3.0)), max_size=60))
def test_a_wheel_never_forgets_and_never_gives_twice(moves: list[tuple[int, float, float]]) -> None:
    """Each thing set comes out once, not before its step and at the first look after the earliest time it was set to."""
    wheel: Wheel[Thing] = Wheel(0.25)
    things = [Thing() for _ in range(6)]
    wanted: dict[Thing, float] = {}
    now = 0.0
    for index, at, pause in moves:
        wheel.set(things[index], now + at)
        wanted[things[index]] = min(now + at, wanted.get(things[index], inf))
        now += pause
        taken = wheel.take(now, 100)
        assert len(set(taken)) == len(taken)
        for thing in taken:
            assert wanted.pop(thing) <= now
        assert all(at > now - wheel.step_s for at in wanted.values())
    assert set(wheel.take(1e9, 100)) == set(wanted)
    assert wheel.take(1e9, 100) == []
