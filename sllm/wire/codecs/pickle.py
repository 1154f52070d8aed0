"""Bodies as pickles (protocol 5) of a plain tuple of atoms and tuples, without memo references.

A body is accepted after three checks: all opcodes are on a short list, an unpickler without globals can load the body, and every value keeps its rule. The
three checks are slow in Python, so there is a short cut: one regular expression for each message, made from the rules of the fields, which matches the
opcodes of usual bodies (plain opcodes, right types, values well within their ranges). The three checks accept every body that the expression accepts; any
other body goes through the three checks (`check_body`). A regular expression cannot find repeated items of a list, so those are looked for separately.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from sys import intern
from typing import Any, ClassVar

from sllm.protocol import limits, rules
from sllm.protocol.limits import DATAGRAM_MAX_BYTES, OPCODES_MAX, TEXT_MAX_BYTES
from sllm.protocol.messages import Message
from sllm.protocol.node import Rejected
from sllm.protocol.rules import Distinct, Fields, Flag, Host, Name, OneOf, Pair, Prose, Real, Rule, Whole
from sllm.wire.body import SCHEMA, Values, check, mended

USUAL_BYTES = 1400  # of a body: fits a datagram that networks do not fragment
SHARED_MAX = 4096  # tuples of names, each kept once for all workers that report it, are remembered up to this number ...
SHARED_ITEMS_MAX = 64  # ... if they have no more names than this
OPCODE, PICKLE = "opcode", "pickle"

# --- the opcodes that any body may have -------------------------------------------------------------------------------------------------


def sized(lengths: range, each: bytes = b".") -> bytes:
    """A pattern: a length byte and then that number of bytes. Each length is an alternative, because regular expressions have no counted fields."""
    return b"|".join(re.escape(bytes([n])) + (each + b"{%d}+" % n if n else b"") for n in lengths)


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

# --- the opcodes of usual bodies ----------------------------------------------------------------------------------------------------------

# By rule: the two powers of two between which most values lie, so that the first two bytes of a double decide; and a pattern for one further value.
_USUAL_REALS: dict[int, tuple[float, float, bytes]] = {
    id(rules.SECONDS): (0.0, 2.0**29, b""),
    id(rules.PART): (0.0, 1.0, rb"|\x3f\xf0\x00\x00\x00\x00\x00\x00"),
    id(rules.INTERVAL): (2.0**-20, 2.0**5, b""),
}


def _spell_whole(rule: Whole) -> bytes:
    """The opcodes of whole numbers from `least` up to the largest power of two that `most` + 1 reaches."""
    least, most = rule.least, rule.most
    bits = (most + 1).bit_length() - 1
    forms = [rb"K[\x%02x-\x%02x]" % (least, min(most, 255))]
    if bits > 8:
        forms.append(rb"M.[\x01-\x%02x]" % ((1 << min(bits, 16) - 8) - 1))
    if 16 < bits < 24:
        forms.append(rb"J..[\x01-\x%02x]\x00" % ((1 << bits - 16) - 1))
    elif bits >= 24:
        assert not least
        forms.append(rb"J...[\x00-\x%02x]" % ((1 << min(bits, 31) - 24) - 1))
    if bits >= 63:  # LONG1: little-endian, two's complement; at 64 bits a zero byte follows
        forms.append(rb"\x8a(?:" + b"|".join(rb"\x%02x" % n + b"." * (n - 1) + rb"[\x00-\x7f]" for n in range(5, 9)))
        forms[-1] += rb"|\x09........\x00)" if bits == 64 else rb")"
    return rb"(?:" + b"|".join(forms) + rb")"


def _spell_real(rule: Real) -> bytes:
    """The opcodes of doubles between two powers of two: the first two bytes have the sign, the exponent and four bits of the fraction."""
    low, high, also = _USUAL_REALS[id(rule)]
    (l0, l1, *_), (h0, h1, *_) = struct.pack(">d", low), struct.pack(">d", high)
    assert l0 + 1 < h0
    forms = [rb"\x%02x[\x%02x-\xff]......" % (l0, l1), rb"[\x%02x-\x%02x]......." % (l0 + 1, h0 - 1), rb"\x%02x[\x00-\x%02x]......" % (h0, h1 - 1)]
    return rb"G(?:" + b"|".join(forms) + also + rb")"


def _spell_distinct(rule: Distinct) -> bytes:
    """The opcodes of a tuple of items of one rule. Pickle has special opcodes for tuples of zero to three items."""
    one = spell(rule.item)
    return rb"(?:\)|" + one + rb"(?:\x85|" + one + rb"(?:\x86|" + one + rb"\x87))|\((?:" + one + rb"){0,%d}+t)" % rule.most


def _spell_tuple(fields: list[bytes]) -> bytes:
    """The opcodes of a tuple with fields of these patterns."""
    ends = {1: rb"\x85", 2: rb"\x86", 3: rb"\x87"}
    return b"".join(fields) + ends[len(fields)] if len(fields) in ends else rb"\(" + b"".join(fields) + rb"t"


def spell(rule: Rule) -> bytes:
    """A regular expression for the opcodes of most values that the rule accepts, and of no other value. Each alternative begins with a different byte, so
    that matching never goes back."""
    match rule:
        case Name():
            return rb"\x8c(?:" + sized(range(1, rule.most_bytes + 1), b"[ -~]") + rb")"
        case Host():
            return rb"\x8c(?:" + sized(range(0 if rule.may_be_empty else 1, limits.HOST_MAX_BYTES + 1), rb"[A-Za-z0-9._~:%-]") + rb")"
        case Prose():
            return rb"\x8c(?:" + sized(range(TEXT_MAX_BYTES + 1), rb"[\x00-\x7f]") + rb")"
        case OneOf():
            return rb"\x8c(?:" + b"|".join(re.escape(bytes([len(choice)]) + choice.encode()) for choice in rule.choices) + rb")"
        case Flag():
            return rb"[\x88\x89]"
        case Whole():
            return _spell_whole(rule)
        case Real():
            return _spell_real(rule)
        case Distinct():
            return _spell_distinct(rule)
        case Pair():
            return spell(rule.first) + spell(rule.second) + rb"\x86"
        case Fields():
            return _spell_tuple([spell(inner) for inner in rule.rules])
    raise TypeError(f"no opcodes are known for {type(rule).__name__}")


_usual: dict[type[Message], re.Pattern[bytes]] = {}


def usual(kind: type[Message]) -> re.Pattern[bytes]:
    """The pattern of a message's usual bodies. Made on first use, because making the pattern of a load report takes some 50 ms."""
    found = _usual.get(kind)
    if found is None:
        opcodes = _spell_tuple([spell(rule) for rule in kind.RULES.values()])
        found = _usual[kind] = re.compile(rb"\x80\x05\x95..\x00\x00\x00\x00\x00\x00" + opcodes + rb"\.", re.DOTALL)
    return found


