"""The load generator's part in its process: here without a process."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

from roles import CATALOG, configuration

import entrypoint_client as entry
from client import Client
from sllm.protocol.seeds import rng_for
from sllm.workload import Request
from sllm.workload.pump import BATCH


class Requests(list[Request]):
    """A workload that is not closed-loop load."""

    users = None


class Part:
    """A load generator whose requests come faster than it can hand them in, without end. `calls`: what its driver is to call."""

    def __init__(self) -> None:
        self.drawn = 0
        self.calls: list[tuple[float, Any]] = []
        self.service: Any = SimpleNamespace(
            config=configuration(), started_wall_s=0.0, clock=SimpleNamespace(now=1.0),
            driver=SimpleNamespace(call_at=lambda at, call: self.calls.append((at, call))), host=None, resolved=True, interrupted_by=0,
        )  # fmt: skip
        self.node = Client(configuration(), ("127.0.0.1", 9), rng_for(1, "client"), 100)
        self.part = entry.ClientPart(self.service, self.node, self.requests())  # type: ignore[arg-type]

    def requests(self) -> Any:
        for number in count():
            self.drawn = number + 1
            assert self.drawn < 10 * BATCH, "one turn has no end"
            yield Request(0.0, f"r{number}", CATALOG.names[0], 100, 10)


def test_one_turn_hands_in_a_bounded_number_of_requests() -> None:
    part = Part()
    part.part.tick()
    assert part.node.in_flight == part.drawn == BATCH
    ((at, go_on),) = part.calls
    assert at == part.service.clock.now
    go_on()
    assert part.node.in_flight == part.drawn == 2 * BATCH


def test_a_signal_that_came_in_the_middle_of_a_turn_ends_it() -> None:
    part = Part()
    submit, submitted = part.node.submit, count(1)

    def interrupted(request: Request, now: float) -> None:
        submit(request, now)
        if next(submitted) == 5:
            part.service.interrupted_by = 2

    part.part.node = SimpleNamespace(submit=interrupted, in_flight=0, finds_nobody=False)  # type: ignore[assignment]
    part.part.tick()
    assert part.node.in_flight == 5
    assert part.calls == []


def test_a_request_whose_time_has_not_come_waits_for_it() -> None:
    part = Part()
    part.part._workload = Requests([Request(0.0, "now", CATALOG.names[0], 100, 10), Request(2.0, "later", CATALOG.names[0], 100, 10)])  # type: ignore[assignment]
    part.part.tick()
    ((at, go_on),) = part.calls
    assert (at, part.node.in_flight) == (3.0, 1)
    part.service.clock.now = 3.0
    go_on()
    assert part.node.in_flight == 2
    assert part.part._exhausted
