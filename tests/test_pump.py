"""The pump of arrivals: everything is handed in once, in order, never early, some at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from sllm.workload.pump import Pump


class At:
    """A pump, and the clock by which it hands in. What has come: (number, when). `step_s`: how long each hand-over takes."""

    def __init__(self, arrivals: Iterator[tuple[float, int]], batch: int = 3, step_s: float = 0.0) -> None:
        self.now = 0.0
        self.stopped = False
        self.come: list[tuple[int, float]] = []
        self._step_s = step_s
        self.pump = Pump(arrivals, self._submit, lambda: self.now, lambda: self.stopped, batch)

    def _submit(self, number: int, now: float) -> None:
        self.come.append((number, now))
        self.now += self._step_s


@given(st.lists(st.sampled_from((0.0, 0.0, 0.5, 2.0))), st.integers(1, 4), st.sampled_from((0.0, 0.25, 1.0)))
def test_all_come_in_order_never_early_and_at_once_when_the_pump_keeps_up(gaps: list[float], batch: int, step_s: float) -> None:
    times = [sum(gaps[: number + 1]) for number in range(len(gaps))]
    at = At(iter(zip(times, count())), batch, step_s)
    while (again := at.pump.hand_in()) < inf:
        at.now = max(at.now, again)
    assert at.pump.exhausted
    assert [number for number, _ in at.come] == list(range(len(times)))
    assert all(now >= due for (_, now), due in zip(at.come, times, strict=True))
    if not step_s:
        assert [now for _, now in at.come] == times


def test_a_batch_has_an_end_however_many_are_due() -> None:
    at = At((0.0, number) for number in count())
    assert at.pump.hand_in() == 0.0, "more may be due now"
    assert len(at.come) == 3
    at.pump.hand_in()
    assert len(at.come) == 6


def test_what_comes_due_during_a_batch_comes_with_it() -> None:
    at = At(iter([(0.0, 0), (0.5, 1), (1.5, 2)]), step_s=1.0)
    assert at.pump.hand_in() == at.now == 3.0
    assert at.come == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_one_is_drawn_ahead_and_kept() -> None:
    drawn = []

    def arrivals() -> Iterator[tuple[float, int]]:
        for number in count():
            drawn.append(number)
            yield float(number), number

    at = At(arrivals())
    assert [at.pump.hand_in() for _ in range(3)] == [1.0] * 3
    assert (at.come, drawn) == ([(0, 0.0)], [0, 1])


def test_a_stop_in_the_middle_of_a_batch_ends_it_and_draws_nothing_more() -> None:
    def arrivals() -> Iterator[tuple[float, int]]:
        yield 0.0, 0
        yield 0.0, 1
        at.stopped = True
        yield 0.0, 2
        raise AssertionError("drawn after the stop")

    at = At(arrivals(), batch=5)
    assert at.pump.hand_in() == inf
    assert at.pump.hand_in() == inf
    assert not at.pump.exhausted
    assert [number for number, _ in at.come] == [0, 1], "the one that was being drawn comes no more"
