"""Fleets with several kinds of hardware: how they are written, and that each worker has its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import configuration, silent
from sllm.models.catalogue import Catalog
from sllm.observe.report.json import validate_results
from sllm.observe.report.table import render_table
from sllm.protocol.errors import UsageError
from sllm.run.assemble import default_rate
from sllm.run.hardware_mix import hardware_of_workers, parse_mix
from sllm.run.live import LiveRun
from sllm.run.run import Run
from sllm.run.system import System
from sllm.run.virtual import VirtualRun
from sllm.workload import Request, write_recorded

FITS_NOWHERE = '[model.giant]\npreset = "llama-2-70b"\n[model.small]\npreset = "opt-6.7b"\n'


def test_a_mix_names_each_kind_with_its_count() -> None:
    assert parse_mix("h100-80g") == {"h100-80g": 0}
    assert parse_mix("h100-80g:3, a5000-24g:2") == {"h100-80g": 3, "a5000-24g": 2}
    assert hardware_of_workers("a:2,b:1", 3) == ["a", "a", "b"]
    assert hardware_of_workers("a", 3) == ["a", "a", "a"]


@pytest.mark.parametrize("text", ["a:3,b", "a:3,b:", "a:3,:2", "a:0,b:2", "a:-1,b:2", "a:x,b:2", "a:3,", ",", "a:1,a:2", "a:1.5,b:1", "a:0"])
def test_a_mix_that_says_nothing_clear_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--hardware"):
        parse_mix(text)


@pytest.mark.parametrize("count", ["1.5", "99999999999", "0", "-1", "+1", "x", ""])
def test_a_wrong_count_of_known_hardware_is_called_that(count: str) -> None:
    with pytest.raises(UsageError, match=r"is not NAME:COUNT with a whole number from 1 to 1000000"):
        hardware_of_workers(f"h100-80g:{count}", 3)


def test_counts_that_do_not_make_the_fleet_are_refused() -> None:
    with pytest.raises(UsageError, match="sum to 5, but the fleet has 6 workers"):
        System(configuration(workers=6, hardware="h100-80g:3,a5000-24g:2"), wire=False)


@pytest.mark.parametrize("kind", [VirtualRun, LiveRun])
def test_each_worker_has_its_own_hardware(kind: type[Run]) -> None:
    speedup = 20.0 if kind is LiveRun else 1.0
    config = configuration(workers=5, hardware="h100-80g:3,a5000-24g:2", duration_s=20.0, rate_per_s=2.0, speedup=speedup)
    run = kind(config, silent(virtual=kind is VirtualRun), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    rows = run.system.tracker.fleet.rows
    assert [rows[f"worker-{i}"].hardware.name for i in range(5)] == ["h100-80g"] * 3 + ["a5000-24g"] * 2
    results = run.results()
    assert validate_results(results) == []
    assert results["run"]["hardware"] == {"h100-80g": 3, "a5000-24g": 2}
    assert results["requests"]["completed"] == results["requests"]["sent"] > 0
    assert "5 workers of 3 × h100-80g and 2 × a5000-24g" in render_table(results)


def test_the_default_rate_of_a_mixed_fleet_lies_between_those_of_its_kinds() -> None:
    catalog = Catalog.demo(8)
    slow, mixed, fast = (default_rate(configuration(workers=5, hardware=mix), catalog) for mix in ("a5000-24g", "h100-80g:3,a5000-24g:2", "h100-80g"))
    assert mixed == pytest.approx(0.6 * fast + 0.4 * slow, rel=0.05)


def test_a_model_that_fits_no_worker_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text(FITS_NOWHERE)

    def start(**changes: Any) -> Run:
        return VirtualRun(configuration(workers=5, model_catalog=str(path), **changes), silent(), io.StringIO())

    for hardware in ("h100-80g", "a5000-24g:2,h100-80g:3"):
        with pytest.raises(UsageError, match=r"'giant' has 140\.0 GB .* h100-80g, has room for less than 72\.0 GB"):
            start(hardware=hardware)
    start(hardware="a5000-24g:4,h100-80g-tp4:1")
    start(engine="queue")
    recording = tmp_path / "small.jsonl"
    write_recorded(str(recording), [Request(0.5, "r0", "small", 10, 10)])
    start(trace=str(recording)).close()
    path.write_text('[model.small]\npreset = "opt-6.7b"\n[model.giant]\npreset = "llama-2-70b"\n')
    start(models=1)
