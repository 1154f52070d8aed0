"""The books of whole runs: what became of every load report."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from experiments.harness import Simulation, configuration, silent
from sllm.observe.report.json import validate_results
from sllm.observe.report.table import render_table
from sllm.protocol.events import RequestSent
from sllm.protocol.messages import LoadReport
from sllm.run.live import LiveRun
from sllm.virtual.faults import load_schedule

SCENARIOS = Path(__file__).parent.parent / "experiments" / "scenarios"


def balance(reports: dict[str, Any]) -> int:
    return int(reports["sent"] - reports["accepted"] - reports["lost"] - reports["under_way"] - sum(reports["rejected"].values()))


def virtual(scenario: str, *, wire: bool = False, link: dict[str, Any] | None = None) -> Simulation:
    config = configuration(workers=5, duration_s=30.0)
    return Simulation(config, wire=wire, schedule=load_schedule(str(SCENARIOS / f"{scenario}.toml"), 1), link=link)


@pytest.mark.parametrize("wire", [False, True])
def test_a_report_refused_for_its_time_is_rejected_not_lost(wire: bool) -> None:
    reports = virtual("clock-jump", wire=wire).complete()["reports"]
    assert reports["lost"] == balance(reports) == 0
    assert reports["rejected"].keys() == {"stale_time"}


@pytest.mark.parametrize("scenario", ["churn", "coordinator-restart", "flaky-network", "split-brain"])
def test_lost_is_what_was_lost_whatever_lost_it(scenario: str) -> None:
    run = virtual(scenario, link={"loss": 0.05, "duplicate": 0.1, "corrupt": 0.05, "reorder": 0.2, "reorder_extra_s": 1.0})
    reports = run.complete()["reports"]
    assert balance(reports) == 0
    assert (reports["lost"], reports["under_way"]) == (run.world.network.lost_by_kind[LoadReport], run.world.pending_of(LoadReport))
    assert reports["lost"] > 0
    assert run.world.network.duplicated_by_kind[LoadReport] > 0


@pytest.mark.parametrize("wire", [False, True])
def test_what_is_under_way_when_the_books_close_is_not_lost(wire: bool) -> None:
    run = Simulation(configuration(workers=5, duration_s=10.0, latency_ms=20_000.0), wire=wire)
    results = run.complete()
    assert validate_results(results) == []
    assert results["reports"]["lost"] == balance(results["reports"]) == 0
    assert results["reports"]["under_way"] == run.world.pending_of(LoadReport) > 0
    assert f"{results['reports']['under_way']:,} under way" in render_table(results)


def test_what_is_under_way_at_an_interrupt_is_not_lost() -> None:
    run = Simulation(configuration(workers=5, duration_s=1000.0, latency_ms=1000.0))
    run.world.bus.subscribe(lambda node, event: run.interrupt() if len(run.recorder.sent_at) == 20 else None, RequestSent)
    reports = run.complete()["reports"]
    assert reports["lost"] == balance(reports) == 0
    assert reports["under_way"] >= 5


def test_a_report_dropped_by_the_coordinator_shows_in_the_results() -> None:
    run = virtual("churn")
    make = run.system.make

    def make_deaf(name: str, incarnation: int, now: float, wall_offset_s: float = 0.0) -> Any:
        node = make(name, incarnation, now, wall_offset_s)
        if name == "coordinator":
            hear = node.handlers[LoadReport]
            node.handlers[LoadReport] = lambda envelope, addr, at: hear(envelope, addr, at) if envelope.sequence != 7 else None
        return node

    run.system.make = make_deaf  # type: ignore[method-assign]
    results = run.complete()
    assert balance(results["reports"]) > 0
    assert "'report-books' broken" in results["invariants"]["violations"][0]


def test_a_live_run_tells_reports_refused_for_their_time_from_those_not_heard() -> None:
    class OneClockJumps(LiveRun):
        def begin(self) -> None:
            super().begin()
            self.system.lives["worker-0"][0].wall_offset_s += 100.0

    config = dataclasses.replace(configuration(workers=2, duration_s=10.0, rate_per_s=2.0), speedup=20.0)
    run = OneClockJumps(config, silent(virtual=False), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    reports = run.results()["reports"]
    assert reports["lost"] == balance(reports) == 0
    assert reports["rejected"].keys() == {"stale_time"}
    assert reports["rejected"]["stale_time"] >= 8
