"""The wire: how an envelope becomes a datagram, and why a datagram is believed.

Layout, integers big-endian:

    offset  size  field
    0       4     magic b"sLLM"
    4       1     version: which codec packed the body, and which fields the messages have (2: pickle)
    5       1     message type, index into MESSAGES plus 1
    6       1     key id
    7       1     length n of the sender id, 1..63
    8       8     incarnation, ns since 1970, below 2**63
    16      8     sequence, below 2**63
    24      8     wall clock, float seconds since 1970
    32      n     sender id, printable UTF-8
    32+n          body: a pickle (protocol 5) of a plain tuple of atoms and tuples, without memo references
    end-16  16    tag: BLAKE2b-128, keyed, over all before it

Checked in this order, each failure a reason of its own (REASONS): size, magic and version, key id, tag, message type and sender, freshness, opcodes of the
pickle, the unpickling itself, exact types and ranges. Freshness (time and sequence) is `sllm.protocol.node`'s, because it holds for envelopes that travel
as objects too: the node judges once the tag has been checked.

The last three are slow in Python, so there is a short cut: for each message type one regular expression, made from its schema, that spells the opcodes of
the bodies that are usual (plain opcodes, right types, values well within their ranges). What it accepts, the three checks accept too; whatever else comes
goes through them one by one (`check_body`).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from functools import cache
from hmac import compare_digest
from sys import intern
from typing import Any

from sllm.protocol.limits import DATAGRAM_MAX_BYTES, ID_MAX_BYTES, NUMBER_MAX, OPCODES_MAX, TEXT_MAX_BYTES, id_problem
from sllm.protocol.messages import Dispatch, Envelope, Enveloped, LoadReport, Message
from sllm.protocol.node import Codec, Judge, Rejected, new_tuple
from sllm.wire.fields import MESSAGES, SCHEMAS, sized

MAGIC = b"sLLM"
PICKLE_VERSION = 2
USUAL_BYTES = 1400  # of a body: what fits a datagram that no network cuts up
TAG_BYTES = 16
KEY_BYTES = 32
HEADER = struct.Struct(">4sBBBBQQd")
_AFTER_PREFIX = struct.Struct(">BQQd")
_PREFIX_BYTES = HEADER.size - _AFTER_PREFIX.size  # magic, version, type, key id
_LEAST_BYTES = HEADER.size + TAG_BYTES + 1
REMEMBERED_MAX = 200_000  # senders whose last report is kept: the object that the worker table has too, and a hash of the body it came in
SHARED_MAX = 4096  # tuples of model names, each kept once for all workers that report it, are remembered up to so many ...
SHARED_ITEMS_MAX = 64  # ... of at most so many names
REASONS = ("size", "magic", "version", "key_id", "tag", "type", "number", "sender", "opcode", "pickle", "schema")
"""Why `decode` rejects, in the order of the checks."""


class Keyring:
    """Keys by id, 1 to 255: `signer` signs, all are accepted. Never shown."""

    __slots__ = ("_bases", "signer")

    def __init__(self, signer: int, keys: Mapping[int, bytes]) -> None:
        if signer not in keys:
            raise ValueError(f"key {signer} is to sign but is not in the ring")
        for key_id, key in keys.items():
            if not 0 < key_id < 256 or len(key) != KEY_BYTES:
                raise ValueError(f"key {key_id}: ids are 1 to 255, keys {KEY_BYTES} bytes")
        self.signer = signer
        self._bases = {key_id: hashlib.blake2b(digest_size=TAG_BYTES, key=key) for key_id, key in keys.items()}

    @property
    def ids(self) -> tuple[int, ...]:
        """The keys that are accepted."""
        return tuple(self._bases)

    def base(self, key_id: int) -> hashlib.blake2b:
        """A hash that has taken in the key: copy it, never update it. Keying a new one costs twice as much as a copy."""
        return self._bases[key_id]

    def tag(self, key_id: int, data: bytes | memoryview) -> bytes:
        """The tag of `data` under a key of the ring."""
        state = self._bases[key_id].copy()
        state.update(data)
        return state.digest()

    def __repr__(self) -> str:
        return f"Keyring(ids {sorted(self._bases)}, {self.signer} signs)"


# --- pickles ----------------------------------------------------------------------------------------------------------------------------

# The grammar of an acceptable pickle. Every alternative begins with a different byte and has a fixed length after its length byte, and the repetition is
# possessive: matching is linear and never goes back, whatever the bytes.
_ACCEPTABLE = re.compile(
    rb"\x80\x05\x95.{8}"  # PROTO 5, FRAME
    rb"(?:[N\x88\x89()t\x85\x86\x87]"  # None, True, False, tuples and their mark
    rb"|K.|M..|J.{4}|G.{8}|\x8a(?:" + sized(range(10)) + rb")"  # integers, floats
    rb"|\x8c(?:" + sized(range(TEXT_MAX_BYTES + 1)) + rb")){0,%d}+\." % OPCODES_MAX,  # strings, STOP
    re.DOTALL,
)
_FRAME_AT, _FRAME_END = 3, 11


@cache
def usual(message: type) -> re.Pattern[bytes]:
    """The usual bodies of a message. Made on first use: it takes some 50 ms for a load report."""
    fields = [kind.usual for kind in SCHEMAS[message].values()]
    ends = {1: rb"\x85", 2: rb"\x86", 3: rb"\x87"}
    opcodes = b"".join(fields) + ends[len(fields)] if len(fields) in ends else rb"\(" + b"".join(fields) + rb"t"
    return re.compile(rb"\x80\x05\x95..\x00\x00\x00\x00\x00\x00" + opcodes + rb"\.", re.DOTALL)


class _Plain(pickle.Unpickler):
    """Knows no global and no persistent object: what slipped past the opcodes still finds nothing to call."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError("no globals")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("no persistent objects")


