"""What a driver of nodes offers, live and in virtual time alike: time, calls at a time, nodes to drive, and the bus on which their events travel.

`sllm.virtual.world.World` and `sllm.live.udp.UdpDriver` are the two drivers. They differ in what else they can do, and in the further parameters of `add`;
whatever is written against `Driver` runs on both.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Protocol, TypeVar

from sllm.protocol.bus import EventBus
from sllm.protocol.messages import Address
from sllm.protocol.node import Node


class Handle(Protocol):
    """A node that a driver drives, and where it is heard."""

    address: Address

    @property
    def node(self) -> Node | None:
        """The node; None while its machine is down."""
        ...

    def touch(self) -> None:
        """Send what the node wants to send, tell what it has told and note when it wants to wake. To be called after something other than the driver has
        talked to the node."""
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
        """The call is not made. Nothing happens if it has been made."""
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
        """Drive this node, which is heard at `address`; the handle says at which address it really is."""
        ...

    def remove(self, handle: H, /) -> None:
        """Forget the node. What it has sent is on its way; what is on its way to it is lost."""
        ...

    def call_at(self, at: float, action: Callable[[], object]) -> Call:
        """Call action() at `at`, or as soon as possible if that is past. Calls of the same time are made in the order in which they were asked for."""
        ...

    def every(self, interval_s: float, action: Callable[[], object]) -> Callable[[], None]:
        """Call action() every `interval_s`, first after one interval. Returns what stops it."""
        ...

    def cancel(self, call: Call) -> None:
        """The call is not made. Nothing happens if it has been made."""
        ...

    def run(self, until: float = inf) -> float:
        """Let happen what happens up to and including `until`, or until `stop`; returns the time reached. Can be called again to go on."""
        ...

    def stop(self) -> None:
        """End `run` after what is happening now."""
        ...


class Repeated:
    """A call that is made again and again until it is stopped. A late one does not make the next ones late; those missed meanwhile are left out."""

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
