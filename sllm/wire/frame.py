"""The wire: how an envelope becomes a datagram, and which checks a datagram has to pass.

Layout, integers big-endian:

    offset  size  field
    0       4     magic b"sLLM"
    4       1     version: which codec packed the body, and which fields the messages have (3: pickle)
    5       1     message type: `Message.CODE`
    6       1     key id
    7       1     length n of the sender id, 1..63
    8       8     incarnation, ns since 1970, below 2**63
    16      8     sequence, below 2**63
    24      8     wall clock, float seconds since 1970
    32      n     sender id, printable UTF-8
    32+n          body: the values of the message's fields, as the version's codec packs them
    end-16  16    tag: BLAKE2b-128, keyed, over all bytes before the tag

The checks, in this order, each failure with a reason of its own: size, magic and version, key id, tag, message type and sender, freshness, the checks of the
body codec. Freshness (time and sequence) is checked by `sllm.protocol.node`, because envelopes that travel as objects need that check too: `Node.judge` is
called as soon as the tag has been checked.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from functools import cache
from hmac import compare_digest
from operator import attrgetter
from sys import intern

from sllm.inputs.folder import read_folder
from sllm.protocol.errors import UsageError
from sllm.protocol.limits import DATAGRAM_MAX_BYTES, ID_MAX_BYTES, NUMBER_MAX, id_problem
from sllm.protocol.messages import MESSAGES, AnyEnvelope, Envelope, Message
from sllm.protocol.node import Judge, Rejected
from sllm.protocol.rules import Fields
from sllm.wire import codecs as folder
from sllm.wire.body import BodyCodec, Values
from sllm.wire.keys import TAG_BYTES, Keyring

MAGIC = b"sLLM"
VERSION = 3  # of the codec that packs what is sent, unless a node is told otherwise
HEADER = struct.Struct(">4sBBBBQQd")
_AFTER_PREFIX = struct.Struct(">BQQd")
_PREFIX_BYTES = HEADER.size - _AFTER_PREFIX.size  # magic, version, type, key id
_LEAST_BYTES = HEADER.size + TAG_BYTES + 1
REMEMBERED_MAX = 200_000  # senders whose last repeated message is cached, with a hash of its body; the message object is shared with the node that reads it
FRAME_REASONS = ("size", "magic", "version", "key_id", "tag", "type", "number", "sender")
"""The reasons with which `read` refuses a datagram before the body codec is called, in the order of the checks."""


@cache
def body_codecs() -> dict[int, type[BodyCodec]]:
    """The codecs of `sllm/wire/codecs/`, by version. UsageError if a file of the folder is broken or two have the same version: a process that reads less
    than its peers would seem to be deaf."""
    found, broken = read_folder(folder, lambda module: {module.__name__: module.Body})
    for problem in broken.values():
        raise UsageError(f"a codec cannot be read: {problem}")
    by_version: dict[int, type[BodyCodec]] = {}
    for name, kind in found.items():
        if kind.VERSION in by_version:
            raise UsageError(f"version {kind.VERSION} is that of two codecs: {by_version[kind.VERSION].__module__}, {name}")
        by_version[kind.VERSION] = kind
    return by_version


def reasons() -> tuple[str, ...]:
    """The reasons with which a codec can refuse a datagram, in the order of the checks; a node adds reasons of time and sequence."""
    return tuple(dict.fromkeys((*FRAME_REASONS, *(reason for kind in body_codecs().values() for reason in kind.REASONS))))


class _Plan:
    """How one type of message goes through one body codec: which fields are records, and how the message is made from its values. Made once per pair."""

    __slots__ = ("body", "code", "inner", "kind", "texts_at", "values")

    def __init__(self, kind: type[Message], body: BodyCodec) -> None:
        rules = list(kind.RULES.values())
        self.kind = kind
        self.code = kind.CODE
        self.body = body
        get = attrgetter(*kind.FIELDS)
        self.values: Callable[[Message], Values] = get if len(kind.FIELDS) > 1 else lambda message: (get(message),)
        self.inner = tuple((at, rule.kind) for at, rule in enumerate(rules) if isinstance(rule, Fields))
        self.texts_at = tuple(at for at, name in enumerate(kind.FIELDS) if name in ("state", "hardware")) if kind.REPEATED else ()

    def pack(self, message: Message) -> bytes:
        """The body of a message."""
        values = self.values(message)
        for at, kind in self.inner:
            item = values[at]
            values = (*values[:at], item.values() if type(item) is kind else item, *values[at + 1 :])
        return self.body.pack(self.kind, values)

    def unpack(self, body: bytes) -> Message:
        """The message in a body. Raises Rejected if the body is not valid."""
        values = self.body.unpack(self.kind, body)
        for at, kind in self.inner:
            values = (*values[:at], kind(*values[at]), *values[at + 1 :])
        for at in self.texts_at:  # the whole fleet uses a handful of such texts, and a report of each worker is kept
            values = (*values[:at], intern(values[at]), *values[at + 1 :])
        return self.kind(*values)


class FrameCodec:
    """Envelopes as signed datagrams; see the module's text for the layout. Not thread-safe.

    `bodies`: the body codecs that are understood; None: all of `sllm/wire/codecs/`. `version`: of the body codec that packs outgoing messages.
    """

    def __init__(self, keyring: Keyring, bodies: Sequence[type[BodyCodec]] | None = None, version: int = VERSION) -> None:
        self.keyring = keyring
        self.version = version
        known = list(body_codecs().values()) if bodies is None else bodies
        plans = [_Plan(kind, body) for body in [make() for make in known] for kind in MESSAGES]
        self._plans = {plan.kind: plan for plan in plans if version == plan.body.VERSION}
        self._versions = {plan.body.VERSION for plan in plans}
        self._routes: dict[bytes, tuple[hashlib.blake2b, _Plan | None]] = {
            MAGIC + bytes((plan.body.VERSION, plan.code, key_id)): (keyring.base(key_id), plan) for plan in plans for key_id in keyring.ids
        }
        self._repeated: dict[bytes, tuple[int, Message]] = {}  # sender -> (64-bit hash of the body, message) of the sender's last repeated message
        self._sender_id, self._sender = "", b""  # of the last datagram packed; a node has one sender id

    # --- out --------------------------------------------------------------------------------------------------------------------------

    def encode(self, envelope: AnyEnvelope) -> bytes:
        """The datagram. ValueError, naming message and field or size, if our own message breaks its rules or is too large."""
        message = envelope.message
        plan = self._plans.get(type(message))
        if plan is None:
            raise ValueError(f"{type(message).__name__} is not a message: {message!r}")
        sender_id, incarnation, sequence = envelope.sender_id, envelope.incarnation, envelope.sequence
        if sender_id != self._sender_id:
            if problem := id_problem(sender_id):
                raise ValueError(f"sender id {sender_id!r}: {problem}")
            self._sender_id, self._sender = sender_id, sender_id.encode()
        sender = self._sender
        body = plan.pack(message)
        if not (0 <= incarnation <= NUMBER_MAX and 0 <= sequence <= NUMBER_MAX):
            raise ValueError(f"{plan.kind.__name__}: incarnation {incarnation!r} and sequence {sequence!r}: must be from 0 to {NUMBER_MAX}")
        header = HEADER.pack(MAGIC, self.version, plan.code, self.keyring.signer, len(sender), incarnation, sequence, envelope.wall_s)
        data = header + sender + body
        if len(data) + TAG_BYTES > DATAGRAM_MAX_BYTES:
            raise ValueError(f"a {plan.kind.__name__} of {len(data) + TAG_BYTES} bytes is longer than {DATAGRAM_MAX_BYTES}")
        return data + self.keyring.tag(self.keyring.signer, data)

    # --- in ---------------------------------------------------------------------------------------------------------------------------

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope:
        """The envelope. Raises Rejected with the first of `reasons()` that holds, or with the judge's reason."""
        found = self.read(data, judge, now)
        if isinstance(found, str):
            raise Rejected(found)
        return found

    def read(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope | str:
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
        if judge is not None and (reason := judge(plan.kind, sender_id, incarnation, sequence, wall_s, now)):
            return reason
        try:
            message = self._open_repeated(plan, sender, body) if plan.kind.REPEATED else plan.unpack(body)
        except Rejected as rejection:  # rare: the sender has the key
            return rejection.reason
        return Envelope(sender_id, incarnation, sequence, wall_s, message)

    def _open_repeated(self, plan: _Plan, sender: bytes, body: bytes) -> Message:
        """The message in an authentic body. A body equal to the sender's last one has been checked before and gives the same message object."""
        known, digest = self._repeated.get(sender), hash(body)
        if known is not None and known[0] == digest and type(known[1]) is plan.kind:
            return known[1]
        message = plan.unpack(body)
        self._remember(sender, digest, message)
        return message

    def _remember(self, sender: bytes, digest: int, message: Message) -> None:
        """Cache the message of a body. Only senders with a key get here, and their number is bounded all the same. The coordinator calls `forget` for senders
        whose reports it does not apply, so that its table bounds the cache."""
        if sender not in self._repeated and len(self._repeated) >= REMEMBERED_MAX:
            self._repeated.clear()
        self._repeated[sender] = digest, message

    def forget(self, sender_id: str) -> None:
        self._repeated.pop(sender_id.encode(), None)

    def _problem_of_prefix(self, data: bytes) -> str:
        """Why the header's first bytes are refused. "" for an unknown message type, which is reported only after the tag has been verified."""
        if not data.startswith(MAGIC):
            return "magic"
        if data[4] not in self._versions:
            return "version"
        return "" if data[6] in self.keyring.ids else "key_id"
