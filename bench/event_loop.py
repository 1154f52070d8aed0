"""The world's event loop against SimPy, on the same M/M/10 in the same run.

    python3 bench/event_loop.py [--customers 200000] [--rho 0.9] [--repeat 3]

Both draw the same arrivals and services from the same seed, so both must find the same mean wait, which the closed form predicts
(C = Wq = 0.6687315241 at rho 0.9 with mean service 1). In the world the queue is one node with a timer, driven like any role: two wake-ups a
customer. In SimPy it is one process a customer and a Resource. Prints customers a second for each, and their ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, show, status
from sllm.protocol.node import Node
from sllm.virtual.network import Network
from sllm.virtual.world import World

SERVERS = 10


def erlang_wait(servers: int, load: float) -> float:
    """Mean wait of M/M/c with mean service 1: Erlang C, from Erlang B by its recursion."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = load * blocked / (k + load * blocked)
    rho = load / servers
    waits = blocked / (1.0 - rho * (1.0 - blocked))
    return waits / (servers - load)


def customers(count: int, load: float, seed: int) -> Iterator[tuple[float, float]]:
    """(gap to the arrival before, service)."""
    rng = Random(seed)
    for _ in range(count):
        yield rng.expovariate(load), rng.expovariate(1.0)


class Station(Node):
    """A queue with some servers, as a role: it wakes for each arrival and each departure."""

    def __init__(self, arrivals: Iterator[tuple[float, float]]) -> None:
        super().__init__("station", 1)
        self._arrivals = arrivals
        self._free = SERVERS
        self._line: deque[tuple[float, float]] = deque()
        self._departures: list[float] = []
        self._arrival_at, self._service = next(arrivals)
        self.served = 0
        self.waited = 0.0
        self.wake_at = self._arrival_at

    def handle_timer(self, now: float) -> None:
        if now >= self._arrival_at:
            if self._free:
                self._free -= 1
                heappush(self._departures, now + self._service)
            else:
                self._line.append((now, self._service))
            gap, self._service = next(self._arrivals, (float("inf"), 0.0))
            self._arrival_at = now + gap
        else:
            heappop(self._departures)
            self.served += 1
            if self._line:
                came, service = self._line.popleft()
                self.waited += now - came
                heappush(self._departures, now + service)
            else:
                self._free += 1
        departures = self._departures
        self.wake_at = departures[0] if departures and departures[0] < self._arrival_at else self._arrival_at


def in_world(count: int, load: float, seed: int) -> float:
    """Mean wait."""
    world = World(seed, Network())
    station = Station(customers(count, load, seed))
    world.add(station, ("station", 1))
    world.run()
    assert station.served == count
    return station.waited / count


def in_simpy(count: int, load: float, seed: int) -> float:
    """Mean wait."""
    simpy: Any = import_module("simpy")
    environment: Any = simpy.Environment()
    servers: Any = simpy.Resource(environment, SERVERS)
    waited = [0.0]

    def customer(service: float) -> Iterator[Any]:
        came = environment.now
        with servers.request() as place:
            yield place
            waited[0] += environment.now - came
            yield environment.timeout(service)

    def source() -> Iterator[Any]:
        for gap, service in customers(count, load, seed):
            yield environment.timeout(gap)
            environment.process(customer(service))

    environment.process(source())
    environment.run()
    return waited[0] / count


def rate(run: Callable[[int, float, int], float], count: int, load: float, repeat: int) -> tuple[float, float]:
    """(customers a second in the best of `repeat` runs, mean wait)."""
    best, wait = float("inf"), 0.0
    for _ in range(repeat):
        began = time.perf_counter()
        wait = run(count, load, 1)
        best = min(best, time.perf_counter() - began)
    return count / best, wait


def main() -> int:
    parser = argparse.ArgumentParser(description="The world's event loop against SimPy on M/M/10.")
    parser.add_argument("--customers", type=int, default=200_000)
    parser.add_argument("--rho", type=float, default=0.9, help="load of each server, 0..1")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the fastest counts")
    options = parser.parse_args()
    if find_spec("simpy") is None:
        print("simpy is missing: pip install -r requirements-dev.txt", file=sys.stderr)
        return 2
    load = SERVERS * options.rho
    ours, our_wait = rate(in_world, options.customers, load, options.repeat)
    theirs, their_wait = rate(in_simpy, options.customers, load, options.repeat)
    print(f"world  {ours:10,.0f} customers/s   mean wait {our_wait:.6f}")
    print(f"simpy  {theirs:10,.0f} customers/s   mean wait {their_wait:.6f}   (exact: {erlang_wait(SERVERS, load):.6f})")
    show("customers a second in the world / in SimPy", ours / theirs, RATIO, 4.0, at_least=True)
    show("difference of the mean waits / the wait", abs(our_wait - their_wait) / our_wait, RATIO, 1e-6)
    return status()


if __name__ == "__main__":
    sys.exit(main())
