"""The queue engine against queueing theory, in units of the mean service time."""

from __future__ import annotations

from itertools import pairwise
from math import exp, inf, sqrt
from random import Random
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest

from sllm.engine import Evicted, Finished, FirstTokenOut, Loaded, QueueEngine, Started
from sllm.engine.queue import Service
from sllm.models.model import DISK
from sllm.protocol.errors import UsageError

SEEDS = range(1, 9)
T_7 = 3.5  # Student's t for 99 % two-sided with 7 degrees of freedom


def drive(engine: QueueEngine, rate: float, customers: int, rng: Random) -> tuple[list[float], list[Any], float]:
    """Poisson arrivals of one model. Returns each one's wait, what happened, and the time of the last arrival."""
    now = 0.0
    arrived, notes = {}, []
    for i in range(customers):
        now += rng.expovariate(rate)
        arrived[str(i)] = now
        engine.submit(now, str(i), "m", 1, 1)
        notes += engine.advance(now)
    last = now
    while (at := engine.next_at) < inf:
        notes += engine.advance(at)
    waits = [note.at - arrived[note.request_id] for note in notes if isinstance(note, Started)]
    return waits, notes, last


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of one value a seed, and half of its 99 % confidence interval."""
    return fmean(values), T_7 * stdev(values) / sqrt(len(values))


@pytest.mark.parametrize(
    ("slots", "rho", "service", "expected"),
    [
        (1, 0.5, "exponential", 1.0),  # M/G/1: rho (1 + CV^2) / (2 (1 - rho))
        (1, 0.5, "deterministic", 0.5),
        (1, 0.5, "hyperexponential:2", 2.5),
        (10, 0.8, "exponential", 0.2045900),  # M/M/c: Erlang C / (c - a)
    ],
)
def test_mean_wait(slots: int, rho: float, service: str, expected: float) -> None:
    means = []
    for seed in SEEDS:
        engine = QueueEngine(slots, service, 1.0, Random(f"{seed} service"))
        waits, _, _ = drive(engine, rho * slots, 12_000, Random(f"{seed} arrivals"))
        means.append(fmean(waits))
    mean, half = interval(means)
    assert abs(mean - expected) <= half, f"{mean} +- {half}, seeds {SEEDS}"


def test_a_server_that_keeps_its_model_for_a_while() -> None:
    """M/G/1 whose model is gone after tau of idleness and takes D to load: mean wait and part of the requests that find it gone."""
    rate, tau, load = 0.6, 1.5, 2.0
    q = exp(-rate * tau)
    wait = rate * 2 / (2 * (1 - rate)) + q * (2 * load + rate * load**2) / (2 * (1 + rate * q * load))
    cold = q * (1 - rate) / (1 + rate * q * load)
    waits, colds = [], []
    for seed in SEEDS:
        engine = QueueEngine(1, "exponential", 1.0, Random(f"{seed} service"), keep_alive_s=tau, load_s=load)
        each, notes, _ = drive(engine, rate, 12_000, Random(f"{seed} arrivals"))
        waits.append(fmean(each))
        colds.append(sum(isinstance(note, Loaded) for note in notes) / len(each))
        loads = [note for note in notes if isinstance(note, Loaded)]
        assert {note.tier_from for note in loads} == {DISK}
        assert len(loads) == sum(isinstance(note, Evicted) for note in notes)
    for values, expected in ((waits, wait), (colds, cold)):
        mean, half = interval(values)
        assert abs(mean - expected) <= half, f"{mean} +- {half} is not {expected}, seeds {SEEDS}"


@pytest.mark.parametrize(("text", "cv"), [("deterministic", 0.0), ("exponential", 1.0), ("hyperexponential:1.5", 1.5), ("hyperexponential:4", 4.0)])
def test_service_times_have_the_mean_and_cv_asked_for(text: str, cv: float) -> None:
    service = Service(text, 3.0)
    assert service.cv == cv
    means, cvs = [], []
    for seed in SEEDS:
        rng = Random(seed)
        drawn = [service.draw_s(rng) for _ in range(20_000)]
        means.append(fmean(drawn))
        cvs.append(pstdev(drawn) / fmean(drawn))
    for values, expected in ((means, 3.0), (cvs, cv)):
        mean, half = interval(values)
        assert abs(mean - expected) <= half + 1e-12 + 0.01 * expected, f"{mean} +- {half}, seeds {SEEDS}"


@pytest.mark.parametrize("text", ["", "gamma", "exponential:2", "hyperexponential", *(f"hyperexponential:{cv}" for cv in ("1", "x", "nan", "inf"))])
def test_bad_service(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Service(text, 1.0)
    assert repr(text) in str(caught.value)


def test_slots_serve_in_the_order_of_arrival() -> None:
    engine = QueueEngine(2, "deterministic", 1.0, Random(1), models=("b", "a"))
    for i in range(5):
        engine.submit(0.25 * i, f"r{i}", "a", 10, 7)
    snapshot = engine.snapshot(0.9)
    assert (snapshot.running, snapshot.waiting, snapshot.slots, snapshot.kv_used) == (2, 2, 2, 1.0)
    assert snapshot.wait_s == pytest.approx(1.5)  # three to be served by two before it, a mean each
    assert snapshot.gpu_models == ("a", "b")
    assert snapshot.busy_models == ("a",)
    notes = engine.advance(10.0)
    assert {note.request_id: note.at for note in notes if isinstance(note, Started)} == {"r0": 0.0, "r1": 0.25, "r2": 1.0, "r3": 1.25, "r4": 2.0}
    assert {note.at for note in notes if isinstance(note, FirstTokenOut)} == {0.0, 0.25, 1.0, 1.25, 2.0}
    assert [note.output_tokens for note in notes if isinstance(note, Finished)] == [7] * 5
    assert all(a.at <= b.at for a, b in pairwise(notes))
    assert engine.usage(10.0).busy_s == pytest.approx(2.5)
    assert engine.next_at == inf


def test_models_load_one_after_the_other_and_leave_when_unused() -> None:
    engine = QueueEngine(1, "deterministic", 1.0, Random(1), keep_alive_s=5.0, load_s=2.0)
    engine.submit(0.0, "a1", "a", 1, 1)
    engine.submit(0.5, "b1", "b", 1, 1)
    engine.submit(1.0, "a2", "a", 1, 1)
    assert engine.snapshot(1.0).loading == (("a", 1.0), ("b", 3.0))
    assert engine.snapshot(1.0).waiting == 3
    notes = engine.advance(100.0)
    assert [note for note in notes if isinstance(note, Loaded | Evicted)] == [
        Loaded(2.0, "a", DISK, 2.0), Loaded(4.0, "b", DISK, 2.0), Evicted(9.0, "a", DISK), Evicted(10.0, "b", DISK),
    ]  # fmt: skip
    assert {note.request_id: note.at for note in notes if isinstance(note, Started)} == {"a1": 2.0, "a2": 3.0, "b1": 4.0}
    engine.load(100.0, "b")
    engine.load(100.0, "b")
    assert engine.advance(102.0) == [Loaded(102.0, "b", DISK, 2.0)]
    assert engine.unload(103.0, "b")
    assert not engine.unload(103.0, "b")
    assert engine.advance(103.0) == [Evicted(103.0, "b", DISK)]


def test_bad_tokens() -> None:
    with pytest.raises(ValueError, match="r1"):
        QueueEngine(1, "deterministic", 1.0, Random(1)).submit(0.0, "r1", "m", 1, 0)


def test_a_cancelled_request_gives_its_slot_to_the_next_and_is_told_of_no_more() -> None:
    engine = QueueEngine(1, "deterministic", 2.0, Random(1), models=("m",))
    for i in range(4):
        engine.submit(0.0, f"r{i}", "m", 1, 1)
    engine.advance(0.5)
    assert engine.cancel(0.5, "r0")
    assert engine.cancel(0.5, "r2")
    assert not engine.cancel(0.5, "r0")
    notes = engine.advance(10.0)
    assert [(note.at, note.request_id) for note in notes if isinstance(note, Finished)] == [(2.5, "r1"), (4.5, "r3")]
    assert engine.usage(10.0).busy_s == 4.5
    assert engine.snapshot(10.0).gpu_models == ("m",)


def test_a_request_that_waits_for_its_model_can_be_cancelled() -> None:
    engine = QueueEngine(1, "deterministic", 2.0, Random(1), load_s=1.0)
    engine.submit(0.0, "r0", "m", 1, 1)
    assert engine.cancel(0.5, "r0")
    assert not any(isinstance(note, Started) for note in engine.advance(10.0))
    assert engine.snapshot(10.0).waiting == 0