def _unpickle(body: bytes) -> Any:
    """The plain tuple in a body that passed the opcode check. Rejected("pickle") for what is malformed all the same."""
    try:
        return _Plain(io.BytesIO(body)).load()
    except Exception:  # the unpickler raises many kinds; none is ours to tell apart
        raise Rejected("pickle") from None


def check_body(message: type, body: bytes) -> tuple[Any, ...]:
    """The fields of a body, checked step by step. Rejected names the first step that fails."""
    if _ACCEPTABLE.fullmatch(body) is None or int.from_bytes(body[_FRAME_AT:_FRAME_END], "little") != len(body) - _FRAME_END:
        raise Rejected("opcode")
    fields = _unpickle(body)
    schema = SCHEMAS[message]
    if type(fields) is not tuple or len(fields) != len(schema):
        raise Rejected("schema")
    if not all(kind.accepts(value) for kind, value in zip(schema.values(), fields, strict=True)):
        raise Rejected("schema")
    return fields


class _Sink:
    """Where the pickler writes: a whole body at a time."""

    __slots__ = ("body",)

    def __init__(self) -> None:
        self.body = b""

    def write(self, body: bytes) -> None:
        self.body = body


# --- the codec --------------------------------------------------------------------------------------------------------------------------


class _Plan:
    """What the codec needs to know of one message type."""

    __slots__ = ("code", "dispatch_at", "distinct_at", "is_usual", "message", "names_at", "others_at", "texts_at")

    def __init__(self, code: int, message: type) -> None:
        fields = list(SCHEMAS[message])
        self.code = code
        self.message = message
        self.is_usual: Callable[[bytes], object] = self._is_usual
        self.dispatch_at = fields.index("dispatch") if "dispatch" in fields else -1
        names = ("gpu_models", "busy_models", "host_models", "disk_models") if message is LoadReport else ()
        self.names_at = tuple(fields.index(name) for name in names)
        self.distinct_at = tuple((at, kind.distinct) for at, kind in enumerate(SCHEMAS[message].values()) if kind.distinct is not None)
        self.others_at = tuple(entry for entry in self.distinct_at if entry[0] not in self.names_at)
        self.texts_at = tuple(fields.index(name) for name in ("state", "hardware")) if names else ()  # the same few of every worker

    def _is_usual(self, body: bytes) -> object:
        self.is_usual = usual(self.message).fullmatch  # from now on without us
        return self.is_usual(body)


def _repeats(fields: Any, places: tuple[tuple[int, Callable[[Any], Any]], ...]) -> bool:
    """Whether one of the lists at these places names something twice. All else about the fields has been found right."""
    for at, distinct in places:
        items = fields[at]
        if len(items) > 1 and len(distinct(items)) < len(items):
            return True
    return False


