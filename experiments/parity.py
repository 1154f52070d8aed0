#!/usr/bin/env python3
"""The same run live on loopback and in virtual time, side by side: same seed, same requests at the same times, same fleet.

    python3 experiments/parity.py                              about a minute; writes the table into docs/validation.md
    python3 experiments/parity.py --duration 10 --dry          shorter, printed and not written

A figure of the live run must lie within 10 % of the virtual one, or within two report intervals of it: the reports of workers interleave differently in each
run, and another order of reports can change a placement, which moves a request by up to two intervals. The effect of luck alone is printed beside each figure:
the range over virtual runs with the same requests but other ties and phases of reports. Exit status: 0 all figures agree, 1 one does not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from config import Config
from experiments.harness import ROOT, Simulation, complete, configuration, cores, replace_section, silent, spread
from sllm.observe.report.standard import run_script
from sllm.protocol.events import RequestCompleted
from sllm.protocol.messages import ACTIONS
from sllm.run.live import LiveRun
from sllm.run.run import Run
from sllm.run.system import System
from sllm.run.virtual import VirtualRun

DOCUMENT = ROOT / "docs" / "validation.md"
TOLERATED = 0.10
REPORTS_TOLERATED = 2.0  # report intervals
LUCKS = 10  # virtual runs that differ in luck alone
MEASURES = [(what, name) for what in ("ttft_s", "e2e_s") for name in ("p50", "p99")]


class Outcome(NamedTuple):
    """The measurements of one of the two runs."""

    results: dict[str, Any]
    served_by: dict[str, str]  # request -> worker
    warnings: list[str]


class Line(NamedTuple):
    """One figure of both runs, in seconds. `limit_s`: the largest difference allowed; `range_s`: least and largest value of virtual runs with other luck."""

    name: str
    live_s: float
    virtual_s: float
    limit_s: float
    range_s: tuple[float, float]

    @property
    def difference_s(self) -> float:
        return self.live_s - self.virtual_s

    @property
    def inside(self) -> bool:
        return abs(self.difference_s) <= self.limit_s

    @property
    def why(self) -> str:
        """The tolerance that the figure keeps, if any."""
        if abs(self.difference_s) <= TOLERATED * self.virtual_s:
            return f"within {100 * TOLERATED:.0f} %"
        return "within two report intervals" if self.inside else "**APART**"

    def row(self) -> str:
        relative = f"{100 * self.difference_s / self.virtual_s:+.1f} %" if self.virtual_s else ""
        figures = f"{self.live_s:.4f} | {self.virtual_s:.4f} | {self.difference_s:+.4f} ({relative})"
        return f"| {self.name} | {figures} | {self.why} | {self.range_s[0]:.4f} to {self.range_s[1]:.4f} |"


class OtherLuck(Simulation):
    """The requests of a configuration, placed by a coordinator and served by workers whose random choices are those of another seed."""

    def __init__(self, config: Config, luck: int) -> None:
        super().__init__(dataclasses.replace(config, seed=config.seed + luck))
        self.workload = System(config, wire=False).workload()


def measure_luck(task: tuple[Config, int]) -> dict[str, Any]:
    """The results of a virtual run with other luck."""
    return OtherLuck(*task).complete()


def measure(run: Run) -> Outcome:
    """Conduct a run. RuntimeError if it broke an invariant or did not complete every request."""
    served_by: dict[str, str] = {}

    def note(node: object, event: RequestCompleted) -> None:
        served_by[event.request_id] = event.worker_id

    run.driver.bus.subscribe(note, RequestCompleted)
    gc.collect()  # here, so that no collection interrupts the live run
    results = complete(run)
    if run.violations:
        raise RuntimeError(run.violations[0])
    if results["requests"]["completed"] != results["requests"]["sent"]:
        raise RuntimeError(f"{run.mode}: not every request was completed: {results['requests']}")
    return Outcome(results, served_by, run.warnings)


def compare(live: Outcome, virtual: Outcome, report_interval_s: float, others: Sequence[dict[str, Any]] = ()) -> list[Line]:
    """The figures that must agree. `others`: results of virtual runs with other luck."""
    lines = []
    for what, name in MEASURES:
        of_live, of_virtual = live.results[what][name], virtual.results[what][name]
        limit_s = max(TOLERATED * of_virtual, REPORTS_TOLERATED * report_interval_s)
        lucky = [of_virtual, *(results[what][name] for results in others)]
        lines.append(Line(f"{what.removesuffix('_s').upper()} {name}, s", of_live, of_virtual, limit_s, (min(lucky), max(lucky))))
    return lines


def table(config: Config, live: Outcome, virtual: Outcome, lines: Sequence[Line]) -> str:
    """The comparison as Markdown."""
    alike = sum(virtual.served_by.get(request_id) == worker_id for request_id, worker_id in live.served_by.items())
    sent, actions = len(live.served_by), (live.results["actions"], virtual.results["actions"])
    counts = [f"| {action} | {actions[0][action]} | {actions[1][action]} | {actions[0][action] - actions[1][action]:+d} | | |" for action in ACTIONS]
    return "\n".join([
        f"{config.workers} workers ({config.hardware}), policy {config.policy}, {config.rate_per_s:.12g} requests/s (Poisson) over {config.duration_s:.12g} s, "
        f"{config.models} models, reports every {config.report_interval_s:.12g} s, seed {config.seed}, speed-up {config.speedup:.12g}: {sent} requests, "
        f"{alike} of them served by the same worker in both runs.",
        "",
        f"| figure | live | virtual | difference | | {LUCKS} virtual runs with other luck |",
        "| --- | --- | --- | --- | --- | --- |",
        *(line.row() for line in lines),
        *counts,
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The same run live and in virtual time, side by side; writes docs/validation.md.")
    parser.add_argument("--workers", type=int, default=10, help="workers in the fleet [10]")
    parser.add_argument("--rate", type=float, default=12.0, help="requests a second [12]")
    parser.add_argument("--duration", type=float, default=35.0, help="seconds in which requests come [35]")
    parser.add_argument("--report-interval", type=float, default=0.1, help="seconds between a worker's reports [0.1]")
    parser.add_argument("--policy", default="startup_time", help="placement policy [startup_time]")
    parser.add_argument("--seed", type=int, default=1, help="seed of all randomness [1]")
    parser.add_argument("--speedup", type=float, default=1.0, help="how many times as fast as the wall clock the live run's clock runs [1]")
    parser.add_argument("--dry", action="store_true", help="print the table, do not write it")
    arguments = parser.parse_args(argv)
    if min(arguments.workers, arguments.rate, arguments.duration, arguments.report_interval, arguments.speedup) <= 0 or arguments.seed < 0:
        parser.error("--workers, --rate, --duration, --report-interval and --speedup must be above 0, --seed not below")
    config = configuration(
        workers=arguments.workers, rate_per_s=arguments.rate, duration_s=arguments.duration, report_interval_s=arguments.report_interval,
        policy=arguments.policy, seed=arguments.seed, speedup=arguments.speedup, models=8,
    )  # fmt: skip
    virtual = measure(VirtualRun(config, silent()))
    wall_s, live_s = virtual.results["wall"]["wall_s"], (config.duration_s + 5.0) / config.speedup
    print(f"virtual: {wall_s:.1f} s; live: about {live_s:.0f} s ...", file=sys.stderr, flush=True)
    live = measure(LiveRun(config, silent(virtual=False)))
    others = list(spread(measure_luck, [(config, luck) for luck in range(1, LUCKS + 1)], cores()))
    lines = compare(live, virtual, config.report_interval_s, others)
    text = table(config, live, virtual, lines)
    print(text)
    for warning in live.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not arguments.dry:
        replace_section(DOCUMENT, "parity", text)
    return 0 if all(line.inside for line in lines) else 1


if __name__ == "__main__":
    run_script(main)
