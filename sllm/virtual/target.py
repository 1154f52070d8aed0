"""The targets of the entries in a world's heap: each kind of thing that can happen is a class with one method."""

from __future__ import annotations

from typing import Any


class Target:
    """The target of a heap entry, which acts when the time of the entry has come."""

    __slots__ = ()

    def happen(self, what: Any, source: Any) -> None:
        """Called with the rest of the entry: for a host, a datagram and the address of its sender; for `Calls`, the call as `source`; other targets ignore
        both arguments."""
        raise NotImplementedError


class Calls(Target):
    """Calls of `World.call_at`: the call is the source of its entry."""

    __slots__ = ()

    def happen(self, what: Any, source: Any) -> None:
        source.make()
