"""Virtual time: requests a second of wall time with everything on (client, coordinator, workers, engines, recorder, checkers).

Plays a trace over 10 workers: the budget was set for the Azure LLM inference trace 2023, conversation; without one, synthetic requests at its rate.
Usage: python3 bench/virtual_time.py [AzureLLMInferenceTrace_conv.csv]

Baseline: a plain heapq loop of M/M/10 in the same run, which tells how fast the machine is; the ratio is how many of its customers cost as much as one
request.
"""

from __future__ import annotations

import heapq
import io
import sys
from collections import deque
from pathlib import Path
from random import Random
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import _fleet
from centralized_simulation import conduct
from sllm.run.command_line import parse
from sllm.run.virtual import VirtualRun

CUSTOMERS = 200_000
SERVERS, RHO = 10, 0.9


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


def main() -> int:
    trace = sys.argv[1] if len(sys.argv) > 1 else ""
    flags = ["--workers", "10", *(("--trace", trace) if trace else ("--rate", "5.53", "--duration", "3500"))]
    print(f"trace {trace}" if trace else "synthetic requests")
    customers, best = 0.0, 0.0
    for _ in range(3):
        customers = max(customers, heapq_customers_per_s())
        requests, rate = requests_per_s(flags)
        best = max(best, rate)
        print(f"  {requests:,} requests at {rate:,.0f} a second")
    kept = _fleet.show("requests a second, 10 workers, everything on", best, "requests/s", 15_000, at_least=True)
    _fleet.show("customers of a plain heapq M/M/10 for each request", customers / best, "customers/request", 36.0)
    print(f"  the plain heapq loop does {customers:,.0f} customers a second here (480,000 to 610,000 where the budget was set)")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
