"""Every message that keeps the rules, to every role, in any order, between timers, on both drivers: nobody raises, and everybody still works."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import CATALOG, CLIENT, changed, configuration
from simulated import COORDINATOR, Fleet
from wire_samples import CODEC, SAMPLES

from client import Client
from coordinator import Coordinator
from experiments.harness import silent
from sllm.engine import LlmEngine, QueueEngine
from sllm.placement.registry import make_policy, policies
from sllm.protocol import limits
from sllm.protocol.bus import EventBus
from sllm.protocol.events import Event, RequestCompleted
from sllm.protocol.messages import MESSAGES, Address, AnyEnvelope, Envelope, Message
from sllm.protocol.node import Handler, Node
from sllm.protocol.record import Record
from sllm.protocol.replay import FRESH_WITHIN_S
from sllm.run.live import LiveRun
from sllm.virtual.hostile import Babbler, Mouth
from sllm.wire import frame as wire
from sllm.wire.codecs import pickle as codec_file
from sllm.wire.frame import HEADER, FrameCodec
from sllm.wire.keys import Keyring
from sllm.workload import Request
from worker import Worker

KEYS = Keyring(1, {1: bytes(range(32))})
WORKERS = ("worker-1", "worker-2", "worker-3")
KNOWN = {
    "model": CATALOG.names, "worker_id": WORKERS, "exclude": WORKERS, "request_id": [f"r{i}" for i in range(10)], "hardware": ["h100-80g", "a5000-24g"],
    "host": ["127.0.0.1", "::1", "10.0.0.1"], "max_tokens": [1, 20], "prompt_tokens": [0, 1, 1000],
}  # fmt: skip


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_what_is_drawn_keeps_the_rules_and_travels(kind: type[Message], seed: int) -> None:
    message = Babbler(Random(seed), KNOWN).message(kind)
    plain = tuple(value.values() if isinstance(value, Record) else value for value in message.values())
    assert all(rule.accepts(value) for rule, value in zip(kind.RULES.values(), plain, strict=True))
    assert CODEC.decode(CODEC.encode(Envelope("w", 1, 1, 1.0, message))).message == message


def make_coordinator(seed: int) -> Node:
    names = list(policies())
    return Coordinator(configuration(), CATALOG, make_policy(names[seed % len(names)]), Random(seed), 100, codec=CODEC)


def make_worker(seed: int) -> Node:
    rng = Random(seed)
    config = configuration(queue_max=rng.choice((1, 1000)), report_interval_s=rng.choice((0.0, 1.0)))
    engine: Any = LlmEngine(CATALOG, CATALOG.get_hardware("h100-80g"))
    if seed % 3 == 0:
        engine = QueueEngine(4, "exponential", 0.5, rng, models=CATALOG.names, load_s=rng.choice((0.0, 1.0)))
    return Worker(config, CATALOG, engine, COORDINATOR, rng, 100, node_id="worker-1", codec=CODEC)


def make_client(seed: int) -> Node:
    node = Client(configuration(), COORDINATOR, Random(seed), 100, codec=CODEC)
    for number in range(5):
        node.submit(Request(0.0, f"r{number}", CATALOG.names[number], 100, 20, 1), 0.0)
    return node


FORBIDDEN: list[dict[str, Any]] = [
    {"message": "InferenceRequest", "max_tokens": 0}, {"message": "LoadReport", "sequence": 1 << 63}, {"message": "LoadReport", "gpu_models": ["a", "a"]},
    {"message": "LoadReport", "host_models": ["a", "a"]}, {"message": "LoadReport", "loading": [["a", 1.0], ["a", 2.0]]},
    {"message": "LoadReport", "host": "h" * 254}, {"message": "LoadReport", "host": "::1%a\0b"}, {"message": "LoadReport", "interval_s": 60.1},
    {"message": "LoadReport", "slots": limits.SLOTS_MAX + 1}, {"message": "LoadReport", "incarnation": (1 << 64) - 1},
    {"message": "LoadReport", "incarnation": limits.NUMBER_MAX}, {"message": "ScheduleRequest", "exclude": [f"w{i}" for i in range(21)]},
    {"message": "ScheduleResponse", "host": ""}, {"message": "ReportAck", "incarnation": 1 << 63},
]  # fmt: skip
ALLOWED: list[dict[str, Any]] = [
    {"message": "LoadReport", "host": "h" * 129}, {"message": "ScheduleRequest", "exclude": [f"w{i}" for i in range(20)]},
    {"message": "InferenceRequest", "max_tokens": 1, "prompt_tokens": 0}, {"message": "LoadReport", "sequence": limits.NUMBER_MAX},
]  # fmt: skip
FAULTS = Path(__file__).resolve().parent.parent.parent / "shared" / "faults" / "messages.json"
GIVEN: list[dict[str, Any]] = json.loads(FAULTS.read_text(encoding="utf-8")) if FAULTS.exists() else []


def as_tuple(value: Any) -> Any:
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def forged(change: dict[str, Any]) -> tuple[type[Message], bytes]:
    """A datagram with these fields, signed, past all that our own sender would look at."""
    fields = {name: as_tuple(value) for name, value in change.items()}
    named = fields.pop("message")
    (kind,) = (kind for kind in MESSAGES if kind.__name__ == named)
    sequence, incarnation = fields.pop("sequence", 1), fields.pop("incarnation", 1)
    if isinstance(fields.get("interval_s"), int):
        fields["interval_s"] = float(fields["interval_s"])
    sample = changed(SAMPLES[kind], **fields)
    plain = tuple(value.values() if isinstance(value, Record) else value for value in sample.values())
    sink = codec_file._Sink()
    pickler = pickle.Pickler(sink, 5)
    pickler.fast = True
    pickler.dump(plain)
    sender = b"coordinator" if kind.OF_COORDINATOR else b"stranger"
    data = HEADER.pack(wire.MAGIC, wire.VERSION, kind.CODE, 1, len(sender), incarnation, sequence, 1.0) + sender + sink.body
    return kind, data + CODEC.keyring.tag(1, data)


@pytest.mark.parametrize("make", [make_coordinator, make_worker, make_client])
@pytest.mark.parametrize("change", [*FORBIDDEN, *ALLOWED, *GIVEN], ids=lambda change: f"{change['message']} {[*change][1:]}")
def test_what_is_beyond_a_rule_is_counted_and_changes_nothing_else(make: Callable[[int], Node], change: dict[str, Any]) -> None:
    node = make(1)
    kind, data = forged(change)
    before = len(node.outbox)
    node.receive_datagram(data, node.coordinator if kind.OF_COORDINATOR else CLIENT, 1.0)
    if kind not in node.handlers:
        assert node.rejected == {"unexpected": 1} or node.rejected == {"number": 1}
    elif change in FORBIDDEN:
        (reason,) = node.rejected
        assert reason in ("schema", "number", "future_incarnation")
        assert len(node.outbox) == before
    elif change in ALLOWED:
        assert not node.rejected
    for answer, _ in node.datagrams_to_send():
        assert CODEC.decode(answer)


@pytest.mark.parametrize("make", [make_coordinator, make_worker, make_client])
@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 1 << 32), as_bytes=st.booleans())
def test_no_role_raises_and_all_it_says_can_be_sent(make: Callable[[int], Node], seed: int, as_bytes: bool) -> None:
    node, rng = make(seed), Random(seed)
    mouth = Mouth(Babbler(rng, KNOWN), [CLIENT, ("::1", 65535)], [*WORKERS, "coordinator", "client", "\ud55c" * 21], per_s=1.0)
    now = 0.0
    for _ in range(rng.randint(1, 60)):
        mouth.say(now)
        ((envelope, addr),) = mouth.outbox
        mouth.outbox.clear()
        if as_bytes:
            node.receive_datagram(CODEC.encode(envelope), addr, now)
        else:
            node.receive(envelope, addr, now)
        if isinstance(node, Worker) and rng.random() < 0.01:
            node.drain(now)
        for _ in range(rng.choice((0, 1, 20))):
            if (at := node.next_deadline()) is None:
                break
            now = max(now, at)
            node.handle_timer(now)
        for data, target in node.datagrams_to_send():
            assert CODEC.decode(data)
            assert len(target) == 2


@pytest.mark.parametrize("make", [make_coordinator, make_worker, make_client])
def test_every_role_hears_much_of_what_is_drawn(make: Callable[[int], Node]) -> None:
    """A flood of which everything is refused at the door would hold nothing. Only fresh lives and fresh numbers of messages of a role are heard, and of the
    coordinator only what comes from where it was asked."""
    node, heard = make(1), Counter[str]()

    def count(handler: Handler, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        heard[type(envelope.message).__name__] += 1
        handler(envelope, addr, now)

    for kind, handler in node.handlers.items():
        node.handlers[kind] = partial(count, handler)
    mouth = Mouth(Babbler(Random(1), KNOWN), [CLIENT, node.coordinator], [*WORKERS, "coordinator"], per_s=1.0)
    for second in range(3000):
        mouth.say(float(second))
        ((envelope, addr),) = mouth.outbox
        mouth.outbox.clear()
        node.receive(envelope, addr, float(second))
    assert heard.keys() == {kind.__name__ for kind in node.handlers}
    assert min(heard.values()) >= 10


STOLEN = ["worker-1", "worker-2", "worker-3", "coordinator", "client"]


@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("stolen", [[], STOLEN], ids=["own ids", "stolen ids"])
@pytest.mark.parametrize("seed", range(3))
def test_a_fleet_in_virtual_time_outlives_a_flood(seed: int, stolen: list[str], wire: bool) -> None:
    """Under ids of its own and under everybody else's, as bytes or as objects. A request completes that comes when all that was said is stale."""
    fleet = Fleet(seed, workers=3, duration_s=20.0, check=False, make_codec=(lambda: FrameCodec(KEYS)) if wire else None).record()
    world = fleet.world
    senders = [f"stranger-{i}" for i in range(10)] + stolen
    targets = [COORDINATOR, ("worker-1", 8000), ("worker-2", 8000), ("worker-3", 8000), ("client", 7000)]
    known = {**KNOWN, "model": fleet.catalog.names, "host": ["worker-1", "mouth", "nowhere"]}
    mouth = Mouth(Babbler(Random(seed), known), targets, senders, per_s=100.0, until=20.0, codec=FrameCodec(KEYS) if wire else None)
    world.add(mouth, ("mouth", 1))
    world.run(20.0)
    world.run(20.0 + (3.0 * FRESH_WITHIN_S if stolen else 2.0 * fleet.config.worker_timeout_s))
    assert mouth.said > 1500
    honest = [Request(0.0, f"honest-{i}", name, 100, 20, 1) for i, name in enumerate(fleet.catalog.names[:3])]
    host = world.hosts["client"]
    for request in honest:
        fleet.client.submit(request, world.now)
    host.touch()
    world.run(world.now + 60.0)
    done = {event.request_id for event in fleet.trace if isinstance(event, RequestCompleted)}
    assert {request.request_id for request in honest} <= done


