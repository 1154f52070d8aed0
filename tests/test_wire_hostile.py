"""Bodies signed with the right key by somebody who has turned: none is executed, none costs more than its size, none raises anything but Rejected."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_samples import CODEC, ENVELOPES, SAMPLES, envelope

from sllm import wire
from sllm.messages import Envelope, ReportAck
from sllm.node import Node, Rejected
from sllm.wire import HEADER, TAG_BYTES


def signed(body: bytes) -> bytes:
    """A datagram with this body, perfect in everything else."""
    good = CODEC.encode(envelope(SAMPLES[ReportAck]))
    data = good[: HEADER.size + len("worker-2")] + body
    return data + CODEC.keyring.tag(1, data)


def framed(opcodes: bytes) -> bytes:
    return b"\x80\x05\x95" + struct.pack("<Q", len(opcodes)) + opcodes


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/sllm-was-here",)


HOSTILE: dict[str, bytes] = {
    "reduce": pickle.dumps(Evil(), 5),
    "reduce, protocol 0": pickle.dumps(Evil(), 0),
    "global": framed(b"cos\nsystem\n."),
    "stack global": framed(b"\x8c\x02os\x8c\x06system\x93."),
    "inst": framed(b"(S'echo'\nios\nsystem\n."),
    "object": framed(b"(cos\nsystem\no."),
    "newobj": framed(b"cos\nsystem\n)\x81."),
    "build": framed(b"K\x01}b."),
    "memo": pickle.dumps(("a", "a"), 5),
    "get": framed(b"h\x00."),
    "put far away": framed(b"K\x01r\xff\xff\xff\x7f."),
    "memoize": framed(b"K\x01\x94."),
    "persistent id": framed(b"K\x01Q."),
    "extension": framed(b"\x82\x01."),
    "bytearray": framed(b"\x96" + struct.pack("<Q", 1 << 40) + b"."),
    "buffer": framed(b"\x97."),
    "long4": framed(b"\x8b" + struct.pack("<i", 1 << 30) + b"."),
    "huge text": framed(b"\x8d" + struct.pack("<Q", 1 << 60) + b"."),
    "text longer than the body": framed(b"\x8c\xffabc."),
    "list": framed(b"]."),
    "dictionary": framed(b"}."),
    "set": framed(b"\x8f."),
    "bytes": framed(b"C\x01a."),
    "a lying frame": b"\x80\x05\x95" + struct.pack("<Q", 9999) + b"K\x01K\x02\x86.",
    "no frame": b"\x80\x05K\x01K\x02\x86.",
    "protocol 2": b"\x80\x02K\x01K\x02\x86.",
    "no stop": framed(b"K\x01K\x02\x86"),
    "after the stop": framed(b"K\x01K\x02\x86.") + b"K\x01",
    "two stops": framed(b"K\x01K\x02\x86.K\x01."),
    "stack underflow": framed(b"\x86."),
    "only a mark": framed(b"(."),
    "a mark too few": framed(b"t."),
    "not a tuple": framed(b"K\x01."),
    "too few fields": framed(b"K\x01\x85."),
    "too many fields": framed(b"K\x01K\x02K\x03\x87."),
    "deep nesting": framed(b")" + b"\x85" * 7000 + b"."),
    "many marks": framed(b"(" * 3500 + b"t" * 3500 + b"."),
    "negative": framed(b"J\xff\xff\xff\xffK\x02\x86."),
    "wide integer": framed(b"\x8a\x09" + b"\x7f" * 9 + b"K\x02\x86."),
    "text for a number": framed(b"\x8c\x01aK\x02\x86."),
    "bool for a number": framed(b"\x88K\x02\x86."),
    "float for a number": framed(b"G" + struct.pack(">d", 1.0) + b"K\x02\x86."),
    "not a number": framed(b"G" + struct.pack(">d", float("nan")) + b"K\x02\x86."),
    "broken text": framed(b"\x8c\x02\xff\xfeK\x02\x86."),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        CODEC.decode(signed(HOSTILE[name]))
    assert caught.value.reason in ("opcode", "pickle", "schema")
    assert not os.path.exists("/tmp/sllm-was-here")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_stale_repeated_or_not_for_us_is_refused_before_its_body_is_looked_at(name: str) -> None:
    node = Node("ear", 1, codec=CODEC)
    hear = partial(node.receive_datagram, signed(HOSTILE[name]), ("x", 1))
    hear(100.0)
    node.handlers[ReportAck] = lambda envelope, addr, now: None
    hear(1000.0)
    assert node.rejected == {"unexpected": 1, "stale_time": 1}
    hear(100.0)
    hear(100.0)
    assert node.rejected["replayed"] == 1


def test_the_samples_themselves_would_pass() -> None:
    """What makes the cases above fail is in them, not in how they are wrapped."""
    assert CODEC.decode(signed(framed(b"K\x01K\x02\x86."))).message == ReportAck(1, 2)


def test_the_unpickler_finds_nothing_even_if_the_opcodes_were_let_through() -> None:
    for name in ("reduce", "global", "stack global", "inst", "persistent id", "extension"):
        with pytest.raises(Rejected):
            wire._unpickle(HOSTILE[name])
    assert not os.path.exists("/tmp/sllm-was-here")


# --- the grammar, against a walk with the standard library's own tables ----------------------------------------------------------------

ALLOWED = {
    "NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BININT1", "BININT2", "BININT", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "STOP",
}  # fmt: skip


def acceptable(body: bytes) -> bool:
    """The allow-list, the slow way: PROTO 5, one FRAME over all the rest, allowed opcodes only, STOP at the end."""
    stream = io.BytesIO(body)
    try:
        opcodes = list(pickletools.genops(stream))
    except Exception:  # pickletools raises many kinds
        return False
    if stream.tell() != len(body) or len(opcodes) < 3:
        return False
    (first, version, _), (second, size, _), *rest = opcodes
    if (first.name, version, second.name, size) != ("PROTO", 5, "FRAME", len(body) - 11):
        return False
    return all(opcode.name in ALLOWED and (opcode.name != "LONG1" or -(1 << 71) <= argument < 1 << 71) for opcode, argument, _ in rest)


def accepted(body: bytes) -> bool:
    return bool(wire._ACCEPTABLE.fullmatch(body)) and int.from_bytes(body[3:11], "little") == len(body) - 11


@settings(deadline=None, max_examples=400)
@given(ENVELOPES, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3))
def test_the_grammar_accepts_what_the_walk_accepts(one: Envelope, changes: list[tuple[int, int]]) -> None:
    body = bytearray(CODEC.encode(one)[HEADER.size + len(one.sender_id) : -TAG_BYTES])
    for place, value in changes:
        body[place % len(body)] = value
    if b"\x8c" in body and changes:  # texts that are no UTF-8 are the unpickler's to refuse; pickletools refuses them in the walk
        try:
            list(pickletools.genops(bytes(body)))
        except UnicodeDecodeError:
            return
        except Exception:
            pass
    assert accepted(bytes(body)) == acceptable(bytes(body))


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=40))
def test_the_grammar_accepts_what_the_walk_accepts_of_noise(noise: bytes) -> None:
    body = framed(noise + b".")
    try:
        list(pickletools.genops(body))
    except UnicodeDecodeError:
        return
    except Exception:
        pass
    assert accepted(body) == acceptable(body)
