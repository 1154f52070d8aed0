"""The rules of the continuous-batching engine, one by one."""

from __future__ import annotations

import dataclasses
from math import inf
from typing import Any

import pytest

from sllm.engine import Evicted, Finished, FirstTokenOut, LlmEngine, Loaded, ModelTooLarge, RequestTooLarge, Started
from sllm.models.catalogue import Catalog
from sllm.models.cost import load_s, prefill_s, service_s, step_cost, step_s
from sllm.models.model import DISK, GB, HOST, REMOTE, Hardware, MeasuredStep, Model, StepCost
from sllm.models.presets import HARDWARE, MODELS

H100 = HARDWARE["h100-80g"]
LLAMA = "llama-3.1-8b"


def drain(engine: LlmEngine, until: float = inf) -> list[Any]:
    """Everything that happens by itself up to `until`."""
    notes: list[Any] = []
    while (at := engine.next_at) <= until and at < inf:
        notes += engine.advance(at)
    return notes


def times(notes: list[Any], kind: type[Any]) -> dict[str, float]:
    """When each request, or each model, had a notification of this kind."""
    return {note.values()[1]: note.at for note in notes if isinstance(note, kind)}


def tiers(notes: list[Any]) -> list[int]:
    """Where the models that were loaded came from, in the order of loading."""
    return [note.tier_from for note in notes if isinstance(note, Loaded)]


def warm(*names: str, hardware: Hardware = H100, **options: Any) -> LlmEngine:
    """An engine that has loaded `names` by time 100."""
    engine = LlmEngine(Catalog.demo(12), hardware, **options)
    for name in names:
        engine.load(0.0, name)
    assert times(engine.advance(100.0), Loaded).keys() == set(names)
    return engine


def small(*sizes: int, memory: int = 1000, **fields: Any) -> tuple[Catalog, Hardware]:
    """Models m0, m1, ... of so many bytes; `memory` usable bytes of GPU; steps of 1 s, +1 s for each 100 new tokens; loads at 100 B/s from anywhere."""
    cost = StepCost(1.0, 0.0, 0.01, 0.0, 0.0)
    models = {f"m{i}": Model(f"m{i}", size, 1, 1, (MeasuredStep("box", cost),)) for i, size in enumerate(sizes)}
    box = Hardware("box", round(memory / 0.9) + 1, 10**6, 10**6, 100.0, 100.0, 100.0, 1.0, 1.0, 0.0, init_s=0.0)
    box = dataclasses.replace(box, **fields)
    assert box.usable_gpu_bytes == memory
    return Catalog(models), box


# --- service ------------------------------------------------------------------------------------------------------------------------


def test_a_lone_request_takes_what_the_cost_model_says() -> None:
    engine = warm(LLAMA)
    engine.submit(100.0, "r", LLAMA, 1155, 211)
    notes = drain(engine)
    model = MODELS[LLAMA]
    assert notes[0] == Started(100.0, "r")
    assert times(notes, FirstTokenOut)["r"] == pytest.approx(100 + prefill_s(model, H100, 1155), rel=1e-12)
    assert isinstance(notes[-1], Finished)
    assert notes[-1].values() == (pytest.approx(100 + service_s(model, H100, 1155, 211), rel=1e-12), "r", 211)
    assert engine.usage(1000.0).busy_s == pytest.approx(service_s(model, H100, 1155, 211))


def test_one_token_is_the_prefill_alone() -> None:
    engine = warm(LLAMA)
    engine.submit(100.0, "r", LLAMA, 10, 1)
    notes = drain(engine)
    assert [type(note) for note in notes] == [Started, FirstTokenOut, Finished]
    assert notes[1].at == notes[2].at


def test_an_arrival_waits_for_the_end_of_the_round_and_joins_the_batch() -> None:
    engine = LlmEngine(*small(100))
    engine.load(0.0, "m0")
    engine.submit(10.0, "a", "m0", 50, 5)
    assert engine.advance(10.0) == [Loaded(1.0, "m0", DISK, 1.0), Started(10.0, "a")]
    engine.submit(12.5, "b", "m0", 300, 2)  # the rounds end at 11, 12, 13
    notes = drain(engine)
    assert times(notes, Started) == {"b": 13.0}
    assert times(notes, FirstTokenOut) == {"a": 11.0, "b": pytest.approx(16.01)}  # 300 new tokens of b and one of a
    assert times(notes, Finished) == {"a": pytest.approx(17.01), "b": pytest.approx(17.01)}


