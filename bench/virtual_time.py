"""Virtual time: requests a second of wall time with everything on (client, coordinator, workers, engines, recorder, checkers).

Plays a trace over 10 workers: the budget was set for the Azure LLM inference trace 2023, conversation; without one, synthetic requests at its rate.
Usage: python3 bench/virtual_time.py [AzureLLMInferenceTrace_conv.csv] [--against TREE]

The budget: against commit 9e3785d, side by side with the same costs, 1.1 times its wall time, and a third of it where
the typed modules are compiled. `--against` a checkout of that commit measures just this.

Baseline: a plain heapq loop of M/M/10 in the same run, which tells how fast the machine is; the ratio is how many of its customers cost as much as one
request.
"""

from __future__ import annotations

import argparse
import heapq
import io
import json
import subprocess
import sys
from collections import deque
from pathlib import Path
from random import Random
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, show, status
from centralized_simulation import conduct
from sllm.run.command_line import parse
from sllm.run.virtual import VirtualRun

CUSTOMERS = 200_000
SERVERS, RHO = 10, 0.9
CUSTOMERS_OF_OLD = 103.0  # of the heapq loop for each request at 9e3785d, on machine B of README.md; on A 66 to 80
ROOT = Path(__file__).resolve().parent.parent


def heapq_customers_per_s() -> float:
    """M/M/10 with nothing but a heap, two entries a customer."""
    rng = Random(1)
    draw, push, pop = rng.expovariate, heapq.heappush, heapq.heappop
    heap = [(draw(SERVERS * RHO), 0, True)]
    waiting: deque[float] = deque()
    busy = served = order = 0
    wait_s = 0.0
    began = perf_counter()
    while served < CUSTOMERS:
        now, _, arrives = pop(heap)
        order += 2
        if arrives:
            push(heap, (now + draw(SERVERS * RHO), order, True))
            if busy < SERVERS:
                busy += 1
                push(heap, (now + draw(1.0), order + 1, False))
            else:
                waiting.append(now)
        else:
            served += 1
            if waiting:
                wait_s += now - waiting.popleft()
                push(heap, (now + draw(1.0), order + 1, False))
            else:
                busy -= 1
    return CUSTOMERS / (perf_counter() - began)


def requests_per_s(flags: list[str]) -> tuple[int, float]:
    """Run it; (requests, requests a second of wall time as the results say)."""
    config, options = parse(["--virtual", "--quiet", *flags], {}, "bench", "")
    run = VirtualRun(config, options, io.StringIO())
    try:
        conduct(run)
    finally:
        run.close()
    results = run.results()
    assert not results["invariants"]["violations"], results["invariants"]["violations"]
    return results["requests"]["completed"], results["wall"]["requests_per_wall_s"]


def wall_s(tree: Path, flags: list[str]) -> tuple[float, int]:
    """(wall seconds of the run, requests) of the code in a tree, as a user would run it."""
    command = [sys.executable, "centralized_simulation.py", "--virtual", "--quiet", "--json", "-", *flags]
    results = json.loads(subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout)
    return results["wall"]["wall_s"], results["requests"]["completed"]


def compare(tree: Path, flags: list[str], runs: int) -> None:
    """This tree and another one by turns, so that both have the same share of a machine's good and bad minutes."""
    ours: list[tuple[float, int]] = []
    theirs: list[tuple[float, int]] = []
    for _ in range(runs):
        for where, found in ((ROOT, ours), (tree, theirs)):
            found.append(wall_s(where, flags))
            print(f"  {found[-1][0]:.2f} s for {found[-1][1]:,} requests: {where}", flush=True)
    show("wall time / that of the other tree, best of each", min(ours)[0] / min(theirs)[0], RATIO, 1.1, compiled=1 / 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("trace", nargs="?", default="", help="a trace to play; without one, synthetic requests")
    parser.add_argument("--duration", type=float, default=3500.0, help="seconds of synthetic requests")
    parser.add_argument("--repeat", type=int, default=3, help="runs; the fastest counts")
    parser.add_argument("--against", type=Path, help="another tree, whose wall time ours is held against")
    parser.add_argument("--flags", default="", help="more flags of the run, for a tree whose defaults are others")
    options = parser.parse_args()
    source = ["--trace", str(Path(options.trace).resolve())] if options.trace else ["--rate", "5.53", "--duration", f"{options.duration:g}"]
    flags = ["--workers", "10", *source, *options.flags.split()]
    print(f"trace {options.trace}" if options.trace else "synthetic requests")
    if options.against:
        compare(options.against.resolve(), flags, options.repeat)
    customers, best = 0.0, 0.0
    for _ in range(options.repeat):
        customers = max(customers, heapq_customers_per_s())
        requests, rate = requests_per_s(flags)
        best = max(best, rate)
        print(f"  {requests:,} requests at {rate:,.0f} a second")
    show("customers of a plain heapq M/M/10 for each request", customers / best, RATIO, CUSTOMERS_OF_OLD * 1.1, compiled=CUSTOMERS_OF_OLD / 3)
    print(f"  the plain heapq loop does {customers:,.0f} customers a second here")
    return status()


if __name__ == "__main__":
    sys.exit(main())
