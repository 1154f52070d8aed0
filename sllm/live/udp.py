"""The live driver: one event loop that runs many nodes over UDP, each on a socket of its own.

A round: wait until something arrives or a deadline comes; read every ready socket, up to a batch each, into one buffer; send what the
nodes have to say; only then run the timers that were due when the round began. A loop that was stopped for seconds therefore hears the
answers waiting in its sockets before it can take anybody for silent.

The driver drives any `sllm.protocol.node.Node`; it knows no role. What a node tells (events) goes to the `observer`.

No datagram and no timer can end the loop. An exception while a node hears, wakes or speaks is a bug of ours: it is counted by the place that raised it,
told once for each place (`InternalErrorCaught`), and dropped with what was being handled.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Protocol

from sllm.live.clock import Clock
from sllm.live.sockets import bound_socket, literal_address
from sllm.protocol.errors import UsageError
from sllm.protocol.events import Event, InternalErrorCaught
from sllm.protocol.limits import DATAGRAM_MAX_BYTES
from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.protocol.timers import Timers

BATCH = 64  # datagrams read from one socket before the next has its turn
SO_RXQ_OVFL = 40  # Linux: each datagram brings the number the socket has dropped so far
CATCH_UP_WALL_S = 0.25  # a socket that stays full may hold back its node's timers for so long
BACKLOG_MAX = 10_000  # datagrams kept for a socket whose send buffer is full
ROUTES_MAX = 200_000  # destinations remembered; then the table starts anew
NAME_KEEP_WALL_S = 30.0  # a destination's name is looked up again after so long
IDLE_WALL_S = 0.5  # the loop turns at least so often: its heartbeat
FINE_WALL_S = 0.002  # shorter waits of a sped-up run do not use epoll, whose milliseconds are too coarse for it
TIMER_PAUSE_WALL_S = 0.1  # a timer that raised is tried again after so long, however soon the node would have it
TRACE_MAX = 20  # innermost frames of an exception that are told
READ, WRITE = 1, 4  # EPOLLIN and EPOLLOUT; the same numbers as POLLIN and POLLOUT

SockAddr = tuple[str, int]
Observer = Callable[[Node, Event], None]
Callback = Callable[[], None]


class NameResolver(Protocol):
    """Looks names up without blocking; see `sllm.live.resolve`."""

    def resolve(self, name: str, answer: Callable[[str | None], None]) -> None: ...


class Poller(Protocol):
    """What `select.epoll` and `select.poll` have in common."""

    def register(self, fd: int, mask: int) -> None: ...
    def modify(self, fd: int, mask: int) -> None: ...
    def unregister(self, fd: int) -> None: ...


class UdpHost:
    """One node and its sockets. Made by `UdpDriver.add`."""

    __slots__ = (
        "address", "backlog", "batch", "count_drops", "driver", "due_at", "entry_at", "full_since_s", "index", "kernel_drops", "node",
        "old_uplink", "receive_buffer_bytes", "rest_until", "routes", "socket", "uplink",
    )  # fmt: skip

    def __init__(self, driver: UdpDriver, node: Node, index: int, sock: socket.socket, *, count_drops: bool) -> None:
        self.driver = driver
        self.node = node
        self.index = index
        self.socket = sock
        self.uplink: socket.socket | None = None
        self.old_uplink: socket.socket | None = None  # the one before: nothing leaves through it, but answers may still come
        self.address: Address = sock.getsockname()[:2]
        self.receive_buffer_bytes: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)  # effective; the kernel's overhead included
        self.count_drops = count_drops
        self.kernel_drops = 0  # datagrams the kernel threw away because the receive buffer was full; only with count_drops
        self.batch = BATCH if count_drops else 1
        self.due_at = self.entry_at = inf  # of its timer
        self.rest_until = -inf  # no timer before: the last one raised
        self.full_since_s: float | None = None
        self.backlog: deque[tuple[socket.socket, bytes, SockAddr]] = deque()
        self.routes = driver._routes[sock.family]

    def touch(self) -> None:
        """Send, tell and reschedule: to be called after using the node from outside of the driver."""
        self.driver._settle(self)

    def renew_uplink(self) -> None:
        """Open another uplink: a new source port gets past stale NAT entries. The one before is heard until the next renewal. UsageError, and the present one
        stays, when no other is to be had."""
        self.driver._open_uplink(self)


class UdpDriver:
    """An event loop for nodes. Not thread-safe: everything but `stop` belongs to the thread that runs it.

    `survive`: observers, readers and calls may raise without ending the loop, as nodes may anyway; for processes that serve others. UsageError ends it
    all the same.
    """

    def __init__(self, clock: Clock, observer: Observer | None = None, *, resolver: NameResolver | None = None, survive: bool = False) -> None:
        self.clock = clock
        self.observer = observer
        self.resolver = resolver
        self.survive = survive
        self.internal_errors: Counter[str] = Counter()  # exceptions of our own, by file and line
        self.hosts: dict[int, UdpHost] = {}
        self.heartbeat = time.monotonic()  # of the last round
        self.received = 0
        self.sent = 0
        self.sends_deferred = 0  # the send buffer was full: kept, and sent later
        self.send_errors: Counter[str] = Counter()  # datagrams not sent, by reason
        self.receive_errors: Counter[str] = Counter()
        self._poller, self._poll = _make_poller()
        self._readers: dict[int, Callback] = {}
        self._sockets: dict[int, tuple[UdpHost, socket.socket]] = {}
        self._timers: Timers[UdpHost] = Timers()
        self._calls: list[tuple[float, int, Callback]] = []
        self._cancelled: set[int] = set()
        self._count = 0
        self._routes: dict[int, dict[Address, SockAddr | None]] = {socket.AF_INET: {}, socket.AF_INET6: {}}
        self._buffer = bytearray(DATAGRAM_MAX_BYTES + 64)  # larger, so that a longer datagram is seen as too long and not cut to fit
        self._view = memoryview(self._buffer)
        self._stopped = False
        self._closed = False

    # --- nodes ----------------------------------------------------------------------------------------------------------------------

    def add(
        self,
        node: Node,
        bind: Address = ("127.0.0.1", 0),
        *,
        count_drops: bool = False,
        uplink: bool = False,
        receive_buffer_bytes: int = 0,
        setting: str = "",
    ) -> UdpHost:
        """Give `node` a socket bound to `bind` (port 0: any free one) and drive it. `count_drops`: count what the kernel drops.
        `uplink`: datagrams for `node.coordinator` leave through a second socket, see `UdpHost.renew_uplink`. `receive_buffer_bytes`: wanted
        size, 0 the system's default. UsageError, which names `setting` (a variable or flag), when the address cannot be had."""
        sock = bound_socket(bind, receive_buffer_bytes, setting)
        if count_drops:
            with contextlib.suppress(OSError):  # not Linux: drops stay uncounted
                sock.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
        self._count += 1
        host = UdpHost(self, node, self._count, sock, count_drops=count_drops)
        self.hosts[host.index] = host
        self._watch(host, sock)
        if uplink:
            self._open_uplink(host)
        self._settle(host)
        return host

    def remove(self, host: UdpHost) -> None:
        """Close the host's sockets and forget its node. Its last datagrams are on their way already."""
        if self.hosts.pop(host.index, None) is None:
            return
        self._timers.cancel(host)
        for sock in (host.socket, host.uplink, host.old_uplink):
            if sock is not None:
                self._unwatch(sock)

    def _open_uplink(self, host: UdpHost) -> None:
        fresh = bound_socket((host.address[0], 0))
        if host.old_uplink is not None:
            self._unwatch(host.old_uplink)
        host.old_uplink, host.uplink = host.uplink, fresh
        self._watch(host, fresh)

    def _watch(self, host: UdpHost, sock: socket.socket) -> None:
        self._sockets[sock.fileno()] = (host, sock)
        self._poller.register(sock.fileno(), READ)

    def _unwatch(self, sock: socket.socket) -> None:
        del self._sockets[sock.fileno()]
        self._poller.unregister(sock.fileno())
        sock.close()

    # --- other things the loop watches ------------------------------------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` when `fd` has something to read: signals, answers from other threads."""
        self._readers[fd] = callback
        self._poller.register(fd, READ)

    def remove_reader(self, fd: int) -> None:
        if self._readers.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def call_at(self, at: float, callback: Callback) -> int:
        """Call once at `at` of the run's clock. Calls of the same time keep their order. Returns a handle for `cancel`."""
        self._count += 1
        heappush(self._calls, (at, self._count, callback))
        return self._count

    def every(self, interval_s: float, callback: Callback) -> Callback:
        """Call each `interval_s` of the run's clock, first after one interval; a late call does not make the next ones late, those missed
        are left out. Returns what stops it."""
        handle = 0
        due = self.clock.now + interval_s

        def fire() -> None:
            nonlocal handle, due
            missed = max(0, int((self.clock.now - due) / interval_s))
            due += interval_s * (missed + 1)
            handle = self.call_at(due, fire)
            callback()

        handle = self.call_at(due, fire)
        return lambda: self.cancel(handle)

    def cancel(self, handle: int) -> None:
        """The call is not made. To be used on calls that are still to come."""
        self._cancelled.add(handle)

    # --- running --------------------------------------------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Turn until `until()` is true or `stop` was called."""
        self._stopped = False
        while not self._stopped and not (until is not None and until()):
            self.step()

    def stop(self) -> None:
        """`run` returns after the round at hand."""
        self._stopped = True

    def step(self, timeout_s: float = IDLE_WALL_S) -> None:
        """One round; waits at most `timeout_s` wall seconds."""
        wait_s = self._wait_s(timeout_s)
        ready = self._wait(wait_s)
        self.heartbeat = time.monotonic()
        clock = self.clock
        began = now = clock.advance(wait_s * clock.speedup)
        exact = clock.step_max_s is None  # the real clock may be read as often as we like; a bounded one steps once a round
        sockets = self._sockets
        for fd, mask in ready:
            entry = sockets.get(fd)
            if entry is None:
                reader = self._readers.get(fd)
                if reader is not None:
                    self.attempt("what a file brought", reader)
                continue
            host, sock = entry
            if mask & WRITE:
                self._send_backlog(host)
            if mask & ~WRITE:
                if exact:
                    now = clock.advance()
                self._receive(host, sock, now)
                self._settle(host)
        if exact:
            now = clock.advance()
        self._run_timers(began, now)

    def close(self) -> None:
        """Close every socket. The driver is of no use afterwards."""
        if self._closed:
            return
        self._closed = True
        for host in list(self.hosts.values()):
            self.remove(host)
        for fd in list(self._readers):
            self.remove_reader(fd)
        if hasattr(self._poller, "close"):
            self._poller.close()

    def __enter__(self) -> UdpDriver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- a round, part by part --------------------------------------------------------------------------------------------------------

    def _wait_s(self, timeout_s: float) -> float:
        """Wall seconds until the next deadline, at most `timeout_s`."""
        at = self._timers.earliest
        calls = self._calls
        if calls and calls[0][0] < at:
            at = calls[0][0]
        if at == inf:
            return timeout_s
        return min(timeout_s, max(0.0, (at - self.clock.now) / self.clock.speedup))

    def _wait(self, wait_s: float) -> list[tuple[int, int]]:
        """What is ready, at once or within `wait_s`. epoll waits whole milliseconds, rounded up: late by up to one, which a run sped up
        60 times would feel as 60 ms. There the rest is slept exactly; datagrams between nodes of this process are in their sockets before."""
        if self.clock.speedup <= 1.0:
            return self._poll(wait_s)
        if wait_s >= FINE_WALL_S:
            return self._poll(wait_s - FINE_WALL_S / 2)
        ready = self._poll(0.0)
        if not ready and wait_s > 0.0:
            time.sleep(wait_s)
            ready = self._poll(0.0)
        return ready

    def _receive(self, host: UdpHost, sock: socket.socket, now: float) -> None:
        """Read up to a batch and hand it to the node. The batch grows while the socket keeps filling it, so that a quiet node is not read
        twice for one datagram."""
        view, buffer, node = self._view, self._buffer, host.node
        hear = node.receive_datagram if sock.family == socket.AF_INET else partial(_hear_ipv6, node)
        receive = sock.recvfrom_into
        limit = host.batch
        count = 0
        try:
            if host.count_drops and sock is host.socket:  # the count is cumulative: once a batch is enough, and recvmsg costs more
                size, ancillary, _, addr = sock.recvmsg_into((buffer,), 64)
                count = 1
                if ancillary:
                    _note_drops(host, ancillary)
                try:
                    hear(view[:size], addr, now)
                except Exception as error:
                    self.note_error("a datagram", error, node)
            while count < limit:
                size, addr = receive(buffer)
                count += 1
                try:
                    hear(view[:size], addr, now)
                except Exception as error:
                    self.note_error("a datagram", error, node)
        except BlockingIOError:
            pass
        except OSError as error:  # the echo of a datagram nobody wanted (ICMP); the socket is none the worse for it
            self.receive_errors[_reason(error)] += 1
        self.received += count
        if count < limit:
            host.full_since_s = None
            if not host.count_drops:
                host.batch = max(1, count)
        else:
            host.batch = min(BATCH, limit * 2)
            if limit == BATCH and host.full_since_s is None:
                host.full_since_s = self.heartbeat

    def _settle(self, host: UdpHost) -> None:
        """Send what the node has to say, tell what happened, note when it wants to be called. A node with an uplink may tell of what renews it, and what it
        says then must leave through the new one."""
        node = host.node
        while node.outbox or node.events:
            if node.events and host.uplink is not None:
                self._tell(host)
            if node.outbox:
                self._send(host)
            if node.events:
                self._tell(host)
        at = node.wake_at
        if at < host.rest_until:
            at = host.rest_until
        if at != host.due_at and host.index in self.hosts:
            if at < inf:
                self._timers.set(host, at)
            else:
                self._timers.cancel(host)

    def _tell(self, host: UdpHost) -> None:
        node = host.node
        events = node.events[:]
        node.events.clear()
        if self.observer is None:
            return
        for event in events:
            try:
                self.observer(node, event)
            except Exception as error:
                if not self.survive or isinstance(error, UsageError):
                    raise
                self.note_error("an event", error)

    def _run_timers(self, began: float, now: float) -> None:
        """Everything that was due when the round began."""
        timers = self._timers
        due: list[UdpHost] = []
        while (host := timers.pop_due(began)) is not None:
            due.append(host)
        for host in due:
            if host.index not in self.hosts:
                continue
            if host.full_since_s is not None and self.heartbeat - host.full_since_s < CATCH_UP_WALL_S:
                timers.set(host, now)  # its answer may still be in the socket: first finish reading
                continue
            try:
                host.node.handle_timer(now)
            except Exception as error:
                self.note_error("a timer", error, host.node)
                host.rest_until = now + TIMER_PAUSE_WALL_S * self.clock.speedup
            self._settle(host)
        calls = self._calls
        pending: list[tuple[int, Callback]] = []
        while calls and calls[0][0] <= began:
            _, handle, callback = heappop(calls)
            pending.append((handle, callback))
        for handle, callback in pending:
            if handle in self._cancelled:
                self._cancelled.discard(handle)
            else:
                self.attempt("a call", callback)

    # --- what must not end the loop ---------------------------------------------------------------------------------------------------

    def note_error(self, what: str, error: Exception, node: Node | None = None) -> None:
        """Count an exception that is our own fault; tell the observer of the first from each place. `what` was being handled, and is dropped."""
        place = place_of(error)
        self.internal_errors[place] += 1
        if node is not None and self.observer is not None and self.internal_errors[place] == 1:
            trace = "".join(traceback.format_exception(error, limit=-TRACE_MAX)).rstrip()
            self.observer(node, InternalErrorCaught(self.clock.now, node.node_id, place, what, f"{type(error).__name__}: {error}", trace))

    def attempt(self, what: str, callback: Callback) -> None:
        """Call back something beside the nodes. What it raises ends the loop unless `survive` says otherwise."""
        try:
            callback()
        except Exception as error:
            if not self.survive or isinstance(error, UsageError):
                raise
            self.note_error(what, error, next((host.node for host in self.hosts.values()), None))

    # --- sending --------------------------------------------------------------------------------------------------------------------

    def _send(self, host: UdpHost) -> None:
        routes = host.routes
        sock = host.socket
        coordinator = getattr(host.node, "coordinator", None) if host.uplink is not None else None
        sent = 0
        unsendable = partial(self.note_error, "a message to send", node=host.node)
        for data, addr in host.node.datagrams_to_send(unsendable):
            target = routes.get(addr) or self._route(host, addr)
            if target is None:
                self.send_errors["unresolved"] += 1
                continue
            out = host.uplink if addr == coordinator and host.uplink is not None else sock
            if host.backlog:
                self._defer(host, out, data, target)
                continue
            try:
                out.sendto(data, target)
                sent += 1
            except BlockingIOError:
                self._defer(host, out, data, target)
            except Exception as error:  # unreachable, refused by a firewall, too long, no address at all: lost like any datagram, but counted
                self.send_errors[_reason(error)] += 1
        self.sent += sent

    def _defer(self, host: UdpHost, sock: socket.socket, data: bytes, target: SockAddr) -> None:
        """The send buffer is full: keep the datagram until there is room."""
        if len(host.backlog) >= BACKLOG_MAX:
            self.send_errors["backlog_full"] += 1
            return
        host.backlog.append((sock, data, target))
        self.sends_deferred += 1
        if sock.fileno() >= 0:
            self._poller.modify(sock.fileno(), READ | WRITE)

    def _send_backlog(self, host: UdpHost) -> None:
        backlog = host.backlog
        while backlog:
            sock, data, target = backlog[0]
            if sock.fileno() < 0:
                self.send_errors["socket_renewed"] += 1
            else:
                try:
                    sock.sendto(data, target)
                    self.sent += 1
                except BlockingIOError:
                    self._poller.modify(sock.fileno(), READ | WRITE)
                    return
                except Exception as error:
                    self.send_errors[_reason(error)] += 1
            backlog.popleft()
        for sock_ in (host.socket, host.uplink, host.old_uplink):
            if sock_ is not None:
                self._poller.modify(sock_.fileno(), READ)

    def _route(self, host: UdpHost, addr: Address) -> SockAddr | None:
        """The socket address for `addr`, or None while its name is looked up or when it has none. Never blocks."""
        routes = host.routes
        if addr in routes:
            return routes[addr]
        if len(routes) >= ROUTES_MAX:
            routes.clear()
        name, port = addr
        family = host.socket.family
        literal = literal_address(name, family)
        if literal is not None and 0 < port < 65536:
            routes[addr] = (literal, port)
            return routes[addr]
        routes[addr] = None
        if self.resolver is not None and name and literal is None:
            self.resolver.resolve(name, partial(self._resolved, routes, addr, family))
        return None

    def _resolved(self, routes: dict[Address, SockAddr | None], addr: Address, family: int, answer: str | None) -> None:
        literal = literal_address(answer, family) if answer else None
        keep_wall_s = NAME_KEEP_WALL_S if literal else 1.0
        routes[addr] = (literal, addr[1]) if literal else None
        self.call_at(self.clock.now + keep_wall_s * self.clock.speedup, lambda: routes.pop(addr, None) and None)


