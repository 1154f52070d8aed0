"""Strangers in a simulated fleet: a holder of its key who says whatever keeps the rules, under ids of its own, to everybody.

What strangers ask for, workers do: so what they ask for here ends within minutes, and no two of them use the same id for a request, by which the checkers
know what a worker does. Their reports go to the coordinator: the books of reports are those of all that it hears.
"""

from __future__ import annotations

from sllm.models.presets import HARDWARE
from sllm.protocol.limits import TOKENS_MAX
from sllm.protocol.messages import Address, InferenceRequest, LoadReport
from sllm.protocol.seeds import rng_for
from sllm.run.system import System
from sllm.virtual.hostile import Babbler, Mouth

ADDRESS: Address = ("strangers", 6000)
NAMES = tuple(f"stranger-{number}" for number in range(8))
REQUESTS = 10  # ids that each of them uses
PROMPT_MAX, OUTPUT_MAX = 50_000, 200  # of what workers may take for them


class Strangers(Mouth):
    """The node that says it. `reports_sent`: as of a worker."""

    __slots__ = ("_coordinator", "reports_sent")

    def __init__(self, system: System, *, per_s: float, until: float, now: float) -> None:
        workers = list(system.workers)
        targets = [system.coordinator_address, ("client", 7000), *((name, system.config.worker_port) for name in workers)]
        known = {
            "model": system.catalog.names[:50], "worker_id": workers, "exclude": workers, "hardware": list(HARDWARE), "prompt_tokens": [0, 1, 1000],
            "max_tokens": [1, 20], "host": [workers[0], ADDRESS[0], "nowhere"],
        }  # fmt: skip
        babbler = Babbler(rng_for(system.config.seed, "strangers"), known)
        super().__init__(babbler, targets, NAMES, per_s=per_s, until=until, now=now, codec=system.codec(), node_id=ADDRESS[0])
        self._coordinator = system.coordinator_address
        self.reports_sent = 0

    def say(self, now: float) -> None:
        super().say(now)
        envelope, addr = self.outbox[-1]
        message = envelope.message
        if isinstance(message, LoadReport):
            addr = self._coordinator
            self.reports_sent += 1
        elif isinstance(message, InferenceRequest):
            message = message.replace(
                request_id=f"{envelope.sender_id}/{self._babbler.rng.randrange(REQUESTS)}", prompt_tokens=_bounded(message.prompt_tokens, PROMPT_MAX),
                max_tokens=_bounded(message.max_tokens, OUTPUT_MAX),
            )  # fmt: skip
        self.outbox[-1] = envelope.replace(message=message), addr


def _bounded(tokens: int, most: int) -> int:
    """At most so many, or the most that can be said, which nobody takes."""
    return tokens if tokens == TOKENS_MAX else min(tokens, most)
