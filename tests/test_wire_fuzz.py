"""The short cut of the wire against its rules: what the regular expression of a message takes, the three checks take, with the same result."""

from __future__ import annotations

import pickle
import pickletools
import struct
import typing
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import changed
from wire_samples import CODEC, ENVELOPES, SAMPLES, envelope

from sllm.protocol.messages import (
    MESSAGES,
    AnyEnvelope,
    Dispatch,
    EngineSnapshot,
    InferenceRequest,
    LoadReport,
    Message,
    Progress,
    ReportAck,
    ScheduleError,
    ScheduleResponse,
)
from sllm.protocol.node import Node, Rejected
from sllm.protocol.record import Record
from sllm.protocol.rules import Fields, Flag, OneOf, Real, Rule, Whole
from sllm.wire import frame as wire
from sllm.wire.codecs import pickle as codec_file
from sllm.wire.codecs.pickle import Body, check_body, usual
from sllm.wire.frame import HEADER, FrameCodec
from sllm.wire.keys import TAG_BYTES

KINDS_OF_FIELDS = [(message, name) for message in MESSAGES for name, rule in message.RULES.items() if not isinstance(rule, Fields)]
KINDS_OF_FIELDS += [(LoadReport, f"engine.{name}") for name in EngineSnapshot.RULES] + [(ScheduleResponse, f"dispatch.{name}") for name in Dispatch.RULES]


def rule_of(message: type[Message], name: str) -> Rule:
    """The rule of a field, or of a field of a record inside ("engine.running")."""
    outer, _, inner = name.partition(".")
    rule = message.RULES[outer]
    return rule.rules[rule.names.index(inner)] if isinstance(rule, Fields) else rule


def with_value(message: Message, name: str, value: Any) -> Message:
    """The message with another value there."""
    outer, _, inner = name.partition(".")
    return message.replace(**{outer: getattr(message, outer).replace(**{inner: value}) if inner else value})


def value_of(message: Message, name: str) -> Any:
    outer, _, inner = name.partition(".")
    return getattr(getattr(message, outer), inner) if inner else getattr(message, outer)


def body_of(data: bytes) -> bytes:
    return data[HEADER.size + data[7] : -TAG_BYTES]


def packed(fields: tuple[Any, ...]) -> bytes:
    """As the codec pickles, whatever the fields."""
    sink = codec_file._Sink()
    pickler = pickle.Pickler(sink, 5)
    pickler.fast = True
    pickler.dump(fields)
    return sink.body


def plain(message: Message) -> tuple[Any, ...]:
    return tuple(value.values() if isinstance(value, Record) else value for value in message.values())


def signed(message: type[Message], body: bytes) -> bytes:
    data = HEADER.pack(wire.MAGIC, wire.VERSION, message.CODE, 1, 8, 1, 1, 100.0) + b"worker-2" + body
    return data + CODEC.keyring.tag(1, data)


def verdict(message: type, body: bytes) -> Any:
    """What the step-by-step checks say: the fields, or the reason."""
    try:
        return check_body(message, body)
    except Rejected as rejection:
        return rejection.reason


def hold(message: type, body: bytes) -> None:
    """The codec as a whole and the checks one by one must agree; the short cut may be taken only where they accept."""
    slow = verdict(message, body)
    try:
        # Compared by repr: 0.0 is not -0.0, True is not 1.
        fast: Any = repr(plain(FrameCodec(CODEC.keyring).decode(signed(message, body)).message))
    except Rejected as rejection:
        fast = rejection.reason
    assert fast == (slow if isinstance(slow, str) else repr(slow)), (message, body)


def repeats(value: Any) -> bool:
    """A list that names something twice: no regular expression can say that."""
    return isinstance(value, tuple) and len(value) > 1 and (len(set(value)) < len(value) or len({item[0] for item in value}) < len(value))


@pytest.mark.parametrize("message", SAMPLES.values(), ids=lambda m: type(m).__name__)
def test_the_short_cut_is_taken(message: Message) -> None:
    """Otherwise nothing here would be tested, and every report would take the long way."""
    assert usual(type(message)).fullmatch(packed(plain(message)))


@settings(deadline=None, max_examples=300)
@given(ENVELOPES, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3), st.sampled_from(MESSAGES))
def test_short_cut_and_checks_agree_on_damaged_bodies(one: AnyEnvelope, changes: list[tuple[int, int]], other: type) -> None:
    body = bytearray(body_of(CODEC.encode(one)))
    for place, value in changes:
        body[place % len(body)] = value
    hold(type(one.message), bytes(body))
    hold(other, bytes(body))


