"""What the coordinator's process says of itself, part by part: here without a process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from roles import CATALOG, Talk, configuration, report, tell

import entrypoint_coordinator as entry
from coordinator import Coordinator
from sllm.placement.registry import make_policy
from sllm.protocol.seeds import rng_for


class Part:
    """A coordinator in its part, driven by hand: `now` is what a test says."""

    def __init__(self) -> None:
        self.node = Coordinator(configuration(), CATALOG, make_policy("random"), rng_for(1, "coordinator"), 100)
        self.clock = SimpleNamespace(now=0.0)
        self.later: list[Any] = []
        service: Any = SimpleNamespace(
            config=configuration(), started_wall_s=0.0, clock=self.clock, driver=SimpleNamespace(call_at=lambda at, step: self.later.append(step)),
            host=SimpleNamespace(kernel_drops=0), stopping=False,
        )  # fmt: skip
        self.part = entry.CoordinatorPart(service, self.node)

    def to(self, now: float) -> None:
        self.clock.now = now
        self.node.handle_timer(now)
        for event in self.node.events:
            tell(self.part, event)
        self.node.events.clear()

    def state(self) -> dict[str, Any]:
        answers: list[Any] = []
        self.part.state(answers.append)
        while self.later:
            self.later.pop(0)()
        (answer,) = answers
        return {"ready": self.part.ready(), **self.part.page_state(answer, {})}


def test_ready_is_not_said_of_a_picture_from_before() -> None:
    """Somebody looked just before the listening time was over, and somebody looks again just after: pictures are shared for a second, but not that one."""
    part = Part()
    part.to(0.5)
    assert part.state()["ready"] == (False, "listening for reports after a start")
    talk = Talk(part.node)
    for number in range(3):
        talk.say(f"worker-{number}", report(), 0.9)
    part.to(1.0)
    state = part.state()
    assert state["ready"] == (True, "ready")
    assert state["total"] == 3
    part.to(1.2)
    assert part.state()["total"] == 3


def test_ready_without_workers_says_so() -> None:
    part = Part()
    part.to(1.0)
    assert part.state()["ready"] == (True, "ready, no worker has reported yet")