def test_models_share_the_rounds() -> None:
    engine = warm(LLAMA, "opt-6.7b")
    engine.submit(100.0, "a", LLAMA, 100, 50)
    engine.submit(100.0, "b", "opt-6.7b", 100, 50)
    notes = drain(engine)
    costs = [step_cost(MODELS[name], H100) for name in (LLAMA, "opt-6.7b")]
    both = sum(prefill_s(MODELS[name], H100, 100) for name in (LLAMA, "opt-6.7b"))
    both += sum(step_s(cost, 1, 100 + i) for cost in costs for i in range(1, 50))
    assert times(notes, Finished) == {"a": pytest.approx(100 + both), "b": pytest.approx(100 + both)}


def test_prompts_of_one_round_are_bounded_but_a_long_one_goes_alone() -> None:
    engine = LlmEngine(*small(100, memory=10_000), prefill_tokens_max=400)
    engine.load(0.0, "m0")
    engine.advance(5.0)
    for name, prompt in (("a", 900), ("b", 300), ("c", 100), ("d", 1)):
        engine.submit(5.0, name, "m0", prompt, 1)
    assert times(drain(engine), Started) == {"a": 5.0, "b": 14.0, "c": 14.0, "d": 18.0}


def test_slots_bound_the_batch_first_come_first_served() -> None:
    engine = LlmEngine(*small(100), slots=2)
    engine.load(0.0, "m0")
    engine.advance(5.0)
    for i in range(5):
        engine.submit(5.0, f"r{i}", "m0", 1, 4)
    snapshot = engine.snapshot(6.5)
    assert (snapshot.running, snapshot.waiting, snapshot.slots) == (2, 3, 2)
    assert snapshot.wait_s > 2.5  # the rest of the first two, and then there are others
    assert times(drain(engine), Started) == {"r2": 9.0, "r3": 9.0, "r4": 13.0} | {"r0": 5.0, "r1": 5.0}


def test_kv_cache_is_reserved_in_full_and_the_oldest_is_never_overtaken() -> None:
    engine = LlmEngine(*small(100))  # 900 tokens of KV cache
    engine.load(0.0, "m0")
    engine.advance(5.0)
    for name, prompt, output in (("a", 400, 4), ("big", 790, 10), ("tiny", 1, 1)):
        engine.submit(5.0, name, "m0", prompt, output)
    assert engine.snapshot(5.5).kv_used == pytest.approx(404 / 900)
    started = times(drain(engine), Started)
    assert started == {"a": 5.0, "big": 12.0, "tiny": 12.0}  # four rounds: 4 s of prefill and three of 1 s


def test_what_can_never_fit_is_refused_and_changes_nothing() -> None:
    catalog, box = small(100, 1001)
    engine = LlmEngine(catalog, box)
    engine.submit(0.0, "just", "m0", 899, 1)
    with pytest.raises(RequestTooLarge, match="r1"):
        engine.submit(0.0, "r1", "m0", 900, 1)
    with pytest.raises(ModelTooLarge, match="m1"):
        engine.submit(0.0, "r2", "m1", 1, 1)
    with pytest.raises(ModelTooLarge, match="m1"):
        engine.load(0.0, "m1")
    with pytest.raises(KeyError):
        engine.submit(0.0, "r3", "nobody", 1, 1)
    for prompt, output in ((-1, 5), (5, 0)):
        with pytest.raises(ValueError, match="r4"):
            engine.submit(0.0, "r4", "m0", prompt, output)
    assert times(drain(engine), Finished).keys() == {"just"}


def test_how_often_it_is_asked_makes_no_difference() -> None:
    rare, often = warm(LLAMA, "opt-6.7b"), warm(LLAMA, "opt-6.7b")
    seen: list[Any] = []
    for i in range(40):
        at = 100 + i * 0.37
        for tick in range(20):
            seen += often.advance(at - 0.37 + 0.37 * tick / 20)
            often.snapshot(at - 0.37 + 0.37 * tick / 20)
        for engine in (rare, often):
            engine.submit(at, f"r{i}", (LLAMA, "opt-6.7b", "mistral-7b")[i % 3], 200 + i, 20 + i)
    assert rare.advance(10_000.0) == seen + often.advance(10_000.0)


# --- loads --------------------------------------------------------------------------------------------------------------------------


