"""What a datagram is while a world carries it: an envelope, its bytes, or either with a wrong bit. The books of each kind of message must know it in all of
these forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.protocol.messages import Message
from sllm.virtual.target import Target

if TYPE_CHECKING:
    from sllm.virtual.host import Host


class Packed:
    """A datagram as signed bytes, and the kind of its message: nobody but its sender could tell that from the bytes."""

    __slots__ = ("data", "kind")

    def __init__(self, data: bytes, kind: type[Message]) -> None:
        self.data = data
        self.kind = kind


class Spoiled(Target):
    """A datagram with a wrong bit on its way to a host. `data` is None while envelopes travel as objects: then it is refused as its bytes would be."""

    __slots__ = ("data", "host", "kind")

    def __init__(self, host: Host, data: bytes | None, kind: type[Message]) -> None:
        self.host = host
        self.data = data
        self.kind = kind

    def happen(self, what: Any, source: Any) -> None:
        """It arrives. Whatever is wrong with the datagram, the host may be in good health; it is heard the careful way all the same."""
        self.host.arrive(self, source)


def kind_of(what: Any) -> type[Message]:
    """The kind of message in a datagram, whatever form the datagram travels in."""
    kind: type[Message] = what.kind if isinstance(what, Packed | Spoiled) else type(what.message)
    return kind


def flip_bit(data: bytes, where: float) -> bytes:
    """`data` with one bit wrong. `where` on 0..1 chooses it in the second half: body and tag, so that the tag is what gives it away."""
    first = len(data) // 2
    bit = min(int(where * (len(data) - first) * 8), (len(data) - first) * 8 - 1)
    changed = bytearray(data)
    changed[first + bit // 8] ^= 1 << bit % 8
    return bytes(changed)
