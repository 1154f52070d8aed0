"""The live driver: one event loop that runs many nodes over UDP, each on a socket of its own.

A round: wait until something arrives or a deadline comes; read every ready socket, up to a batch each, into one buffer; send what the
nodes have to say; only then run the timers that were due when the round began. A loop that was stopped for seconds therefore hears the
answers waiting in its sockets before it can take anybody for silent.

The driver drives any `sllm.protocol.node.Node`; it knows no role. What a node tells (events) goes to the `bus`.

No datagram and no timer can end the loop: an exception while a node hears, wakes or speaks is noted (`sllm.live.internal_errors`) and dropped with what was
being handled.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from types import TracebackType

from sllm.live.clock import Clock
from sllm.live.host import UdpHost
from sllm.live.internal_errors import InternalErrors
from sllm.live.poller import READ, WRITE, make_poller
from sllm.live.receiving import Inlet, Receiver
from sllm.live.routes import NameResolver, Routes
from sllm.live.sending import Sender
from sllm.live.sockets import bound_socket
from sllm.protocol.bus import EventBus
from sllm.protocol.driver import Call, Repeated
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.protocol.timers import Timers

UPLINKS_OPEN = 2  # uplinks of a host: the one that datagrams leave through, and the one before, through which answers may still come
CATCH_UP_WALL_S = 0.25  # a socket that stays full may hold back its node's timers for this time
IDLE_WALL_S = 0.5  # the loop turns at least once in this time: its heartbeat
FINE_WALL_S = 0.002  # shorter waits of a sped-up run do not use epoll, whose milliseconds are too coarse for it
TIMER_PAUSE_WALL_S = 0.1  # least time until a timer that raised an exception is tried again


class UdpDriver:
    """An event loop for nodes (`sllm.protocol.driver`). Not thread-safe: everything but `stop` belongs to the thread that runs it.

    `survive`: observers, readers and calls may raise without ending the loop, as nodes may anyway; for processes that serve others. UsageError ends it
    all the same.
    """

    def __init__(self, clock: Clock, *, resolver: NameResolver | None = None, survive: bool = False) -> None:
        self.clock = clock
        self.bus = EventBus()
        self.survive = survive
        self.hosts: dict[int, UdpHost] = {}
        self.heartbeat = time.monotonic()  # of the last round
        self._poller, self._poll = make_poller()
        self._errors = InternalErrors(self.bus, lambda: clock.now)
        self._receiver = Receiver(self._errors)
        self._sender = Sender(self._poller, self._errors)
        self._readers: dict[int, Callable[[], object]] = {}
        self._inlets: dict[int, tuple[UdpHost, Inlet]] = {}
        self._timers: Timers[UdpHost] = Timers()
        self._calls: list[tuple[float, int, Call]] = []
        self._count = 0
        self._routes = {family: Routes(family, self._call_after_wall) for family in (socket.AF_INET, socket.AF_INET6)}
        self.resolve_with(resolver)
        self._stopped = False
        self._closed = False

    @property
    def now(self) -> float:
        """The run's clock, as of this round."""
        return self.clock.now

    # --- counters -------------------------------------------------------------------------------------------------------------------

    @property
    def received(self) -> int:
        return self._receiver.received

    @property
    def receive_errors(self) -> Counter[str]:
        return self._receiver.errors

    @property
    def sent(self) -> int:
        return self._sender.sent

    @property
    def sends_deferred(self) -> int:
        """Datagrams that waited for room in a send buffer."""
        return self._sender.deferred

    @property
    def send_errors(self) -> Counter[str]:
        """Datagrams not sent, by reason."""
        return self._sender.errors

    @property
    def internal_errors(self) -> Counter[str]:
        """Exceptions of our own, by file and line."""
        return self._errors.counts

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
        inlet = Inlet(bound_socket(bind, receive_buffer_bytes, setting), self._receiver, count_drops=count_drops)
        self._count += 1
        host = UdpHost(self, node, self._count, inlet, self._routes[socket.AddressFamily(inlet.socket.family)])
        self.hosts[host.index] = host
        self._watch(host, inlet)
        if uplink:
            self.open_uplink(host)
        self.take_output(host)
        return host

    def remove(self, host: UdpHost) -> None:
        """Close the host's sockets and forget its node. Its last datagrams are on their way already."""
        if self.hosts.pop(host.index, None) is None:
            return
        self._timers.cancel(host)
        for inlet in host.inlets:
            self._unwatch(inlet)

    def open_uplink(self, host: UdpHost) -> None:
        """Give the host another uplink; see `UdpHost.renew_uplink`."""
        fresh = bound_socket((host.address[0], 0))
        if len(host.inlets) == UPLINKS_OPEN + 1:
            self._unwatch(host.inlets.pop(1))
        host.uplink = fresh
        self._watch(host, Inlet(fresh, self._receiver))

    def _watch(self, host: UdpHost, inlet: Inlet) -> None:
        fd = inlet.socket.fileno()
        host.inlets.append(inlet)
        self._inlets[fd] = (host, inlet)
        self._poller.register(fd, READ)

    def _unwatch(self, inlet: Inlet) -> None:
        fd = inlet.socket.fileno()
        del self._inlets[fd]
        self._poller.unregister(fd)
        inlet.socket.close()

    # --- other things the loop watches ------------------------------------------------------------------------------------------------

    def resolve_with(self, resolver: NameResolver | None) -> None:
        """Use this resolver for names; None: datagrams to names are not sent."""
        for routes in self._routes.values():
            routes.resolver = resolver

    def add_reader(self, fd: int, callback: Callable[[], object]) -> None:
        """Call `callback` when `fd` has something to read: signals, answers from other threads."""
        self._readers[fd] = callback
        self._poller.register(fd, READ)

    def remove_reader(self, fd: int) -> None:
        if self._readers.pop(fd, None) is not None:
            self._poller.unregister(fd)

    def call_at(self, at: float, action: Callable[[], object]) -> Call:
        """Call action() once at `at` of the run's clock. Calls of the same time keep their order."""
        call = Call(action)
        self._count += 1
        heappush(self._calls, (at, self._count, call))
        return call

    def every(self, interval_s: float, action: Callable[[], object]) -> Callable[[], None]:
        """Call action() every `interval_s` of the run's clock, first after one interval; a late call does not delay the calls after it, and missed calls are
        left out. Returns a function that ends the calls."""
        return Repeated(self, interval_s, action).stop

    def cancel(self, call: Call) -> None:
        """Do not make the call. Nothing happens if it has been made already."""
        call.cancel()

    def _call_after_wall(self, wall_s: float, action: Callable[[], object]) -> Call:
        return self.call_at(self.clock.now + wall_s * self.clock.speedup, action)

    # --- running --------------------------------------------------------------------------------------------------------------------

    def run(self, until: float = inf) -> float:
        """Turn until everything up to and including `until` of the run's clock has happened, or `stop` was called. Returns the time reached."""
        self._stopped = False
        reached = -inf
        while not self._stopped and reached < until:
            reached = self.step(min(IDLE_WALL_S, max(0.0, (until - self.clock.now) / self.clock.speedup)))
        return self.clock.now

    def run_until(self, done: Callable[[], bool]) -> None:
        """Turn until `done()` is true or `stop` was called."""
        self._stopped = False
        while not self._stopped and not done():
            self.step()

    def stop(self) -> None:
        """`run` and `run_until` return after the round at hand."""
        self._stopped = True

    def step(self, timeout_s: float = IDLE_WALL_S) -> float:
        """One round; waits at most `timeout_s` wall seconds. Returns the time of the run's clock up to which everything due has happened."""
        wait_s = self._wait_s(timeout_s)
        ready = self._wait(wait_s)
        self.heartbeat = time.monotonic()
        clock = self.clock
        began = now = clock.advance(wait_s * clock.speedup)
        exact = clock.step_max_s is None  # the real clock may be read as often as we like; a bounded one steps once a round
        inlets = self._inlets
        for fd, mask in ready:
            entry = inlets.get(fd)
            if entry is None:
                self._read_other(fd)
                continue
            host, inlet = entry
            if mask & WRITE:
                self._sender.send_backlog(host)
            if mask & ~WRITE:
                if exact:
                    now = clock.advance()
                inlet.read(host.node, now, self.heartbeat)
                self.take_output(host)
        if exact:
            now = clock.advance()
        self._run_timers(began, now)
        self._make_calls(began)
        return began

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

    def _read_other(self, fd: int) -> None:
        reader = self._readers.get(fd)
        if reader is not None:
            self._attempt("what a file brought", reader)

    def take_output(self, host: UdpHost) -> None:
        """Send what the node has to say, tell what happened, note when it wants to be called. A node with an uplink may tell of what renews it, and what it
        says then must leave through the new one."""
        node = host.node
        while node.outbox or node.events:
            if node.events and host.uplink is not None:
                self._tell(node)
            if node.outbox:
                self._sender.send(host)
            if node.events:
                self._tell(node)
        at = node.wake_at
        if at < host.rest_until:
            at = host.rest_until
        if at != host.due_at and host.index in self.hosts:
            if at < inf:
                self._timers.set(host, at)
            else:
                self._timers.cancel(host)

    def wake(self, host: UdpHost, now: float) -> None:
        """Let the host's node do what is due, then send, tell and reschedule. A node that raises is let be for a while."""
        try:
            host.node.handle_timer(now)
        except Exception as error:
            self._errors.note("a timer", error, host.node)
            host.rest_until = now + TIMER_PAUSE_WALL_S * self.clock.speedup
        self.take_output(host)

    def _tell(self, node: Node) -> None:
        events = node.events[:]
        node.events.clear()
        self.bus.publish(node, events, self._on_handler_error)

    def _run_timers(self, began: float, now: float) -> None:
        """Those that were due when the round began."""
        timers = self._timers
        due: list[UdpHost] = []
        while (host := timers.pop_due(began)) is not None:
            due.append(host)
        for host in due:
            if host.index not in self.hosts:
                continue
            full_since_s = host.full_since_s
            if full_since_s is not None and self.heartbeat - full_since_s < CATCH_UP_WALL_S:
                timers.set(host, now)  # its answer may still be in the socket: first finish reading
                continue
            self.wake(host, now)

    def _make_calls(self, began: float) -> None:
        """Those that were due when the round began, and were asked for before."""
        calls, due = self._calls, []
        while calls and calls[0][0] <= began:
            due.append(heappop(calls)[2])
        for call in due:
            self._attempt("a call", call.make)

    # --- what must not end the loop ---------------------------------------------------------------------------------------------------

    def _attempt(self, what: str, callback: Callable[[], object]) -> None:
        """Call a function that belongs to no node. Its exceptions end the loop, unless `survive` is set."""
        try:
            callback()
        except Exception as error:
            self._bear(what, error, next((host.node for host in self.hosts.values()), None))

    def _on_handler_error(self, error: Exception) -> None:
        """A handler of an event has raised. No event is told about that, because its handler might be the one that raised."""
        self._bear("an event", error, None)

    def _bear(self, what: str, error: Exception, node: Node | None) -> None:
        """Go on after an exception, or raise it again."""
        if not self.survive or isinstance(error, UsageError):
            raise error
        self._errors.note(what, error, node)
