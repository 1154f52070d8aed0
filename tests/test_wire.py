"""The wire: what goes in comes out, and whatever else arrives is refused, counted, and changes nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import changed, coordinator
from wire_samples import CODEC, ENVELOPES, KEY, OTHER_KEY, SAMPLES, envelope, sample

from sllm.fleet import membership
from sllm.protocol.limits import DATAGRAM_MAX_BYTES, ID_MAX_BYTES, NUMBER_MAX
from sllm.protocol.messages import MESSAGES, AnyEnvelope, Envelope, LoadReport, Message, ReportAck
from sllm.protocol.node import Rejected
from sllm.wire.codecs.pickle import Body
from sllm.wire.frame import HEADER, MAGIC, VERSION, FrameCodec, body_codecs, reasons
from sllm.wire.keys import TAG_BYTES, Keyring

ROOT = Path(__file__).resolve().parent.parent
EVERY = pytest.mark.parametrize("message", SAMPLES.values(), ids=lambda m: type(m).__name__)


def refusal(data: bytes, codec: FrameCodec = CODEC) -> str:
    """Why a datagram is refused; nothing but Rejected may come out."""
    with pytest.raises(Rejected) as caught:
        codec.decode(data)
    return caught.value.reason


def resign(data: bytes) -> bytes:
    """The datagram with a tag that fits what it says now."""
    body = data[:-TAG_BYTES]
    return body + CODEC.keyring.tag(1, body)


@settings(deadline=None, max_examples=300)
@given(ENVELOPES)
def test_what_goes_in_comes_out(one: AnyEnvelope) -> None:
    data = CODEC.encode(one)
    assert CODEC.decode(data) == one
    assert CODEC.decode(memoryview(data)) == one
    assert [type(part) for part in CODEC.decode(data).message.values()] == [type(part) for part in one.message.values()]


def test_every_message_has_a_code_of_its_own_rules_and_a_sample() -> None:
    assert set(MESSAGES) == set(SAMPLES)
    codes = [kind.CODE for kind in MESSAGES]
    assert codes == sorted(set(codes))
    assert codes[0] > 0
    assert all(kind.FIELDS == tuple(kind.RULES) == kind.__slots__ for kind in MESSAGES)
    assert VERSION in body_codecs()


@EVERY
def test_it_is_small(message: Message) -> None:
    assert len(CODEC.encode(envelope(message))) <= 1400


@EVERY
def test_every_truncation_is_refused(message: Message) -> None:
    data = CODEC.encode(envelope(message))
    assert {refusal(data[:size]) for size in range(len(data))} <= {"size", "tag"}


@EVERY
def test_every_flipped_bit_is_refused(message: Message) -> None:
    data = CODEC.encode(envelope(message))
    reasons = set()
    for bit in range(len(data) * 8):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        reasons.add(refusal(bytes(changed)))
    assert reasons == {"magic", "version", "key_id", "tag"}


@given(st.binary(max_size=600))
def test_noise_is_refused(data: bytes) -> None:
    assert refusal(data) in ("size", "magic")


@given(st.binary(max_size=600))
def test_noise_behind_a_good_header_and_tag_is_refused(body: bytes) -> None:
    data = CODEC.encode(envelope(SAMPLES[LoadReport]))
    start = HEADER.size + len("worker-2")
    assert refusal(resign(data[:start] + body + data[-TAG_BYTES:])) in ("opcode", "pickle", "schema")


def test_the_checks_come_in_their_order() -> None:
    """A datagram with everything wrong fails the first check; mended from the front, it fails the next one."""
    good = CODEC.encode(envelope(SAMPLES[ReportAck]))
    fields = list(HEADER.unpack_from(good))
    fields[:4] = [b"XXXX", 9, 200, 7]
    rest = good[HEADER.size : -TAG_BYTES] + b"garbage"
    assert refusal(b"") == "size"
    assert refusal(bytes(DATAGRAM_MAX_BYTES + 1)) == "size"
    for index, right, reason in ((0, b"sLLM", "magic"), (1, VERSION, "version"), (3, 1, "key_id")):
        data = HEADER.pack(*fields) + rest + bytes(TAG_BYTES)
        assert refusal(data) == reason
        fields[index] = right
    data = HEADER.pack(*fields) + rest + bytes(TAG_BYTES)
    assert refusal(data) == "tag"
    assert refusal(resign(data)) == "type"
    fields[2] = ReportAck.CODE
    assert refusal(resign(HEADER.pack(*fields) + rest + bytes(TAG_BYTES))) == "opcode"
    other = CODEC.encode(envelope(SAMPLES[LoadReport]))
    fields[2] = LoadReport.CODE
    assert refusal(resign(HEADER.pack(*fields) + good[HEADER.size : -TAG_BYTES] + bytes(TAG_BYTES))) == "schema"
    assert CODEC.decode(other)


def test_a_foreign_key_is_refused_and_a_second_one_of_ours_is_not() -> None:
    foreign = FrameCodec(Keyring(1, {1: OTHER_KEY}))
    data = foreign.encode(envelope(SAMPLES[ReportAck]))
    assert refusal(data) == "tag"
    both = FrameCodec(Keyring(1, {1: KEY, 2: OTHER_KEY}))
    second = FrameCodec(Keyring(2, {1: KEY, 2: OTHER_KEY}))
    assert both.decode(second.encode(envelope(SAMPLES[ReportAck])))
    assert second.decode(both.encode(envelope(SAMPLES[ReportAck])))
    assert refusal(second.encode(envelope(SAMPLES[ReportAck]))) == "key_id"


def test_keys_are_never_shown() -> None:
    ring = Keyring(1, {1: KEY, 2: OTHER_KEY})
    assert KEY.decode() not in repr(ring)
    for signer, keys in ((3, {1: KEY}), (0, {0: KEY}), (1, {1: b"short"})):
        with pytest.raises(ValueError, match="key") as caught:
            Keyring(signer, keys)
        assert "short" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"running": -1}, {"running": 1.0}, {"running": True}, {"wait_s": 1}, {"wait_s": float("nan")}, {"wait_s": -0.1},
        {"kv_used": 1.5}, {"state": "ASLEEP"}, {"state": None}, {"gpu_models": ["a"]}, {"gpu_models": ("",)}, {"gpu_models": (1,)}, {"loading": (("m",),)},
        {"loading": (("m", -1.0),)}, {"disk_complete": 1}, {"port": 65536}, {"hardware": ""}, {"hardware": "x" * 129},
        {"dispatch_missing": (-1,)}, {"dispatch_missing": (1, 1)}, {"blocked": -1},
        {"interval_s": 0.0}, {"interval_s": 3600.0}, {"slots": 1 << 62}, {"slots": 0}, {"gpu_models": ("a", "a")}, {"loading": (("a", 1.0), ("a", 2.0))},
        {"host": "h" * 254}, {"host": "::1%a\0b"}, {"host": "a b"}, {"hardware": "\u202e"}, {"host_models": ("\ud55c" * 43,)},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_as_its_schema_says_cannot_be_sent_or_heard(changes: dict[str, object]) -> None:
    report = changed(SAMPLES[LoadReport], **changes)
    with pytest.raises(ValueError, match="LoadReport"):
        CODEC.encode(envelope(report))


def test_what_is_too_long_is_our_own_error() -> None:
    report = changed(SAMPLES[LoadReport], gpu_models=tuple(f"model-{i:0100}" for i in range(200)))
    with pytest.raises(ValueError, match="longer than 8192"):
        CODEC.encode(envelope(report))
    with pytest.raises(ValueError, match="sender id"):
        CODEC.encode(Envelope("x" * 64, 1, 1, 1.0, SAMPLES[ReportAck]))


def forged(message: Message, sender: bytes, incarnation: int = 1, sequence: int = 1) -> bytes:
    """A signed datagram with this header, whatever our own sender would say to it."""
    body = CODEC.encode(envelope(message))[HEADER.size + len(b"worker-2") : -TAG_BYTES]
    data = HEADER.pack(MAGIC, VERSION, message.CODE, 1, len(sender), incarnation, sequence, 100.0) + sender + body
    return data + CODEC.keyring.tag(1, data)


@pytest.mark.parametrize("sender", [b"", b"x" * (ID_MAX_BYTES + 1), b"x" * 255, b"a\n", b"\xff", "\u202e".encode()])
def test_a_sender_id_that_is_none_is_refused(sender: bytes) -> None:
    assert refusal(forged(SAMPLES[ReportAck], sender)) == "sender"
    with pytest.raises(ValueError, match="sender id"):
        CODEC.encode(envelope(SAMPLES[ReportAck]).replace(sender_id=sender.decode(errors="replace") if sender != b"\xff" else "\udcff"))


@pytest.mark.parametrize("sender", ["x", "x" * ID_MAX_BYTES, "\ud55c" * (ID_MAX_BYTES // 3)])
@pytest.mark.parametrize("number", [0, NUMBER_MAX])
def test_a_header_at_its_limits_is_heard(sender: str, number: int) -> None:
    said = Envelope(sender, number, number, 100.0, SAMPLES[ReportAck])
    assert CODEC.decode(CODEC.encode(said)) == said
    assert CODEC.encode(said)[:-TAG_BYTES] == forged(said.message, sender.encode(), number, number)[:-TAG_BYTES]


@pytest.mark.parametrize("numbers", [(NUMBER_MAX + 1, 1), (1, NUMBER_MAX + 1), ((1 << 64) - 1, (1 << 64) - 1)])
def test_numbers_beyond_their_limit_are_neither_sent_nor_heard(numbers: tuple[int, int]) -> None:
    assert refusal(forged(SAMPLES[ReportAck], b"x", *numbers)) == "number"
    with pytest.raises(ValueError, match="must be from 0 to"):
        CODEC.encode(Envelope("x", *numbers, 1.0, SAMPLES[ReportAck]))
    with pytest.raises(ValueError, match="must be from 0 to"):
        CODEC.encode(Envelope("x", -numbers[0], -numbers[1], 1.0, SAMPLES[ReportAck]))


def test_sizes_are_refused_from_the_first_byte_too_few_and_too_many() -> None:
    least = HEADER.size + 1 + TAG_BYTES
    assert [refusal(bytes(size)) for size in (least - 1, least, DATAGRAM_MAX_BYTES, DATAGRAM_MAX_BYTES + 1)] == ["size", "magic", "magic", "size"]
    report = changed(sample(LoadReport), gpu_models=tuple(f"model-{i:090}" for i in range(81)), busy_models=())
    spare = DATAGRAM_MAX_BYTES - len(CODEC.encode(envelope(report)))
    assert 0 < spare < 100
    fits = changed(report, host_models=(*report.engine.host_models, "x" * (spare - 2)))
    assert len(CODEC.encode(envelope(fits))) == DATAGRAM_MAX_BYTES
    assert CODEC.decode(CODEC.encode(envelope(fits))).message == fits
    with pytest.raises(ValueError, match="a LoadReport of 8193 bytes is longer than 8192"):
        CODEC.encode(envelope(changed(report, host_models=(*report.engine.host_models, "x" * (spare - 1)))))


def test_what_a_sender_repeats_is_opened_once_until_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sllm.wire.frame.REMEMBERED_MAX", 10)
    codec = FrameCodec(CODEC.keyring)

    def hear(sender: str, message: Message, sequence: int) -> Message:
        return codec.decode(codec.encode(envelope(message, sequence).replace(sender_id=sender))).message  # type: ignore[no-any-return]

    report, ack = SAMPLES[LoadReport], SAMPLES[ReportAck]
    first = hear("a", report, 1)
    assert hear("a", report, 2) is first
    other = hear("b", report, 1)
    assert other is not first
    assert isinstance(first, LoadReport)
    assert isinstance(other, LoadReport)
    assert (other.state, other.hardware) == (first.state, first.hardware)
    assert other.hardware is first.hardware, "the same few of every worker are kept once"
    assert hear("a", ack, 1) is not hear("a", ack, 2), "nobody says that it is repeated"
    busier = changed(report, running=9)
    assert hear("a", busier, 3) == busier
    assert hear("a", report, 4) is not first, "only the last is known"
    codec.forget("b")
    assert hear("b", report, 2) is not other
    for number in range(100):
        hear(f"flood-{number}", report, 1)
        assert len(codec._repeated) <= 10


# --- at a real coordinator ------------------------------------------------------------------------------------------------------------


def test_a_bad_datagram_changes_nothing_but_a_counter() -> None:
    node, _ = coordinator()
    node.codec = CODEC
    report = SAMPLES[LoadReport]
    good = CODEC.encode(envelope(report, 5, wall_s=2.0))
    node.receive_datagram(good, ("10.0.0.7", 1), 2.0)
    row = node.fleet.rows["worker-2"]
    before = (row.sequence, row.incarnation, row.heard_at, row.report, node.reports_accepted, len(node.outbox), len(node.events))
    forged = bytearray(good)
    forged[-1] ^= 1
    newer = CODEC.encode(envelope(report, 6, wall_s=2.0))
    for data in (bytes(forged), b"", b"x" * 9000, resign(newer[:-20] + newer[-16:])):
        node.receive_datagram(data, ("10.0.0.66", 1), 3.0)
    node.receive_datagram(good, ("10.0.0.66", 1), 3.0)  # replayed
    node.receive_datagram(CODEC.encode(envelope(report, 99, wall_s=-40.0)), ("10.0.0.66", 1), 3.0)  # too old
    after = (row.sequence, row.incarnation, row.heard_at, row.report, node.reports_accepted, len(node.outbox), len(node.events))
    assert after == before
    node.receive_datagram(resign(good[:-20] + good[-16:]), ("10.0.0.66", 1), 3.0)  # its body is not even looked at
    assert node.rejected == {"tag": 1, "size": 2, "opcode": 1, "stale_time": 1, "replayed": 2}
    assert node.reports_rejected == {"replayed": 2, "stale_time": 1}, "the one refused for its time was known for a report"
    assert list(node.fleet.rows) == ["worker-2"]


def test_two_versions_refuse_each_other_in_both_orders() -> None:
    """The byte decides, whatever else is in the datagram: nothing of another version is looked into."""

    class OlderBody(Body):
        VERSION = Body.VERSION - 1

    data = CODEC.encode(envelope(SAMPLES[LoadReport]))
    older = FrameCodec(Keyring(1, {1: KEY}), [OlderBody], OlderBody.VERSION)
    assert refusal(data, older) == "version"
    old_data = older.encode(envelope(SAMPLES[LoadReport]))
    assert old_data[4] == VERSION - 1
    assert refusal(old_data) == "version"


def reason_in(node: ast.AST) -> ast.AST | None:
    """The expression of a reason in a piece of code: what is counted under a name, handed to `refuse` or `_refuse`, or called the reason."""
    match node:
        case ast.Subscript(value=ast.Attribute(attr="rejected")):
            return node.slice
        case ast.Call(func=ast.Attribute(attr="refuse"), args=[_, reason, _]):
            return reason
        case ast.Call(func=ast.Attribute(attr="_refuse"), args=[_, reason]):
            return reason
        case ast.Assign(targets=[ast.Name(id="reason")]):
            return node.value
    return None


PLACES = ("sllm/protocol/node.py", "sllm/protocol/replay.py", "sllm/fleet/membership.py", "coordinator.py", "worker.py", "client.py")  # that refuse


def reasons_in_the_code() -> set[str]:
    """Why messages are refused: what the codec lists, what roles and their parts count, and what their judges return."""
    found = {*reasons(), *membership.REFUSED}
    for path in PLACES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        judges = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith(("judge", "admit"))]
        said = [reason_in(node) for node in ast.walk(tree)]
        said += [node.value for judge in judges for node in ast.walk(judge) if isinstance(node, ast.Return)]
        for reason in said:
            for one in (reason.body, reason.orelse) if isinstance(reason, ast.IfExp) else (reason,):
                if isinstance(one, ast.Constant) and isinstance(one.value, str) and one.value:
                    found.add(one.value)
    return found


def test_the_document_lists_every_reason_and_no_other() -> None:
    text = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    section = text.partition("## What is checked, in this order")[2].partition("\n## ")[0]
    rows = [line.rstrip(" |").rpartition(" | ")[2] for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    listed = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    assert listed == reasons_in_the_code()
    assert {"not_asked", "table_full", "unknown_hardware", "out_of_order", "future_incarnation"} <= listed


def test_the_document_has_the_layout_and_every_message_with_its_code() -> None:
    text = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    assert {(int(code), name) for code, name in re.findall(r"\| (\d+) \| `(\w+)` (?=\|)", text)} == {(kind.CODE, kind.__name__) for kind in MESSAGES}
    assert f"({VERSION}: pickle)" in text
    layout = re.findall(r"^\| (\d+) \| (\d+) \|", text, flags=re.MULTILINE)
    assert layout[:8] == [(str(at), str(size)) for at, size in ((0, 4), (4, 1), (5, 1), (6, 1), (7, 1), (8, 8), (16, 8), (24, 8))]
    assert f"\n| {HEADER.size} | n |" in text
