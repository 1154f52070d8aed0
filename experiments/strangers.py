"""Strangers in a simulated fleet: a compromised node with the key, which sends messages that keep the field rules, under ids of its own, to every role.

Workers serve the requests of strangers, so these requests are short enough to end within minutes, and no two strangers use the same request id, because
checkers identify a worker's work by request id. Reports of strangers go to the coordinator and count among the reports sent.
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
REQUESTS = 10  # request ids of each stranger
PROMPT_MAX, OUTPUT_MAX = 50_000, 200  # tokens of the requests of strangers that workers may serve


class Strangers(Mouth):
    """The node that sends these messages. `reports_sent`: as of a worker, so that the counts of reports include strangers."""

    __slots__ = ("_coordinator", "reports_sent")

    def __init__(self, system: System, *, per_s: float, until: float, now: float) -> None:
        workers = system.workers
        targets = [system.addresses[name] for name in (*system.trackers, system.client, *workers)]
        known = {
            "model": system.catalog.names[:50], "worker_id": workers, "exclude": workers, "hardware": list(HARDWARE), "prompt_tokens": [0, 1, 1000],
            "max_tokens": [1, 20], "host": [workers[0], ADDRESS[0], "nowhere"],
        }  # fmt: skip
        babbler = Babbler(rng_for(system.config.seed, "strangers"), known)
        super().__init__(babbler, targets, NAMES, per_s=per_s, until=until, now=now, codec=system.codec(), node_id=ADDRESS[0])
        self._coordinator = targets[0]
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
    """A number of tokens up to a limit, or the largest number that the field rule allows, which every worker refuses."""
    return tokens if tokens == TOKENS_MAX else min(tokens, most)
