"""The interface of a body codec, and two functions that every body codec needs: the check of received fields by their rules, and the clamping of our own
fields before they are packed.

A body codec is one file in `sllm/wire/codecs/`, found by listing that folder. A body codec packs the values of a message's fields, with records inside as
plain tuples. Headers, keys, times and sequence numbers belong to `sllm.wire.frame`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from sllm.protocol.messages import Message
from sllm.protocol.node import Rejected
from sllm.protocol.rules import Fields, Rule

Values = tuple[Any, ...]
"""The values of a message's fields in their order, each an atom or a tuple."""

SCHEMA = "schema"  # reason for a refusal: types, ranges or the number of fields break the message's rules


class BodyCodec(Protocol):
    """Packs the fields of a message into bytes and back. One object serves one node."""

    VERSION: ClassVar[int]  # the byte in the header that stands for this codec and for the present fields of all messages
    REASONS: ClassVar[tuple[str, ...]]  # the reasons with which `unpack` rejects, in the order of the checks; SCHEMA is the last

    def pack(self, kind: type[Message], values: Values) -> bytes:
        """The body. ValueError, naming message and field, for a value of our own that breaks its rule even after clamping."""
        ...

    def unpack(self, kind: type[Message], body: bytes) -> Values:
        """The values in an authentic body; every value keeps its rule. Raises Rejected, with one of REASONS, for any other body."""
        ...


def check(kind: type[Message], values: Any) -> Values:
    """The values, if they keep the rules of the message; raises Rejected(SCHEMA) otherwise."""
    rules = kind.RULES
    if type(values) is not tuple or len(values) != len(rules) or not all(rule.accepts(value) for rule, value in zip(rules.values(), values, strict=True)):
        raise Rejected(SCHEMA)
    return values


def mended(kind: type[Message], values: Values) -> Values:
    """The values, clamped to their rules. ValueError names the first value that cannot be clamped."""
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
