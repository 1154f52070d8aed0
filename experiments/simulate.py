#!/usr/bin/env python3
"""The seed sweep: random fleets, random workloads, random faults, every policy, with every checker on.

    python3 experiments/simulate.py --seeds 200                  the seeds 1 to 200, on all cores
    python3 experiments/simulate.py --first 37 --seeds 1         seed 37 again, to the byte

Everything about a run follows from its seed. Each run is a fleet, a workload and a schedule of faults; after the last fault everything must settle and
finish. What is broken is printed with the command that shows it again. Exit status: 0 nothing broken, 1 something was, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from experiments.harness import Simulation, configuration, cores, fingerprint, spread
from sllm.assemble import build_catalog, default_rate
from sllm.placement.registry import policies
from sllm.sim.faults import Fault, Schedule, random_faults
from sllm.sim.network import Latency
from sllm.streams import stream

REQUESTS_MAX = 500.0  # mean number of requests in a run
WALL_MAX_S = 120  # a seed takes a tenth of a second: one that is not done by then never will be
FAULTS_FROM_S = 2.0
LASTING_S = (0.5, 12.0)
WORKER_FAULTS = ("crash", "freeze", "zombie", "drain", "slow", "clock_jump", "clock_drift", "overflow", "isolate", "cut", "degrade")
COORDINATOR_FAULTS = ("crash", "freeze", "zombie", "slow", "clock_jump", "clock_drift", "overflow", "isolate", "cut", "degrade")
CLIENT_FAULTS = ("freeze", "slow", "clock_jump", "clock_drift", "overflow", "isolate", "cut", "degrade")  # no restart: its requests are nowhere else


class Scenario(NamedTuple):
    """One run: the fleet and its workload, every link's quality, what goes wrong, whether messages travel as bytes, and what strangers with the key say."""

    config: Config
    link: dict[str, Any]
    schedule: Schedule
    wire: bool
    strangers_per_s: float = 0.0

    def describe(self) -> str:
        """One line for people."""
        config = self.config
        what = f"{config.workers} workers of {config.engine}/{config.hardware}, {config.policy}"
        how = f"{config.rate_per_s:.2f} req/s {config.arrivals} for {config.duration_s:.0f} s"
        more = f"{', bytes' if self.wire else ''}{f', {self.strangers_per_s:.0f} messages/s of strangers' if self.strangers_per_s else ''}"
        return f"{what}, {how}, reports every {config.report_interval_s:g} s, {len(self.schedule.faults)} faults{more}"


class Outcome(NamedTuple):
    """How one seed went. `problem` is "" when everything held."""

    seed: int
    scenario: str
    problem: str
    digest: str
    requests: int
    checked: int


def draw_scenario(seed: int, *, small: bool = False) -> Scenario:
    """The scenario of a seed. `small`: fewer workers and requests and no bytes, for tests that run many."""
    rng = stream(seed, "scenario")
    config = _draw_config(rng, seed, small)
    until_s = config.duration_s + 2.0
    faults = [] if rng.random() < 0.1 else _draw_faults(rng, until_s)
    link: dict[str, Any] = {"latency": _draw_latency(rng), "loss": config.loss}
    if rng.random() < 0.3:
        link |= {"duplicate": rng.uniform(0.0, 0.1), "reorder": rng.uniform(0.0, 0.3), "reorder_extra_s": rng.uniform(0.001, 1.0)}
    if rng.random() < 0.2:
        link["corrupt"] = rng.uniform(0.0, 0.05)
    wire = rng.random() < 0.2 and not small
    strangers_per_s = rng.choice((0.0, 0.0, 0.0, rng.uniform(1.0, 30.0)))
    return Scenario(config, link, Schedule(tuple(faults), f"seed {seed}"), wire, strangers_per_s)


def _draw_config(rng: Random, seed: int, small: bool) -> Config:
    """A fleet and its workload."""
    names = list(policies())
    config = configuration(
        seed=seed,
        workers=rng.randint(1, 4 if small else 12),
        duration_s=rng.uniform(10.0, 20.0) if small else rng.uniform(15.0, 60.0),
        arrivals=rng.choice(("poisson", "poisson", "gamma", "deterministic")),
        cv=rng.choice((2.0, 4.0, 8.0)),
        models=rng.randint(1, 16),
        zipf=rng.choice((0.0, 0.8, 1.1, 2.0)),
        policy=_with_parameters(names[seed % len(names)], rng),
        report_interval_s=rng.choice((0.0, 0.1, 0.3, 1.0, 1.0, 2.0, 5.0)),
        loss=rng.choice((0.0, 0.0, rng.uniform(0.0, 0.1))),
        keep_alive_s=rng.choice((0.0, 0.0, rng.uniform(0.5, 10.0))),
        engine=rng.choice(("llm", "llm", "queue")),
        hardware=rng.choice(("h100-80g", "a100-80g", "a5000-24g")),
        service=rng.choice(("exponential", "deterministic", "hyperexponential:3")),
        service_mean_s=rng.uniform(0.02, 0.3),  # the longest of hyperexponential ones are 30 times that
        service_load_s=rng.choice((0.0, rng.uniform(0.1, 3.0))),
        slots=rng.choice((0, 0, 1, 4, 16)),
        demo_models=rng.choice((0, 0, 1, 2)),
        queue_threshold=rng.choice((1, 4, 10, 10, 1000)),
        queue_max=rng.choice((2, 20, 1000)),
        request_timeout_s=rng.choice((70.0, 90.0, 120.0)),  # at rest within this and more: the longest request alone takes 40 s on the slowest hardware
        drain_timeout_s=rng.choice((1.0, 5.0, 30.0)),
        response_keep_s=rng.choice((30.0, 120.0)),
    )
    busy = default_rate(config, build_catalog(config)) * rng.uniform(0.2, 2.5)
    most = (100.0 if small else REQUESTS_MAX) / config.duration_s
    return dataclasses.replace(config, rate_per_s=min(busy, most))


