"""What each field of each message may be: as a rule for its value, and as the opcodes with which usual values are pickled.

Types come from the messages' own annotations (`sllm.messages`), ranges from the tables here; both ends of the wire check by them (`sllm.wire`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

from sllm import messages
from sllm.messages import Dispatch

TEXT_MAX_BYTES = 255  # of one string in a body: what one length byte can say
SECONDS_MAX = 1e9  # what is further off never comes
MESSAGES: tuple[type, ...] = (
    messages.LoadReport, messages.ReportAck, messages.ScheduleRequest, messages.ScheduleResponse, messages.ScheduleError, messages.InferenceRequest,
    messages.InferenceAccepted, messages.FirstToken, messages.InferenceResponse, messages.MigrateRequest,
)  # fmt: skip
"""Message types by code; a code is never used again for another type."""


class Kind(NamedTuple):
    """One sort of field.

    `accepts` is the rule. `usual` spells, as a regular expression, opcodes of most of what the rule accepts and of nothing else; each of its alternatives
    begins with a byte of its own, so that matching never has to go back. `mend` makes fit what a peer's words could lead us to say ourselves: no message
    may make our answer to it an error."""

    usual: bytes
    accepts: Callable[[Any], bool]
    what: str
    mend: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def sized(lengths: range) -> bytes:
    """A length byte and so many bytes, each length an alternative of its own, for want of counted fields in regular expressions."""
    return b"|".join(re.escape(bytes([n])) + (b".{%d}+" % n if n else b"") for n in lengths)


def _bytes_of(text: str) -> int:
    """Length in UTF-8; -1 for half of a surrogate pair, which pickle would carry but nobody could print or pack again."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return -1


def _text(least: int, most: int, mend: Callable[[Any], Any] = _same) -> Kind:
    """A string of `least` to `most` characters. One length byte must be enough for its bytes."""

    def accepts(value: Any) -> bool:
        return type(value) is str and least <= len(value) <= most and 0 <= _bytes_of(value) <= TEXT_MAX_BYTES

    what = f"a text of {least} to {most} characters, at most {TEXT_MAX_BYTES} bytes"
    return Kind(rb"\x8c(?:" + sized(range(least, most + 1)) + rb")", accepts, what, mend)


def _cut(value: Any) -> Any:
    return value.encode(errors="replace")[:TEXT_MAX_BYTES].decode(errors="ignore") if type(value) is str else value


def _one_of(choices: tuple[str, ...]) -> Kind:
    sized = b"|".join(re.escape(bytes([len(choice)]) + choice.encode()) for choice in choices)
    return Kind(rb"\x8c(?:" + sized + rb")", lambda value: type(value) is str and value in choices, f"one of {', '.join(choices)}", _same)


def _whole(limit: int) -> Kind:
    """0 <= value < limit. Usual: below the power of two that the limit reaches."""
    bits = limit.bit_length() - 1
    if bits < 8:
        forms = [rb"K[\x00-\x%02x]" % (limit - 1)]
    else:
        forms = [rb"K.", rb"M.." if bits >= 16 else rb"M[\x00-\xff][\x00-\x%02x]" % ((1 << bits - 8) - 1)]
    if bits >= 24:
        forms.append(rb"J...[\x00-\x%02x]" % ((1 << min(bits, 31) - 24) - 1))
    if bits >= 63:  # LONG1: little-endian, two's complement; at 64 bits a zero byte follows
        forms.append(rb"\x8a(?:" + b"|".join(rb"\x%02x" % n + b"." * (n - 1) + rb"[\x00-\x7f]" for n in range(5, 9)))
        forms[-1] += rb"|\x09........\x00)" if bits == 64 else rb")"
    return Kind(rb"(?:" + b"|".join(forms) + rb")", lambda value: type(value) is int and 0 <= value < limit, f"a whole number below {limit}", _same)


