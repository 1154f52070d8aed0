"""The world of virtual time: one heap of future entries, the hosts, and the network between them.

It drives any `sllm.protocol.node.Node` and knows no role. Messages travel as envelopes, or as signed bytes with `wire=True`; the run is the same.
Things that happen at the same moment happen in the order in which they were scheduled, so a seed gives one run, whatever PYTHONHASHSEED is.

An entry of the heap has a target: a host that a datagram comes to, the alarm of a host, a feed of arrivals, a call. The classes of targets say what happens
(`sllm.virtual.host`, `sllm.virtual.feed`, `sllm.virtual.target`); `sllm.virtual.carrier` takes datagrams from host to host.
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
"""(time, order, target, what, source): at `time`, target.happen(what, source) is called. `order` differs between all entries and decides at equal times."""


class Interrupted(BaseException):
    """`World.interrupt` was called: `World.run` raises this between two entries, so that the state of every node and every count is consistent. Not an
    Exception, so that no `except Exception` catches it as an error of a node."""


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
        self.hear_spoiled: Callable[[Node, Callable[[], None]], None] = lambda node, hear: hear()  # a checker replaces this function
        self.unsubmitted = 0  # fed items that found their host down
        self.order: Callable[[], int] = count(1).__next__  # the next number of an entry
        self.heap: list[Entry] = []
        self._lane: deque[Entry] = deque()  # datagrams under one constant latency, which arrive in the order of sending and need no heap
        self._calls = Calls()
        self._end = Target()  # the target of entries at which a run ends; their source is a number that identifies the run
        self._stop = 0  # the number of the entry at which the present run stops; 0: none
        self._interrupt = 0  # the same for `interrupt`
        self.carrier: Carrier = LinkCarrier(self)
        network.rng = rng_for(seed, "network")
        network.on_change = self._choose_carrier
        self._choose_carrier()

    # --- nodes ------------------------------------------------------------------------------------------------------------------------

    def add(self, node: Node, address: Address, make_node: MakeNode | None = None) -> Host:
        """Put a node on a new host at `address`. `make_node` makes the next lives; without `make_node` the host cannot restart."""
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
        """Take a host away for good. Datagrams that the host has sent still arrive; datagrams on their way to the host are lost."""
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
        """Call action() at `at`, or now if that is past. If the action calls a node, `touch` has to be called on the node's host afterwards."""
        call = Call(action)
        self.push(max(at, self.now), self._calls, None, call)
        return call

    def every(self, interval_s: float, action: Callable[[], object]) -> Callable[[], None]:
        """Call action() every `interval_s` of simulated time, for progress and inspection, without a cost per event. Returns a function that ends the calls."""
        return Repeated(self, interval_s, action).stop

    def cancel(self, call: Call) -> None:
        """Do not make the call. Nothing happens if it has been made already."""
        call.cancel()

    # --- run --------------------------------------------------------------------------------------------------------------------------

    def push(self, at: float, target: Target, what: Any = None, source: Any = None) -> None:
        """Let target.happen(what, source) be called at `at`, which is not past."""
        heappush(self.heap, (at, self.order(), target, what, source))

    def run(self, until: float = INF) -> float:
        """Run up to and including the time `until`; returns the time reached. A further call goes on from there. Raises Interrupted after `interrupt`."""
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
                continue  # the end of an earlier run
            self.now = now
            target.happen(what, source)
        if source == last and until < INF:
            self.now = last_s
        return self.now

    def stop(self) -> None:
        """End `run` before the next entry."""
        if not self._stop:
            self._stop = self.order()
            heappush(self.heap, (self.now, -1.0, self._end, None, self._stop))

    def interrupt(self) -> None:
        """End `run`, or the next `run` if none is under way, with Interrupted before the next entry. A signal handler may call this method at any time."""
        if not self._interrupt:
            self._interrupt = self.order()
            heappush(self.heap, (-INF, -1.0, self._end, None, self._interrupt))

    # --- the network ------------------------------------------------------------------------------------------------------------------

    def datagrams_pending(self) -> int:
        """Datagrams in the heap, the lane and in frozen hosts, counted one by one, to check the network's own count."""
        return sum(1 for _ in self._pending())

    def pending_of(self, kind: type[Message]) -> int:
        """Pending messages of one kind, including messages that a frozen host could not send yet."""
        unsent = [envelope for host in self.hosts.values() if host.node is not None for envelope, _ in host.node.outbox]
        return sum(kind_of(what) is kind for what in chain(self._pending(), unsent))

    def _pending(self) -> Iterator[Any]:
        """The entries that are datagrams, which are the only entries with a `what`."""
        for _, _, _, what, _ in chain(self._lane, self.heap):
            if what is not None:
                yield what
        for host in self.hosts.values():
            yield from [what for what, source in host.held if not isinstance(source, Feed)]

    def _choose_carrier(self) -> None:
        """The network has changed. Datagrams in the lane keep their times; the lane is emptied into the heap, because it must stay in order."""
        for entry in self._lane:
            heappush(self.heap, entry)
        self._lane.clear()
        latency_s = self.network.plain_latency_s
        self.carrier = LinkCarrier(self) if latency_s is None or self.wire else PlainCarrier(self, latency_s, self._lane)