def _with_parameters(name: str, rng: Random) -> str:
    """The policy, sometimes with parameters other than its own."""
    changed = {"power_of_two": f"choices={rng.randint(1, 5)}", "startup_time": f"sample={rng.randint(1, 10)},margin_s={rng.uniform(0.0, 2.0):.3f}"}
    return f"{name}:{changed[name]}" if name in changed and rng.random() < 0.5 else name


def _draw_latency(rng: Random) -> Latency:
    kind = rng.choice(Latency.KINDS)
    typical_s = 10.0 ** rng.uniform(-4.0, -1.0)
    a, b = {"constant": (typical_s, 0.0), "uniform": (0.0, 2.0 * typical_s), "exponential": (1e-4, typical_s), "lognormal": (typical_s, 0.7)}[kind]
    return Latency(kind, a, b)


def _draw_faults(rng: Random, until_s: float) -> list[Fault]:
    """Some kinds of faults, each at a rate of its own, on workers, on the coordinator and on the client."""
    faults: list[Fault] = []
    for kinds, hosts, chance in ((WORKER_FAULTS, "random:1:worker-*", 0.5), (COORDINATOR_FAULTS, "coordinator", 0.2), (CLIENT_FAULTS, "client", 0.1)):
        rates = {kind: rng.uniform(0.5, 6.0) for kind in kinds if rng.random() < chance}
        if hosts != "random:1:worker-*":
            rates = {kind: rate / 3.0 for kind, rate in rates.items()}
        faults += random_faults(rng, FAULTS_FROM_S, until_s, rates, LASTING_S, (hosts,))
    return sorted(faults, key=lambda fault: fault.at_s)


def run_scenario(scenario: Scenario) -> tuple[dict[str, Any], str, str]:
    """Run it; returns the results, what is broken ("" if nothing), and a digest of all that the seed determines."""
    run = Simulation(
        scenario.config, wire=scenario.wire, schedule=scenario.schedule, link=scenario.link, strangers_per_s=scenario.strangers_per_s
    )  # fmt: skip
    results = run.complete()
    problem = "\n".join(results["invariants"]["violations"]) or check_books(results)
    return results, problem, fingerprint(results, run.world.now, run.world.network.delivered)


def check_books(results: dict[str, Any]) -> str:
    """The sums that results always keep, once everything has settled; "" if they do."""
    requests, reports = results["requests"], results["reports"]
    ended = requests["completed"] + requests["failed"] + requests["rejected"]
    if requests["in_flight"] or requests["sent"] != ended:
        return f"requests do not add up: {requests}"
    if reports["lost"] < 0 or reports["sent"] != reports["accepted"] + reports["lost"] + sum(reports["rejected"].values()):
        return f"reports do not add up: {reports}"
    if (results["fleet"]["utilisation"] or 0.0) > 1.0:
        return f"busier than there was time: {results['fleet']}"
    return ""


class TooLong(Exception):
    """A seed came to no end."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"not done after {WALL_MAX_S} s of wall time; it stands where the traceback ends")


def run_seed(seed: int, *, small: bool = False) -> Outcome:
    """Draw and run the scenario of a seed. With bytes on the wire, the same run with objects must come out the same."""
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


def show_failure(outcome: Outcome) -> None:
    """What broke, in which scenario, and how to see it again."""
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
    for done, outcome in enumerate(spread(run_seed, seeds, arguments.jobs), 1):
        requests, checked = requests + outcome.requests, checked + outcome.checked
        if arguments.faults:
            print("\n".join(draw_scenario(outcome.seed).schedule.describe()))
        if outcome.problem:
            failed.append(outcome.seed)
            show_failure(outcome)
        elif len(seeds) == 1:
            print(f"seed {outcome.seed} held: {outcome.scenario}; digest {outcome.digest}")
        if done % 50 == 0 or done == len(seeds):
            took_s = time.monotonic() - began
            print(f"{done} of {len(seeds)} seeds, {len(failed)} failed, {requests:,} requests, {checked:,} checks, {took_s:.0f} s", flush=True)
    if failed:
        print(f"failing seeds: {' '.join(map(str, failed))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
