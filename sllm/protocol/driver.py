"""The interface of a driver, live and in virtual time alike: the time, calls at a given time, adding and removing nodes, and the bus that carries their events.

`sllm.virtual.world.World` and `sllm.live.udp.UdpDriver` are the two drivers. Each has more methods than this interface and its own further parameters of
`add`; code written against `Driver` runs on both.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Protocol, TypeVar

from sllm.protocol.bus import EventBus
from sllm.protocol.messages import Address
from sllm.protocol.node import Node


class Handle(Protocol):
    """A node that a driver drives, and the address at which the node receives."""

    address: Address

    @property
    def node(self) -> Node | None:
        """The node; None while its machine is down."""
        ...

    def read_clock(self) -> float:
        """The time to hand to the node now, in seconds of its monotonic clock."""
        ...

    def wake(self) -> None:
        """Let the node do what is due, as at its deadline, and `touch` it: its engine, which could not know when anything would happen, says that something has
        (`sllm.engine.base.Engine.wake`). Nothing happens while the machine is down."""
        ...

    def touch(self) -> None:
        """Send the node's outbox, publish its events and note its next deadline. To be called after something other than the driver has called the node."""
        ...


class Call:
    """A call that a driver is to make once; what `call_at` returns and `cancel` takes."""

    __slots__ = ("_action",)

    def __init__(self, action: Callable[[], object]) -> None:
        self._action: Callable[[], object] | None = action

    def make(self) -> None:
        """Call, unless the call was cancelled."""
        action = self._action
        if action is not None:
            self._action = None
            action()

    def cancel(self) -> None:
        """Do not make the call. Nothing happens if it has been made already."""
        self._action = None


H = TypeVar("H", bound=Handle)


class Driver(Protocol[H]):
    """Runs nodes. Times are those of the driver's clock, in seconds; everything is called in one thread."""

    bus: EventBus
    """Hears every event of every node, right after it happened."""

    @property
    def now(self) -> float:
        """The driver's clock."""
        ...

    def add(self, node: Node, address: Address, /) -> H:
        """Drive this node at `address`; the handle has the address that the node really got (port 0 asks for a free port)."""
        ...

    def remove(self, handle: H, /) -> None:
        """Forget the node. Datagrams that the node has sent still arrive; datagrams on their way to the node are lost."""
        ...

    def call_at(self, at: float, action: Callable[[], object]) -> Call:
        """Call action() at `at`, or as soon as possible if that is past. Calls of the same time are made in the order in which they were asked for."""
        ...

    def every(self, interval_s: float, action: Callable[[], object]) -> Callable[[], None]:
        """Call action() every `interval_s`, first after one interval. Returns a function that ends the calls."""
        ...

    def cancel(self, call: Call) -> None:
        """Do not make the call. Nothing happens if it has been made already."""
        ...

    def run(self, until: float = inf) -> float:
        """Run up to and including the time `until`, or until `stop`; returns the time reached. A further call goes on from there."""
        ...

    def stop(self) -> None:
        """End `run` after the datagram, timer or call being handled now."""
        ...


class Repeated:
    """A call that is made at a fixed interval until stopped. A late call does not delay the calls after it; calls missed meanwhile are left out."""

    def __init__(self, driver: Driver[Any], interval_s: float, action: Callable[[], object]) -> None:
        self._driver = driver
        self._interval_s = interval_s
        self._action = action
        self._due = driver.now + interval_s
        self._call: Call | None = driver.call_at(self._due, self._make)

    def _make(self) -> None:
        try:
            self._action()
        finally:
            if self._call is not None:
                missed = max(0, int((self._driver.now - self._due) / self._interval_s))
                self._due += self._interval_s * (missed + 1)
                self._call = self._driver.call_at(self._due, self._make)

    def stop(self) -> None:
        """No more calls."""
        if self._call is not None:
            self._call.cancel()
            self._call = None
