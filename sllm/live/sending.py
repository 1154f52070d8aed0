"""Sends datagrams, and keeps datagrams for which a send buffer has no room."""

from __future__ import annotations

import socket
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING

from sllm.live.internal_errors import InternalErrors, reason_of
from sllm.live.poller import READ, WRITE, Poller
from sllm.live.routes import SockAddr

if TYPE_CHECKING:
    from sllm.live.host import UdpHost

BACKLOG_MAX = 10_000  # datagrams kept for a host whose send buffer is full

Backlog = deque[tuple[socket.socket, bytes, SockAddr]]


class Sender:
    """Sends for every host of a driver. A datagram that cannot be sent is counted by reason and lost, as any datagram may be."""

    def __init__(self, poller: Poller, internal: InternalErrors) -> None:
        self.sent = 0
        self.deferred = 0  # datagrams that were kept, because the send buffer was full, and sent later
        self.errors: Counter[str] = Counter()  # datagrams not sent, by reason
        self._poller = poller
        self._internal = internal

    def send(self, host: UdpHost) -> None:
        """Send the outbox of the host's node; datagrams for the coordinator leave through the uplink, if the host has one."""
        routes, uplinked = host.routes, host.uplinked
        known, coordinator = routes.known, uplinked.coordinator if uplinked is not None else None
        for data, addr in host.node.datagrams_to_send(partial(self._internal.note, "a message to send", node=host.node)):
            target = known.get(addr) or routes.find(addr)
            if target is None:
                self.errors["unresolved"] += 1
                continue
            out = host.uplink if addr == coordinator and host.uplink is not None else host.socket
            if host.backlog or not self._try(out, data, target):
                self._defer(host, out, data, target)

    def _try(self, sock: socket.socket, data: bytes, target: SockAddr) -> bool:
        """False if there is no room in the send buffer."""
        try:
            sock.sendto(data, target)
            self.sent += 1
        except BlockingIOError:
            return False
        except Exception as error:  # unreachable, refused by a firewall, too long, no address at all
            self.errors[reason_of(error)] += 1
        return True

    def _defer(self, host: UdpHost, sock: socket.socket, data: bytes, target: SockAddr) -> None:
        """Keep the datagram until there is room."""
        if len(host.backlog) >= BACKLOG_MAX:
            self.errors["backlog_full"] += 1
            return
        host.backlog.append((sock, data, target))
        self.deferred += 1
        if sock.fileno() >= 0:
            self._poller.modify(sock.fileno(), READ | WRITE)

    def send_backlog(self, host: UdpHost) -> None:
        """The send buffer has room again: send kept datagrams until it is full."""
        backlog = host.backlog
        while backlog:
            sock, data, target = backlog[0]
            if sock.fileno() < 0:
                self.errors["socket_renewed"] += 1
            elif not self._try(sock, data, target):
                self._poller.modify(sock.fileno(), READ | WRITE)
                return
            backlog.popleft()
        for inlet in host.inlets:
            self._poller.modify(inlet.socket.fileno(), READ)
