"""The engine that jumps equals one that goes token by token, rescans everything at every step and keeps no sums."""

from __future__ import annotations

import dataclasses
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from sllm.engine import Evicted, Finished, FirstTokenOut, LlmEngine, Loaded, Started
from sllm.models.catalogue import Catalog
from sllm.models.cost import load_s, step_cost, step_s
from sllm.models.model import DISK, HOST, REMOTE, Hardware, MeasuredStep, Model, StepCost


class Job:
    """A request of the naive engine."""

    def __init__(self, age: int, name: str, model: str, prompt: int, output: int, kv: int) -> None:
        self.age, self.name, self.model, self.prompt, self.output, self.kv = age, name, model, prompt, output, kv
        self.done = 0  # tokens
        self.cancelled = False


class Naive:
    """The rules of `sllm.engine.batching` and `sllm.engine.residency`, followed literally: one step after the other."""

    def __init__(self, catalog: Catalog, hardware: Hardware, keep_alive_s: float, slots: int, prefill_max: int) -> None:
        self.catalog, self.hardware, self.keep_alive_s, self.slots, self.prefill_max = catalog, hardware, keep_alive_s, slots, prefill_max
        self.capacity = hardware.usable_gpu_bytes
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self.loaded: dict[str, float] = {}  # model -> when it was last used
        self.load_queue: list[tuple[int, str]] = []
        self.load: tuple[float, str, int, float] | None = None
        self.age = 0
        self.round_end = inf
        self.in_round = False
        self.hold = self.blocked = inf
        self.host: list[str] = []
        self.disk = []
        room = hardware.disk_bytes
        for model in catalog.models.values():
            if model.size_bytes <= room:
                room -= model.size_bytes
                self.disk.append(model.name)
        self.notes: list[Any] = []
        self.busy = 0.0
        self.steps = 0

    def size(self, names: Any) -> int:
        return sum(self.catalog[name].size_bytes for name in names)

    def weights(self) -> int:
        return self.size(self.loaded) + (self.size([self.load[1]]) if self.load else 0)

    def kv(self) -> int:
        return sum(job.kv for job in self.running)

    def ready(self) -> list[Job]:
        return sorted((job for job in self.waiting if job.model in self.loaded), key=lambda job: job.age)

    def idle(self) -> list[str]:
        used = {job.model for job in self.running + self.waiting}
        return sorted((name for name in self.loaded if name not in used), key=lambda name: self.loaded[name])

    def tier(self, name: str) -> int:
        return HOST if name in self.host else DISK if name in self.disk else REMOTE

    def evict(self, name: str, now: float) -> None:
        del self.loaded[name]
        self.notes.append(Evicted(now, name, self.tier(name)))
        mine = [job.age for job in self.waiting if job.model == name]
        if mine:
            if min(mine) == self.blocked:
                self.blocked = inf
            self.age += 1
            self.load_queue.append((self.age, name))

    def make_room(self, missing: int, age: int, now: float) -> bool:
        oldest: dict[str, int] = {}
        for job in self.ready():
            oldest.setdefault(job.model, job.age)
        serving = {job.model for job in self.running}
        held = sorted((name for name, first in oldest.items() if name not in serving and first > age), key=lambda name: -oldest[name])
        victims = self.idle()
        if self.size(victims) < missing:
            victims += held
        if self.size(victims) < missing:
            return False
        for name in victims:
            if missing > 0:
                missing -= self.size([name])
                self.evict(name, now)
        return True

    def start_load(self, now: float) -> bool:
        if self.load or not self.load_queue:
            return False
        age, name = self.load_queue[0]
        if self.blocked < age:
            return False
        missing = self.size([name]) - (self.capacity - self.weights() - self.kv())
        if missing > 0 and not self.make_room(missing, age, now):
            self.hold = age
            return False
        self.load_queue.pop(0)
        self.hold = inf
        tier = self.tier(name)
        takes = load_s(self.catalog[name], self.hardware, tier)
        self.load = (now + takes, name, tier, takes)
        return True

    def keep(self, names: list[str], name: str, room: int) -> None:
        if name in names:
            names.remove(name)
        if self.size([name]) <= room:
            while self.size([*names, name]) > room:
                names.pop(0)
            names.append(name)

    def finish_load(self, now: float) -> None:
        assert self.load
        _, name, tier, takes = self.load
        self.load = None
        self.keep(self.host, name, self.hardware.host_memory_bytes)
        if self.size(self.catalog.names) > self.hardware.disk_bytes:
            self.keep(self.disk, name, self.hardware.disk_bytes)
        self.loaded[name] = now
        self.notes.append(Loaded(now, name, tier, takes))
        self.start_load(now)
        self.look(now)

    def look(self, now: float) -> None:
        if not self.in_round and self.ready():
            self.round_end = now

    def boundary(self, now: float) -> None:
        if self.in_round:
            self.notes += [FirstTokenOut(now, job.name) for job in self.running if job.done == 0 and not job.cancelled]
            for job in self.running:
                job.done += 1
            for job in sorted(self.running, key=lambda job: job.age):
                if job.done == job.output:
                    self.running.remove(job)
                    self.loaded.pop(job.model)
                    self.loaded[job.model] = now  # the order tells which was used last when times are equal
                    if not job.cancelled:
                        self.notes.append(Finished(now, job.name, job.output))
        self.blocked = inf
        self.admit(now)
        while self.start_load(now):
            self.admit(now)
        self.in_round = bool(self.running)
        self.round_end = inf
        if self.running:
            duration = 0.0
            for name in self.catalog.names:
                mine = [job for job in self.running if job.model == name]
                if mine:
                    new = sum(1 if job.done else job.prompt for job in mine)
                    duration += step_s(step_cost(self.catalog[name], self.hardware), new, sum(job.prompt + job.done for job in mine), len(mine))
            self.round_end = now + duration
            self.busy += duration
            self.steps += 1

    def admit(self, now: float) -> None:
        while ready := self.ready():
            job = ready[0]
            fresh = [other.prompt for other in self.running if other.done == 0]
            if job.age > self.hold or len(self.running) >= self.slots or (fresh and sum(fresh) + job.prompt > self.prefill_max):
                return
            missing = job.kv - (self.capacity - self.weights())
            if missing > 0:
                self.make_room(missing, job.age, now)
            if self.kv() + job.kv > self.capacity - self.weights():
                self.blocked = job.age
                return
            self.waiting.remove(job)
            self.running.append(job)
            self.notes.append(Started(now, job.name))

    def run(self, now: float) -> None:
        while True:
            expiry = min((self.loaded[name] + self.keep_alive_s for name in self.idle()), default=inf)
            load_end = self.load[0] if self.load else inf
            at = min(load_end, self.round_end, expiry)
            if at > now:
                return
            if self.round_end == at:
                self.boundary(at)
            elif load_end == at:
                self.finish_load(at)
            else:
                for name in self.idle():
                    if self.loaded[name] + self.keep_alive_s <= at:
                        self.evict(name, at)
                self.start_load(at)
                self.look(at)

    def submit(self, now: float, name: str, model: str, prompt: int, output: int) -> None:
        self.age += 1
        self.waiting.append(Job(self.age, name, model, prompt, output, (prompt + output) * self.catalog[model].kv_bytes_per_token))
        if model not in self.loaded and not (self.load and self.load[1] == model) and model not in [name for _, name in self.load_queue]:
            self.age += 1
            self.load_queue.append((self.age, model))
            self.start_load(now)
        self.look(now)


    def cancel(self, now: float, name: str) -> bool:
        for job in self.running:
            if job.name == name and not job.cancelled:
                job.cancelled, job.output = True, job.done + 1
                return True
        for job in self.waiting:
            if job.name == name:
                self.waiting.remove(job)
                if job.age == self.blocked:
                    self.blocked = inf
                if job.model in self.idle():
                    self.loaded.pop(job.model)
                    self.loaded[job.model] = now
                self.start_load(now)
                self.look(now)
                return True
        return False


