"""Destinations: the socket address for the address of a node. Names are looked up by another thread; until then datagrams to a name are not sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from sllm.live.sockets import literal_address
from sllm.protocol.messages import Address

ROUTES_MAX = 200_000  # destinations remembered; then the table starts anew
NAME_KEEP_WALL_S = 30.0  # a destination's name is looked up again after this time
NO_NAME_KEEP_WALL_S = 1.0  # a destination's name without an address is looked up again after this time

SockAddr = tuple[str, int]


class NameResolver(Protocol):
    """Looks names up without blocking; see `sllm.live.resolve`."""

    def resolve(self, name: str, answer: Callable[[str | None], None]) -> None: ...


class Routes:
    """Destinations of the sockets of one address family. `known` has the socket address of each, or None while there is none."""

    def __init__(self, family: int, call_after_wall: Callable[[float, Callable[[], object]], object]) -> None:
        """call_after_wall(seconds, function) lets the driver call the function after a number of wall seconds."""
        self.known: dict[Address, SockAddr | None] = {}
        self.resolver: NameResolver | None = None
        self._family = family
        self._call_after_wall = call_after_wall

    def find(self, addr: Address) -> SockAddr | None:
        """The socket address for `addr`, or None while its name is looked up or when it has none. Never blocks."""
        known = self.known
        if addr in known:
            return known[addr]
        if len(known) >= ROUTES_MAX:
            known.clear()
        name, port = addr
        literal = literal_address(name, self._family)
        if literal is not None and 0 < port < 65536:
            known[addr] = (literal, port)
            return known[addr]
        known[addr] = None
        if self.resolver is not None and name and literal is None:
            self.resolver.resolve(name, partial(self._resolved, addr))
        return None

    def _resolved(self, addr: Address, answer: str | None) -> None:
        literal = literal_address(answer, self._family) if answer else None
        self.known[addr] = (literal, addr[1]) if literal else None
        self._call_after_wall(NAME_KEEP_WALL_S if literal else NO_NAME_KEEP_WALL_S, lambda: self.known.pop(addr, None))
