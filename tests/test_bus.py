"""The event bus, and the records that travel on it."""

from __future__ import annotations

import copy
import pickle

import pytest

from sllm.protocol.bus import EventBus
from sllm.protocol.record import Record


class Ping(Record):
    FIELDS = ("at", "name")
    __slots__ = FIELDS

    def __init__(self, at: float, name: str = "n") -> None:
        self.at = at
        self.name = name


class Pong(Record):
    FIELDS = ("at", "name")
    __slots__ = FIELDS

    def __init__(self, at: float, name: str) -> None:
        self.at = at
        self.name = name


def test_who_asked_for_a_kind_hears_it_and_who_named_none_hears_all_in_the_order_of_asking() -> None:
    heard: list[tuple[str, object]] = []
    bus = EventBus()
    bus.subscribe(lambda node, event: heard.append(("ping", event)), Ping)
    bus.subscribe(lambda node, event: heard.append(("all", event)))
    bus.subscribe_all({Pong: lambda node, event: heard.append(("pong", event))})
    ping, pong = Ping(1.0), Pong(2.0, "x")
    bus.publish("node", [ping, pong])
    assert heard == [("ping", ping), ("all", ping), ("all", pong), ("pong", pong)]


def test_records_are_compared_shown_copied_and_replaced_field_by_field() -> None:
    ping = Ping(1.0, "a")
    assert ping == Ping(1.0, "a")
    assert ping != Ping(1.0, "b")
    assert Ping(1.0, "a") != Pong(1.0, "a")
    assert len({ping, Ping(1.0, "a"), Pong(1.0, "a")}) == 2
    assert repr(ping) == "Ping(at=1.0, name='a')"
    assert ping.replace(name="b") == Ping(1.0, "b")
    assert ping == Ping(1.0, "a")
    assert copy.copy(ping) == ping == pickle.loads(pickle.dumps(ping))
    with pytest.raises(TypeError):
        ping.replace(nobody=1)