def fleet_of_one(rng: Random, exact: bool) -> tuple[Catalog, Hardware]:
    """Three to six models that do not all fit. `exact`: every time is a multiple of 2**-20 s, so that sums are exact and ties happen."""

    def number(low: float, high: float) -> float:
        value = rng.uniform(low, high)
        return max(1, round(value * 2**20)) / 2**20 if exact else value

    models = {}
    for i in range(rng.randint(3, 6)):
        k_s = rng.choice((0.0, number(1e-7, 1e-5)))
        cost = StepCost(number(0.004, 0.03), number(0.001, 0.02), number(1e-5, 3e-4), k_s, number(0.0, 0.02), number(0.0, 1e-3))
        if exact:
            cost = StepCost(0.25, 0.125, 2**-9, rng.choice((0.0, 2**-16)), rng.choice((0.0, 0.25)), rng.choice((0.0, 2**-8)))
        models[f"m{i}"] = Model(f"m{i}", rng.randint(100, 400), rng.choice((0, 1, 1, 2)), 1, (MeasuredStep("box", cost),))
    hardware = Hardware(
        "box",
        gpu_memory_bytes=rng.randint(1200, 2500),
        host_memory_bytes=rng.randint(0, 1500),
        disk_bytes=rng.choice((700, 10_000)),
        pcie_bytes_per_s=2.0**9,
        disk_bytes_per_s=2.0**8,
        network_bytes_per_s=2.0**6,
        gpu_bytes_per_s=1.0,
        gpu_flops_per_s=1.0,
        layer_overhead_s=0.0,
        init_s=0.25 if exact else rng.uniform(0.0, 0.3),
    )
    return Catalog(models), hardware


