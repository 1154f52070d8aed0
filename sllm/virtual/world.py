"""The world of virtual time: one heap of what will happen, the hosts it happens to, and the network between them.

It drives any `sllm.protocol.node.Node` and knows no role. Messages travel as envelopes, or as signed bytes with `wire=True`; the run is the same.
Things that happen at the same moment happen in the order in which they were scheduled, so a seed gives one run, whatever PYTHONHASHSEED is.

An entry of the heap carries what it is for: a host a datagram comes to, the alarm of a host, a feed of arrivals, a call. What happens is in their classes
(`sllm.virtual.host`, `sllm.virtual.feed`, `sllm.virtual.target`), and how datagrams get from host to host in `sllm.virtual.carrier`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import chain, count
from typing import Any, TypeVar

from sllm.protocol.bus import EventBus
from sllm.protocol.driver import Call, Repeated
from sllm.protocol.messages import Address, Message
from sllm.protocol.node import Node
from sllm.protocol.seeds import rng_for
from sllm.virtual.carrier import Carrier, LinkCarrier, PlainCarrier
from sllm.virtual.datagram import kind_of
from sllm.virtual.feed import Feed
from sllm.virtual.host import INF, Host, MakeNode
from sllm.virtual.network import Network
from sllm.virtual.target import Calls, Target

T = TypeVar("T")

Entry = tuple[Any, ...]
"""(time, order, target, what, source): at its time target.happen(what, source) is called. No two entries have the same `order`: comparing them ends there."""


class Interrupted(BaseException):
    """The run was told to end: raised out of `World.run` between two things that happen, so that every node and every book is whole. No Exception, so
    that nobody takes it for an error of what was running."""


class World:
    """A simulation, and the driver of its nodes (`sllm.protocol.driver`): hosts, the network between them and what is to happen next.

    `bus` hears every event of every node, right after it happened.
    `lifecycle` lists callables (what, host): "crash" just before the node goes, "clock" just before the rate of its clock changes;
    "restart", "freeze", "thaw" and "zombie" just after.
    """

    def __init__(self, seed: int, network: Network, *, wire: bool = False) -> None:
        self.seed = seed
        self.network = network
        self.wire = wire
        self.now = 0.0
        self.bus = EventBus()
        self.hosts: dict[str, Host] = {}
        self.routes: dict[Address, Host] = {}
        self.lifecycle: list[Callable[[str, Host], None]] = []
        self.hear_spoiled: Callable[[Node, Callable[[], None]], None] = lambda node, hear: hear()  # a checker puts itself around it
        self.unsubmitted = 0  # fed items that found their host down
        self.order: Callable[[], int] = count(1).__next__  # the next number of an entry
        self.heap: list[Entry] = []
        self._lane: deque[Entry] = deque()  # datagrams under one constant latency: in order by themselves, no heap needed
        self._calls = Calls()
        self._end = Target()  # of the entries at which a run ends; their source is a number of their own
        self._stop = 0  # that of the entry at which the run under way stops; 0: it does not
        self._interrupt = 0  # the same for `interrupt`
        self.carrier: Carrier = LinkCarrier(self)
        network.rng = rng_for(seed, "network")
        network.on_change = self._choose_carrier
        self._choose_carrier()

    # --- nodes ------------------------------------------------------------------------------------------------------------------------

    def add(self, node: Node, address: Address, make_node: MakeNode | None = None) -> Host:
        """Put a node on a new host at `address`. `make_node` makes its next lives; without one it cannot restart."""
        if address[0] in self.hosts:
            raise ValueError(f"a host named {address[0]!r} is there already")
        host = Host(self, address, node, make_node)
        self.admit(host)
        host.touch()
        return host

    def admit(self, host: Host) -> None:
        """Let a host be reached at its address."""
        self.hosts[host.name] = self.routes[host.address] = host

    def remove(self, host: Host) -> None:
        """Take a host away for good. What it has sent is on its way; what is on its way to it is lost."""
        if self.hosts.get(host.name) is host:
            host.crash()
            del self.hosts[host.name], self.routes[host.address]

    def feed(
        self, host: Host, arrivals: Iterable[tuple[float, T]], submit: Callable[[T, float], object], ended: Callable[[], object] | None = None
    ) -> None:
        """At each time of `arrivals` (in order; a few are taken in advance, never all) call submit(item, now) on behalf of the host's node; after the last
        of them call ended()."""
        Feed(host, arrivals, submit, ended).await_next()

    # --- calls ------------------------------------------------------------------------------------------------------------------------

    def call_at(self, at: float, action: Callable[[], object]) -> Call:
        """Call action() at `at`, or now if that is past. If it talks to a node, touch() its host afterwards."""
        call = Call(action)
        self.push(max(at, self.now), self._calls, None, call)
        return call

    def every(self, interval_s: float, action: Callable[[], object]) -> Callable[[], None]:
        """Call action() every `interval_s` of simulated time, for progress and inspection: it costs nothing per event. Returns what stops it."""
        return Repeated(self, interval_s, action).stop

    def cancel(self, call: Call) -> None:
        """The call is not made. Nothing happens if it has been made."""
        call.cancel()

    # --- run --------------------------------------------------------------------------------------------------------------------------

    def push(self, at: float, target: Target, what: Any = None, source: Any = None) -> None:
        """Let target.happen(what, source) be called at `at`, which is not past."""
        heappush(self.heap, (at, self.order(), target, what, source))

    def run(self, until: float = INF) -> float:
        """Let everything up to and including `until` happen; returns the time reached. Can be called again to go on. Interrupted after `interrupt`."""
        heap, lane, end = self.heap, self._lane, self._end
        last, last_s = self.order(), max(until, self.now)
        self._stop = 0
        heappush(heap, (last_s, INF, end, None, last))
        while True:
            now, _, target, what, source = lane.popleft() if lane and lane[0] < heap[0] else heappop(heap)
            if target is end:
                if source == self._interrupt:
                    raise Interrupted
                if source in (last, self._stop):
                    break
                continue  # it was the end of a run that ended before
            self.now = now
            target.happen(what, source)
        if source == last and until < INF:
            self.now = last_s
        return self.now

    def stop(self) -> None:
        """End run() before anything else happens."""
        if not self._stop:
            self._stop = self.order()
            heappush(self.heap, (self.now, -1.0, self._end, None, self._stop))

    def interrupt(self) -> None:
        """End run() with Interrupted before anything else happens, or the next run() if none is under way. A signal's handler may call it at any time."""
        if not self._interrupt:
            self._interrupt = self.order()
            heappush(self.heap, (-INF, -1.0, self._end, None, self._interrupt))

    # --- the network ------------------------------------------------------------------------------------------------------------------

    def datagrams_pending(self) -> int:
        """Datagrams in the heap, the lane and in frozen hosts, counted one by one: to be held against the network's books."""
        return sum(1 for _ in self._pending())

    def pending_of(self, kind: type[Message]) -> int:
        """Messages of one kind among those, and those that a frozen host could not send yet."""
        unsent = (envelope for host in self.hosts.values() if host.node is not None for envelope, _ in host.node.outbox)
        return sum(kind_of(what) is kind for what in chain(self._pending(), unsent))

    def _pending(self) -> Iterator[Any]:
        """Datagrams on their way: nothing else in an entry has a `what`."""
        for _, _, _, what, _ in chain(self._lane, self.heap):
            if what is not None:
                yield what
        for host in self.hosts.values():
            yield from (what for what, source in host.held if not isinstance(source, Feed))

    def _choose_carrier(self) -> None:
        """The network has changed. What is in the lane keeps its time; the lane must stay in order, so it is emptied into the heap."""
        for entry in self._lane:
            heappush(self.heap, entry)
        self._lane.clear()
        latency_s = self.network.plain_latency_s
        self.carrier = LinkCarrier(self) if latency_s is None or self.wire else PlainCarrier(self, latency_s, self._lane)
