"""What placement is worth in whole runs: fleets in virtual time, and the figures that their users would see."""

from __future__ import annotations

from typing import TypeVar

import pytest
from simulated import Fleet

from sllm.observe.statistics import summarize
from sllm.protocol.events import Event, RequestCompleted, RequestRefused, RequestRetried, RequestSent

E = TypeVar("E", bound=Event)


def told(fleet: Fleet, kind: type[E]) -> list[E]:
    return [event for event in fleet.trace if isinstance(event, kind)]


def run(after_s: float = 0.0, **arguments: object) -> tuple[Fleet, dict[str, float | None]]:
    """A fleet after its run, every request completed, and the statistics of the times to first token of those that came from `after_s` on."""
    fleet = Fleet(**arguments).record().run()  # type: ignore[arg-type]
    completed = told(fleet, RequestCompleted)
    assert len(completed) == len(told(fleet, RequestSent)) > 100
    return fleet, summarize([event.ttft_s for event in completed if event.arrival_s >= after_s])


def refused(fleet: Fleet, after_s: float) -> list[RequestRefused]:
    return [event for event in told(fleet, RequestRefused) if event.at >= after_s]


def test_rare_reports_do_not_make_workers_look_full_that_have_long_gone_on() -> None:
    """Five reports' worth of finished requests would fill every queue, push requests to cold starts and models off each other's GPUs."""
    fleet, ttft_s = run(20.0, workers=5, models=8, rate_per_s=20.0, duration_s=120.0, report_interval_s=5.0)
    assert ttft_s["p99"] is not None
    assert ttft_s["p99"] < 1.0
    assert not refused(fleet, 20.0)


@pytest.mark.parametrize("report_interval_s", [1.0, 12.0])
def test_hundreds_of_dispatches_between_two_reports_are_all_acknowledged(report_interval_s: float) -> None:
    """240 dispatches go to two workers between reports 12 s apart: none of them counts once it is in a report, so nobody waits longer than at 1 s."""
    begin_s = 2.0 * report_interval_s + 1.0  # by then the coordinator has listened and the model is loaded
    fleet, ttft_s = run(begin_s, workers=2, models=1, rate_per_s=20.0, duration_s=120.0, report_interval_s=report_interval_s)
    assert ttft_s["mean"] is not None
    assert ttft_s["mean"] < 0.2
    assert not refused(fleet, begin_s)


def test_a_request_that_waits_for_the_end_of_a_round_does_not_fill_a_worker() -> None:
    """A worker with 256 slots and a few requests is not full, whatever waits some milliseconds for the round in progress."""
    fleet, ttft_s = run(5.0, workers=1, models=1, rate_per_s=30.0, duration_s=60.0, lengths="fixed:50:5")
    assert ttft_s["p99"] is not None
    assert ttft_s["p99"] < 0.1
    assert not refused(fleet, 5.0)


def test_long_prompts_go_where_they_fit_the_first_time() -> None:
    fleet, _ = run(workers=6, models=1, rate_per_s=2.0, duration_s=60.0, lengths="fixed:60000:20", kinds=("a5000-24g",) * 4)
    assert {event.worker_id for event in told(fleet, RequestCompleted)} == {"worker-4", "worker-5"}
    assert not told(fleet, RequestRetried)


def test_many_models_on_few_workers_break_no_invariant() -> None:
    fleet = Fleet(workers=4, models=80, rate_per_s=10.0, duration_s=60.0).record().run()
    assert fleet.client.in_flight == 0
    assert all(0.0 < event.ttft_s < 400.0 for event in told(fleet, RequestCompleted))
