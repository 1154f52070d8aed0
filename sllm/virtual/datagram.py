"""What a datagram is while a world carries it: an envelope, its bytes, or either with a wrong bit. The books of load reports must know each for one."""

from __future__ import annotations

from typing import Any

from sllm.protocol.messages import LoadReport


class PackedReport(bytes):
    """A load report as signed bytes: nothing but its sender could say what it is."""

    __slots__ = ()


class Spoiled:
    """A datagram with a wrong bit. `data` is None while envelopes travel as objects: then it is refused as its bytes would be."""

    __slots__ = ("data", "is_report")

    def __init__(self, data: bytes | None, is_report: bool) -> None:
        self.data = data
        self.is_report = is_report


def is_report(what: Any) -> bool:
    """Whether a datagram is a load report, whatever it travels as."""
    if isinstance(what, bytes):
        return type(what) is PackedReport
    return what.is_report if type(what) is Spoiled else type(what.message) is LoadReport
