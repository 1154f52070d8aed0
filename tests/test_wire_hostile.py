"""Bodies signed with the right key by somebody who has turned: none is executed, none costs more than its size, none raises anything but Rejected."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from roles import coordinator
from wire_samples import CODEC, ENVELOPES, SAMPLES, envelope

from sllm.protocol.messages import AnyEnvelope, EngineSnapshot, LoadReport, Message, Progress, ReportAck
from sllm.protocol.node import Node, Rejected
from sllm.protocol.record import Record
from sllm.wire.codecs import pickle as wire
from sllm.wire.frame import HEADER
from sllm.wire.keys import TAG_BYTES


def signed(body: bytes, message: type = ReportAck) -> bytes:
    """A datagram with this body, perfect in everything else."""
    good = CODEC.encode(envelope(SAMPLES[message]))
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


REPORT = tuple(value.values() if isinstance(value, Record) else value for value in SAMPLES[LoadReport].values())
FIELDS = list(LoadReport.RULES)


def pickled(fields: object) -> bytes:
    """As our own codec spells it."""
    sink = wire._Sink()
    pickler = pickle.Pickler(sink, 5)
    pickler.fast = True
    pickler.dump(fields)
    return sink.body


def like_report(**changes: object) -> bytes:
    """A report that is one of ours but for these fields."""
    at = FIELDS.index("engine")
    engine = tuple(changes.get(name, value) for name, value in zip(EngineSnapshot.FIELDS, REPORT[at], strict=True))
    return pickled(tuple({"engine": engine, **changes}.get(name, value) for name, value in zip(FIELDS, REPORT, strict=True)))


def spelt(old: bytes, new: bytes) -> bytes:
    """Our own report with some of its opcodes spelt otherwise, and the frame set right."""
    rest = like_report()[11:]
    assert rest.count(old) >= 1, old
    return framed(rest.replace(old, new, 1))


def nested(depth: int) -> object:
    """A tuple in a tuple in a tuple ..."""
    value: object = ()
    for _ in range(depth):
        value = (value,)
    return value


STATE, GPU = b"\x8c\x05READY", b"\x8c\x0cllama-3.1-8b"
INF, NAN = float("inf"), float("nan")
LOOK_ALIKES: dict[str, tuple[bytes, str]] = {
    # opcodes that ours never have, where ours have others
    "the state as a long text": (spelt(STATE, b"X\x05\0\0\0READY"), "opcode"),
    "the state as a text of 8 length bytes": (spelt(STATE, b"\x8d" + struct.pack("<Q", 5) + b"READY"), "opcode"),
    "the state as a line of text": (spelt(STATE, b"VREADY\n"), "opcode"),
    "the state as a byte string": (spelt(STATE, b"U\x05READY"), "opcode"),
    "the state as a quoted string": (spelt(STATE, b"S'READY'\n"), "opcode"),
    "the state as bytes": (spelt(STATE, b"C\x05READY"), "opcode"),
    "the state as long bytes": (spelt(STATE, b"B\x05\0\0\0READY"), "opcode"),
    "the state as a bytearray": (spelt(STATE, b"\x96" + struct.pack("<Q", 5) + b"READY"), "opcode"),
    "the state as a global": (spelt(STATE, b"cos\nsystem\n"), "opcode"),
    "the state as a stack global": (spelt(STATE, b"\x8c\x02os\x8c\x06system\x93"), "opcode"),
    "the state as a call": (spelt(STATE, b"cos\ngetcwd\n)R"), "opcode"),
    "the state as an instance": (spelt(STATE, b"(ios\ngetcwd\n"), "opcode"),
    "the state as an object": (spelt(STATE, b"(cbuiltins\nobject\no"), "opcode"),
    "the state as a new object": (spelt(STATE, b"cbuiltins\nobject\n)\x81"), "opcode"),
    "the state as a new object with names": (spelt(STATE, b"cbuiltins\nobject\n)}\x92"), "opcode"),
    "the state as a persistent object": (spelt(STATE, b"K\x01Q"), "opcode"),
    "the state as a persistent line": (spelt(STATE, b"P1\n"), "opcode"),
    "the state as extension 1": (spelt(STATE, b"\x82\x01"), "opcode"),
    "the state as extension 256": (spelt(STATE, b"\x83\x00\x01"), "opcode"),
    "the state as extension 65536": (spelt(STATE, b"\x84\x00\x00\x01\x00"), "opcode"),
    "the state as a buffer": (spelt(STATE, b"\x97"), "opcode"),
    "the state as a read-only buffer": (spelt(STATE, b"\x97\x98"), "opcode"),
    "the state remembered": (spelt(STATE, STATE + b"\x94"), "opcode"),
    "the state put in place 0": (spelt(STATE, STATE + b"q\x00"), "opcode"),
    "the state put in a far place": (spelt(STATE, STATE + b"r\xff\xff\xff\x7f"), "opcode"),
    "the state put in a place by a line": (spelt(STATE, STATE + b"p99999999999\n"), "opcode"),
    "the state got from place 0": (spelt(STATE, b"h\x00"), "opcode"),
    "the state got from a far place": (spelt(STATE, b"j\xff\xff\xff\x7f"), "opcode"),
    "the state got by a line": (spelt(STATE, b"g0\n"), "opcode"),
    "the state twice, one dropped": (spelt(STATE, STATE + b"20"), "opcode"),
    "the state and a mark dropped": (spelt(STATE, STATE + b"(1"), "opcode"),
    "another frame in the frame": (spelt(STATE, b"\x95" + struct.pack("<Q", 7) + STATE), "opcode"),
    "another protocol in the middle": (spelt(STATE, b"\x80\x05" + STATE), "opcode"),
    "a list for a tuple": (spelt(GPU, b"]" + GPU + b"a"), "opcode"),
    "a list of several": (spelt(GPU, b"](" + GPU + b"e"), "opcode"),
    "a dictionary for a tuple": (spelt(GPU, b"}" + GPU + b"K\x01s"), "opcode"),
    "a dictionary of several": (spelt(GPU, b"}(" + GPU + b"K\x01u"), "opcode"),
    "a set": (spelt(GPU, b"\x8f(" + GPU + b"\x90"), "opcode"),
    "a frozen set": (spelt(GPU, b"(" + GPU + b"\x91"), "opcode"),
    "a number by a line": (spelt(b"M@\x1f", b"I8000\n"), "opcode"),
    "a long number by a line": (spelt(b"M@\x1f", b"L8000L\n"), "opcode"),
    "a true by a line": (spelt(b"\x88", b"I01\n"), "opcode"),
    "a float by a line": (spelt(b"G" + struct.pack(">d", 0.25), b"F0.25\n"), "opcode"),
    "a float nan by a line": (spelt(b"G" + struct.pack(">d", 0.25), b"Fnan\n"), "opcode"),
    "a number of 2 GB": (spelt(b"M@\x1f", b"\x8b\xff\xff\xff\x7f"), "opcode"),
    "a number of negative length": (spelt(b"M@\x1f", b"\x8b\xff\xff\xff\xff"), "opcode"),
    "a number of 10 bytes": (spelt(b"M@\x1f", b"\x8a\x0a" + b"\x01" * 10), "opcode"),
    "a number of 255 bytes": (spelt(b"M@\x1f", b"\x8a\xff" + b"\x01" * 255), "opcode"),
    "built upon": (spelt(STATE, STATE + b"}b"), "opcode"),
    # lengths that lie
    "a text a byte longer than it is": (spelt(STATE, b"\x8c\x06READY"), "opcode"),
    "a text that ends beyond the body": (framed(like_report()[11:-40] + b"\x8c\xff."), "opcode"),
    "a text cut in two": (framed(like_report()[11:40]), "opcode"),
    "a frame a byte short": (like_report()[:3] + struct.pack("<Q", len(like_report()) - 12) + like_report()[11:], "opcode"),
    "a frame a byte long": (like_report()[:3] + struct.pack("<Q", len(like_report()) - 10) + like_report()[11:], "opcode"),
    "a frame of nothing": (like_report()[:3] + struct.pack("<Q", 0) + like_report()[11:], "opcode"),
    "a frame of all memory": (like_report()[:3] + struct.pack("<Q", (1 << 64) - 1) + like_report()[11:], "opcode"),
    "no stop at the end": (framed(like_report()[11:-1]), "opcode"),
    "bytes after the stop": (framed(like_report()[11:] + b"K\x01"), "opcode"),
    "a second pickle after the first": (like_report() + like_report(), "opcode"),
    "the frame left out": (b"\x80\x05" + like_report()[11:], "opcode"),
    "protocol 4": (b"\x80\x04" + like_report()[2:], "opcode"),
    "protocol 255": (b"\x80\xff" + like_report()[2:], "opcode"),
    "no body": (b"", "opcode"),
    "nothing in the frame": (framed(b""), "opcode"),
    "more values than a body may have": (like_report(disk_models=tuple(f"m{i}" for i in range(500)), host_models=tuple(f"m{i}" for i in range(500))), "opcode"),
    # the stack
    "a tuple of more than there is": (framed(b"K\x01\x87."), "pickle"),
    "a tuple without a mark": (framed(b"K\x01t."), "pickle"),
    "a mark left on the stack": (framed(b"(K\x01(."), "pickle"),
    "text that is no UTF-8": (spelt(STATE, b"\x8c\x05RE\xff\xfeY"), "pickle"),
    "text cut within a character": (spelt(STATE, b"\x8c\x05READ\xe2"), "pickle"),
    "half of a surrogate pair": (like_report(hardware="h100\ud800"), "schema"),
    "both halves, each by itself": (like_report(hardware="h100\ud83e\udd99"), "schema"),
    # values
    "nothing where the fields are": (framed(b"N."), "schema"),
    "an empty tuple": (framed(b")."), "schema"),
    "a text where the fields are": (framed(b"\x8c\x05READY."), "schema"),
    "a field too few": (pickled(REPORT[:-1]), "schema"),
    "a field too many": (pickled((*REPORT, 1)), "schema"),
    "the fields in a tuple of their own": (pickled((REPORT,)), "schema"),
    "a field 300 tuples deep": (like_report(gpu_models=nested(300)), "schema"),
    "a field that is None": (like_report(host=None), "schema"),
    "an integer for a float": (like_report(wait_s=0), "schema"),
    "a float for an integer": (like_report(running=1.0), "schema"),
    "true for an integer": (like_report(running=True), "schema"),
    "an integer for true": (like_report(disk_complete=1), "schema"),
    "a text for a list of names": (like_report(gpu_models="opt-6.7b"), "schema"),
    "a number among the names": (like_report(gpu_models=("opt-6.7b", 1)), "schema"),
    "a tuple among the names": (like_report(host_models=(("opt-6.7b",),)), "schema"),
    "a name twice": (like_report(gpu_models=("opt-6.7b", "opt-6.7b")), "schema"),
    "a name twice with other seconds": (like_report(loading=(("opt-6.7b", 1.0), ("opt-6.7b", 2.0))), "schema"),
    "a dispatch missing twice": (like_report(dispatch_missing=(70, 70)), "schema"),
    "65 dispatches missing": (like_report(dispatch_missing=tuple(range(65))), "schema"),
    "501 names": (like_report(disk_models=tuple(f"m{i}" for i in range(501))), "schema"),
    "a name of 129 bytes": (like_report(hardware="h" * 129), "schema"),
    "a name with a line end": (like_report(hardware="h100\n"), "schema"),
    "a name with a zero": (like_report(hardware="h\0100"), "schema"),
    "an empty name": (like_report(gpu_models=("",)), "schema"),
    "a host with a zero": (like_report(host="::1%a\0b"), "schema"),
    "a port of 65536": (like_report(port=65536), "schema"),
    "a state of our own table": (like_report(state="DEAD"), "schema"),
    "seconds that are no number": (like_report(wait_s=NAN), "schema"),
    "seconds without end": (like_report(load_queue_s=INF), "schema"),
    "seconds before now": (like_report(wait_s=-0.5), "schema"),
    "an interval of nothing": (like_report(interval_s=0.0), "schema"),
    "an interval of an hour": (like_report(interval_s=3600.0), "schema"),
    "an interval that is no number": (like_report(interval_s=NAN), "schema"),
    "2**62 slots": (like_report(slots=1 << 62), "schema"),
    "no slots": (like_report(slots=0), "schema"),
    "bytes of 2**63": (like_report(gpu_free_bytes=1 << 63), "schema"),
    "bytes below nothing": (like_report(gpu_free_bytes=-1), "schema"),
    "an epoch of 2**70": (like_report(epoch=1 << 70), "schema"),
}  # fmt: skip
"""Bodies that look like a report of ours, the right key's tag over them, and the reason for which each is refused."""