@settings(deadline=None, max_examples=300)
@given(ENVELOPES, st.integers(0, 10_000), st.integers(0, 12), st.binary(max_size=12))
def test_short_cut_and_checks_agree_on_bodies_with_other_opcodes_in_them(one: AnyEnvelope, place: int, gone: int, put: bytes) -> None:
    """A piece replaced and the frame's length set right, so that it is the opcodes that count."""
    rest = body_of(CODEC.encode(one))[11:]
    place %= len(rest)
    rest = rest[:place] + put + rest[place + gone :]
    hold(type(one.message), b"\x80\x05\x95" + struct.pack("<Q", len(rest)) + rest)


EDGES: list[Any] = [
    0, 1, 9, 10, 127, 128, 255, 256, 65535, 65536, 99_999, 100_000, 100_001, 8_388_607, 8_388_608, 10_000_000, 10_000_001, 10_100_000, 10_100_001,
    (1 << 24) - 1, 1 << 24, 67_108_863, 67_108_864, 100_000_000, 100_000_001,
    (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 39) - 1, 1 << 39, (1 << 55) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70, -1, -128,
    -(1 << 31), -(1 << 31) - 1, -(1 << 63),
    0.0, -0.0, 5e-324, 2.0**-21, 2.0**-20, 0.5, 1.0, 1.0000001, 1.000001, 1.1, 32.0, 60.0, 60.1, 2048.0, 4096.0, 2.0**29, 1e9, 1.1e9, 1e300, -1.0,
    float("inf"), float("-inf"), float("nan"), True, False, None,
    "", "a", "a" * 63, "a" * 64, "a" * 128, "a" * 129, "a" * 253, "a" * 254, "a" * 255, "a" * 256, "a b", "a\nb", "a\x00b", "\u202e", "::1%a\0b",
    "é" * 64, "é" * 65, "é" * 127, "é" * 128, "한국", "\U0001f999" * 63, "\U0001f999" * 64, "\ud800",
    "READY", "serve", "READY ", (), ("a",), ("a", "b"), ("a", "b", "c"), ("a", "b", "c", "d"), ("a", "a"),
    ("a", "b", "a"), ("a",) * 20, tuple("abcdefghijklmnopqrst"), tuple("abcdefghijklmnopqrstu"),
    ("",), ("a", 1), (1, 2), (1, -2), (1,), (1,
    2, 3), (1.0, 2),
    (("a", 0.5),), (("a", 0.5),) * 5, (("a", 0.5), ("b", 0.5)), (("a", 0.5), ("a", 0.7)),
    (("a", 1),), (("a",),), (("a", 0.5, 1),), ((),), (((),),), ("\ud800",), ("한",) * 4, (("한", 1.0),),
]  # fmt: skip
"""Values at and beyond every bound, and of every wrong type."""


