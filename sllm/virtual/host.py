"""A simulated machine: the node on it, the arrivals at it, and the faults of it.

Arrivals at a machine without faults go straight to its node (the fast path). While a machine has any fault (it is down, frozen, has a clock of its own or a
small socket buffer), `Host.sound` is None, and arrivals take the slow path: `arrive`, `take` and `wake`, which check for every fault. On a machine without
faults both paths do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappush
from typing import TYPE_CHECKING, Any

from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.virtual.datagram import Spoiled, kind_of
from sllm.virtual.feed import Feed
from sllm.virtual.hostclock import HostClock
from sllm.virtual.network import DOWN, OVERFLOW
from sllm.virtual.target import Target

if TYPE_CHECKING:
    from sllm.virtual.world import World

INF = float("inf")
SPINS_MAX = 100_000  # wake-ups of one host at one moment; more is a deadline that handle_timer does not move
TICK_S = 1e-9  # least time between two wake-ups of a host whose clock has a rate of its own, because converted times are rounded

MakeNode = Callable[[int, float], Node]
"""(incarnation, now) -> a new life of the node."""


class SocketBuffer:
    """A socket buffer for `datagrams` datagrams, emptied at a steady rate; datagrams that do not fit are lost."""

    __slots__ = ("_drained_per_s", "_level", "_seen_s", "datagrams")

    def __init__(self, datagrams: int, drained_per_s: float, now: float) -> None:
        self.datagrams = datagrams
        self._drained_per_s = drained_per_s
        self._level = 0.0  # datagrams in the buffer at the last call of `admit`
        self._seen_s = now

    def has_room(self, now: float) -> bool:
        """Put one datagram in; False: the buffer is full."""
        self._level = max(0.0, self._level - (now - self._seen_s) * self._drained_per_s)
        self._seen_s = now
        if self._level + 1.0 > self.datagrams:
            return False
        self._level += 1.0
        return True


class Alarm(Target):
    """Wakes the node of a host at `due`. Heap entries for any other time are void."""

    __slots__ = ("_host", "due")

    def __init__(self, host: Host) -> None:
        self._host = host
        self.due = INF

    def happen(self, what: Any, source: Any) -> None:
        host = self._host
        now = host.world.now
        if self.due != now:
            return
        self.due = INF
        node = host.sound
        if node is None:
            host.wake()
            return
        node.handle_timer(now)
        host.take_output(node)


class Host(Target):
    """A machine with an address, and the node that runs on it, if any. Made by `World.add`."""

    __slots__ = (
        "_spin_at",
        "_spins",
        "address",
        "alarm",
        "buffer",
        "clock",
        "events",
        "frozen",
        "held",
        "incarnation",
        "life",
        "make_node",
        "name",
        "node",
        "outbox",
        "sound",
        "world",
    )  # fmt: skip

    def __init__(self, world: World, address: Address, node: Node | None, make_node: MakeNode | None = None) -> None:
        self.world = world
        self.address = address
        self.name = address[0]
        self.node = node  # None: down
        self.sound = node  # the node while the host has no fault, otherwise None
        self.make_node = make_node
        self.incarnation = node.incarnation if node is not None else 0
        self.life = 1  # number of lives so far
        self.alarm = Alarm(self)
        self.clock = HostClock()
        self.buffer: SocketBuffer | None = None  # None: large enough
        self.frozen = False
        self.held: list[tuple[Any, Any]] = []  # arrivals while frozen: (datagram, address) or (item, feed)
        self._spin_at = -1.0
        self._spins = 0
        self.refresh()

    @property
    def stands_still(self) -> bool:
        """Whether the host is frozen or so slow that its work comes to no end."""
        return self.frozen or self.clock.stands_still

    def read_clock(self) -> float:
        """The machine's monotonic clock, which is the `now` of its node."""
        return self.clock.read(self.node, self.world.now)

    def __repr__(self) -> str:
        return f"Host({self.name!r}, life {self.life}{', frozen' if self.frozen else ''}{', down' if self.node is None else ''})"

    # --- arrivals ---------------------------------------------------------------------------------------------------------------------

    def happen(self, what: Any, source: Any) -> None:
        """A datagram arrives."""
        node = self.sound
        if node is None:
            self.arrive(what, source)
            return
        world = self.world
        world.network.delivered += 1
        if world.wire:
            node.receive_datagram(what.data, source, world.now)
        else:
            node.receive(what, source, world.now)
        self.take_output(node)

    def arrive(self, what: Any, source: Address) -> None:
        """A datagram arrives at a host that may have any fault."""
        network = self.world.network
        if self.node is None:
            network.lose(DOWN, kind_of(what))
        elif self.frozen:
            if self.buffer is not None and len(self.held) >= self.buffer.datagrams:
                network.lose(OVERFLOW, kind_of(what))
            else:
                self.held.append((what, source))
        elif self.buffer is not None and not self.buffer.has_room(self.world.now):
            network.lose(OVERFLOW, kind_of(what))
        else:
            self._hear(self.node, what, source)

    def take(self, feed: Feed, item: Any) -> None:
        """An item of a feed arrives at a host that may have any fault."""
        if self.node is None:
            self.world.unsubmitted += 1
        elif self.frozen:
            self.held.append((item, feed))
        else:
            feed.submit(item, self.read_clock())
            self.take_output(self.node)

    def wake(self) -> None:
        """Let the node do what is due, whatever fault the host may have: its alarm goes off, or its engine says that something has happened."""
        if self.node is not None and not self.frozen:
            self.node.handle_timer(self.read_clock())
            self.take_output(self.node)

    def _hear(self, node: Node, what: Any, source: Address) -> None:
        network = self.world.network
        network.delivered += 1
        now = self.read_clock()
        if type(what) is Spoiled:
            network.lost_by_kind[what.kind] += 1
            self.world.hear_spoiled(node, partial(_refuse_spoiled, node, what, source, now))
        elif self.world.wire:
            node.receive_datagram(what.data, source, now)
        else:
            node.receive(what, source, now)
        self.take_output(node)

    # --- the node's output --------------------------------------------------------------------------------------------------------------

    def touch(self) -> None:
        """Take over the node's outbox, events and deadline; to be called after something other than the world has called the node."""
        if self.node is not None and not self.frozen:
            self.take_output(self.node)

    def take_output(self, node: Node) -> None:
        """Send the node's outbox, publish its events and set the alarm to its deadline."""
        if self.outbox:
            self.world.carrier.transmit(self, node)
        events = self.events
        if events:
            self.world.bus.publish(node, events)
            events.clear()
        wake_at = node.wake_at
        if self.sound is None:
            wake_at = self._by_world_clock(wake_at)
        alarm = self.alarm
        if wake_at < alarm.due:
            world = self.world
            if wake_at <= world.now:
                wake_at = self._at_once()
            alarm.due = wake_at
            heappush(world.heap, (wake_at, world.order(), alarm, None, None))

    def _by_world_clock(self, wake_at: float) -> float:
        return wake_at if self.clock.is_true else max(self.clock.world_time(wake_at), self.world.now + TICK_S)

    def _at_once(self) -> float:
        """The time at which to wake a node whose deadline is not after now. RuntimeError for a node whose deadline never moves."""
        now = self.world.now
        self._spins = self._spins + 1 if self._spin_at == now else 1
        self._spin_at = now
        if self._spins > SPINS_MAX:
            raise RuntimeError(f"{self.name} asks to be woken at {now} again and again: handle_timer does not move wake_at")
        return now

    # --- faults -----------------------------------------------------------------------------------------------------------------------

    def crash(self) -> None:
        """The process dies without a message to anyone: the node is gone, and datagrams that reach the host from now on are lost."""
        self._tell("crash")
        self._lose(self.held)
        if self.node is not None:  # the messages that a frozen node could not send are lost
            self.world.network.lost_by_kind.update(kind_of(envelope) for envelope, _ in self.node.outbox)
        self.held.clear()
        self.node = None
        self.frozen = False
        self.alarm.due = INF
        self.refresh()

    def _lose(self, held: Iterable[tuple[Any, Any]]) -> None:
        """Count the arrivals that waited for the frozen host as lost."""
        for what, source in held:
            if isinstance(source, Feed):
                self.world.unsubmitted += 1
            else:
                self.world.network.lose(DOWN, kind_of(what))

    def restart(self) -> Node:
        """Begin a new life at the same address. The incarnation is the time of the host's wall clock, so it is lower than the last one if that clock was set
        back meanwhile; no two lives have the same incarnation. Datagrams still on their way reach the new life, as on a real network."""
        if self.make_node is None:
            raise ValueError(f"{self.name} cannot restart: it was added without make_node")
        if self.node is not None:
            self.crash()
        clock, world = self.clock, self.world
        now = clock.node_time(world.now)
        self.life += 1
        if clock.wall_steady:
            clock.wall_lag_s = world.now - now
        self.incarnation = max(0, round((now + clock.wall_offset_s) * 1e9)) + self.life
        node = self.make_node(self.incarnation, now)
        node.wall_offset_s += clock.wall_offset_s
        self.node = node
        self.refresh()
        self._tell("restart")
        self.take_output(node)
        return node

    def freeze(self) -> None:
        """Freeze the process: arrivals wait in its socket, and its timers do not run."""
        if self.node is None or self.frozen:
            return
        self.frozen = True
        self.refresh()
        self._tell("freeze")

    def thaw(self) -> None:
        """Let a frozen process go on: it handles the arrivals that waited, then its timers."""
        if not self.frozen:
            return
        self.frozen = False
        self.refresh()
        self._tell("thaw")
        held, self.held = iter(self.held), []
        for what, source in held:
            if self.node is None:  # a handler of an event has crashed the host
                self._lose(((what, source), *held))
                break
            if isinstance(source, Feed):
                self.take(source, what)
            else:
                self._hear(self.node, what, source)
        if self.node is not None:
            self.alarm.due = INF
            self.take_output(self.node)

    def supplant(self) -> Host:
        """Start the host's next life while the old one still exists: returns a new host, at an address of its own, on which the old node stays
        (frozen, if it was) and may come back as a zombie with its old incarnation."""
        if self.node is None:
            raise ValueError(f"{self.name} is down: there is no node to come back")
        ghost = Host(self.world, (f"{self.name}~{self.life}", self.address[1]), self.node)
        ghost.frozen, ghost.held, self.held = self.frozen, self.held, []
        ghost.clock = self.clock.copy()
        ghost.refresh()
        self.world.admit(ghost)
        self.node.relocate(ghost.address)
        self.node, self.frozen, self.alarm.due = None, False, INF
        ghost._tell("zombie")
        self.restart()
        ghost.touch()
        return ghost

    def jump_wall_clock(self, by_s: float) -> None:
        """Move the wall clock by `by_s`, in this life and the next ones. The monotonic clock is not moved."""
        self.clock.wall_jump_s += by_s
        if self.node is not None:
            self.node.set_wall_clock(self.node.wall_offset_s + by_s, self.clock.node_time(self.world.now))

    def set_clock_rate(self, rate: float, *, wall_steady: bool = False) -> None:
        """Let the monotonic clock run `rate` seconds per second of the world from now on, and the wall clock too unless `wall_steady`."""
        if rate <= 0.0:
            raise ValueError(f"clock rate {rate}: must be above 0")
        self._tell("clock")
        self.clock.set_rate(rate, self.world.now, self.read_clock(), wall_steady=wall_steady)
        self.refresh()
        self.alarm.due = INF
        self.touch()

    def limit_buffer(self, datagrams: int, drained_per_s: float) -> None:
        """Limit the socket buffer to a number of datagrams, emptied at the given rate; 0 datagrams: no limit."""
        self.buffer = SocketBuffer(datagrams, drained_per_s, self.world.now) if datagrams else None
        self.refresh()

    def refresh(self) -> None:
        """Decide whether this host may take the fast path; to be called after each change of the host's faults."""
        node = self.node
        if node is not None:
            self.outbox, self.events = node.outbox, node.events
        self.sound = node if self.buffer is None and self.clock.is_true and not self.frozen else None

    def _tell(self, what: str) -> None:
        for listener in self.world.lifecycle:
            listener(what, self)


def _refuse_spoiled(node: Node, spoiled: Spoiled, source: Address, now: float) -> None:
    if spoiled.data is None:
        node.rejected["tag"] += 1
    else:
        node.receive_datagram(spoiled.data, source, now)