# --- loading ------------------------------------------------------------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """An unpickler without globals and persistent objects: a body that slipped past the check of opcodes still finds nothing to call."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError("no globals")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("no persistent objects")


def _unpickle(body: bytes) -> Any:
    """The plain tuple in a body that passed the check of opcodes. Raises Rejected(PICKLE) if the pickle is malformed."""
    try:
        return _Plain(io.BytesIO(body)).load()
    except Exception:  # the unpickler raises errors of many classes, all of which mean a malformed body
        raise Rejected(PICKLE) from None


def check_body(kind: type[Message], body: bytes) -> Values:
    """The fields of a body, after the three checks. Rejected names the first check that fails."""
    if _ACCEPTABLE.fullmatch(body) is None or int.from_bytes(body[_FRAME_AT:_FRAME_END], "little") != len(body) - _FRAME_END:
        raise Rejected(OPCODE)
    return check(kind, _unpickle(body))


class _Sink:
    """The file that the pickler writes to. The pickler writes a whole body at a time."""

    __slots__ = ("body",)

    def __init__(self) -> None:
        self.body = b""

    def write(self, body: bytes) -> None:
        self.body = body


# --- the codec ----------------------------------------------------------------------------------------------------------------------------

Look = tuple[int, Distinct]


class _Plan:
    """What the codec needs for one type of message: the pattern of usual bodies, and the places of lists, which are checked for repeated items."""

    __slots__ = ("is_usual", "kind", "lists", "nested")

    def __init__(self, kind: type[Message]) -> None:
        self.kind = kind
        self.is_usual: Callable[[bytes], object] = self._is_usual
        self.lists, self.nested = _lists_of(list(kind.RULES.values()))

    def _is_usual(self, body: bytes) -> object:
        self.is_usual = usual(self.kind).fullmatch  # replaces this method
        return self.is_usual(body)