def workload(rng: Random, catalog: Catalog, hardware: Hardware, exact: bool) -> list[tuple[float, str, str, int, int]]:
    jobs = []
    at = 0.0
    gap_s = rng.choice((0.02, 0.3, 3.0))
    for i in range(rng.randint(1, 60)):
        step_s = rng.expovariate(1 / gap_s)
        at += round(step_s * 4) / 4 if exact else step_s  # exact: at the very ends of rounds, and several at once
        model = catalog[rng.choice(catalog.names)]
        prompt, output = min(int(rng.expovariate(1 / 100)), 900), 1 + min(int(rng.expovariate(1 / 40)), 400)
        if model.size_bytes + (prompt + output) * model.kv_bytes_per_token <= hardware.usable_gpu_bytes:
            jobs.append((at, f"r{i}", model.name, prompt, output))
    return jobs


def compare(seed: int, exact: bool) -> tuple[int, int]:
    rng = Random(seed)
    catalog, hardware = fleet_of_one(rng, exact)
    keep_alive_s = rng.choice((inf, inf, 2.0, 0.5 if exact else 0.37))
    slots, prefill_max = rng.choice((1, 3, 8, 256)), rng.choice((64, 300, 2048))
    naive = Naive(catalog, hardware, keep_alive_s, slots, prefill_max)
    engine = LlmEngine(catalog, hardware, keep_alive_s=keep_alive_s, slots=slots, prefill_tokens_max=prefill_max)
    notes: list[Any] = []
    jobs = workload(rng, catalog, hardware, exact)
    now = -inf
    cancelled = 0
    cancel_share = rng.choice((0.0, 0.3))
    for job in jobs:
        if job[0] != now:
            now = job[0]
            while rng.random() < 0.5 and (at := engine.next_at) <= now and at < inf:
                notes += engine.advance(at)
            naive.run(now)
        if rng.random() < 0.2:
            engine.snapshot(now)  # like advance, it lets a round begin that was waiting for others to arrive at this instant
            naive.run(now)
        engine.submit(*job)
        naive.submit(*job)
        if rng.random() < cancel_share:
            naive.run(now)
            name = rng.choice(jobs)[1]
            here = engine.cancel(now, name)
            assert here == naive.cancel(now, name)
            cancelled += here
    while (at := engine.next_at) < inf:
        notes += engine.advance(at)
        if rng.random() < 0.05:
            assert all(value >= 0 for value in engine.snapshot(at).values()[:4])
        now = at
    naive.run(now * (1 + 1e-9) + 1e-9)
    assert [(type(x), x.values()[1]) for x in notes] == [(type(x), x.values()[1]) for x in naive.notes]
    for got, want in zip(notes, naive.notes, strict=True):
        assert got.values()[2:] == want.values()[2:]
        assert got.at == want.at if exact else got.at == pytest.approx(want.at, rel=1e-9, abs=1e-12)
    assert sum(isinstance(x, Finished) for x in notes) == len(jobs) - cancelled
    assert engine.usage(now).busy_s == pytest.approx(naive.busy, rel=1e-9, abs=1e-12)
    snapshot = engine.snapshot(now)
    assert (snapshot.running, snapshot.waiting, snapshot.kv_used, snapshot.wait_s) == (0, 0, 0.0, 0.0)
    assert snapshot.gpu_models == tuple(sorted(naive.loaded))
    assert snapshot.host_models == tuple(sorted(naive.host))
    assert snapshot.disk_complete or snapshot.disk_models == tuple(sorted(naive.disk))
    return len(notes), naive.steps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_closed_form_equals_token_by_token(seed: int) -> None:
    note(f"seed {seed}")
    compare(seed, exact=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_closed_form_equals_token_by_token_bit_for_bit_with_ties(seed: int) -> None:
    note(f"seed {seed}")
    compare(seed, exact=True)


def test_cost_follows_changes_not_tokens() -> None:
    """A long answer alone: two events, however many tokens."""
    catalog = Catalog.demo(1)
    hardware = dataclasses.replace(Catalog.demo(1).get_hardware("h100-80g"), init_s=0.0)
    engine = LlmEngine(catalog, hardware)
    engine.load(0.0, catalog.names[0])
    engine.advance(5.0)
    engine.submit(10.0, "r", catalog.names[0], 10_000, 100_000)
    events = 0
    while (at := engine.next_at) < inf:
        engine.advance(at)
        events += 1
    assert events == 3  # the start, the first token, the last one
