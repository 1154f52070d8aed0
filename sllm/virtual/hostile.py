"""Random messages of a compromised node that has the key: each message keeps the field rules of the wire and nothing else. The messages follow from a seed.

A `Babbler` draws messages by the field rules: fields at their limits, the longest, the shortest, and often names that exist in the run. A `Mouth` is a node
that sends these messages, under any ids, to any addresses; the world and the live driver drive a `Mouth` as any other node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf
from random import Random
from typing import Any

from sllm.protocol.fitting import fitted
from sllm.protocol.limits import NUMBER_MAX
from sllm.protocol.messages import MESSAGES, Address, Envelope, LoadReport, Message
from sllm.protocol.node import Codec, Node
from sllm.protocol.replay import FRESH_WITHIN_S
from sllm.protocol.rules import Fields, Rule

KNOWN_PART = 0.6  # probability that a field gets one of its known values


class Babbler:
    """Draws messages. `known` has existing values by field name: models, workers, requests of the run."""

    def __init__(self, rng: Random, known: Mapping[str, Sequence[Any]] | None = None) -> None:
        self.rng = rng
        self.known = dict(known or {})
        models = self.known.get("model", ())
        for name in ("gpu_models", "busy_models", "host_models", "disk_models"):
            self.known.setdefault(name, models)

    def message(self, kind: type[Message] | None = None) -> Message:
        """One message, of the given kind or of a random one."""
        kind = kind or self.rng.choice(MESSAGES)
        message = kind(**{name: self._field(name, rule) for name, rule in kind.RULES.items()})
        return fitted(message) if isinstance(message, LoadReport) else message

    def _field(self, name: str, rule: Rule) -> Any:
        if isinstance(rule, Fields):
            return rule.kind(*(self._field(inner, its) for inner, its in zip(rule.names, rule.rules, strict=True)))
        rng, known, drawn = self.rng, self.known.get(name), rule.draw(self.rng)
        if known and rng.random() < KNOWN_PART:
            return tuple(rng.sample(known, rng.randint(0, min(len(known), 8)))) if isinstance(drawn, tuple) else rng.choice(known)
        return drawn


class Mouth(Node):
    """Sends a babbler's messages, `per_s` of them a second until `until`, to `targets`, under the ids of `senders`."""

    __slots__ = ("_babbler", "_numbers", "_per_s", "_senders", "_targets", "_until", "said")

    def __init__(
        self, babbler: Babbler, targets: Sequence[Address], senders: Sequence[str], *, per_s: float, until: float = inf, now: float = 0.0,
        codec: Codec | None = None, wall_offset_s: float = 0.0, node_id: str = "mouth",
    ) -> None:  # fmt: skip
        super().__init__(node_id, 1, codec=codec, wall_offset_s=wall_offset_s)
        self._babbler = babbler
        self._targets = targets
        self._senders = senders
        self._per_s = per_s
        self._until = until
        self._numbers: defaultdict[tuple[str, type], int] = defaultdict(int)
        self.said = 0
        self.wake_at = now

    def handle_timer(self, now: float) -> None:
        for _ in range(max(1, int((now - self.wake_at) * self._per_s))):
            self.say(now)
        self.wake_at = now + 1.0 / self._per_s if now < self._until else inf

    def say(self, now: float) -> None:
        """One message."""
        rng = self._babbler.rng
        message, sender = self._babbler.message(), rng.choice(self._senders)
        wall_now_s = now + self.wall_offset_s
        started_ns = int((max(now, wall_now_s) + rng.choice((0.0, FRESH_WITHIN_S - 1.0, -60.0, rng.uniform(-3600.0, 0.0)))) * 1e9)
        incarnation = rng.choice((0, 1, max(0, started_ns), max(0, started_ns), NUMBER_MAX))
        self._numbers[sender, type(message)] += 1
        sequence = rng.choice((self._numbers[sender, type(message)], self._numbers[sender, type(message)], 0, NUMBER_MAX, rng.randint(0, NUMBER_MAX)))
        wall_s = wall_now_s + rng.choice((0.0, 0.0, rng.uniform(-FRESH_WITHIN_S, FRESH_WITHIN_S)))
        self.outbox.append((Envelope(sender, incarnation, sequence, wall_s, message), rng.choice(self._targets)))
        self.said += 1