class PickleCodec(Codec):
    """Envelopes as signed pickles; see the module's text for the layout. Not for several threads at once."""

    version = PICKLE_VERSION

    def __init__(self, keyring: Keyring) -> None:
        self.keyring = keyring
        plans = [_Plan(code, kind) for code, kind in enumerate(MESSAGES, 1)]
        self._plans = {plan.message: plan for plan in plans}
        self._routes: dict[bytes, tuple[hashlib.blake2b, _Plan | None]] = {
            MAGIC + bytes((PICKLE_VERSION, plan.code, key_id)): (keyring.base(key_id), plan) for plan in plans for key_id in keyring.ids
        }
        self._reports: dict[bytes, tuple[int, Message]] = {}  # sender -> hash (64 bits) of the body of its last report, and what that says
        self._shared: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._sender_id, self._sender = "", b""  # of the last datagram packed: a node has one
        self._begin_pickling()
        self._file = io.BytesIO()
        self._load = _Plain(self._file).load  # one for all bodies: making one costs as much as half a body. No body has memo references

    def _begin_pickling(self) -> None:
        self._sink = _Sink()
        self._pickler = pickle.Pickler(self._sink, 5)
        self._pickler.fast = True  # no memo

    # --- out --------------------------------------------------------------------------------------------------------------------------

    def encode(self, envelope: Enveloped[Message]) -> bytes:
        """The datagram. ValueError, naming message and field or size, if it is not as its schema says or too large: that is our own fault."""
        sender_id, incarnation, sequence, wall_s, message = envelope
        plan = self._plans.get(type(message))
        if plan is None:
            raise ValueError(f"{type(message).__name__} is not a message: {message!r}")
        if sender_id != self._sender_id:
            if problem := id_problem(sender_id):
                raise ValueError(f"sender id {sender_id!r}: {problem}")
            self._sender_id, self._sender = sender_id, sender_id.encode()
        sender = self._sender
        fields = tuple(message)
        at = plan.dispatch_at
        if at >= 0:
            dispatch: Any = fields[at]
            fields = (*fields[:at], tuple(dispatch) if type(dispatch) is Dispatch else dispatch, *fields[at + 1 :])
        body = self._pickle(fields)
        if plan.is_usual(body) is None or (plan.distinct_at and self._repeat(plan, fields)):
            body = self._pickle(self._mended(plan, fields))
        if len(body) > USUAL_BYTES and len(body) < DATAGRAM_MAX_BYTES and _ACCEPTABLE.fullmatch(body) is None:
            raise ValueError(f"a {plan.message.__name__} of more than {OPCODES_MAX} values")
        if not (0 <= incarnation <= NUMBER_MAX and 0 <= sequence <= NUMBER_MAX):
            raise ValueError(f"{plan.message.__name__}: incarnation {incarnation!r} and sequence {sequence!r}: must be from 0 to {NUMBER_MAX}")
        header = HEADER.pack(MAGIC, PICKLE_VERSION, plan.code, self.keyring.signer, len(sender), incarnation, sequence, wall_s)
        data = header + sender + body
        if len(data) + TAG_BYTES > DATAGRAM_MAX_BYTES:
            raise ValueError(f"a {plan.message.__name__} of {len(data) + TAG_BYTES} bytes is longer than {DATAGRAM_MAX_BYTES}")
        return data + self.keyring.tag(self.keyring.signer, data)

    def _repeat(self, plan: _Plan, fields: tuple[Any, ...]) -> bool:
        """Whether a list of a usual body names something twice. Those that are shared have been looked at."""
        shared = self._shared
        for at in plan.names_at:
            names = fields[at]
            if len(names) > 1 and names not in shared:
                if len(set(names)) < len(names):
                    return True
                self._share(names)
        return _repeats(fields, plan.others_at)

    def _pickle(self, fields: tuple[Any, ...]) -> bytes:
        try:
            self._pickler.dump(fields)
        except Exception:  # something in there cannot be pickled at all; `_mended` will say which field
            self._begin_pickling()
            return b""
        return self._sink.body

    @staticmethod
    def _mended(plan: _Plan, fields: tuple[Any, ...]) -> tuple[Any, ...]:
        """The fields as they can be sent. ValueError names the first that cannot."""
        mended = []
        for (name, kind), value in zip(SCHEMAS[plan.message].items(), fields, strict=True):
            fitting = kind.mend(value)
            if not kind.accepts(fitting):
                raise ValueError(f"{plan.message.__name__}.{name}={value!r}: must be {kind.what}")
            mended.append(fitting)
        return tuple(mended)

    # --- in ---------------------------------------------------------------------------------------------------------------------------

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> Envelope:
        """The envelope. Rejected, with the first of REASONS that holds, or with the judge's reason."""
        found = self.read(data, judge, now)
        if isinstance(found, str):
            raise Rejected(found)
        return found

    def read(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> Envelope | str:
        """The envelope, or the reason with which `decode` would raise."""
        if not _LEAST_BYTES <= len(data) <= DATAGRAM_MAX_BYTES:
            return "size"
        data = bytes(data)
        route = self._routes.get(data[:_PREFIX_BYTES])
        if route is None:
            if problem := self._problem_of_prefix(data):
                return problem
            route = self.keyring.base(data[6]), None
        base, plan = route
        state = base.copy()
        state.update(data[:-TAG_BYTES])
        if not compare_digest(state.digest(), data[-TAG_BYTES:]):
            return "tag"
        if plan is None:
            return "type"
        sender_size, incarnation, sequence, wall_s = _AFTER_PREFIX.unpack_from(data, _PREFIX_BYTES)
        if incarnation > NUMBER_MAX or sequence > NUMBER_MAX:
            return "number"
        begin = HEADER.size + sender_size
        sender, body = data[HEADER.size : begin], data[begin:-TAG_BYTES]
        try:
            sender_id = sender.decode()
        except UnicodeDecodeError:
            return "sender"
        if not 0 < sender_size <= ID_MAX_BYTES or not sender_id.isprintable():
            return "sender"
        if judge is not None and (reason := judge(plan.message, sender_id, incarnation, sequence, wall_s, now)):
            return reason
        try:
            message = self._open(plan, body) if plan.message is not LoadReport else self._open_report(plan, sender, body)
        except Rejected as rejection:  # by a holder of the key: seldom
            return rejection.reason
        envelope: Envelope = new_tuple(Envelope, (sender_id, incarnation, sequence, wall_s, message))
        return envelope

    def _open_report(self, plan: _Plan, sender: bytes, body: bytes) -> Message:
        """The report in an authentic body. A worker at rest says the same again: then it was checked before."""
        known, digest = self._reports.get(sender), hash(body)
        if known is not None and known[0] == digest:
            return known[1]
        message = self._open(plan, body)
        self._remember(sender, digest, message)
        return message

    def _open(self, plan: _Plan, body: bytes) -> Message:
        """The message in an authentic body."""
        fields: Any
        if len(body) <= USUAL_BYTES and plan.is_usual(body) is not None and body[3] | body[4] << 8 == len(body) - _FRAME_END:
            self._file.__init__(body)  # type: ignore[misc]  # the cheapest way to give it new content
            fields = self._load()
            if plan.others_at and _repeats(fields, plan.others_at):
                raise Rejected("schema")
        else:
            fields = check_body(plan.message, body)
        at = plan.dispatch_at
        if plan.names_at:
            get, fields = self._shared.get, list(fields)
            for at in plan.names_at:
                names = fields[at]
                if names:
                    fields[at] = get(names) or self._share(names)
            for at in plan.texts_at:
                fields[at] = intern(fields[at])
        elif at >= 0:
            fields = (*fields[:at], Dispatch(*fields[at]), *fields[at + 1 :])
        message: Message = new_tuple(plan.message, fields)
        return message

    def _remember(self, sender: bytes, digest: int, report: Message) -> None:
        """Keep what a report was found to say. Only holders of a key get here, and the senders remembered are bounded all the same; the
        coordinator has what it does not apply forgotten, so that what stays is bounded by its table."""
        if sender not in self._reports and len(self._reports) >= REMEMBERED_MAX:
            self._reports.clear()
        self._reports[sender] = digest, report

    def forget(self, sender_id: str) -> None:
        self._reports.pop(sender_id.encode(), None)

    def _problem_of_prefix(self, data: bytes) -> str:
        """Why the header's first bytes are not of a message that we know. "" for a type we do not know: that is not said before its tag is checked."""
        if not data.startswith(MAGIC):
            return "magic"
        if data[4] != PICKLE_VERSION:
            return "version"
        return "" if data[6] in self.keyring.ids else "key_id"

    def _share(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The models of one worker are those of many others: one object for all halves the memory of a table of reports. What is shared names nothing
        twice, so that this is looked at once."""
        if len(names) > 1 and len(set(names)) < len(names):
            raise Rejected("schema")
        if len(names) <= SHARED_ITEMS_MAX:
            if len(self._shared) >= SHARED_MAX:
                self._shared.clear()
            names = tuple(map(intern, names))
            self._shared[names] = names
        return names


CODECS: dict[int, type[PickleCodec]] = {PICKLE_VERSION: PickleCodec}
"""Codecs by the version byte. Another one stands beside this: a class with `version`, `encode` and `decode`, and a line here."""
