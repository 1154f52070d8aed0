#!/usr/bin/env python3
"""The seed sweep: random fleets, random workloads, random faults, every policy, with every checker on.

    python3 experiments/simulate.py --seeds 200                  the seeds 1 to 200, on all cores
    python3 experiments/simulate.py --first 37 --seeds 1         seed 37 again, to the byte

Everything about a run follows from its seed. Each run is a fleet, a workload and a schedule of faults; after the last fault the fleet must come to rest. A
broken invariant is printed with the command that reproduces it. Exit status: 0 no invariant was broken, 1 one was, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from experiments.draw import Bounds, Scenario, draw_scenario, limit_requests
from experiments.harness import PROBE, Simulation, cores, fingerprint, spread
from sllm.observe.report.standard import run_script
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected, RequestRetried
from sllm.protocol.messages import MODEL_TOO_LARGE, REFUSED_TOO_LARGE, REQUEST_TOO_LARGE
from sllm.protocol.node import Node
from sllm.protocol.seeds import rng_for
from sllm.run.assemble import build_catalog
from sllm.workload import Request

PROBES = 2  # requests sent after all faults; they must complete
SLOW_S = 5.0  # seeds that take longer are listed
WALL_MAX_S = 120  # limit for one seed, which takes a tenth of a second


class Outcome(NamedTuple):
    """The outcome of one seed. `problem` is "" if every invariant held."""

    seed: int
    scenario: str
    problem: str
    digest: str
    requests: int
    checked: int


def run_scenario(scenario: Scenario) -> tuple[dict[str, Any], str, str]:
    """Run a scenario; returns the results, the problem ("" if there is none), and a digest of everything that the seed determines."""
    config = scenario.config
    bounds = Bounds(config, build_catalog(config))
    reshape = limit_requests(rng_for(config.seed, "scenario/limits"), bounds, scenario.limits_part)
    ends = Ends()
    run = Simulation(
        config, wire=scenario.wire, schedule=scenario.schedule, link=scenario.link, reshape=lambda request: ends.note(reshape(request)),
        strangers_per_s=scenario.strangers_per_s, probes=PROBES,
    )  # fmt: skip
    run.world.bus.subscribe(ends.see, *Ends.KINDS)
    results = run.complete()
    problem = "\n".join(results["invariants"]["violations"]) or check_books(results) or run.unhealed or ends.check(scenario, bounds)
    return results, problem, fingerprint(results, run.world.now, run.world.network.delivered)


class Ends:
    """How each request ended, compared with the requests that the fleet can hold."""

    KINDS = RequestCompleted, RequestFailed, RequestRejected, RequestRetried

    def __init__(self) -> None:
        self.asked: dict[str, Request] = {}
        self.ended: dict[str, str] = {}  # request id -> "completed", "failed" or the code with which it was rejected
        self.refused_by_worker: set[str] = set()  # requests that a worker refused as too large

    def note(self, request: Request) -> Request:
        self.asked[request.request_id] = request
        return request

    def see(self, node: Node, event: Any) -> None:
        if isinstance(event, RequestRetried):
            if event.reason == REFUSED_TOO_LARGE:
                self.refused_by_worker.add(event.request_id)
        else:
            how = event.code if isinstance(event, RequestRejected) else "completed" if isinstance(event, RequestCompleted) else "failed"
            self.ended[event.request_id] = how

    def check(self, scenario: Scenario, bounds: Bounds) -> str:
        """The requests that ended in a wrong way; "" if there are none. A fleet without faults refuses at once the requests that it cannot hold."""
        faults = scenario.schedule.faults
        sound = not faults and not scenario.config.loss and not scenario.strangers_per_s
        restarts = any(fault.kind in ("crash", "zombie") and "coordinator" in fault.options["hosts"] for fault in faults)
        known = len(bounds.hardware) == 1 or (scenario.schedule.heals and not restarts)  # the coordinator has always heard of every kind of hardware
        for request_id, request in self.asked.items():
            how, model, tokens = self.ended.get(request_id, ""), bounds.catalog[request.model], request.prompt_tokens + request.output_tokens
            fits = bounds.fits(model, tokens)
            too_large = how in (MODEL_TOO_LARGE, REQUEST_TOO_LARGE)
            where = f"{request} {'fits' if fits else 'does not fit'} {scenario.config.hardware}"
            if request_id in self.refused_by_worker:
                return f"{where}, and a worker that it was sent to refused it as too large"
            if (how == "completed" and not fits) or (too_large and fits and known) or (sound and not fits and not too_large):
                return f"{where}, and it ended as {how!r}"
        failed = [f"{request_id}: {how}" for request_id, how in self.ended.items() if request_id.startswith(PROBE) and how != "completed"]
        return f"everything was at rest, nothing was wrong any more, and requests failed: {failed}" if failed else ""


def check_books(results: dict[str, Any]) -> str:
    """The first sum of the results that does not hold at rest; "" if all sums hold."""
    requests, reports = results["requests"], results["reports"]
    ended = requests["completed"] + requests["failed"] + requests["rejected"]
    if requests["in_flight"] or requests["sent"] != ended:
        return f"requests do not add up: {requests}"
    if reports["lost"] < 0 or reports["sent"] != reports["accepted"] + reports["lost"] + reports["under_way"] + sum(reports["rejected"].values()):
        return f"reports do not add up: {reports}"
    if (results["fleet"]["utilisation"] or 0.0) > 1.0:
        return f"busier than there was time: {results['fleet']}"
    return ""


class TooLong(Exception):
    """A seed took longer than WALL_MAX_S."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"not done after {WALL_MAX_S} s of wall time; it stands where the traceback ends")


