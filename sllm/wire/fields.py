"""What each field of each message may be: as a rule for its value, and as the opcodes with which usual values are pickled.

Types come from the messages' own annotations (`sllm.protocol.messages`), limits from `sllm.protocol.limits`;
both ends of the wire check by them (`sllm.wire.frame`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple, get_type_hints

from sllm.protocol import limits, messages
from sllm.protocol.limits import TEXT_MAX_BYTES
from sllm.protocol.messages import Dispatch

MESSAGES: tuple[type, ...] = (
    messages.LoadReport, messages.ReportAck, messages.ScheduleRequest, messages.ScheduleResponse, messages.ScheduleError, messages.InferenceRequest,
    messages.InferenceAccepted, messages.FirstToken, messages.InferenceResponse, messages.MigrateRequest,
    messages.Progress, messages.WorkerLost, messages.CancelRequest,
)  # fmt: skip
"""Message types by code; a code is never used again for another type."""


class Kind(NamedTuple):
    """One sort of field.

    `accepts` is the rule. `usual` spells, as a regular expression, opcodes of most of what the rule accepts and of nothing else; each of its alternatives
    begins with a byte of its own, so that matching never has to go back. A regular expression cannot say that a list names nothing twice: `distinct`
    makes a set or a dictionary of its items, which is as long as the list only then. `mend` makes fit what a peer's words could lead us to say ourselves:
    no message may make our answer to it an error. `draw` makes a value that the rule accepts, often one at its limits: for tests that send whatever may
    be sent."""

    usual: bytes
    accepts: Callable[[Any], bool]
    what: str
    draw: Callable[[Random], Any]
    mend: Callable[[Any], Any] = lambda value: value
    distinct: Callable[[Any], Any] | None = None


def sized(lengths: range, each: bytes = b".") -> bytes:
    """A length byte and that number of bytes, each length an alternative of its own, for want of counted fields in regular expressions."""
    return b"|".join(re.escape(bytes([n])) + (each + b"{%d}+" % n if n else b"") for n in lengths)


# --- texts ------------------------------------------------------------------------------------------------------------------------------

ALPHABETS = ("a", "kM-7/. ", "\u00e9\u00df", "\ud55c\uae00", "\U0001f999", "0")


def _draw_text(most_bytes: int, alphabets: tuple[str, ...] = ALPHABETS) -> Callable[[Random], str]:
    def draw(rng: Random) -> str:
        size = rng.choice((1, most_bytes, rng.randint(1, most_bytes), rng.randint(1, min(most_bytes, 12))))
        alphabet = rng.choice(alphabets)
        text = "".join(rng.choices(alphabet, k=size))
        return text.encode()[:size].decode(errors="ignore") or "a"

    return draw


def _name(most_bytes: int) -> Kind:
    """A name by `limits.name_problem`. Usual: ASCII."""

    def accepts(value: Any) -> bool:
        return type(value) is str and not limits.name_problem(value, most_bytes)

    usual = rb"\x8c(?:" + sized(range(1, most_bytes + 1), b"[ -~]") + rb")"
    return Kind(usual, accepts, f"1 to {most_bytes} bytes of printable text", _draw_text(most_bytes))


def _host(*, may_be_empty: bool) -> Kind:
    """A host by `limits.host_problem`."""

    def accepts(value: Any) -> bool:
        return type(value) is str and (not limits.host_problem(value) if value else may_be_empty)

    def draw(rng: Random) -> str:
        return "" if may_be_empty and rng.random() < 0.3 else rng.choice(("127.0.0.1", "::1%a", "h" * limits.HOST_MAX_BYTES, "no-such-host", "%%", "::"))

    usual = rb"\x8c(?:" + sized(range(0 if may_be_empty else 1, limits.HOST_MAX_BYTES + 1), rb"[A-Za-z0-9._~:%-]") + rb")"
    return Kind(usual, accepts, f"a host of at most {limits.HOST_MAX_BYTES} bytes", draw)


def _is_prose(value: Any) -> bool:
    """Short enough, and no half of a surrogate pair, which pickle would carry but nobody could print or pack again."""
    try:
        return type(value) is str and len(value.encode()) <= TEXT_MAX_BYTES
    except UnicodeEncodeError:
        return False


def _cut(value: Any) -> Any:
    return value.encode(errors="replace")[:TEXT_MAX_BYTES].decode(errors="ignore") if type(value) is str else value


def _one_of(choices: tuple[str, ...]) -> Kind:
    sized = b"|".join(re.escape(bytes([len(choice)]) + choice.encode()) for choice in choices)
    usual = rb"\x8c(?:" + sized + rb")"
    return Kind(usual, lambda value: type(value) is str and value in choices, f"one of {', '.join(choices)}", lambda rng: rng.choice(choices))


# --- numbers ----------------------------------------------------------------------------------------------------------------------------


def _whole(most: int, least: int = 0) -> Kind:
    """least <= value <= most, where `least` is 0 or 1. Usual: as pickle spells it, below the power of two that `most` + 1 reaches."""
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

    def draw(rng: Random) -> int:
        return rng.choice((least, least + 1, most, rng.randint(least, most), rng.randint(least, min(most, 1000))))

    return Kind(rb"(?:" + b"|".join(forms) + rb")", lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}", draw)


def _real(
    accepts: Callable[[float], bool], what: str, low: float, high: float, draws: tuple[float, ...], also: bytes = b"", mend: Callable[[Any], Any] | None = None
) -> Kind:
    """A float. Usual: low <= value < high, powers of two, so that the first two bytes of a double decide: sign, exponent, a little more. `draws` begins
    with the least and the most that it accepts."""
    (l0, l1, *_), (h0, h1, *_) = struct.pack(">d", low), struct.pack(">d", high)
    assert l0 + 1 < h0
    forms = [rb"\x%02x[\x%02x-\xff]......" % (l0, l1), rb"[\x%02x-\x%02x]......." % (l0 + 1, h0 - 1), rb"\x%02x[\x00-\x%02x]......" % (h0, h1 - 1)]
    kind = Kind(
        rb"G(?:" + b"|".join(forms) + also + rb")", lambda value: type(value) is float and accepts(value), what,
        lambda rng: rng.choice((*draws, rng.uniform(draws[0], draws[1]))),
    )  # fmt: skip
    return kind._replace(mend=mend) if mend else kind


def _at_most_for_ever(value: Any) -> Any:
    return limits.SECONDS_MAX if type(value) is float and value > limits.SECONDS_MAX else value


# --- tuples -----------------------------------------------------------------------------------------------------------------------------


def _distinct(item: Kind, most: int, distinct: Callable[[Any], Any] = set) -> Kind:
    """Up to `most` of `item`, no two of one name. Pickle has opcodes of their own for none, one, two and three."""
    one = item.usual
    usual = rb"(?:\)|" + one + rb"(?:\x85|" + one + rb"(?:\x86|" + one + rb"\x87))|\((?:" + one + rb"){0,%d}+t)" % most

    def accepts(value: Any) -> bool:
        return type(value) is tuple and len(value) <= most and all(map(item.accepts, value)) and len(distinct(value)) == len(value)

    def draw(rng: Random) -> tuple[Any, ...]:
        size = rng.choice((0, 0, 1, 2, 3, rng.randint(0, min(most, 20)), rng.randint(0, min(most, 20)), most))
        items = distinct(item.draw(rng) for _ in range(size))
        return tuple(sorted(items.items() if isinstance(items, dict) else items))

    def mend(value: Any) -> Any:
        return tuple(map(item.mend, value)) if type(value) is tuple else value

    return Kind(usual, accepts, f"a tuple of at most {most}, no two alike, each {item.what}", draw, mend, distinct)


def _pair_of(first: Kind, second: Kind) -> Kind:
    def accepts(value: Any) -> bool:
        return type(value) is tuple and len(value) == 2 and first.accepts(value[0]) and second.accepts(value[1])

    def mend(value: Any) -> Any:
        return (first.mend(value[0]), second.mend(value[1])) if type(value) is tuple and len(value) == 2 else value

    return Kind(first.usual + second.usual + rb"\x86", accepts, f"a pair: {first.what}; {second.what}", lambda rng: (first.draw(rng), second.draw(rng)), mend)


# --- what the fields are ------------------------------------------------------------------------------------------------------------------

NAME = _name(limits.NAME_MAX_BYTES)
ID = _name(limits.ID_MAX_BYTES)
HOST = _host(may_be_empty=False)
PROSE = Kind(  # for people: cut rather than refused
    rb"\x8c(?:" + sized(range(TEXT_MAX_BYTES + 1), rb"[\x00-\x7f]") + rb")", _is_prose, f"at most {TEXT_MAX_BYTES} bytes of text",
    _draw_text(TEXT_MAX_BYTES, (*ALPHABETS, "\x00\n\u202e")), _cut,
)  # fmt: skip
FLAG = Kind(rb"[\x88\x89]", lambda value: type(value) is bool, "True or False", lambda rng: rng.random() < 0.5)
COUNT = _whole(limits.NUMBER_MAX)
TOKENS = _whole(limits.TOKENS_MAX)
REQUESTS = _whole(limits.SLOTS_MAX + limits.QUEUE_MAX)
SECONDS = _real(
    lambda value: 0.0 <= value <= limits.SECONDS_MAX, "a float of seconds from 0 to 1e9", 0.0, 2.0**29, (0.0, limits.SECONDS_MAX, 5e-324, 1.0, 0.01),
    mend=_at_most_for_ever,
)  # fmt: skip
PART = _real(lambda value: 0.0 <= value <= 1.000001, "a float from 0 to 1", 0.0, 1.0, (0.0, 1.0, 0.5), rb"|\x3f\xf0\x00\x00\x00\x00\x00\x00")
INTERVAL = _real(
    lambda value: 0.0 < value <= limits.REPORT_INTERVAL_MAX_S, f"a float of seconds above 0 and at most {limits.REPORT_INTERVAL_MAX_S:.12g}",
    2.0**-20, 2.0**5, (5e-324, limits.REPORT_INTERVAL_MAX_S, 1e-6, 0.1, 1.0),
)  # fmt: skip
NAMES = _distinct(NAME, limits.NAMES_MAX)
NAMED_SECONDS = _distinct(_pair_of(NAME, SECONDS), limits.NAMES_MAX, dict)

KINDS: dict[Any, Kind] = {
    str: NAME, int: COUNT, float: SECONDS, bool: FLAG, tuple[str, ...]: NAMES, tuple[tuple[str, float], ...]: NAMED_SECONDS,
    tuple[int, ...]: _distinct(COUNT, limits.NAMES_MAX), Dispatch: _pair_of(COUNT, COUNT),
}  # fmt: skip
"""What a field of this type may be, unless RANGES knows better."""

RANGES: dict[str, Kind] = {
    "state": _one_of(messages.REPORTED_STATES), "action": _one_of(messages.ACTIONS), "code": _one_of(messages.ERROR_CODES),
    "outcome": _one_of(messages.OUTCOMES), "worker_id": ID, "target_worker_id": ID, "exclude": _distinct(ID, limits.PLACEMENTS_MAX),
    "host": HOST, "LoadReport.host": _host(may_be_empty=True), "port": _whole((1 << 16) - 1), "reason": PROSE, "detail": PROSE,
    "priority": _whole(9), "prompt_tokens": TOKENS, "max_tokens": _whole(limits.TOKENS_MAX, 1), "output_tokens": TOKENS,
    "slots": _whole(limits.SLOTS_MAX, 1), "running": _whole(limits.SLOTS_MAX), "waiting": REQUESTS, "queue_depth": REQUESTS,
    "kv_used": PART, "interval_s": INTERVAL, "dispatch_missing": _distinct(COUNT, limits.MISSING_MAX), "queue_max": REQUESTS, "blocked": REQUESTS,
    "requests": REQUESTS, "attempt": _whole(limits.PLACEMENTS_MAX),
}  # fmt: skip
"""By the name of a field, which means the same in every message that has it; or of one message only."""


def _kind_of(message: type, field: str, hint: Any) -> Kind:
    return RANGES.get(f"{message.__name__}.{field}") or RANGES.get(field) or KINDS[hint]


SCHEMAS: dict[type, dict[str, Kind]] = {
    message: {field: _kind_of(message, field, hint) for field, hint in get_type_hints(message).items()} for message in MESSAGES
}
"""What each field of each message may be, in their order."""
