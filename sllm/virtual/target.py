"""What an entry of a world's heap is for: each kind of thing that can happen is a class with one method."""

from __future__ import annotations

from typing import Any


class Target:
    """Something happens to it when the time of its entry has come."""

    __slots__ = ()

    def happen(self, what: Any, source: Any) -> None:
        """Called with what else is in the entry: a datagram and the address it comes from; nothing of use to other kinds of targets but calls."""
        raise NotImplementedError


class Calls(Target):
    """Calls that somebody beside the nodes has asked for: the call is the source of its entry."""

    __slots__ = ()

    def happen(self, what: Any, source: Any) -> None:
        source.make()