def run_seed(seed: int, *, small: bool = False) -> Outcome:
    """Draw and run the scenario of a seed. A run with bytes on the wire is repeated with objects and must give the same digest."""
    scenario = draw_scenario(seed, small=small)
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(WALL_MAX_S)
    try:
        results, problem, digest = run_scenario(scenario)
        if scenario.wire and not problem:
            _, problem, other = run_scenario(scenario._replace(wire=False))
            if not problem and other != digest:
                problem = f"as bytes the run's digest is {digest}, as objects {other}"
    except Exception:
        return Outcome(seed, scenario.describe(), traceback.format_exc(), "", 0, 0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Outcome(seed, scenario.describe(), problem, digest, results["requests"]["sent"], results["invariants"]["checked"])


def _timed_seed(seed: int) -> tuple[Outcome, float]:
    began = time.monotonic()
    return run_seed(seed), time.monotonic() - began


def show_failure(outcome: Outcome) -> None:
    """The problem, its scenario, and the command that reproduces it."""
    print(f"\nseed {outcome.seed} FAILED: {outcome.scenario}")
    print(outcome.problem.rstrip())
    print(f"see it again: python3 experiments/simulate.py --first {outcome.seed} --seeds 1 --faults\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Runs random fleets under random faults, one for each seed, with every checker on.")
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds [200]")
    parser.add_argument("--first", type=int, default=1, help="the first of them [1]")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes [all cores]")
    parser.add_argument("--faults", action="store_true", help="print each seed's schedule of faults")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.first < 0 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1, --first at least 0")
    began = time.monotonic()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    failed: list[int] = []
    requests = checked = 0
    for done, (outcome, wall_s) in enumerate(spread(_timed_seed, seeds, arguments.jobs), 1):
        requests, checked = requests + outcome.requests, checked + outcome.checked
        if arguments.faults:
            print("\n".join(draw_scenario(outcome.seed).schedule.describe()))
        if outcome.problem:
            failed.append(outcome.seed)
            show_failure(outcome)
        elif len(seeds) == 1:
            print(f"seed {outcome.seed} held: {outcome.scenario}; digest {outcome.digest}")
        if wall_s > SLOW_S:
            print(f"seed {outcome.seed} took {wall_s:.1f} s: {outcome.scenario}")
        if done % 50 == 0 or done == len(seeds):
            took_s = time.monotonic() - began
            print(f"{done} of {len(seeds)} seeds, {len(failed)} failed, {requests:,} requests, {checked:,} checks, {took_s:.0f} s", flush=True)
    if failed:
        print(f"failing seeds: {' '.join(map(str, failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    run_script(main)
