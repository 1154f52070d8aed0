"""Every codec of bodies keeps one contract: those of sllm/wire/codecs/, and a toy one that packs JSON. What is around a body (framing, keys, replay, both
drivers, the roles) must work with the toy as it does with the others, for none of it knows what a body looks like."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import nan
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from roles import CATALOG, changed, configuration
from simulated import Fleet
from wire_samples import ENVELOPES, KEY, OTHER_KEY, SAMPLES, envelope

from coordinator import Coordinator
from sllm.engine import LlmEngine
from sllm.live.clock import Clock
from sllm.live.udp import UdpDriver
from sllm.placement.registry import make_policy
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import READY, Address, AnyEnvelope, FirstToken, LoadReport, Message, Progress, ReportAck, ScheduleRequest
from sllm.protocol.node import Node, Rejected
from sllm.protocol.rules import Fields
from sllm.virtual.network import Latency, Link, Network
from sllm.virtual.world import World
from sllm.wire import codecs as folder
from sllm.wire import frame
from sllm.wire.body import SCHEMA, BodyCodec, Values, check, mended
from sllm.wire.frame import HEADER, MAGIC, FrameCodec, body_codecs, reasons
from sllm.wire.keys import TAG_BYTES, Keyring
from worker import Worker

ROOT = Path(__file__).resolve().parent.parent
RING = Keyring(1, {1: KEY})
JSON_VERSION = 200


def as_tuples(value: Any) -> Any:
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


class JsonBody:
    """Bodies as JSON lists: a codec in a few lines."""

    VERSION: ClassVar[int] = JSON_VERSION
    REASONS: ClassVar[tuple[str, ...]] = ("json", SCHEMA)

    def pack(self, kind: type[Message], values: Values) -> bytes:
        return json.dumps(mended(kind, values)).encode()

    def unpack(self, kind: type[Message], body: bytes) -> Values:
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise Rejected("json") from None
        return check(kind, as_tuples(values))


BODIES: list[type[BodyCodec]] = [*body_codecs().values(), JsonBody]


def codec_of(body: type[BodyCodec], ring: Keyring = RING) -> FrameCodec:
    return FrameCodec(ring, [body], body.VERSION)


def refusal(codec: FrameCodec, data: bytes) -> str:
    with pytest.raises(Rejected) as caught:
        codec.decode(data)
    return caught.value.reason


def signed(body: type[BodyCodec], kind: type[Message], content: bytes, sequence: int = 1) -> bytes:
    """A datagram of somebody with the key, whatever is in it."""
    data = HEADER.pack(MAGIC, body.VERSION, kind.CODE, 1, 1, 1, sequence, 100.0) + b"w" + content
    return data + RING.tag(1, data)


class Ear(Node):
    """Hears some sorts of messages, and answers a question with an acknowledgement."""

    def __init__(self, name: str = "ear", codec: FrameCodec | None = None, wall_offset_s: float = 0.0) -> None:
        super().__init__(name, 1, codec=codec, wall_offset_s=wall_offset_s)
        self.heard: list[Message] = []
        self.handlers = dict.fromkeys((FirstToken, Progress, ScheduleRequest), self._hear)

    def _hear(self, one: AnyEnvelope, addr: Address, now: float) -> None:
        self.heard.append(one.message)
        if isinstance(one.message, ScheduleRequest):
            self.send(Progress(1.0, len(self.heard)), addr, now)


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", BODIES)
class TestContract:
    @settings(deadline=None, max_examples=100)
    @given(one=ENVELOPES)
    def test_what_goes_in_comes_out(self, body: type[BodyCodec], one: AnyEnvelope) -> None:
        heard = codec_of(body).decode(codec_of(body).encode(one))
        assert heard == one
        assert [type(value) for value in heard.message.values()] == [type(value) for value in one.message.values()]

    def test_its_version_is_a_byte_and_its_last_check_is_that_of_the_fields(self, body: type[BodyCodec]) -> None:
        assert 0 < body.VERSION < 256
        assert body.REASONS[-1] == SCHEMA
        assert codec_of(body).encode(envelope(SAMPLES[ReportAck]))[4] == body.VERSION

    @pytest.mark.parametrize("kind", SAMPLES, ids=lambda kind: kind.__name__)
    def test_every_damaged_datagram_is_refused_before_its_body_is_looked_at(self, body: type[BodyCodec], kind: type[Message]) -> None:
        codec = codec_of(body)
        data = codec.encode(envelope(SAMPLES[kind]))
        rng = Random(kind.__name__)
        for at in [*range(HEADER.size), *(rng.randrange(HEADER.size, len(data)) for _ in range(50))]:
            damaged = bytearray(data)
            damaged[at] ^= 1 << rng.randrange(8)
            assert refusal(codec, bytes(damaged)) == ("magic" if at < 4 else "version" if at == 4 else "key_id" if at == 6 else "tag")
            assert refusal(codec, data[:at]) in ("size", "tag")
        assert refusal(codec_of(body, Keyring(1, {1: OTHER_KEY})), data) == "tag"
        assert refusal(codec_of(body, Keyring(2, {2: OTHER_KEY})), data) == "key_id"

    def test_a_body_that_is_none_is_refused_by_a_reason_of_its_codec(self, body: type[BodyCodec]) -> None:
        codec, rng = codec_of(body), Random(body.__module__)
        packed = codec.encode(envelope(SAMPLES[ReportAck]))[HEADER.size + len("worker-2") : -TAG_BYTES]
        for content in (b"", b"garbage", packed[:-1], packed + packed, b"[" * 5000, *(rng.randbytes(rng.randrange(200)) for _ in range(300))):
            assert refusal(codec, signed(body, ReportAck, content)) in body.REASONS
        assert refusal(codec, signed(body, LoadReport, packed)) == SCHEMA, "the fields of another message"
        assert refusal(codec, signed(body, Message, packed)) == "type", "the code of no message"

    @pytest.mark.parametrize(
        ("kind", "changes"),
        [
            (ReportAck, {"epoch": -1}), (ReportAck, {"sequence": 1.0}), (ReportAck, {"sequence": True}), (ScheduleRequest, {"max_tokens": 0}),
            (ScheduleRequest, {"exclude": ("a", "a")}), (Progress, {"interval_s": nan}), (LoadReport, {"slots": 0}), (LoadReport, {"gpu_models": ("a", "a")}),
        ],
        ids=str,
    )  # fmt: skip
    def test_wrong_fields_are_neither_sent_nor_heard(self, body: type[BodyCodec], kind: type[Message], changes: dict[str, Any]) -> None:
        wrong = changed(SAMPLES[kind], **changes)
        with pytest.raises(ValueError, match=kind.__name__):
            codec_of(body).encode(envelope(wrong))
        values = tuple(value.values() if isinstance(rule, Fields) else value for rule, value in zip(kind.RULES.values(), wrong.values(), strict=True))
        with pytest.MonkeyPatch.context() as patch:  # a sender that does not look at what it says
            patch.setattr(f"{body.__module__}.mended", lambda kind, values: values)
            content = body().pack(kind, values)
        assert refusal(codec_of(body), signed(body, kind, content)) == SCHEMA

    def test_a_repeat_is_refused(self, body: type[BodyCodec]) -> None:
        mouth, ear = Ear("mouth", codec_of(body)), Ear("ear", codec_of(body))
        mouth.send(FirstToken("r", 0.5), ("ear", 1), 100.0)
        mouth.send(FirstToken("r", 0.5), ("ear", 1), 100.0)
        (first, _), (second, _) = mouth.datagrams_to_send()
        for data in (second, first, second, first):
            ear.receive_datagram(data, ("mouth", 1), 100.0)
        ear.receive_datagram(codec_of(body).encode(envelope(FirstToken("r", 0.5), wall_s=60.0)), ("mouth", 1), 100.0)
        assert ear.heard == [FirstToken("r", 0.5)] * 2
        assert ear.rejected == {"replayed": 2, "stale_time": 1}

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_whole_fleet_runs_the_same_as_with_objects(self, body: type[BodyCodec], plain: bool) -> None:
        def run(make_codec: Callable[[], FrameCodec] | None) -> tuple[Any, ...]:
            network = Network() if plain else Network(Link(Latency("lognormal", 0.002, 1.0), loss=0.05, duplicate=0.1, corrupt=0.05))
            fleet = Fleet(5, workers=3, duration_s=5.0, network=network, make_codec=make_codec).record().run()
            rejected = [dict(host.node.rejected) for host in fleet.world.hosts.values() if host.node is not None]
            assert any(len(reasons) > 1 for reasons in rejected) is not plain, "some datagrams were damaged and some came twice"
            return fleet.trace, rejected, network.sent, network.delivered, fleet.world.now

        assert run(None) == run(lambda: codec_of(body))

    def test_a_coordinator_and_a_worker_talk_over_udp(self, body: type[BodyCodec]) -> None:
        config, clock = configuration(), Clock(20.0)
        with UdpDriver(clock) as driver:
            node = Coordinator(config, CATALOG, make_policy("startup_time"), Random(1), 1, codec=codec_of(body), wall_offset_s=clock.wall_offset_s)
            at = driver.add(node).address
            engine = LlmEngine(CATALOG, CATALOG.get_hardware(config.hardware))
            worker = Worker(config, CATALOG, engine, at, Random(1), 1, node_id="w", codec=codec_of(body), wall_offset_s=clock.wall_offset_s)
            driver.add(worker)
            for _ in range(2000):
                if worker.acknowledged and node.fleet.states[READY] == 1:
                    break
                driver.step(0.05)
            assert node.fleet.states[READY] == 1
            assert worker.acknowledged
            assert not node.rejected
            assert not worker.rejected


# --- versions beside each other ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["virtual", "live"])
def talk(request: pytest.FixtureRequest) -> Iterator[Callable[[Ear, Ear], None]]:
    """Lets one node ask another, and waits for what comes of it."""
    if request.param == "virtual":
        world = World(1, Network(), wire=True)

        def in_world(asker: Ear, answerer: Ear) -> None:
            hosts = [world.hosts[node.node_id] if node.node_id in world.hosts else world.add(node, (node.node_id, 1)) for node in (asker, answerer)]
            asker.send(ASK, (answerer.node_id, 1), world.now)
            hosts[0].touch()
            world.run(world.now + 1.0)

        yield in_world
        return
    with UdpDriver(Clock()) as driver:
        handles: dict[str, Any] = {}

        def over_udp(asker: Ear, answerer: Ear) -> None:
            for node in (asker, answerer):
                if node.node_id not in handles:
                    node.wall_offset_s = driver.clock.wall_offset_s
                    handles[node.node_id] = driver.add(node)
            before = [sum(node.rejected.values()) + len(node.heard) for node in (asker, answerer)]
            asker.send(ASK, handles[answerer.node_id].address, driver.clock.now)
            handles[asker.node_id].touch()
            for _ in range(2000):
                asked = bool(answerer.heard) and isinstance(answerer.heard[-1], ScheduleRequest)
                refused = not asked and sum(answerer.rejected.values()) + len(answerer.heard) > before[1]
                if refused or sum(asker.rejected.values()) + len(asker.heard) > before[0]:
                    return
                driver.step(0.05)
            raise AssertionError("neither an answer nor a refusal came")

        yield over_udp


ASK = SAMPLES[ScheduleRequest]


def test_versions_change_one_process_at_a_time_once_all_read_both(talk: Callable[[Ear, Ear], None]) -> None:
    both = [*body_codecs().values(), JsonBody]
    old, new = Ear("old", FrameCodec(RING, both)), Ear("new", FrameCodec(RING, both, JSON_VERSION))
    talk(old, new)
    talk(new, old)
    assert old.heard == [Progress(1.0, 1), ASK]
    assert new.heard == [ASK, Progress(1.0, 2)]
    assert not old.rejected
    assert not new.rejected
    assert [node.codec.encode(envelope(ASK))[4] for node in (old, new) if node.codec is not None] == [frame.VERSION, JSON_VERSION]


def test_who_reads_one_version_refuses_the_other(talk: Callable[[Ear, Ear], None]) -> None:
    old, new = Ear("old", FrameCodec(RING)), Ear("new", codec_of(JsonBody))
    talk(old, new)
    talk(new, old)
    assert (old.heard, new.heard) == ([], [])
    assert old.rejected == new.rejected == {"version": 1}


# --- one file, and nothing else knows of it ---------------------------------------------------------------------------------------------

ONE_FILE = f"""
from test_second_codec import JsonBody
class Body(JsonBody):
    VERSION = {JSON_VERSION + 1}
    REASONS = ("json", "a reason of its own", "schema")