def _lists_of(fields: list[Rule]) -> tuple[tuple[Look, ...], tuple[tuple[int, tuple[Look, ...]], ...]]:
    """(Places and rules of the lists among the fields, the same for each record among the fields)."""
    lists = tuple((at, rule) for at, rule in enumerate(fields) if isinstance(rule, Distinct))
    inner = ((at, _lists_of(list(rule.rules))[0]) for at, rule in enumerate(fields) if isinstance(rule, Fields))
    return lists, tuple((at, found) for at, found in inner if found)


class Body:
    """See `sllm.wire.body.BodyCodec`. Not thread-safe."""

    VERSION: ClassVar[int] = 3
    REASONS: ClassVar[tuple[str, ...]] = (OPCODE, PICKLE, SCHEMA)

    def __init__(self) -> None:
        self._plans: dict[type[Message], _Plan] = {}
        self._shared: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._begin_pickling()
        self._file = io.BytesIO()
        self._load = _Plain(self._file).load  # one unpickler for all bodies, because a new one costs as much as half a body; no body has memo references

    def _begin_pickling(self) -> None:
        self._sink = _Sink()
        self._pickler = pickle.Pickler(self._sink, 5)
        self._pickler.fast = True  # no memo

    def _plan(self, kind: type[Message]) -> _Plan:
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = _Plan(kind)
        return plan

    def pack(self, kind: type[Message], values: Values) -> bytes:
        """The body; see `BodyCodec.pack`."""
        plan = self._plan(kind)
        body = self._pickle(values)
        if plan.is_usual(body) is None or self._repeats(plan, values):
            body = self._pickle(mended(kind, values))
        if USUAL_BYTES < len(body) < DATAGRAM_MAX_BYTES and _ACCEPTABLE.fullmatch(body) is None:
            raise ValueError(f"a {kind.__name__} of more than {OPCODES_MAX} values")
        return body

    def _pickle(self, values: Values) -> bytes:
        try:
            self._pickler.dump(values)
        except Exception:  # a value cannot be pickled at all; `mended` will name the field
            self._begin_pickling()
            return b""
        return self._sink.body

    def _repeats(self, plan: _Plan, values: Values) -> bool:
        """Whether a list in a usual body has two equal items."""
        return self._do_repeat(plan.lists, values) or any(self._do_repeat(lists, values[at]) for at, lists in plan.nested)

    def _do_repeat(self, lists: tuple[Look, ...], values: Values) -> bool:
        for at, rule in lists:
            items = values[at]
            if len(items) > 1 and items not in self._shared:
                if rule.repeats(items):
                    return True
                self._share(items)
        return False

    def unpack(self, kind: type[Message], body: bytes) -> Values:
        """The values of the fields; see `BodyCodec.unpack`."""
        plan = self._plan(kind)
        if len(body) > USUAL_BYTES or plan.is_usual(body) is None or body[3] | body[4] << 8 != len(body) - _FRAME_END:
            return check_body(kind, body)
        self._file.__init__(body)  # type: ignore[misc]  # the cheapest way to give the file new content
        values: Values = self._load()
        if plan.lists:
            values = self._with_shared(plan.lists, values)
        for at, lists in plan.nested:
            values = (*values[:at], self._with_shared(lists, values[at]), *values[at + 1 :])
        return values

    def _with_shared(self, lists: tuple[Look, ...], values: Values) -> Values:
        """The values; a list that an earlier body had too is the same object. Raises Rejected(SCHEMA) if a list has two equal items."""
        get, fields = self._shared.get, list(values)
        for at, rule in lists:
            items = fields[at]
            if len(items) > 1:
                known = get(items)
                if known is None:
                    if rule.repeats(items):
                        raise Rejected(SCHEMA)
                    known = self._share(items)
                fields[at] = known
            elif items and type(items[0]) is str:
                fields[at] = get(items) or self._share(items)
        return tuple(fields)

    def _share(self, items: tuple[Any, ...]) -> tuple[Any, ...]:
        """One object for all equal lists of names: many workers hold the same models, and sharing halves the memory of a table of reports. A shared list has
        been checked for repeated items, so the check is made once."""
        if len(items) <= SHARED_ITEMS_MAX and type(items[0]) is str:
            if len(self._shared) >= SHARED_MAX:
                self._shared.clear()
            items = tuple(map(intern, items))
            self._shared[items] = items
        return items
