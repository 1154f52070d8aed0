"""What a codec of bodies is, and what all of them need: the check of every field by its rule, and the mending of our own fields before they are packed.

A codec is one file in `sllm/wire/codecs/`, found by listing that folder. It packs the values of a message's fields, with records inside as plain tuples, and
knows nothing of headers, keys, times or sequence numbers (`sllm.wire.frame`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from sllm.protocol.messages import Message
from sllm.protocol.node import Rejected
from sllm.protocol.rules import Fields, Rule

Values = tuple[Any, ...]
"""The values of a message's fields in their order, each an atom or a tuple."""

SCHEMA = "schema"  # reason: types, ranges or the number of fields are not as the message's rules say


class BodyCodec(Protocol):
    """Bytes for the fields of a message, and back. One object serves one node."""

    VERSION: ClassVar[int]  # the byte in the header that stands for this codec and for the fields that messages have now
    REASONS: ClassVar[tuple[str, ...]]  # with which `unpack` rejects, in the order of its checks; SCHEMA is the last

    def pack(self, kind: type[Message], values: Values) -> bytes:
        """The body. ValueError, naming message and field, for a value that its rule does not let through even when mended: that is our own fault."""
        ...

    def unpack(self, kind: type[Message], body: bytes) -> Values:
        """The values in an authentic body, all of which keep their rules. Rejected, with one of REASONS, if it is not one."""
        ...


def check(kind: type[Message], values: Any) -> Values:
    """The values, if they are as the rules of the message say; Rejected(SCHEMA) if not."""
    rules = kind.RULES
    if type(values) is not tuple or len(values) != len(rules) or not all(rule.accepts(value) for rule, value in zip(rules.values(), values, strict=True)):
        raise Rejected(SCHEMA)
    return values


def mended(kind: type[Message], values: Values) -> Values:
    """The values as they can be sent. ValueError names the first that cannot."""
    return _mended(kind.__name__, tuple(kind.RULES), tuple(kind.RULES.values()), values)


def _mended(where: str, names: tuple[str, ...], rules: tuple[Rule, ...], values: Values) -> Values:
    fitting = []
    for name, rule, value in zip(names, rules, values, strict=True):
        if isinstance(rule, Fields) and type(value) is tuple and len(value) == len(rule.rules):
            item: Any = _mended(f"{where}.{name}", rule.names, rule.rules, value)
        else:
            item = rule.mend(value)
            if not rule.accepts(item):
                raise ValueError(f"{where}.{name}={value!r}: must be {rule.what}")
        fitting.append(item)
    return tuple(fitting)