def _real(accepts: Callable[[float], bool], what: str, low: float, high: float, also: bytes = b"", mend: Callable[[Any], Any] = _same) -> Kind:
    """A float. Usual: low <= value < high, powers of two, so that the first two bytes of a double decide: sign, exponent, a little more."""
    (l0, l1, *_), (h0, h1, *_) = struct.pack(">d", low), struct.pack(">d", high)
    assert l0 + 1 < h0
    forms = [rb"\x%02x[\x%02x-\xff]......" % (l0, l1), rb"[\x%02x-\x%02x]......." % (l0 + 1, h0 - 1), rb"\x%02x[\x00-\x%02x]......" % (h0, h1 - 1)]
    return Kind(rb"G(?:" + b"|".join(forms) + also + rb")", lambda value: type(value) is float and accepts(value), what, mend)


def _at_most_for_ever(value: Any) -> Any:
    return SECONDS_MAX if type(value) is float and SECONDS_MAX < value < float("inf") else value


def _tuple_of(item: Kind) -> Kind:
    """Any number of `item`; pickle has opcodes of their own for none, one, two and three."""
    one = item.usual
    usual = rb"(?:\)|" + one + rb"(?:\x85|" + one + rb"(?:\x86|" + one + rb"\x87))|\((?:" + one + rb")*+t)"
    return Kind(usual, lambda value: type(value) is tuple and all(map(item.accepts, value)), f"a tuple, each item {item.what}", _same)


def _pair_of(first: Kind, second: Kind) -> Kind:
    def accepts(value: Any) -> bool:
        return type(value) is tuple and len(value) == 2 and first.accepts(value[0]) and second.accepts(value[1])

    return Kind(first.usual + second.usual + rb"\x86", accepts, f"a pair: {first.what}; {second.what}", _same)


NAME = _text(1, 128)
PROSE = _text(0, 255, _cut)  # for people: cut rather than refused
FLAG = Kind(rb"[\x88\x89]", lambda value: type(value) is bool, "True or False", _same)
COUNT = _whole(1 << 63)
TOKENS = _whole(100_000_001)
SECONDS = _real(lambda value: 0.0 <= value <= SECONDS_MAX, "a float of seconds from 0 to 1e9", 0.0, 2.0**29, mend=_at_most_for_ever)
PART = _real(lambda value: 0.0 <= value <= 1.000001, "a float from 0 to 1", 0.0, 1.0, rb"|\x3f\xf0\x00\x00\x00\x00\x00\x00")
INTERVAL = _real(lambda value: 0.0 < value <= 3600.0, "a float of seconds above 0 and at most 3600", 2.0**-20, 2.0**11)

KINDS: dict[Any, Kind] = {
    str: NAME, int: COUNT, float: SECONDS, bool: FLAG, tuple[str, ...]: _tuple_of(NAME), tuple[tuple[str, float], ...]: _tuple_of(_pair_of(NAME, SECONDS)),
    Dispatch: _pair_of(COUNT, COUNT),
}  # fmt: skip
"""What a field of this type may be, unless RANGES knows better."""

RANGES: dict[str, Kind] = {
    "state": _one_of(messages.REPORTED_STATES), "action": _one_of(messages.ACTIONS), "code": _one_of(messages.ERROR_CODES),
    "outcome": _one_of(messages.OUTCOMES), "LoadReport.host": _text(0, 255), "reason": PROSE, "detail": PROSE, "port": _whole(1 << 16),
    "priority": _whole(10), "prompt_tokens": TOKENS, "max_tokens": TOKENS, "output_tokens": TOKENS, "kv_used": PART, "interval_s": INTERVAL,
    "dispatch_missing": _tuple_of(COUNT),
}  # fmt: skip
"""By the name of a field, which means the same in every message that has it; or of one message only."""


def _kind_of(message: type, field: str, hint: Any) -> Kind:
    return RANGES.get(f"{message.__name__}.{field}") or RANGES.get(field) or KINDS[hint]


SCHEMAS: dict[type, dict[str, Kind]] = {
    message: {field: _kind_of(message, field, hint) for field, hint in get_type_hints(message).items()} for message in MESSAGES
}
"""What each field of each message may be, in their order."""
