"""Busy time: a question that changes nothing, exact whatever befalls a host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from test_engine_closed_form import fleet_of_one, workload

from experiments.harness import Simulation, configuration
from sllm.engine import LlmEngine, QueueEngine
from sllm.engine.base import Finished, Started
from sllm.observe.busy import BusyTime
from sllm.protocol.events import WorkerDrained
from sllm.protocol.node import Node
from sllm.virtual.faults import Fault, Schedule
from sllm.virtual.host import Host
from sllm.virtual.network import Network
from sllm.virtual.world import World

# --- engines ------------------------------------------------------------------------------------------------------------------------


def llm(seed: int) -> Callable[[], Any]:
    rng = Random(seed)
    catalog, hardware = fleet_of_one(rng, exact=False)
    return partial(LlmEngine, catalog, hardware, keep_alive_s=rng.choice((inf, 2.0)), slots=rng.choice((1, 3, 256)), prefill_tokens_max=300)


def queue(seed: int) -> Callable[[], Any]:
    rng = Random(seed)
    slots, service, load_s = rng.choice((1, 2, 5)), rng.choice(("exponential", "deterministic")), rng.choice((0.0, 0.5))
    return lambda: QueueEngine(slots, service, 0.7, Random(seed), models=("m0", "m1"), keep_alive_s=2.0, load_s=load_s)


def served_s(notes: list[Any], now: float, slots: int) -> float:
    """What was told, added up: the time with anything running, or for `slots` above 0 the mean over slots."""
    changes = sorted([(x.at, 1) for x in notes if isinstance(x, Started)] + [(x.at, -1) for x in notes if isinstance(x, Finished)])
    total, running, since = 0.0, 0, 0.0
    for at, change in [*changes, (now, 0)]:
        total += (at - since) * (running / slots if slots else running > 0)
        running, since = running + change, at
    return total


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((llm, queue)), st.integers(0, 2**32))
def test_asking_an_engine_changes_nothing(kind: Callable[[int], Callable[[], Any]], seed: int) -> None:
    note(f"seed {seed}")
    make = kind(seed)
    asked, alone = make(), make()
    rng = Random(f"{seed}/questions")
    jobs = workload(rng, *fleet_of_one(Random(seed), exact=False), exact=rng.random() < 0.5)
    notes: list[Any] = []
    now, said_s = 0.0, 0.0
    while jobs or alone.next_at < inf:
        due = min(jobs[0][0] if jobs else inf, alone.next_at)
        for _ in range(rng.choice((0, 0, 1, 3))):
            now = rng.uniform(now, max(now, due + rng.choice((0.0, 0.0, 0.3))))  # sometimes later than the engine was let run
            answer_s = asked.usage(now).busy_s
            assert answer_s == asked.usage(now).busy_s
            assert said_s - 1e-9 <= answer_s <= now + 1e-9
            said_s = answer_s
        now = max(now, due)
        if rng.random() < 0.8 or not jobs:
            told = alone.advance(now)
            assert asked.advance(now) == told
            notes += told
            slots = 0 if kind is llm else asked.snapshot(now).slots
            alone.snapshot(now)
            assert asked.usage(now).busy_s == alone.usage(now).busy_s == pytest.approx(served_s(notes, now, slots), rel=1e-9, abs=1e-9)
        while jobs and jobs[0][0] <= now:
            _, name, model, prompt, output = jobs.pop(0)
            for engine in (asked, alone):
                engine.submit(now, name, model if kind is llm else f"m{len(name) % 2}", prompt, output)
            asked.usage(now)
        assert asked.snapshot(now) == alone.snapshot(now)
        assert asked.next_at == alone.next_at
    assert sum(isinstance(x, Started) for x in notes) == sum(isinstance(x, Finished) for x in notes)


# --- hosts --------------------------------------------------------------------------------------------------------------------------


class Server(Node):
    """Serves one request for a hundred seconds of its own, from the moment it is there."""

    def __init__(self, incarnation: int, now: float) -> None:
        super().__init__("worker-1", incarnation)
        self.engine = QueueEngine(1, "deterministic", 100.0, Random(1))
        self.engine.submit(now, "r", "m", 1, 1)
        self.wake_at = self.engine.next_at

    def handle_timer(self, now: float) -> None:
        self.engine.advance(now)
        self.wake_at = self.engine.next_at


def server() -> tuple[World, Host, BusyTime]:
    world = World(1, Network())
    busy = BusyTime(world)
    host = world.add(Server(1, 0.0), ("worker-1", 1), Server)
    world.run(10.0)
    busy.begin()
    return world, host, busy


def test_a_worker_that_crashes_half_way_was_busy_until_then() -> None:
    world, host, busy = server()
    world.call_at(16.0, host.crash)
    world.run(20.0)
    assert busy.busy_s("worker-1") == 6.0
    world.call_at(30.0, host.restart)
    world.run(32.5)
    assert busy.busy_s("worker-1") == busy.busy_s("worker-1") == 6.0 + 2.5
    world.call_at(33.0, host.restart)
    world.run(200.0)
    assert busy.busy_s("worker-1") == 6.0 + 3.0 + 100.0, "it crashed when it was told to start again; the next life finished what it had"


@pytest.mark.parametrize("rate", [0.25, 1.0, 3.0])
def test_time_is_the_worlds_whatever_the_clock_shows(rate: float) -> None:
    world, host, busy = server()
    world.call_at(12.0, lambda: host.set_clock_rate(rate))
    world.run(14.0)
    assert busy.busy_s("worker-1") == pytest.approx(4.0)
    world.call_at(20.0, lambda: host.set_clock_rate(1.0))
    world.run(25.0)
    assert busy.busy_s("worker-1") == pytest.approx(15.0)
    world.run(500.0)
    assert busy.busy_s("worker-1") == pytest.approx(10.0 + 100.0 - 20.0 - 8.0 * (rate - 1.0)), "what its hundred seconds took"


def test_one_whose_place_was_taken_is_not_counted_beside_its_successor() -> None:
    world, host, busy = server()
    world.call_at(15.0, host.freeze)
    world.call_at(20.0, lambda: host.supplant().thaw())
    world.run(40.0)
    assert busy.busy_s("worker-1") == 30.0
    world.hosts["worker-1~1"].crash()
    assert busy.busy_s("worker-1") == 30.0


def test_what_a_worker_still_runs_when_it_has_drained_is_over() -> None:
    world, host, busy = server()

    def drain() -> None:
        assert host.node is not None
        host.node.events.append(WorkerDrained(world.now, "worker-1"))
        host.touch()

    world.call_at(13.0, drain)
    world.run(20.0)
    assert busy.busy_s("worker-1") == 3.0
    host.restart()
    world.run(21.0)
    assert busy.busy_s("worker-1") == 4.0


def test_nobody_is_busy_for_longer_than_there_was_time() -> None:
    """A frozen host makes up for much when it thaws, by a clock that ran fast meanwhile and is right again."""
    world, host, busy = server()
    node: Any = host.node
    node.engine = QueueEngine(1, "deterministic", 1.0, Random(1))
    for number in range(100):
        node.engine.submit(10.0, f"r{number}", "m", 1, 1)
    node.wake_at = node.engine.next_at
    host.refresh()
    busy.begin()
    world.call_at(10.5, host.freeze)
    world.call_at(20.0, host.thaw)
    world.call_at(10.6, lambda: host.set_clock_rate(5.0))
    world.call_at(19.0, lambda: host.set_clock_rate(1.0))
    world.run(19.5)
    assert busy.busy_s("worker-1") == pytest.approx(0.6 + 0.4 / 5.0), "the first of them"
    world.run(21.0)
    assert node.engine.usage(host.clock.node_time(21.0)).busy_s > 40.0
    assert busy.busy_s("worker-1") == 11.0


# --- runs ---------------------------------------------------------------------------------------------------------------------------


class Sampled(Simulation):
    """Looks at every worker a hundred times a second, for itself."""

    STEP_S = 0.01

    def begin(self) -> None:
        super().begin()
        self.sampled = {name: [0.0] * 4 for name in self.system.workers}
        self.world.every(self.STEP_S, self.sample)

    def sample(self) -> None:
        for name, sums in self.sampled.items() if not self.meter.has_ended else ():
            node: Any = self.world.hosts[name].node
            if node is None or node.drained:
                continue
            seen = node.engine.snapshot(self.world.hosts[name].clock.node_time(self.world.now))
            room_bytes = node.engine.memory_bytes - node.engine._weights_bytes
            found = (seen.running > 0, seen.running, seen.kv_used * room_bytes, node.engine._weights_bytes)
            for place, value in enumerate(found):
                sums[place] += self.STEP_S * value


def test_what_is_in_use_after_faults_is_what_a_look_at_every_moment_finds() -> None:
    options: dict[str, Any] = {"hosts": ["random:1:worker-*"], "stagger": 0.0}
    faults = [Fault(6.0 + 3 * i, "crash", 2.0, options, "test") for i in range(5)]
    faults += [Fault(5.0, "slow", 9.0, {**options, "factor": 3.0}, "test"), Fault(8.0, "clock_drift", 9.0, {**options, "rate": 1.5}, "test")]
    faults.append(Fault(12.0, "drain", 4.0, options, "test"))
    config = configuration(workers=4, duration_s=30.0, rate_per_s=3.0, drain_timeout_s=1.0, engine_profile="splitwise")  # which is busy enough
    run = Sampled(config, schedule=Schedule(tuple(faults), "test"))
    results = run.complete()
    assert results["invariants"]["violations"] == []
    for used, sampled in zip(run.meter.used(0.0), run.sampled.values(), strict=True):
        busy_s, slot_s, kv_byte_s, weights_byte_s = used.values()
        assert busy_s == pytest.approx(sampled[0], abs=0.2)
        assert slot_s == pytest.approx(sampled[1], abs=0.05 * sampled[1] + 0.2)
        assert kv_byte_s == pytest.approx(sampled[2], rel=0.05)
        assert weights_byte_s == pytest.approx(sampled[3], rel=0.05)
    assert 0.5 < results["fleet"]["utilisation"] < 1.0


def test_occupancy_without_faults_is_what_a_look_at_every_moment_finds() -> None:
    run = Sampled(configuration(workers=3, duration_s=30.0, rate_per_s=6.0, slots=8))
    results = run.complete()
    sums = [sum(column) for column in zip(*run.sampled.values(), strict=True)]
    capacity_s = 3 * 8 * results["run"]["duration_s"]
    worker: Any = run.system.lives["worker-0"][0]
    engine = worker.engine
    room_byte_s = 3 * engine.memory_bytes * run.window_s - sums[3]
    assert results["fleet"]["slot_occupancy"] == pytest.approx(sums[1] / capacity_s, rel=0.02)
    assert results["fleet"]["kv_occupancy"] == pytest.approx(sums[2] / room_byte_s, rel=0.02)
    assert 0.0 < results["fleet"]["kv_occupancy"] < results["fleet"]["slot_occupancy"] < results["fleet"]["utilisation"]
    series, bin_s = results["series"], results["series"]["bin_s"]
    whole = [value for at_s, value in zip(series["at_s"], series["slot_occupancy"], strict=True) if at_s <= run.window_s and value is not None]
    assert sum(whole) * bin_s * 24 == pytest.approx(sums[1], rel=0.05)
