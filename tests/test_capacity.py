"""The closed formula of saturation: it follows what the fleet is made of, and it comes near what experiments/saturation.py finds."""

from __future__ import annotations

import time

import pytest

from experiments.harness import Simulation, configuration
from sllm.models.capacity import saturation_rate
from sllm.models.catalogue import Catalog
from sllm.models.presets import HARDWARE, MODELS
from sllm.run.assemble import build_catalog, build_workload, default_rate

H100 = HARDWARE["h100-80g"]
LENGTHS = 1155.0, 211.0


def formula(**changes: object) -> float:
    config = configuration(**changes)
    return 2.0 * default_rate(config, build_catalog(config))


@pytest.mark.parametrize(("workers", "measured_per_s"), [(5, 38.3), (20, 261.3), (100, 1487.0)])
def test_it_comes_within_a_quarter_of_what_was_measured(workers: int, measured_per_s: float) -> None:
    """Measured by `experiments/saturation.py --workers N`; docs/compare.md has the figures."""
    assert formula(workers=workers) == pytest.approx(measured_per_s, rel=0.25)


@pytest.mark.parametrize(("workers", "measured_per_s"), [(1, 1.9), (2, 5.0), (3, 11.0)])
def test_fleets_of_fewer_workers_than_models_come_within_two_fifths(workers: int, measured_per_s: float) -> None:
    """Measured by `experiments/saturation.py --workers N --measure 60 --seeds 2`."""
    assert formula(workers=workers) == pytest.approx(measured_per_s, rel=0.4)


def test_it_takes_less_than_fifty_milliseconds() -> None:
    config = configuration(workers=100_000, models=1000)
    catalog = build_catalog(config)
    default_rate(config, catalog)  # costs of models are kept
    took_s = []
    for _ in range(5):
        began = time.perf_counter()
        default_rate(config, catalog)
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.05


def test_one_model_on_one_worker_by_hand() -> None:
    """OPT-6.7B on an H100: 58.6 GB for KV cache of 512 KiB a token are 81 requests of 1366 tokens; their round, prompts included, and 211 rounds each."""
    model = Catalog.demo(2)["opt-6.7b"]
    running = 58.6e9 / (1366 * 512 * 1024)
    new_tokens, context = running * (1 + 1155 / 211), running * (1155 + 211 / 2)
    weights_s, token_s = 13.4e9 / (0.926 * 3.35e12), 13.4e9 / (0.73 * 989.4e12)
    round_s = weights_s - token_s + token_s * new_tokens + 524288 / (0.89 * 3.35e12) * context + 1.15e-3 + 32 * 0.0096e-3 + 5e-6 * running
    assert saturation_rate({H100: 1}, [(model, 1.0)], *LENGTHS) == pytest.approx(0.82 * running / (211 * round_s), rel=1e-3)


def test_more_of_anything_serves_more() -> None:
    assert formula(workers=10) > 2.0 * formula(workers=5)  # and there are fewer models to a worker
    assert formula(workers=5, hardware="h100-80g-tp2") > formula(workers=5)
    assert formula(workers=5, slots=8) < formula(workers=5, slots=64) < formula(workers=5)
    assert formula(workers=5, models=2) > formula(workers=5)


def test_loads_count_where_models_do_not_all_fit() -> None:
    at_hand, too_many = formula(workers=5, models=16, zipf=0.0), formula(workers=5, models=200, zipf=0.0)
    assert too_many < 0.5 * at_hand


def test_a_fleet_that_can_hold_nothing_serves_nothing() -> None:
    assert saturation_rate({HARDWARE["a5000-24g"]: 3}, [(Catalog.demo(1)["llama-3.1-8b"], 1.0)], *LENGTHS) > 0.0
    assert saturation_rate({HARDWARE["a5000-24g"]: 3}, [(MODELS["llama-2-70b"], 1.0)], *LENGTHS) == 0.0


def test_the_default_run_has_hundreds_of_requests_with_cold_starts_and_queues_and_completes_them() -> None:
    results = Simulation(configuration(workers=5)).complete()
    assert results["requests"]["sent"] >= 300
    assert results["requests"]["completed"] == results["requests"]["sent"]
    assert results["actions"]["cold_start"] >= 5
    assert results["queue_wait_s"]["max"] > 0.5  # the first of each model wait for it


def test_a_live_run_is_bounded_by_what_one_process_passes_on() -> None:
    config = configuration(workers=1000, speedup=4.0)
    catalog = build_catalog(config)
    with build_workload(config, catalog, live=True) as live, build_workload(config, catalog) as virtual:
        assert live.spec.rate_per_s == 50.0
        assert virtual.spec.rate_per_s == default_rate(config, catalog) > 5000.0
    with build_workload(configuration(workers=1000, rate_per_s=700.0), catalog, live=True) as asked:
        assert asked.spec.rate_per_s == 700.0