def _note_drops(host: UdpHost, ancillary: list[tuple[int, int, bytes]]) -> None:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == SO_RXQ_OVFL and len(data) >= 4:
            (total,) = struct.unpack("=I", data[:4])
            host.kernel_drops += (total - host.kernel_drops) % 2**32  # the kernel's counter has 32 bits


def _hear_ipv6(node: Node, data: memoryview, addr: tuple[str, int, int, int], now: float) -> None:
    """Without flow and scope, and IPv4 peers by their own address: that is how a node compares and passes on addresses."""
    node.receive_datagram(data, (addr[0].removeprefix("::ffff:"), addr[1]), now)


def _reason(error: Exception) -> str:
    """A name for what went wrong with a socket: the system's, or that of the exception."""
    return errno.errorcode.get(error.errno or 0, "EUNKNOWN").lower() if isinstance(error, OSError) else type(error).__name__.lower()


def place_of(error: BaseException) -> str:
    """Where an exception was raised, as file and line: "fleet.py:120"."""
    place = "unknown"
    for frame, line in traceback.walk_tb(error.__traceback__):
        place = f"{Path(frame.f_code.co_filename).name}:{line}"
    return place


def _make_poller() -> tuple[Poller, Callable[[float], list[tuple[int, int]]]]:
    """epoll where there is one, else poll; both with a timeout in seconds."""
    if hasattr(select, "epoll"):
        epoll = select.epoll()
        return epoll, lambda timeout_s: epoll.poll(timeout_s, 4096)
    poll = select.poll()
    return poll, lambda timeout_s: poll.poll(-(-timeout_s * 1000 // 1))
