"""The forms of a datagram that a world carries: an envelope, its bytes, or either with a wrong bit. The counts of messages by kind need the kind in every
form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.protocol.messages import Message
from sllm.virtual.target import Target

if TYPE_CHECKING:
    from sllm.virtual.host import Host


class Packed:
    """A datagram as signed bytes, with the kind of its message, which the network cannot read from the bytes."""

    __slots__ = ("data", "kind")

    def __init__(self, data: bytes, kind: type[Message]) -> None:
        self.data = data
        self.kind = kind


class Spoiled(Target):
    """A datagram with a wrong bit on its way to a host. `data` is None if envelopes travel as objects; the host then refuses the datagram as it would refuse
    the bytes."""

    __slots__ = ("data", "host", "kind")

    def __init__(self, host: Host, data: bytes | None, kind: type[Message]) -> None:
        self.host = host
        self.data = data
        self.kind = kind

    def happen(self, what: Any, source: Any) -> None:
        """The datagram arrives. A spoiled datagram always takes the host's slow path, even if nothing is wrong with the host."""
        self.host.arrive(self, source)


def kind_of(what: Any) -> type[Message]:
    """The kind of message in a datagram of any form."""
    kind: type[Message] = what.kind if isinstance(what, Packed | Spoiled) else type(what.message)
    return kind


def flip_bit(data: bytes, where: float) -> bytes:
    """`data` with one bit wrong. `where`, from 0 to 1, chooses a bit of the second half, which has body and tag, so that the check of the tag fails."""
    first = len(data) // 2
    bit = min(int(where * (len(data) - first) * 8), (len(data) - first) * 8 - 1)
    changed = bytearray(data)
    changed[first + bit // 8] ^= 1 << bit % 8
    return bytes(changed)
