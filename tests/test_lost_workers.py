"""What becomes of requests when their worker dies, falls silent for a while, or cannot be heard by the coordinator alone."""

from __future__ import annotations

import pytest
from simulated import Fleet

from sllm.protocol.events import DuplicateResponse, RequestCancelled, RequestCompleted, RequestFailed, RequestRetried, RequestRouted, RequestSent
from sllm.virtual.faults import parse_schedule
from sllm.virtual.network import Latency, Link, Network

PLACED_AGAIN_S = 5.0  # at the default timeouts, from the death of the worker on


def placed_again(fleet: Fleet, died_at: float, worker_id: str) -> list[float]:
    """How long after the death each request that was on the worker then, or was sent there later, got another placement."""
    routed: dict[str, list[RequestRouted]] = {}
    ended: dict[str, float] = {}
    for event in fleet.trace:
        if isinstance(event, RequestRouted):
            routed.setdefault(event.request_id, []).append(event)
        elif isinstance(event, RequestCompleted | RequestFailed):
            ended[event.request_id] = event.at
    waits = []
    for request_id, placements in routed.items():
        for first, then in zip(placements, [*placements[1:], None], strict=True):
            if first.worker_id != worker_id or (then is None and ended[request_id] <= died_at + 0.01) or (then is not None and then.at <= died_at):
                continue
            assert then is not None, f"{request_id} was never placed again"
            waits.append(then.at - max(died_at, first.at))
    return waits


@pytest.mark.parametrize("seed", range(1, 21))
def test_a_dead_workers_requests_are_placed_again_within_five_seconds(seed: int) -> None:
    network = Network(Link(Latency("constant", 0.0002), loss=0.02 if seed % 2 else 0.0))
    schedule = parse_schedule('fault = [{at = 20.0, kind = "crash", hosts = ["worker-2"]}]', seed)
    fleet = Fleet(seed, workers=4, models=4, rate_per_s=10.0, duration_s=40.0, network=network, schedule=schedule).record().run()
    waits = placed_again(fleet, 20.0, "worker-2")
    assert waits
    assert max(waits) <= PLACED_AGAIN_S
    assert not [event for event in fleet.trace if isinstance(event, RequestFailed)]
    assert len([e for e in fleet.trace if isinstance(e, RequestCompleted)]) == len([e for e in fleet.trace if isinstance(e, RequestSent)])


@pytest.mark.parametrize("seed", range(1, 6))
def test_what_a_frozen_worker_had_is_stopped_there_when_it_thaws(seed: int) -> None:
    schedule = parse_schedule('fault = [{at = 20.0, kind = "freeze", hosts = ["worker-2"], for = 8.0}]', seed)
    fleet = Fleet(seed, workers=4, models=4, rate_per_s=10.0, duration_s=40.0, schedule=schedule, engine_profile="splitwise").record().run()
    given_up = {event.request_id for event in fleet.trace if isinstance(event, RequestRetried) and event.worker_id == "worker-2"}
    assert given_up
    cancelled = {event.request_id for event in fleet.trace if isinstance(event, RequestCancelled) and event.worker_id == "worker-2"}
    twice = {event.request_id for event in fleet.trace if isinstance(event, DuplicateResponse)}
    assert cancelled <= given_up
    assert cancelled
    assert len(twice) < len(given_up)
    assert max(event.at for event in fleet.trace if isinstance(event, RequestCancelled)) < 30.0, "nothing runs twice for long"


def test_a_worker_that_only_the_coordinator_cannot_hear_keeps_its_requests() -> None:
    schedule = parse_schedule('fault = [{at = 20.0, kind = "cut", from = ["worker-2"], to = ["coordinator"], for = 15.0}]', 1)
    fleet = Fleet(1, workers=4, models=4, rate_per_s=10.0, duration_s=40.0, schedule=schedule).record().run()
    assert not [event for event in fleet.trace if isinstance(event, RequestRetried)]