@pytest.mark.parametrize(("message", "name"), KINDS_OF_FIELDS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_short_cut_and_checks_agree_at_every_edge_of_every_field(message: type, name: str) -> None:
    accepted = 0
    for value in EDGES:
        changed = plain(with_value(SAMPLES[message], name, value))
        body = packed(changed)
        hold(message, body)
        taken = rule_of(message, name).accepts(value)
        assert (verdict(message, body) == changed) == taken, (name, value)
        if usual(message).fullmatch(body):
            assert taken or repeats(value), (name, value)
        accepted += taken
    assert 0 < accepted < len(EDGES) or isinstance(rule_of(message, name), OneOf)


@pytest.mark.parametrize(("message", "name"), KINDS_OF_FIELDS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_can_be_sent_can_be_heard_and_the_rest_is_an_error_that_names_the_field(message: type, name: str) -> None:
    """Nothing is signed that every receiver will refuse."""
    for value in (*EDGES, ["a"], {"a": 1}, object(), lambda: None, b"a", Dispatch(1, 2), 1j):
        original = with_value(SAMPLES[message], name, value)
        try:
            data = CODEC.encode(envelope(original))
        except ValueError as error:
            said = str(error)
        else:
            said = ""
        if said:
            assert said.startswith(f"{message.__name__}.{name}=")
            continue
        heard = value_of(CODEC.decode(data).message, name)
        assert (heard == value and type(heard) is type(value)) or rule_of(message, name).mend(value) == heard, (name, value)


def test_rules_fit_the_types_and_names_that_the_messages_declare() -> None:
    """A rule that lets another type through than the field has would be believed."""
    records: list[Any] = [*MESSAGES, EngineSnapshot, Dispatch]
    for record in records:
        hints = typing.get_type_hints(record.__init__)
        del hints["return"]
        assert list(hints) == list(record.FIELDS) == list(record.RULES)
        for name, rule in record.RULES.items():
            drawn = rule.kind(*rule.draw(Random(1))) if isinstance(rule, Fields) else rule.draw(Random(1))
            assert isinstance(drawn, typing.get_origin(hints[name]) or hints[name]), (record, name)
            kinds = {Whole: int, Real: float, Flag: bool}
            assert type(drawn) is kinds.get(type(rule), type(drawn)), (record, name)


@pytest.mark.parametrize("text", ["x" * 300, "한" * 200, "x" + "é" * 200, "\ud800"])
def test_a_text_for_people_is_cut_to_fit(text: str) -> None:
    """What we say to a question with a long name in it must not be an error of ours."""
    for message in (changed(SAMPLES[ScheduleError], detail=text), changed(SAMPLES[ScheduleResponse], reason=text)):
        heard = CODEC.decode(CODEC.encode(envelope(message))).message
        said = heard.detail if isinstance(heard, ScheduleError) else heard.reason
        assert 0 < len(said.encode()) <= 255
        assert text.encode(errors="replace").decode().startswith(said)


def test_an_estimate_beyond_all_measure_is_sent_as_the_longest_there_is() -> None:
    message = changed(SAMPLES[ScheduleResponse], eta_s=3e9)
    assert CODEC.decode(CODEC.encode(envelope(message))).message.eta_s == 1e9


def test_a_codec_goes_on_after_what_it_could_not_pack_or_unpack() -> None:
    """Pickler and unpickler are used again and again: a failure must not be felt by the next message."""
    codec = FrameCodec(CODEC.keyring)
    broken = packed(plain(SAMPLES[ReportAck])).replace(b"K\x0c", b"K\x0b")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"ReportAck\.epoch"):
            codec.encode(envelope(ReportAck(lambda: None, 1)))  # type: ignore[arg-type]
        bad = bytearray(packed(plain(SAMPLES[InferenceRequest])))
        bad[bad.index(b"llama")] = 0xFF
        with pytest.raises(Rejected, match="pickle"):
            codec.decode(signed(InferenceRequest, bytes(bad)))
        assert codec.decode(signed(ReportAck, broken)).message == ReportAck(1_764_000_000_000_000_000, 11)
        for message in SAMPLES.values():
            assert codec.decode(codec.encode(envelope(message))).message == message


def test_a_body_of_very_many_values_is_refused_and_not_sent() -> None:
    report = SAMPLES[LoadReport]
    names = tuple(f"m{i}" for i in range(500))
    fits = changed(report, disk_models=names, host_models=names[:450])
    assert CODEC.decode(CODEC.encode(envelope(fits))).message == fits
    too_many = changed(report, disk_models=names, host_models=names)
    with pytest.raises(ValueError, match="LoadReport of more than 1000 values"):
        CODEC.encode(envelope(too_many))
    body = packed(plain(too_many))
    assert verdict(LoadReport, body) == "opcode"
    hold(LoadReport, body)


def test_names_are_kept_once_for_all_workers() -> None:
    codec = FrameCodec(CODEC.keyring)
    report = SAMPLES[LoadReport]
    first, second = (codec.decode(codec.encode(envelope(changed(report, running=n)))).message for n in (1, 2))
    assert first.engine.gpu_models is second.engine.gpu_models
    for number in range(codec_file.SHARED_MAX + 10):
        codec.decode(codec.encode(envelope(changed(report, gpu_models=(f"model-{number}",)))))
    (body,) = {id(plan.body): plan.body for plan in codec._plans.values()}.values()
    assert isinstance(body, Body)
    assert len(body._shared) <= codec_file.SHARED_MAX


def test_no_usual_body_has_an_opcode_that_is_not_on_the_list() -> None:
    allowed = {
        "PROTO", "FRAME", "STOP", "NEWTRUE", "NEWFALSE", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "BININT1", "BININT2", "BININT", "LONG1",
        "BINFLOAT", "SHORT_BINUNICODE",
    }  # fmt: skip
    for message in SAMPLES.values():
        assert {opcode.name for opcode, _, _ in pickletools.genops(packed(plain(message)))} <= allowed


# --- through a node -------------------------------------------------------------------------------------------------------------------


def test_a_node_hears_a_datagram_once() -> None:
    node = Node("worker-1", 1, codec=FrameCodec(CODEC.keyring))
    heard: list[AnyEnvelope] = []
    node.handlers = {Progress: lambda one, addr, now: heard.append(one)}
    progress = SAMPLES[Progress]

    def say(sequence: int, wall_s: float = 100.0, incarnation: int = 1, message: Message = progress) -> None:
        node.receive_datagram(CODEC.encode(envelope(message, sequence, wall_s, incarnation)), ("10.0.0.1", 1), 100.0)

    say(5)
    say(5)  # repeated
    say(4)  # late, but new
    say(4)
    say(6, wall_s=69.0)
    say(6, wall_s=131.0)
    say(6, wall_s=float("nan"))
    say(6, wall_s=float("inf"))
    say(1, incarnation=2)
    say(7, incarnation=1)  # of an earlier life
    say(1, message=SAMPLES[InferenceRequest])
    assert [(one.incarnation, one.sequence) for one in heard] == [(1, 5), (1, 4), (2, 1)]
    assert node.rejected == {"replayed": 2, "stale_time": 4, "old_incarnation": 1, "unexpected": 1}
