"""What a datagram is while a world carries it: an envelope, its bytes, or either with a wrong bit. The books of load reports must know each for one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sllm.protocol.messages import LoadReport
from sllm.virtual.target import Target

if TYPE_CHECKING:
    from sllm.virtual.host import Host


class Packed:
    """A datagram as signed bytes, and whether it is a load report: nobody but its sender could tell that from the bytes."""

    __slots__ = ("data", "is_report")

    def __init__(self, data: bytes, is_report: bool) -> None:
        self.data = data
        self.is_report = is_report


class Spoiled(Target):
    """A datagram with a wrong bit on its way to a host. `data` is None while envelopes travel as objects: then it is refused as its bytes would be."""

    __slots__ = ("data", "host", "is_report")

    def __init__(self, host: Host, data: bytes | None, is_report: bool) -> None:
        self.host = host
        self.data = data
        self.is_report = is_report

    def happen(self, what: Any, source: Any) -> None:
        """It arrives. Whatever is wrong with the datagram, the host may be in good health; it is heard the careful way all the same."""
        self.host.arrive(self, source)


def is_report(what: Any) -> bool:
    """Whether a datagram is a load report, whatever it travels as."""
    return bool(what.is_report) if isinstance(what, Packed | Spoiled) else type(what.message) is LoadReport


def flip_bit(data: bytes, where: float) -> bytes:
    """`data` with one bit wrong. `where` on 0..1 chooses it in the second half: body and tag, so that the tag is what gives it away."""
    first = len(data) // 2
    bit = min(int(where * (len(data) - first) * 8), (len(data) - first) * 8 - 1)
    changed = bytearray(data)
    changed[first + bit // 8] ^= 1 << bit % 8
    return bytes(changed)