def test_one_load_serves_all_who_wait() -> None:
    engine = LlmEngine(Catalog.demo(3), H100)
    for i in range(10):
        engine.submit(i * 0.01, f"r{i}", LLAMA, 10, 10)
    notes = drain(engine)
    takes = load_s(MODELS[LLAMA], H100, DISK)
    assert [note.values() for note in notes if isinstance(note, Loaded)] == [(pytest.approx(takes), LLAMA, DISK, pytest.approx(takes))]
    assert len(set(times(notes, Started).values())) == 1
    assert len(times(notes, Finished)) == 10
    assert tiers(notes) == [DISK]
    assert not times(notes, Evicted)


def test_loads_are_one_at_a_time_in_order_and_others_are_served_meanwhile() -> None:
    engine = LlmEngine(*small(100, 200, 300))
    engine.load(0.0, "m0")
    engine.advance(1.0)
    engine.submit(1.0, "b", "m1", 1, 1)
    engine.submit(1.5, "c", "m2", 1, 1)
    engine.submit(2.0, "a", "m0", 1, 1)
    snapshot = engine.snapshot(2.0)
    assert dict(snapshot.loading) == pytest.approx({"m1": 1.0, "m2": 4.0})
    assert snapshot.load_queue_s == pytest.approx(4.0)
    assert snapshot.gpu_models == ("m0",)
    assert snapshot.busy_models == ("m0",)
    assert (snapshot.running, snapshot.waiting) == (1, 2)
    assert times(drain(engine), Started) == {"a": 2.0, "b": 3.0, "c": 6.0}


def test_tiers_a_second_load_comes_from_host_memory() -> None:
    catalog = Catalog.demo(3)
    engine = LlmEngine(catalog, dataclasses.replace(H100, name="h", disk_bytes=30 * GB))  # two of three on disk
    assert engine.snapshot(0.0).disk_models == (LLAMA, "opt-6.7b")
    assert not engine.snapshot(0.0).disk_complete
    now = 0.0
    for name, tier in ((LLAMA, DISK), ("mistral-7b", REMOTE), (LLAMA, HOST), ("mistral-7b", HOST)):
        engine.load(now, name)
        (loaded,) = drain(engine)
        assert (loaded.model, loaded.tier_from) == (name, tier)
        assert loaded.load_s == pytest.approx(loaded.at - now)
        now = loaded.at + 1
        assert engine.unload(now, name)
        assert engine.advance(now) == [Evicted(now, name, HOST)]
    snapshot = engine.snapshot(now)
    assert snapshot.host_models == (LLAMA, "mistral-7b")
    assert snapshot.disk_models == ("mistral-7b",)  # bounded: what had not been used for longest made room, and the other with it


def test_host_memory_drops_the_least_recently_used() -> None:
    engine = LlmEngine(*small(100, 100, 100, host_memory_bytes=200))
    now = 0.0
    for name in ("m0", "m1", "m0", "m2"):
        engine.load(now, name)
        now = drain(engine)[-1].at
        engine.unload(now, name)
    assert engine.snapshot(now).host_models == ("m0", "m2")
    assert engine.snapshot(now).disk_complete
    assert engine.snapshot(now).disk_models == ()


# --- evictions ----------------------------------------------------------------------------------------------------------------------


def test_only_memory_pressure_evicts_and_the_least_recently_used_goes() -> None:
    engine = LlmEngine(*small(300, 300, 300, 400))
    for name in ("m0", "m1", "m2"):
        engine.load(0.0, name)
    engine.submit(20.0, "r", "m0", 1, 1)  # m1 is now the one not used for longest
    assert not times(drain(engine), Evicted)
    engine.load(50.0, "m3")
    assert engine.advance(50.0) == [Evicted(50.0, "m1", HOST)]
    assert engine.next_at == 54.0
    assert engine.snapshot(54.0).gpu_models == ("m0", "m2", "m3")


def test_a_load_waits_until_serving_models_finish_and_starves_no_longer_than_that() -> None:
    engine = LlmEngine(*small(600, 600))
    engine.load(0.0, "m0")
    engine.advance(10.0)
    engine.submit(10.0, "a", "m0", 1, 20)
    engine.submit(11.5, "b", "m1", 1, 1)
    engine.submit(12.5, "late", "m0", 1, 1)  # younger than the load that waits: held back
    snapshot = engine.snapshot(13.0)
    assert dict(snapshot.loading) == pytest.approx({"m1": 6.0})
    assert not engine.unload(13.0, "m0")
    notes = drain(engine)
    assert times(notes, Finished)["a"] == 30.0
    assert [note for note in notes if isinstance(note, Evicted)] == [Evicted(30.0, "m0", HOST), Evicted(37.0, "m1", HOST)]
    assert {"b": 36.0, "late": 43.0}.items() <= times(notes, Started).items()