"""


@pytest.fixture
def more_codecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files are found with those of sllm/wire/codecs/."""
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    body_codecs.cache_clear()
    yield tmp_path
    body_codecs.cache_clear()
    for name in [name for name in sys.modules if name.startswith(f"{folder.__name__}.toy")]:
        del sys.modules[name]


def test_a_codec_is_one_file(more_codecs: Path) -> None:
    (more_codecs / "toy.py").write_text(ONE_FILE, encoding="utf-8")
    assert body_codecs().keys() == {frame.VERSION, JSON_VERSION + 1}
    toy = FrameCodec(RING, version=JSON_VERSION + 1)
    assert FrameCodec(RING).decode(toy.encode(envelope(ASK))).message == ASK, "whoever reads all codecs of the folder reads this one"
    assert "a reason of its own" in reasons()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ONE_FILE.replace(str(JSON_VERSION + 1), str(frame.VERSION)), f"version {frame.VERSION} is that of two codecs"),
        ("def Body(:\n", r"codecs/toy\.py, line 1: SyntaxError"),
        ("class NoBody: ...\n", "codecs/toy.*has no attribute 'Body'"),
    ],
    ids=["a version twice", "broken", "without a body"],
)  # fmt: skip
def test_a_file_that_adds_no_codec_is_an_error(more_codecs: Path, text: str, says: str) -> None:
    (more_codecs / "toy.py").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=says):
        body_codecs()


WITHOUT_PICKLE = """
import sys
sys.modules["pickle"] = sys.modules["_pickle"] = None  # whoever imports either of them fails
import json
from sllm.protocol.messages import MESSAGES, FirstToken
from sllm.protocol.node import Node
from sllm.wire.body import check, mended
from sllm.wire.frame import FrameCodec
from sllm.wire.keys import Keyring

class Body:
    VERSION = 9
    REASONS = ("schema",)
    def pack(self, kind, values): return json.dumps(mended(kind, values)).encode()
    def unpack(self, kind, body): return check(kind, tuple(json.loads(body)))

class Ear(Node):
    heard = 0
    def hear(self, *_): self.heard += 1

codec = FrameCodec(Keyring(1, {1: b"k" * 32}), [Body], 9)
node = Ear("n", 1, codec=codec)
node.handlers[FirstToken] = node.hear
node.send(FirstToken("r", 0.5), ("n", 1), 1.0)
((data, addr),) = node.datagrams_to_send()
for _ in range(2):
    node.receive_datagram(data, addr, 1.0)
print(node.heard, dict(node.rejected))
"""


def test_framing_keys_and_replay_do_without_pickle() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PICKLE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1 {'replayed': 1}\n", "")
