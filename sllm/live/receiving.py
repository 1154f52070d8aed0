"""Reading sockets: a batch of datagrams at a time, each handed to the node of the socket."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import Counter
from functools import partial
from typing import Any

from sllm.live.internal_errors import InternalErrors, reason_of
from sllm.protocol.limits import DATAGRAM_MAX_BYTES
from sllm.protocol.node import Node

BATCH = 64  # datagrams read from one socket before the next socket is read
SO_RXQ_OVFL = 40  # Linux: each datagram brings the number of datagrams that the socket has dropped so far
ANCILLARY_BYTES = 64  # room for that number


class Receiver:
    """The buffer that datagrams are read into, and the counters; shared by all sockets of one driver."""

    def __init__(self, errors: InternalErrors) -> None:
        self.buffer = bytearray(DATAGRAM_MAX_BYTES + 64)  # larger, so that a longer datagram is seen as too long and not cut to fit
        self.view = memoryview(self.buffer)
        self.internal = errors
        self.received = 0
        self.errors: Counter[str] = Counter()  # by reason


class Inlet:
    """A socket through which a node receives, and the number of datagrams that are read from the socket in one round.

    The batch grows while the socket keeps filling it, so that a quiet socket is not read twice for one datagram. A socket whose drops are counted has full
    batches always: the count is cumulative, so the first datagram of a batch brings it, read the dearer way.
    """

    __slots__ = ("_counts_drops", "_receiver", "batch", "full_since_s", "kernel_drops", "socket")

    def __init__(self, sock: socket.socket, receiver: Receiver, *, count_drops: bool = False) -> None:
        self.socket = sock
        self.batch = BATCH if count_drops else 1
        self.full_since_s: float | None = None  # since this time every batch was full and of the largest size
        self.kernel_drops = 0  # datagrams the kernel threw away because the receive buffer was full; only with count_drops
        self._receiver = receiver
        self._counts_drops = count_drops
        if count_drops:
            with contextlib.suppress(OSError):  # not Linux: drops stay uncounted
                sock.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)

    def read(self, node: Node, now: float, round_s: float) -> None:
        """Read up to a batch of datagrams and hand them to the node. `round_s`: when this round of the loop began."""
        receiver, limit, count = self._receiver, self.batch, 0
        view, buffer, plain = receiver.view, receiver.buffer, self.socket.recvfrom_into
        hear = node.receive_datagram if self.socket.family == socket.AF_INET else partial(_hear_ipv6, node)
        receive: Any = self._receive_counting_drops if self._counts_drops else plain
        try:
            while count < limit:
                size, addr = receive(buffer)
                receive = plain
                count += 1
                try:
                    hear(view[:size], addr, now)
                except Exception as error:
                    receiver.internal.note("a datagram", error, node)
        except BlockingIOError:
            pass
        except OSError as error:  # ICMP has reported that an earlier datagram was not delivered; the socket still works
            receiver.errors[reason_of(error)] += 1
        receiver.received += count
        self._adapt(count, limit, round_s)

    def _adapt(self, count: int, limit: int, round_s: float) -> None:
        """Choose the size of the next batch by the number of datagrams in this one."""
        if count < limit:
            self.full_since_s = None
            if not self._counts_drops:
                self.batch = max(1, count)
        else:
            self.batch = min(BATCH, limit * 2)
            if limit == BATCH and self.full_since_s is None:
                self.full_since_s = round_s

    def _receive_counting_drops(self, buffer: bytearray) -> tuple[int, Any]:
        size, ancillary, _, addr = self.socket.recvmsg_into((buffer,), ANCILLARY_BYTES)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == SO_RXQ_OVFL and len(data) >= 4:
                (total,) = struct.unpack("=I", data[:4])
                self.kernel_drops += (total - self.kernel_drops) % 2**32  # the kernel's counter has 32 bits
        return size, addr


def _hear_ipv6(node: Node, data: memoryview, addr: tuple[str, int, int, int], now: float) -> None:
    """An address in the form in which nodes compare and pass on addresses: without flow and scope, and mapped IPv4 addresses as IPv4."""
    node.receive_datagram(data, (addr[0].removeprefix("::ffff:"), addr[1]), now)
