"""Deadlines by key, against the obvious implementation."""

from hypothesis import given
from hypothesis import strategies as st

from sllm.timers import Timers


def test_nothing_set_means_no_deadline() -> None:
    timers: Timers[str] = Timers()
    assert timers.next_deadline() is None
    assert timers.pop_due(1e9) is None


def test_equal_deadlines_come_in_the_order_they_were_set() -> None:
    timers: Timers[str] = Timers()
    for key in ("c", "a", "b"):
        timers.set(key, 1.0)
    assert [timers.pop_due(1.0) for _ in range(3)] == ["c", "a", "b"]


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
    timers: Timers[int] = Timers()
    plain: dict[int, float] = {}
    for what, key, at in steps:
        if what == "set":
            timers.set(key, float(at))
            plain[key] = float(at)
        elif what == "cancel":
            timers.cancel(key)
            plain.pop(key, None)
        else:
            popped = timers.pop_due(float(at))
            due = [k for k, t in plain.items() if t <= at]
            if not due:
                assert popped is None
            else:
                assert popped is not None
                assert plain[popped] == min(plain[k] for k in due)
                del plain[popped]
        assert timers.next_deadline() == (min(plain.values()) if plain else None)
        assert len(timers) == len(plain)
