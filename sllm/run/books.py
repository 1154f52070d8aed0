"""The books of a run: what was measured, closed into results. What a user reads of a run comes from here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sllm import __version__
from sllm.observe.results import Begun, FleetFigures, Invariants, RunInfo, Slo, make_results
from sllm.run.assemble import profile_names
from sllm.run.command_line import settings_of
from sllm.run.thresholds import judge, parse_thresholds

if TYPE_CHECKING:
    from sllm.run.run import Run


def close_books(run: Run) -> dict[str, Any]:
    """The results of a run that has ended, schema 2."""
    meter, warmup_s = run.meter, run.config.warmup_s
    used = meter.used(warmup_s)
    workers = run.system.worker_figures(used) if used else []
    results = make_results(
        run.recorder,
        _describe(run),
        FleetFigures(run.ready_workers, workers, max(0.0, meter.window_s - warmup_s), meter.began_s, warmup_s, meter.timeline),
        run.report_figures(),
        Invariants(run.checkers.checked, run.violations),
        run.system.in_flight,
        count_begun(run.system.unfinished(), run.slo, run.now, meter.began_s + warmup_s if warmup_s else 0.0),
        run.slo,
    )
    results["slo"]["thresholds"] = judge(parse_thresholds(run.options.fail_if), results)
    return results


def _describe(run: Run) -> RunInfo:
    """What was run."""
    config, system, window_s, asked_s = run.config, run.system, run.meter.window_s, run.workload.spec.duration_s
    engine_profile, loader = profile_names(config, map(system.catalog.get_hardware, system.hardware))
    return RunInfo(
        run.mode, system.architecture.name, config.workers, config.policy, config.seed, window_s if run.interrupted else asked_s or window_s, run.wall_s,
        run.workload.describe(), system.hardware, engine_profile, loader, asked_s, run.interrupted,
        __version__, settings_of(config, run.options), run.clock_lag,
    )  # fmt: skip


def count_begun(unfinished: Iterable[Any], slo: Slo, ended_s: float, since_s: float) -> Begun:
    """What is known at `ended_s` of the targets of requests in flight; of those that arrived before `since_s` nothing counts."""
    in_time = undecided = 0
    for pending in unfinished:
        if pending.arrival_s < since_s:
            continue
        first_s = pending.first_tokens.get(pending.worker_id)
        if first_s is None:
            undecided += ended_s - pending.arrival_s < slo.ttft_s
        elif first_s - pending.arrival_s <= slo.ttft_s:
            in_time += slo.tpot_s is None
            undecided += slo.tpot_s is not None
    return Begun(in_time, undecided)
