"""A node that is driven live, and its sockets."""

from __future__ import annotations

import socket
from collections import deque
from math import inf
from typing import TYPE_CHECKING

from sllm.live.receiving import Inlet
from sllm.live.routes import Routes
from sllm.live.sending import Backlog
from sllm.protocol.capabilities import HasCoordinator, capable
from sllm.protocol.messages import Address
from sllm.protocol.node import Node

if TYPE_CHECKING:
    from sllm.live.udp import UdpDriver


class UdpHost:
    """One node and its sockets. Made by `UdpDriver.add`."""

    __slots__ = (
        "_driver", "address", "backlog", "due_at", "entry_at", "index", "inlet", "inlets", "node", "receive_buffer_bytes", "rest_until", "routes",
        "socket", "uplink", "uplinked",
    )  # fmt: skip

    def __init__(self, driver: UdpDriver, node: Node, index: int, inlet: Inlet, routes: Routes) -> None:
        self._driver = driver
        self.index = index
        self.inlet = inlet  # the inlet of the socket at `address`
        self.inlets: list[Inlet] = []  # the inlets of all open sockets
        self.socket = sock = inlet.socket
        self.uplink: socket.socket | None = None  # what leaves for the coordinator leaves through this one
        self.address: Address = sock.getsockname()[:2]
        self.receive_buffer_bytes: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)  # effective; the kernel's overhead included
        self.due_at = self.entry_at = inf  # of its timer
        self.rest_until = -inf  # no timer runs before this time, because the last timer raised an exception
        self.backlog: Backlog = deque()
        self.routes = routes
        self.adopt(node)

    def adopt(self, node: Node) -> None:
        """Drive this node from now on. A node that must know its address before it can be made takes the place of another, with which the host was added."""
        self.node = node
        self.uplinked = capable(node, HasCoordinator)

    @property
    def kernel_drops(self) -> int:
        """Datagrams the kernel threw away because the receive buffer was full; counted only if that was asked for."""
        return self.inlet.kernel_drops

    @property
    def full_since_s(self) -> float | None:
        """Since when more has been waiting in one of its sockets than is read in one go; None if in none."""
        return min((inlet.full_since_s for inlet in self.inlets if inlet.full_since_s is not None), default=None)

    def read_clock(self) -> float:
        """The time to hand to the node now: what the run's clock shows."""
        return self._driver.now

    def wake(self) -> None:
        """Let the node do what is due, as at its deadline."""
        self._driver.wake(self, self._driver.now)

    def touch(self) -> None:
        """Send, tell and reschedule: to be called after using the node from outside of the driver."""
        self._driver.take_output(self)

    def renew_uplink(self) -> None:
        """Open another uplink: a new source port gets past stale NAT entries. The one before is heard until the next renewal. UsageError, and the present one
        stays, when no other is to be had."""
        self._driver.open_uplink(self)
