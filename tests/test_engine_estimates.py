"""What a report says of the time to come, held against what comes: the wait of a request that arrives now, the pace of the batch, what is left of it."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from test_engine_llm import H100, LLAMA, drain, small, times, warm

from sllm.engine import Finished, FirstTokenOut, LlmEngine, Started
from sllm.models.catalogue import Catalog
from sllm.models.cost import step_cost, step_s

COST = step_cost(Catalog.demo(12).models[LLAMA], H100)


class Busy:
    """An engine with some requests, all of which have their first token at `at`, and besides, if wished, one whose prefill is on its way then.

    `full`: they take all of its slots.
    """

    def __init__(self, seed: int, *, full: bool, prefills: bool = False) -> None:
        note(f"seed {seed}")
        rng = Random(seed)
        self.requests = {f"r{i}": (rng.randint(1, 1500), rng.randint(100, 400)) for i in range(rng.randint(1, 5))}
        slots = len(self.requests) + prefills if full else 64
        self.engine = engine = warm(LLAMA, slots=slots)
        for name, (prompt, output) in self.requests.items():
            engine.submit(100.0, name, LLAMA, prompt, output)
        firsts: dict[str, float] = {}
        while firsts.keys() != self.requests.keys():
            firsts |= times(engine.advance(engine.next_at), FirstTokenOut)
        self.at = max(firsts.values())
        if prefills:
            engine.submit(self.at, "prefills", LLAMA, 7000, 300)
            self.at = engine.next_at
            assert "prefills" in times(engine.advance(self.at), Started)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.booleans(), st.floats(0.0, 0.2))
def test_who_finds_room_waits_for_the_end_of_the_round(seed: int, prefills: bool, later_s: float) -> None:
    busy = Busy(seed, full=False, prefills=prefills)
    engine, now = busy.engine, busy.at + later_s
    engine.advance(now)
    estimate_s = engine.snapshot(now).wait_s
    engine.submit(now, "new", LLAMA, 100, 10)
    assert now + estimate_s == pytest.approx(times(drain(engine), Started)["new"], abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.booleans(), st.floats(0.0, 0.99))
def test_who_finds_no_slot_waits_until_the_first_is_done(seed: int, prefills: bool, part: float) -> None:
    twin = Busy(seed, full=True, prefills=prefills)
    done_at = min(times(drain(twin.engine), Finished).values())
    busy = Busy(seed, full=True, prefills=prefills)
    engine, now = busy.engine, busy.at + part * (done_at - busy.at)
    engine.advance(now)
    estimate_s = engine.snapshot(now).wait_s
    engine.submit(now, "new", LLAMA, 100, 10)
    assert times(drain(engine), Started)["new"] == done_at
    assert now + estimate_s == pytest.approx(done_at, abs=1e-9)


def test_the_pace_is_that_of_a_round_of_the_batch() -> None:
    """Two requests have had their prefill, one after the other: the first has two tokens by then."""
    engine = warm(LLAMA)
    engine.submit(100.0, "a", LLAMA, 700, 100)
    engine.submit(100.0, "b", LLAMA, 1500, 100)
    firsts: dict[str, float] = {}
    while len(firsts) < 2:
        firsts |= times(engine.advance(engine.next_at), FirstTokenOut)
    round_s = step_s(COST, 2, 700 + 2 + 1500 + 1, 2)
    assert engine.snapshot(firsts["b"]).round_s == pytest.approx(round_s)
    assert engine.snapshot(firsts["b"] + 0.9 * round_s).wait_s == pytest.approx(0.1 * round_s)


def test_what_is_left_is_the_mean_of_all_and_shrinks_round_by_round() -> None:
    """Rounds of 1 s."""
    engine = LlmEngine(*small(100))
    engine.load(0.0, "m0")
    engine.advance(10.0)
    engine.submit(10.0, "a", "m0", 1, 100)
    engine.submit(10.0, "b", "m0", 1, 50)
    for done in (1, 2, 10, 49):
        engine.advance(10.5 + done)
        assert engine.snapshot(10.5 + done).left_s == pytest.approx((100 + 50) / 2 - done)
        assert engine.snapshot(10.5 + done).round_s == 1.0
    engine.advance(71.5)
    assert engine.snapshot(71.5).left_s == pytest.approx(100 - 61)


def test_what_is_cancelled_leaves_nothing() -> None:
    engine = LlmEngine(*small(100))
    engine.load(0.0, "m0")
    engine.advance(10.0)
    engine.submit(10.0, "a", "m0", 1, 100)
    engine.submit(10.0, "b", "m0", 1, 50)
    assert engine.cancel(12.5, "b")
    for done in (3, 5, 70):
        engine.advance(10.5 + done)
        assert engine.snapshot(10.5 + done).left_s == pytest.approx(100 - done)


@pytest.mark.parametrize("waiting", [1, 3, 8])
def test_prompts_that_wait_are_prefilled_in_rounds_before_the_next(waiting: int) -> None:
    """Each round takes no more than 8,192 prompt tokens, so one prompt of 6,000."""
    engine = warm(LLAMA)
    engine.submit(100.0, "long", LLAMA, 100, 2000)
    engine.advance(101.0)
    for i in range(waiting):
        engine.submit(101.0, f"w{i}", LLAMA, 6000, 500)
    estimate_s = engine.snapshot(101.0).wait_s
    engine.submit(101.0, "new", LLAMA, 6000, 500)
    started = times(drain(engine), Started)["new"]
    assert started - 101.0 > 0.1 * waiting
    assert estimate_s == pytest.approx(started - 101.0, rel=0.1 if waiting > 1 else 0.25)