def test_there_are_96_look_alikes_and_more_each_unlike_the_others() -> None:
    assert len({body for body, _ in LOOK_ALIKES.values()}) == len(LOOK_ALIKES) >= 96
    assert like_report() not in {body for body, _ in LOOK_ALIKES.values()}
    assert CODEC.decode(signed(like_report(), LoadReport)).message == SAMPLES[LoadReport], "what makes them fail is in them"


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_refused_with_its_reason_and_costs_no_more_than_its_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is looked up, called or imported, and no more memory is asked for than a few times what came."""
    body, reason = LOOK_ALIKES[name]
    monkeypatch.setattr(wire._Plain, "find_class", lambda *names: pytest.fail(f"looked up {names[1:]}"))
    data = signed(body, LoadReport)
    with pytest.raises(Rejected):
        CODEC.decode(data)  # what is made on first use is there from now on
    tracemalloc.start()
    try:
        with pytest.raises(Rejected) as caught:
            CODEC.decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.reason == reason
    assert peak < 50_000 + 100 * len(body)
    node, talk = coordinator()
    node.codec = CODEC
    node.receive_datagram(data, ("10.0.0.66", 1), 100.0)
    assert (len(node.fleet), node.rejected, talk.heard(Message)) == (0, {reason: 1}, [])


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(name: str) -> None:
    with pytest.raises(Rejected) as caught:
        CODEC.decode(signed(HOSTILE[name]))
    assert caught.value.reason in ("opcode", "pickle", "schema")
    assert not os.path.exists("/tmp/sllm-was-here")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_stale_repeated_or_not_for_us_is_refused_before_its_body_is_looked_at(name: str) -> None:
    node = Node("ear", 1, codec=CODEC)
    hear = partial(node.receive_datagram, signed(HOSTILE[name], Progress), ("x", 1))
    hear(100.0)
    node.handlers[Progress] = lambda envelope, addr, now: None
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
    return all(opcode.name in ALLOWED and (opcode.name != "LONG1" or -(1 << 71) <= (argument or 0) < 1 << 71) for opcode, argument, _ in rest)


def accepted(body: bytes) -> bool:
    return bool(wire._ACCEPTABLE.fullmatch(body)) and int.from_bytes(body[3:11], "little") == len(body) - 11


@settings(deadline=None, max_examples=400)
@given(ENVELOPES, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3))
def test_the_grammar_accepts_what_the_walk_accepts(one: AnyEnvelope, changes: list[tuple[int, int]]) -> None:
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