def test_a_live_fleet_outlives_a_flood() -> None:
    """The same over UDP on loopback: the guard counts nothing, because nothing raises."""
    config = configuration(workers=3, rate_per_s=2.0, duration_s=60.0, models=6, speedup=20.0)
    run = LiveRun(config, silent(virtual=False))
    with run.driver:
        run.start_fleet()
        seen: list[Event] = []
        run.driver.bus = EventBus()  # without the checkers: what strangers say breaks the books
        run.driver.bus.subscribe(lambda node, event: seen.append(event))
        targets = list(run.system.addresses.values())
        known = {**KNOWN, "model": run.system.catalog.names, "port": [port for _, port in targets]}
        senders = [f"stranger-{i}" for i in range(10)] + ["worker-0", "worker-1", "coordinator", "client"]
        mouth = Mouth(
            Babbler(Random(1), known), targets, senders, per_s=50.0, until=run.now + 30.0, now=run.now, codec=run.system.codec(),
            wall_offset_s=run.clock.wall_offset_s,
        )  # fmt: skip
        run.driver.add(mouth)
        ends_at = run.now + 30.0 + 2.0 * config.worker_timeout_s
        run.driver.run_until(lambda: run.now >= ends_at)
        assert mouth.said > 100
        for number in range(5):
            run.submit(Request(0.0, f"honest-{number}", run.system.catalog.names[number], 100, 20, 1), run.now)
        run.handles["client"].touch()
        last_s = run.now + 200.0
        run.driver.run_until(lambda: not run.system.in_flight or run.now >= last_s)
    assert not run.driver.internal_errors, [event for event in seen if "trace" in event.FIELDS]
    done = {event.request_id for event in seen if isinstance(event, RequestCompleted)}
    assert {f"honest-{number}" for number in range(5)} <= done
