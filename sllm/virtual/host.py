"""A simulated machine: what runs on it, what its clocks show, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sllm.protocol.messages import Address
from sllm.protocol.node import Node

INF = float("inf")
STILL_RATE = 0.01  # of a host's clock: one that is slower stands still, as far as anybody waits for it

MakeNode = Callable[[int, float], Node]
"""(incarnation, now) -> a new life of the node."""


class Host:
    """A machine with an address, and the node that runs on it, if any."""

    __slots__ = (
        "address", "buffer_level", "buffer_max", "buffer_per_s", "buffer_seen_s", "clock_base_s", "clock_rate", "events", "frozen", "handle_timer",
        "hear", "held", "incarnation", "life", "live", "make_node", "name", "node", "node_base_s", "outbox", "spin_at", "spins", "wake",
        "wall_jump_s", "wall_lag_s", "wall_steady", "wire",
    )  # fmt: skip

    def __init__(self, address: Address, node: Node | None, make_node: MakeNode | None = None, *, wire: bool = False) -> None:
        self.address = address
        self.name = address[0]
        self.node = node  # None: down
        self.make_node = make_node
        self.wire = wire  # its node hears bytes
        self.incarnation = node.incarnation if node is not None else 0
        self.life = 1  # how many nodes ran here so far
        self.wake = INF  # when its wake-up is due; others in the heap are void
        self.spin_at = -1.0
        self.spins = 0
        self.frozen = False
        self.held: list[tuple[Any, Any]] = []  # what arrived while frozen
        self.wall_jump_s = 0.0  # by how much its wall clock was set wrong
        self.clock_rate = 1.0  # seconds its own clock runs in a second
        self.clock_base_s = 0.0  # at this time of the world ...
        self.node_base_s = 0.0  # ... its own clock showed this
        self.wall_steady = False  # the wall clock keeps true time although the monotonic one does not
        self.wall_lag_s = 0.0  # what has been added to it for that
        self.buffer_max = 0  # datagrams its socket buffer holds; 0: enough
        self.buffer_per_s = 0.0  # datagrams it takes out of the buffer in a second
        self.buffer_level = 0.0
        self.buffer_seen_s = 0.0
        self.refresh()

    @property
    def has_own_clock(self) -> bool:
        return self.clock_rate != 1.0 or self.clock_base_s != self.node_base_s

    @property
    def stands_still(self) -> bool:
        """What is open here comes to no end while this lasts."""
        return self.frozen or self.clock_rate < STILL_RATE

    def node_time(self, now: float) -> float:
        """The host's own monotonic clock at world time `now`."""
        return self.node_base_s + (now - self.clock_base_s) * self.clock_rate if self.has_own_clock else now

    def world_time(self, node_s: float) -> float:
        return self.clock_base_s + (node_s - self.node_base_s) / self.clock_rate if self.has_own_clock else node_s

    def read_clock(self, node: Node, now: float) -> float:
        """The host's own time, with the node's wall clock put right if it is to keep true time."""
        node_now = self.node_time(now)
        if self.wall_steady:
            node.wall_offset_s += now - node_now - self.wall_lag_s
            self.wall_lag_s = now - node_now
        return node_now

    def refresh(self) -> None:
        """Say whether this host may take the short way: `live` is its node then. The loop drives nodes of several classes; what it needs of them it finds
        faster here, where the interpreter meets one class only."""
        node = self.node
        self.live = None if self.frozen or self.buffer_max or self.has_own_clock else node
        if node is not None:
            self.hear = node.receive_datagram if self.wire else node.receive
            self.handle_timer = node.handle_timer
            self.outbox = node.outbox
            self.events = node.events

    def has_room(self, now: float) -> bool:
        """Put one datagram into the socket buffer, which drains at a steady rate; False: it is full."""
        self.buffer_level = max(0.0, self.buffer_level - (now - self.buffer_seen_s) * self.buffer_per_s)
        self.buffer_seen_s = now
        if self.buffer_level + 1.0 > self.buffer_max:
            return False
        self.buffer_level += 1.0
        return True

    def __repr__(self) -> str:
        return f"Host({self.name!r}, life {self.life}{', frozen' if self.frozen else ''}{', down' if self.node is None else ''})"


def flip_bit(data: bytes, where: float) -> bytes:
    """`data` with one bit wrong. `where` on 0..1 chooses it in the second half: body and tag, so that the tag is what gives it away."""
    first = len(data) // 2
    bit = min(int(where * (len(data) - first) * 8), (len(data) - first) * 8 - 1)
    changed = bytearray(data)
    changed[first + bit // 8] ^= 1 << bit % 8
    return bytes(changed)
