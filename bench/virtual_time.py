"""Virtual time: requests a second of wall time with everything on (client, coordinator, workers, engines, recorder, checkers).

Plays a trace over 10 workers: the budget was set for the Azure LLM inference trace 2023, conversation; without one, synthetic requests at its rate.
Usage: python3 bench/virtual_time.py [AzureLLMInferenceTrace_conv.csv]

Two baselines in the same run tell how fast the machine is, and the ratios how much of each costs as much as one request. A plain heapq loop of
M/M/10 is so small that a processor foresees each of its branches; a request runs through thousands of different statements, which it does not.
Processors differ by a factor of two in how much slower that makes them, so there is a second baseline: a program of as many different statements.
"""

from __future__ import annotations

import heapq
import io
import sys
from collections import deque
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import _fleet
from centralized_simulation import conduct
from simulation import VirtualRun
from sllm.cli import parse

CUSTOMERS = 200_000
SERVERS, RHO = 10, 0.9
PROGRAM, ROUNDS = 3_000, 200
STATEMENTS = (
    "x = numbers[0]", "names['a'] = x", "things.append(x)", "things.pop() if things else None", "x = item.count + 1", "item.count = i", "pair = (x, i)",
    "x, y = i, x", "y = names.get(x)", "i = len(numbers)", "x = call(i)", "x = i * 1.5 - x * 0.25", "x = i if x > 1.0 else 1",
)  # fmt: skip
STATEMENTS_MAX = 3_500.0  # a little above what it is now


class Item:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 1


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


def statements_per_s() -> float:
    """Different statements of everyday kinds, so many that they come round too seldom for a branch predictor to know them."""
    rng = Random(1)
    lines = [f"        {rng.choice(STATEMENTS)}" for _ in range(PROGRAM)]
    source = "\n".join(["def program(rounds, numbers, names, things, item, call):", "    i = x = y = 1", "    for _ in range(rounds):", *lines])
    scope: dict[str, Any] = {}
    exec(source, scope)
    arguments: tuple[Any, ...] = ([1, 1], {}, [], Item(), float)
    scope["program"](10, *arguments)
    began = perf_counter()
    scope["program"](ROUNDS, *arguments)
    return PROGRAM * ROUNDS / (perf_counter() - began)


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
    return results["requests"]["completed"], results["run"]["requests_per_wall_s"]


def main() -> int:
    trace = sys.argv[1] if len(sys.argv) > 1 else ""
    flags = ["--workers", "10", *(("--trace", trace) if trace else ("--rate", "5.53", "--duration", "3500"))]
    print(f"trace {trace}" if trace else "synthetic requests")
    customers = statements = best = 0.0
    for _ in range(3):
        customers = max(customers, heapq_customers_per_s())
        statements = max(statements, statements_per_s())
        requests, rate = requests_per_s(flags)
        best = max(best, rate)
        print(f"  {requests:,} requests at {rate:,.0f} a second")
    kept = _fleet.show("requests a second, 10 workers, everything on", best, "requests/s", 15_000, at_least=True)
    _fleet.show("customers of a plain heapq M/M/10 for each request", customers / best, "customers/request", 36.0)
    _fleet.show("statements of a long program for each request", statements / best, "statements/request", STATEMENTS_MAX)
    print(f"  the plain heapq loop does {customers:,.0f} customers a second here (480,000 to 610,000 where the budget was set)")
    print(f"  the long program does {statements:,.0f} statements a second here")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
