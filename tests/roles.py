"""Small helpers to talk to a role by hand: what it is told, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any, TypeVar

from config import Config
from coordinator import Coordinator
from sllm.models.catalogue import Catalog
from sllm.placement.registry import make_policy
from sllm.protocol.bus import EventBus
from sllm.protocol.messages import READY, Address, AnyEnvelope, EngineSnapshot, Envelope, LoadReport, Message, ScheduleRequest
from sllm.protocol.node import Judge, Node, Rejected

M = TypeVar("M", bound=Message)
E = TypeVar("E")
CLIENT: Address = ("client", 7000)
CATALOG = Catalog.demo(6)
MODEL = CATALOG.names[0]


def configuration(**changes: Any) -> Config:
    return dataclasses.replace(Config.from_env({"DEPLOYMENT_MODE": "local"}), **changes)


def report(**changes: Any) -> LoadReport:
    """An idle worker with one model loaded."""
    engine = EngineSnapshot(256, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 50_000_000_000, (MODEL,), (), (), (MODEL,), (), True)
    return changed(LoadReport(READY, "", 8000, "h100-80g", 1000, engine, 0, 0, (), 1.0), **changes)


def changed(message: M, **changes: Any) -> M:
    """The message with other values, of its own fields or, for a report, of its engine's."""
    if isinstance(message, LoadReport):
        inner = {name: changes.pop(name) for name in list(changes) if name in EngineSnapshot.FIELDS}
        changes |= {"engine": message.engine.replace(**inner)} if inner else {}
    return message.replace(**changes)


class ToyCodec:
    """A codec for tests in a few lines: whoever derives from this class says how an envelope is packed, and raises Rejected where it is refused."""

    def encode(self, envelope: AnyEnvelope) -> bytes:
        raise NotImplementedError

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope:
        raise NotImplementedError

    def read(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope | str:
        try:
            return self.decode(data, judge, now)
        except Rejected as rejection:
            return rejection.reason

    def forget(self, sender_id: str) -> None:
        """Nothing is kept of anybody."""


def judged(envelope: AnyEnvelope, judge: Judge | None, now: float) -> AnyEnvelope:
    """What a codec does between the header and the body."""
    reason = judge(type(envelope.message), envelope.sender_id, envelope.incarnation, envelope.sequence, envelope.wall_s, now) if judge else ""
    if reason:
        raise Rejected(reason)
    return envelope


def in_turn(*actions: Callable[[], object]) -> Callable[[], None]:
    """One action that does them one after the other."""

    def act() -> None:
        for action in actions:
            action()

    return act


def tell(hearer: Any, *events: Any) -> None:
    """Let something hear events as it would hear them from a driver: what it subscribes to, or has handlers for."""
    bus = EventBus()
    if hasattr(hearer, "subscribe"):
        hearer.subscribe(bus)
    else:
        bus.subscribe_all(hearer.handlers)
    bus.publish(None, events)


class Talk:
    """Speaks to one node as many senders, numbering what each says."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._sequences: dict[tuple[str, type], int] = {}

    def say(self, sender: str, message: Message, now: float, *, addr: Address | None = None, incarnation: int = 1, sequence: int | None = None) -> None:
        key = (sender, type(message))
        self._sequences[key] = number = sequence if sequence is not None else self._sequences.get(key, 0) + 1
        envelope = Envelope(sender, incarnation, number, now + self.node.wall_offset_s, message)
        self.node.receive(envelope, addr or (sender, 9000 if sender == "coordinator" else 8000), now)

    def heard(self, kind: type[M]) -> list[M]:
        """Messages of one kind it has sent since last asked; the others are dropped."""
        messages = [envelope.message for envelope, _ in self.node.outbox]
        self.node.outbox.clear()
        return [message for message in messages if isinstance(message, kind)]

    def told(self, kind: type[E]) -> list[E]:
        """Events of one kind it has told since last asked; the others are dropped."""
        events = list(self.node.events)
        self.node.events.clear()
        return [event for event in events if isinstance(event, kind)]

    def run_to(self, now: float) -> None:
        """Fire its timers, one by one, up to `now`."""
        while (at := self.node.next_deadline()) is not None and at <= now:
            self.node.handle_timer(at)


def coordinator(policy: str = "startup_time", **changes: Any) -> tuple[Coordinator, Talk]:
    """A coordinator that has finished listening."""
    node = Coordinator(configuration(**changes), CATALOG, make_policy(policy), Random(1), 100)
    talk = Talk(node)
    talk.run_to(1.0)
    return node, talk


def ask(request_id: str = "r0", model: str = MODEL, **changes: Any) -> ScheduleRequest:
    return ScheduleRequest(request_id, model, 1000, 200, 1, 0.0, ()).replace(**changes)
