"""A run made up for tests of results and reports: events as the roles would tell them, from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from roles import tell

from sllm.engine.base import EngineUsage
from sllm.observe.recorder import Recorder
from sllm.observe.results import FleetFigures, Invariants, ReportFigures, RunInfo, WorkerFigures, make_results
from sllm.protocol.events import (
    DuplicateResponse,
    Event,
    FirstTokenReceived,
    ModelLoaded,
    ModelLoadStarted,
    RequestAdmitted,
    RequestCompleted,
    RequestFailed,
    RequestRejected,
    RequestRouted,
    RequestSent,
    WorkerStateChanged,
)

RUN = RunInfo("virtual", "centralized", 4, "startup_time", 1, 60.0, 1.25, {"arrivals": "poisson", "rate_per_s": 1 / 3, "models": ["m0", "m1"]})
REPORTS = ReportFigures(240, 236, {"replayed": 1, "bad_tag": 2})


def events(count: int, seed: int = 1, *, workers: int = 4, duration_s: float = 60.0, trouble: bool = True) -> list[Event]:
    """`count` requests in order of time, a few of which fail, are rejected or stay in flight if there is to be trouble."""
    return sorted(_unordered(count, seed, workers, duration_s, trouble), key=lambda event: event.at)


def _unordered(count: int, seed: int, workers: int, duration_s: float, trouble: bool) -> Iterator[Event]:
    rng = Random(seed)
    for index in range(workers):
        yield WorkerStateChanged(0.001 * index, f"worker-{index}", 1, "", "READY", "reported")
    arrivals = sorted(rng.random() * duration_s for _ in range(count))
    for index, at in enumerate(arrivals):
        request_id, model, worker_id = f"r{index}", f"m{rng.randrange(3)}", f"worker-{rng.randrange(workers)}"
        yield RequestSent(at, request_id, model)
        fate = rng.random() if trouble else 1.0
        if fate < 0.01:
            yield RequestRejected(at + 0.001, request_id, model, at, "SATURATED")
            continue
        cold = rng.random() < 0.05
        yield RequestRouted(at + 0.001, request_id, model, worker_id, "cold_start" if cold else "serve", 0.1, rng.uniform(1e-5, 3e-5))
        yield RequestAdmitted(at + 0.002, worker_id, request_id, model)
        load_s = rng.uniform(1.0, 4.0) if cold else 0.0
        if cold:
            yield ModelLoadStarted(at + 0.002, worker_id, model)
            yield ModelLoaded(at + 0.002 + load_s, worker_id, model, "disk", load_s)
        if fate < 0.02:
            yield RequestFailed(at + 9.0, request_id, model, at, "not finished within 9 s")
            continue
        if fate < 0.03:
            continue
        queue_wait_s = load_s + rng.expovariate(20.0)
        ttft_s = 0.003 + queue_wait_s + rng.uniform(0.02, 0.2)
        tokens = rng.randrange(1, 400)
        tpot_s = rng.uniform(0.01, 0.03) if tokens > 1 else 0.0
        e2e_s = ttft_s + tpot_s * (tokens - 1)
        yield FirstTokenReceived(at + ttft_s, request_id, ttft_s, worker_id)
        yield RequestCompleted(
            at + e2e_s, request_id, model, worker_id, "cold_start" if cold else "serve", at, ttft_s, e2e_s, tpot_s, queue_wait_s, load_s, 512, tokens, 1, 0
        )
        if trouble and rng.random() < 0.002:
            yield DuplicateResponse(at + e2e_s + 1.0, request_id, "worker-0")


def recorded(count: int = 2000, seed: int = 1, **options: Any) -> Recorder:
    recorder = Recorder()
    for event in events(count, seed, **options):
        tell(recorder, event)
    return recorder


def fleet_of(*busy_s: float, measured_s: float = 75.0, **more: Any) -> FleetFigures:
    """Workers of ten slots and 100 bytes, half of them for weights, that used two slots and five bytes of KV cache while they were busy."""
    workers = [
        WorkerFigures(f"worker-{index}", "h100-80g", 10, 100, EngineUsage(one_s, 2.0 * one_s, 5.0 * one_s, 50.0 * measured_s))
        for index, one_s in enumerate(busy_s)
    ]  # fmt: skip
    return FleetFigures(4, workers, measured_s, **more)


def results_of(recorder: Recorder, violations: tuple[str, ...] = (), run: RunInfo = RUN) -> dict[str, Any]:
    return make_results(recorder, run, fleet_of(10.0, 20.0, 15.0, 15.0), REPORTS, Invariants(12, violations))
