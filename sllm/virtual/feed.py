"""Arrivals from outside the world, such as a client's requests: items that come to a host without having been sent by another host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from sllm.virtual.target import Target

if TYPE_CHECKING:
    from sllm.virtual.host import Host

T = TypeVar("T")

AHEAD = 64  # arrivals taken in advance, because reading several rows of a trace at a time is faster


class Feed(Target):
    """The arrivals of one host, in order of time. At most `AHEAD` of them are taken in advance; one entry of the world's heap stands for the next arrival."""

    __slots__ = ("_ahead", "_arrivals", "_ended", "_host", "_item", "submit")

    def __init__(
        self, host: Host, arrivals: Iterable[tuple[float, T]], submit: Callable[[T, float], object], ended: Callable[[], object] | None = None
    ) -> None:
        self.submit: Callable[[Any, float], object] = submit
        self._host = host
        self._item: Any = None  # the next item
        self._arrivals = iter(arrivals)
        self._ended = ended
        self._ahead: list[tuple[float, Any]] = []  # (time, item) of the items after the next one, the nearest last

    def happen(self, what: Any, source: Any) -> None:
        """The next item arrives."""
        host, item = self._host, self._item
        node = host.sound
        if node is None:
            host.take(self, item)
            self.await_next()
            return
        self.submit(item, host.world.now)
        self.await_next()
        host.take_output(node)

    def await_next(self) -> None:
        """Put the following arrival into the world's heap; if there is none, call ended()."""
        if not self._ahead:
            self._ahead = list(islice(self._arrivals, AHEAD))
            if not self._ahead:
                if self._ended is not None:
                    self._ended()
                return
            self._ahead.reverse()
        at, self._item = self._ahead.pop()
        world = self._host.world
        world.push(max(at, world.now), self)
