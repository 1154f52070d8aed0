"""A run conducts its fleet: requests come when the workload says, counted from the moment the fleet is up."""

from __future__ import annotations

import dataclasses
import io

import pytest

from experiments.harness import configuration, silent
from sllm.protocol.events import RequestSent
from sllm.run.live import LiveRun
from sllm.run.run import Run
from sllm.run.virtual import VirtualRun

ROUNDING_S = 1e-9


@pytest.mark.parametrize("kind", [LiveRun, VirtualRun])
def test_requests_come_when_the_workload_says(kind: type[Run]) -> None:
    config = dataclasses.replace(configuration(workers=2, duration_s=10.0, rate_per_s=3.0), speedup=10.0 if kind is LiveRun else 1.0)
    run = kind(config, silent(virtual=kind is VirtualRun), io.StringIO())
    due_s = [request.arrival_s for request in run.system.workload()]
    try:
        run.conduct()
    finally:
        run.close()
    came_s = [at - run.began_s for at in run.recorder.sent_at]
    assert run.began_s > 0.0, "it took a while until every worker had reported"
    assert len(came_s) == len(due_s) > 10
    if kind is VirtualRun:
        assert came_s == pytest.approx(due_s)
    else:
        assert all(came >= due - ROUNDING_S for came, due in zip(came_s, due_s, strict=True)), "a machine may be late, never early"
    assert run.window_s >= due_s[-1] - ROUNDING_S


@pytest.mark.parametrize("kind", [LiveRun, VirtualRun])
def test_the_workers_going_home_at_the_end_are_no_event_of_the_run(kind: type[Run]) -> None:
    """The plot of workers by state shows what befell the fleet while there was something to do."""
    config = configuration(workers=3, duration_s=5.0, rate_per_s=3.0, speedup=10.0 if kind is LiveRun else 1.0)
    run = kind(config, silent(virtual=kind is VirtualRun), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    assert run.recorder.fleet.points[-1][1] == {"READY": 3}
    assert run.system.tracker.fleet.states["LEFT"] == 3
    assert run.system.tracker.fleet.states["DEAD"] == 0


@pytest.mark.parametrize("kind", [LiveRun, VirtualRun])
def test_a_bug_of_ours_ends_the_run_and_is_in_its_results(kind: type[Run]) -> None:
    run = kind(configuration(workers=2, duration_s=5.0, rate_per_s=3.0, seed=7), silent(virtual=kind is VirtualRun), io.StringIO())

    def fail(node: object, event: object) -> None:
        raise ZeroDivisionError("planted")

    run.driver.bus.subscribe(fail, RequestSent)
    try:
        run.conduct()
    finally:
        run.close()
    (violation,) = run.results()["invariants"]["violations"]
    assert violation.startswith(f"internal error at {run.now:.6f} s with seed 7: ZeroDivisionError: planted\n")
    assert "in fail" in violation, "where it happened"
    assert len(run.recorder.sent_at) == 1


def test_a_live_fleet_has_its_report_intervals_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator listens for a report interval before it is ready: that is no sign of a machine that is too small."""
    monkeypatch.setattr("sllm.run.live.START_WALL_S", 0.0)
    run = LiveRun(configuration(workers=2, duration_s=0.1, rate_per_s=10.0, report_interval_s=0.5), silent(virtual=False), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    assert run.ready_workers == 2


@pytest.mark.parametrize("few", [200, 0])
def test_a_large_fleet_is_looked_at_rarely_and_its_series_has_its_bins(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use between two looks is an exact mean, so that bins lose detail and no sum."""
    monkeypatch.setattr("sllm.run.meter.FEW_WORKERS", few)
    run = VirtualRun(configuration(workers=3, duration_s=30.0, rate_per_s=5.0), silent(), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    looks = run.meter.timeline.looks
    assert (looks[1].at - looks[0].at) == pytest.approx(4.0 if not few else 0.5)
    series = run.results()["series"]
    assert len(series["at_s"]) >= 30
    mean = sum(value for value in series["utilisation"] if value is not None) * series["bin_s"]
    whole = run.meter.timeline.at(looks[0].at + series["at_s"][-1]) - looks[0].usage
    assert mean == pytest.approx(whole.busy_s / 3, rel=0.05)