def test_an_idle_model_makes_room_for_kv_cache_only_if_waiting_cannot_help() -> None:
    engine = LlmEngine(*small(300, 300))
    engine.load(0.0, "m0")
    engine.load(0.0, "m1")
    engine.advance(10.0)
    engine.submit(10.0, "a", "m0", 290, 10)
    engine.submit(10.0, "b", "m0", 190, 10)  # fits when a is done
    notes = drain(engine)
    assert not times(notes, Evicted)
    assert times(notes, Started)["b"] == times(notes, Finished)["a"]
    engine.submit(50.0, "c", "m0", 390, 60)  # never beside m1
    assert engine.advance(50.0) == [Evicted(50.0, "m1", HOST), Started(50.0, "c")]


def test_two_models_whose_requests_do_not_fit_side_by_side_take_turns() -> None:
    """Both loaded, neither has room for its request while the other is there: the oldest request wins, the other model comes back later."""
    engine = LlmEngine(*small(300, 300))
    engine.submit(0.0, "a", "m0", 490, 10)
    engine.submit(0.0, "b", "m1", 490, 10)
    notes = drain(engine)
    assert times(notes, Finished).keys() == {"a", "b"}
    assert len(tiers(notes)) <= 4


def test_keep_alive_evicts_after_idleness_only() -> None:
    engine = LlmEngine(*small(100, 100), keep_alive_s=5.0)
    engine.load(0.0, "m0")
    engine.submit(3.0, "r", "m0", 1, 10)
    notes = drain(engine)
    assert notes[-1] == Evicted(18.0, "m0", HOST)
    assert engine.next_at == inf
    assert engine.snapshot(18.0).gpu_models == ()


@pytest.mark.parametrize("never", [None, 0.0, inf])
def test_keep_alive_may_be_for_ever(never: float | None) -> None:
    engine = LlmEngine(*small(100), keep_alive_s=never)
    engine.load(0.0, "m0")
    assert not times(drain(engine), Evicted)
    assert engine.next_at == inf


# --- reports ------------------------------------------------------------------------------------------------------------------------


def test_the_snapshot_of_an_idle_engine_is_cached_until_something_happens() -> None:
    engine = warm(LLAMA)
    first = engine.snapshot(100.0)
    assert engine.snapshot(200.0) is first
    assert first.gpu_models == (LLAMA,)
    assert first.busy_models == ()
    assert first.host_models == (LLAMA,)
    assert first.gpu_free_bytes == H100.usable_gpu_bytes - 16_060_000_000
    assert (first.running, first.waiting, first.wait_s, first.load_queue_s, first.kv_used) == (0, 0, 0.0, 0.0, 0.0)
    engine.submit(200.0, "r", LLAMA, 10, 10)
    assert engine.snapshot(200.0).running == 1


def test_the_wait_is_the_rest_of_the_round_while_there_is_room() -> None:
    engine = LlmEngine(*small(100))
    engine.load(0.0, "m0")
    engine.submit(10.0, "a", "m0", 1, 100)
    assert engine.snapshot(17.25).wait_s == pytest.approx(0.75)


def test_the_wait_with_a_full_kv_cache_is_until_enough_is_free() -> None:
    engine = LlmEngine(*small(100))
    engine.load(0.0, "m0")
    engine.advance(10.0)
    for i, output in enumerate((10, 20, 30)):
        engine.submit(10.0, f"r{i}", "m0", 300 - output, output)
    estimate = engine.snapshot(12.0).wait_s
    engine.submit(12.0, "new", "m0", 290, 10)
    started = times(drain(engine), Started)["new"]
    assert 12.0 + estimate == pytest.approx(started)


def test_the_wait_behind_more_than_what_runs_counts_on_the_mean_rate() -> None:
    engine = LlmEngine(*small(100), slots=2)
    engine.load(0.0, "m0")
    engine.advance(10.0)
    for i in range(8):
        engine.submit(10.0, f"r{i}", "m0", 1, 5)
    estimate = engine.snapshot(10.0).wait_s
    engine.submit(10.0, "new", "m0", 1, 5)
    assert times(drain(engine), Started)["new"] == 30.0  # four pairs of 5 s are before it
    assert estimate == pytest.approx(17.5)  # 7 of the 8 must be gone, at 2 in 5 s
