"""The world of virtual time: one heap of what will happen, the hosts it happens to, and the network between them.

It drives any `sllm.protocol.node.Node` and knows no role. Messages travel as envelopes, or as signed bytes with `wire=True`; the run is the same.
Things that happen at the same moment happen in the order in which they were scheduled, so a seed gives one run, whatever PYTHONHASHSEED is.

The loop is the hot path of every simulation. A host in good health is driven without a look at what could be wrong with it: `Host.live` is its node
then, and None as soon as anything about it is out of the ordinary, which sends its entries down the slow path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from heapq import heappop, heappush
from itertools import chain, count
from typing import Any, TypeVar

from sllm.protocol.events import Event
from sllm.protocol.messages import Address, LoadReport
from sllm.protocol.node import Node
from sllm.protocol.seeds import rng_for
from sllm.virtual.datagram import PackedReport, Spoiled, is_report
from sllm.virtual.feed import Feed
from sllm.virtual.host import INF, Host, MakeNode, flip_bit
from sllm.virtual.network import DOWN, OVERFLOW, UNROUTABLE, Network

SPINS_MAX = 100_000  # wake-ups of one host at one moment; more is a deadline that handle_timer does not move
RECENT_EVENTS = 60  # kept for whoever finds something wrong
TICK_S = 1e-9  # least distance of two wake-ups of a host whose clock runs at a rate of its own: conversions round


class Interrupted(BaseException):
    """The run was told to end: raised out of `World.run` between two things that happen, so that every node and every book is whole. No Exception, so
    that nobody takes it for an error of what was running."""


Observer = Callable[[Node, Event], None]
T = TypeVar("T")


Entry = tuple[float, float, Host, Any, Any]
"""(time, order, host, what, source): a datagram (`what` from the address `source`), a wake-up (None, None), an arrival from outside (None, its feed), or
on the world's own host a call."""


class _Observers(dict[type, tuple[Observer, ...]]):
    """Who hears a kind of event, in the order in which they asked."""

    of_all: tuple[Observer, ...] = ()

    def __missing__(self, kind: type) -> tuple[Observer, ...]:
        self[kind] = self.of_all
        return self.of_all


class World:
    """A simulation: hosts, the network between them and what is to happen next.

    `observer` is called as observer(node, event) with every event of every node, right after it happened; `observe()` adds others.
    `lifecycle` lists callables (what, host): "crash" just before the node goes, "clock" just before the rate of its clock changes;
    "restart", "freeze", "thaw" and "zombie" just after.
    """

    def __init__(self, seed: int, network: Network, *, wire: bool = False, observer: Observer | None = None) -> None:
        self.seed = seed
        self.network = network
        self.wire = wire
        self.now = 0.0
        self.hosts: dict[str, Host] = {}
        self.lifecycle: list[Callable[[str, Host], None]] = []
        self.recent: deque[Event] = deque(maxlen=RECENT_EVENTS)
        self.hear_spoiled: Callable[[Node, Callable[[], None]], None] = lambda node, hear: hear()  # a checker puts itself around it
        self.unsubmitted = 0  # fed items that found their host down
        self._heap: list[Entry] = []
        self._lane: deque[Entry] = deque()  # datagrams under one constant latency: in order by themselves, no heap needed
        self._lane_latency_s = -1.0  # negative: the lane is closed, each datagram is looked at
        self._stop: Entry | None = None
        self._interrupt: Entry | None = None
        self._order = count(1).__next__
        self._routes: dict[Address, Host] = {}
        self._self = Host(("", 0), None)
        self._observers = _Observers()
        network.rng = rng_for(seed, "network")
        network.on_change = self._network_changed
        self._network_changed()
        if observer is not None:
            self.observe(observer)

    # --- set up -----------------------------------------------------------------------------------------------------------------------

    def add(self, node: Node, address: Address, make_node: MakeNode | None = None) -> Host:
        """Put a node on a new host at `address`. `make_node` makes its next lives; without one it cannot restart."""
        if address[0] in self.hosts:
            raise ValueError(f"a host named {address[0]!r} is there already")
        host = Host(address, node, make_node, wire=self.wire)
        self.hosts[host.name] = host
        self._routes[address] = host
        self.touch(host)
        return host

    def observe(self, observer: Observer, *kinds: type) -> None:
        """Call observer(node, event) with events of these kinds; of every kind if none is named."""
        observers = self._observers
        if not kinds:
            observers.of_all += (observer,)
        for kind in kinds or tuple(observers):
            observers[kind] += (observer,)

    def call_at(self, at: float, fn: Callable[[], object]) -> None:
        """Call fn() at `at`, or now if that is past. If it talks to a node, touch() that host afterwards."""
        heappush(self._heap, (max(at, self.now), self._order(), self._self, fn, None))

    def every(self, interval_s: float, fn: Callable[[], object]) -> None:
        """Call fn() every `interval_s` of simulated time, for progress and inspection: they cost nothing per event."""

        def again() -> None:
            fn()
            self.call_at(self.now + interval_s, again)

        self.call_at(self.now + interval_s, again)

    def feed(
        self, host: Host, arrivals: Iterable[tuple[float, T]], submit: Callable[[T, float], object], ended: Callable[[], object] | None = None
    ) -> None:
        """At each time of `arrivals` (in order; a few are taken in advance, never all) call submit(item, now) on behalf of the host's node; after the last
        of them call ended()."""
        self._await(host, Feed(arrivals, submit, ended))

    def touch(self, host: Host) -> None:
        """Take what the host's node wants to send or tell, and when it wants to wake, after something other than the world talked to it."""
        if host.node is not None and not host.frozen:
            self._settle(host, host.node)

    # --- run --------------------------------------------------------------------------------------------------------------------------

    def run(self, until: float = INF) -> float:
        """Let everything up to and including `until` happen; returns the time reached. Can be called again to go on. Interrupted after `interrupt`."""
        heap, lane, pop_lane, network = self._heap, self._lane, self._lane.popleft, self.network
        route, order, append, latency_s = self._routes.get, self._order, lane.append, self._lane_latency_s
        observers, remember = self._observers, self.recent.extend
        end: Entry = (max(until, self.now), INF, self._self, None, None)
        self._stop = None
        heappush(heap, end)
        sent = delivered = 0
        try:
            while True:
                entry = pop_lane() if lane and lane[0] < heap[0] else heappop(heap)
                now, _, host, what, source = entry
                node = host.live
                if node is None:
                    network.sent += sent
                    network.delivered += delivered
                    sent = delivered = 0
                    if what is None and host is self._self:  # the end of this run, of an interrupted one, or stop()
                        if entry is end or entry is self._stop:
                            break
                        if entry is self._interrupt:
                            raise Interrupted
                        continue
                    self.now = now
                    self._odd(host, what, source)
                    latency_s = self._lane_latency_s  # it may have opened or closed the lane
                    continue
                self.now = now
                if what is not None:
                    delivered += 1
                    host.hear(what, source, now)
                elif source is not None:
                    source.submit(source.item, now)
                    self._await(host, source)
                elif host.wake == now:
                    host.wake = INF
                    host.handle_timer(now)
                else:
                    continue  # a void wake-up
                outbox = host.outbox
                if outbox:
                    if latency_s >= 0.0:  # what _flush does, without the call
                        at, source = now + latency_s, host.address
                        sent += len(outbox)
                        for message, address in outbox:
                            target = route(address)
                            if target is not None:
                                append((at, order(), target, message, source))
                            else:
                                network.lose(UNROUTABLE, is_report(message))
                        outbox.clear()
                    else:
                        self._flush(host, node)
                events = host.events
                if events:  # what _tell_events does, without the call
                    remember(events)
                    for event in events:
                        for observer in observers[type(event)]:
                            observer(node, event)
                    events.clear()
                deadline = node.wake_at
                if deadline < host.wake:
                    if deadline <= now:
                        self._arm(host, deadline)
                    else:
                        host.wake = deadline
                        heappush(heap, (deadline, order(), host, None, None))
        finally:
            network.sent += sent
            network.delivered += delivered
        if entry is end and until < INF:
            self.now = end[0]
        return self.now

    def datagrams_pending(self) -> int:
        """Datagrams in the heap, the lane and in frozen hosts, counted one by one: to be held against the network's books."""
        return sum(1 for _ in self._pending())

    def reports_pending(self) -> int:
        """Load reports among those, and those that a frozen host could not send yet."""
        unsent = (envelope for host in self.hosts.values() if host.node is not None for envelope, _ in host.node.outbox)
        return sum(map(is_report, chain(self._pending(), unsent)))

    def _pending(self) -> Iterator[Any]:
        for _, _, _, what, source in chain(self._lane, self._heap):
            if what is not None and source is not None:
                yield what
            elif isinstance(what, partial) and what.func == self._arrive:
                yield what.args[1]  # spoiled
        for host in self.hosts.values():
            yield from (what for what, source in host.held if source is not None)

    def stop(self) -> None:
        """End run() before anything else happens."""
        if self._stop is None:
            self._stop = (self.now, -1.0, self._self, None, None)
            heappush(self._heap, self._stop)

    def interrupt(self) -> None:
        """End run() with Interrupted before anything else happens, or the next run() if none is under way. A signal's handler may call it at any time."""
        if self._interrupt is None:
            self._interrupt = (-INF, -1.0, self._self, None, None)
            heappush(self._heap, self._interrupt)

    def _odd(self, host: Host, what: Any, source: Any) -> None:
        """An entry of a host that is down, frozen, limited or with a clock of its own, or a call of the world."""
        if host is self._self:
            what()
        elif what is not None:
            self._arrive(host, what, source)
        elif source is not None:
            self._arrive_from_outside(host, source)
        elif host.wake == self.now:
            host.wake = INF
            if host.node is not None and not host.frozen:
                host.node.handle_timer(host.read_clock(host.node, self.now))
                self._settle(host, host.node)

    def _settle(self, host: Host, node: Node) -> None:
        """Take out what the node has to say and when it wants to wake."""
        if node.outbox or node.events:
            self._flush(host, node)
        deadline = node.wake_at
        if deadline < INF:
            if host.has_own_clock:
                deadline = max(host.world_time(deadline), self.now + TICK_S)
            if deadline < host.wake:
                self._arm(host, deadline)

    def _arm(self, host: Host, deadline: float) -> None:
        now = self.now
        if deadline <= now:
            host.spins = host.spins + 1 if host.spin_at == now else 1
            host.spin_at = deadline = now
            if host.spins > SPINS_MAX:
                raise RuntimeError(f"{host.name} asks to be woken at {now} again and again: handle_timer does not move next_deadline")
        host.wake = deadline
        heappush(self._heap, (deadline, self._order(), host, None, None))

    # --- from outside -----------------------------------------------------------------------------------------------------------------

    def _await(self, host: Host, feed: Feed) -> None:
        """Put the next arrival of a feed into the heap."""
        at = feed.turn()
        if at is not None:
            heappush(self._heap, (max(at, self.now), self._order(), host, None, feed))

    def _arrive_from_outside(self, host: Host, feed: Feed) -> None:
        """At a host of which anything may be wrong."""
        submit = partial(self._submit, host, feed, feed.item)
        if host.node is None:
            self.unsubmitted += 1
        elif host.frozen:
            host.held.append((submit, None))
        else:
            submit()
            self._settle(host, host.node)
        self._await(host, feed)

    def _submit(self, host: Host, feed: Feed, item: Any) -> None:
        if host.node is not None:
            feed.submit(item, host.read_clock(host.node, self.now))

    # --- messages ---------------------------------------------------------------------------------------------------------------------

    def _flush(self, host: Host, node: Node) -> None:
        """Send what is in the node's outbox and tell its events."""
        outbox = node.outbox
        if outbox:
            latency_s = self._lane_latency_s
            if latency_s >= 0.0:
                at, source, route, order, append = self.now + latency_s, host.address, self._routes.get, self._order, self._lane.append
                self.network.sent += len(outbox)
                for message, address in outbox:
                    target = route(address)
                    if target is not None:
                        append((at, order(), target, message, source))
                    else:
                        self.network.lose(UNROUTABLE, is_report(message))
            else:
                self._transmit(host, node)
            outbox.clear()
        if node.events:
            self._tell_events(node)

    def _tell_events(self, node: Node) -> None:
        """Hand the node's events to those who observe them."""
        events = node.events
        self.recent.extend(events)
        for event in events:
            for observer in self._observers[type(event)]:
                observer(node, event)
        events.clear()

    def _transmit(self, host: Host, node: Node) -> None:
        """Send each datagram as the network decides."""
        network, now, heap, source = self.network, self.now, self._heap, host.address
        for envelope, address in list(node.outbox):
            target = self._routes.get(address)
            if target is None:
                network.sent += 1
                network.lose(UNROUTABLE, is_report(envelope))
                continue
            what: Any = envelope
            if self.wire:
                assert node.codec is not None, "bytes on the wire need a codec in every node"
                data = node.codec.encode(envelope)
                what = PackedReport(data) if is_report(envelope) else data
            for at, flip in network.carry(host.name, target.name, envelope, now):
                if flip >= 0.0:
                    spoiled = Spoiled(flip_bit(what, flip) if self.wire else None, is_report(what))
                    heappush(heap, (at, self._order(), self._self, partial(self._arrive, target, spoiled, source), None))
                elif network.instant_reports and type(envelope.message) is LoadReport:
                    self._arrive(target, what, source)
                else:
                    heappush(heap, (at, self._order(), target, what, source))

    def _arrive(self, host: Host, what: Any, source: Any) -> None:
        """A datagram reaches a host of which anything may be wrong."""
        lose = self.network.lose
        if host.node is None:
            lose(DOWN, is_report(what))
        elif host.frozen:
            if host.buffer_max and len(host.held) >= host.buffer_max:
                lose(OVERFLOW, is_report(what))
            else:
                host.held.append((what, source))
        elif host.buffer_max and not host.has_room(self.now):
            lose(OVERFLOW, is_report(what))
        else:
            self._deliver(host, host.node, what, source)

    def _deliver(self, host: Host, node: Node, what: Any, source: Any) -> None:
        if source is None:  # a fed item that waited
            what()
        else:
            self.network.delivered += 1
            now = host.read_clock(node, self.now)
            if type(what) is Spoiled:
                self.network.lost_reports += what.is_report
                self.hear_spoiled(node, partial(_refuse_spoiled, node, what, source, now))
            else:
                host.hear(what, source, now)
        self._settle(host, node)

    def _network_changed(self) -> None:
        """The network is plain now, or no more. What is in the lane keeps its time; the lane must stay in order, so it is emptied into the heap."""
        for entry in self._lane:
            heappush(self._heap, entry)
        self._lane.clear()
        latency_s = self.network.plain_latency_s
        self._lane_latency_s = -1.0 if latency_s is None or self.wire else latency_s

    # --- what befalls hosts -----------------------------------------------------------------------------------------------------------

    def crash(self, host: Host) -> None:
        """The process dies: its node is gone, what reaches the host from now on is lost, and nothing is said to anyone."""
        self._tell("crash", host)
        self._lose(host.held)
        if host.node is not None:  # what a frozen node could not send dies with it
            self.network.lost_reports += sum(is_report(envelope) for envelope, _ in host.node.outbox)
        host.held.clear()
        host.node = None
        host.frozen = False
        host.wake = INF
        host.refresh()

    def _lose(self, held: Iterable[tuple[Any, Any]]) -> None:
        """What waited for a host is lost with it."""
        for what, source in held:
            if source is None:
                self.unsubmitted += 1
            else:
                self.network.lose(DOWN, is_report(what))

    def restart(self, host: Host) -> Node:
        """A new life at the same address. Its incarnation is what the host's wall clock shows, so it is lower than the last one if that clock was set back
        meanwhile; no two lives have the same. Datagrams still on their way reach it, as on a real network."""
        if host.make_node is None:
            raise ValueError(f"{host.name} cannot restart: it was added without make_node")
        if host.node is not None:
            self.crash(host)
        now = host.node_time(self.now)
        host.life += 1
        if host.wall_steady:
            host.wall_lag_s = self.now - now
        wall_offset_s = host.wall_jump_s + host.wall_lag_s
        host.incarnation = max(0, round((now + wall_offset_s) * 1e9)) + host.life
        node = host.make_node(host.incarnation, now)
        node.wall_offset_s += wall_offset_s
        host.node = node
        host.refresh()
        self._tell("restart", host)
        self._settle(host, node)
        return node

    def freeze(self, host: Host) -> None:
        """The process stands still: what arrives waits in its socket, its timers do not run."""
        if host.node is None or host.frozen:
            return
        host.frozen = True
        host.refresh()
        self._tell("freeze", host)

    def thaw(self, host: Host) -> None:
        """It goes on: what waited is handled now, late, then its timers."""
        if not host.frozen:
            return
        host.frozen = False
        host.refresh()
        self._tell("thaw", host)
        held, host.held = iter(host.held), []
        for what, source in held:
            if host.node is None:  # an observer let it crash
                self._lose(((what, source), *held))
                break
            self._deliver(host, host.node, what, source)
        if host.node is not None:
            host.wake = INF
            self._settle(host, host.node)

    def supplant(self, host: Host) -> Host:
        """Start the host's next life while the old one still exists: returns a new host, at an address of its own, on which the old node stays
        (frozen, if it was) and may come back as a zombie with its old incarnation."""
        if host.node is None:
            raise ValueError(f"{host.name} is down: there is no node to come back")
        ghost = Host((f"{host.name}~{host.life}", host.address[1]), host.node, wire=self.wire)
        ghost.frozen, ghost.held, host.held = host.frozen, host.held, []
        ghost.wall_jump_s, ghost.clock_rate = host.wall_jump_s, host.clock_rate
        ghost.clock_base_s, ghost.node_base_s = host.clock_base_s, host.node_base_s
        ghost.wall_steady, ghost.wall_lag_s = host.wall_steady, host.wall_lag_s
        ghost.refresh()
        self.hosts[ghost.name] = self._routes[ghost.address] = ghost
        host.node.relocate(ghost.address)
        host.node, host.frozen, host.wake = None, False, INF
        self._tell("zombie", ghost)
        self.restart(host)
        self.touch(ghost)
        return ghost

    def jump_wall_clock(self, host: Host, by_s: float) -> None:
        """Set the host's wall clock wrong by `by_s` more, in this life and the next ones. Its monotonic clock is not moved."""
        host.wall_jump_s += by_s
        if host.node is not None:
            host.node.set_wall_clock(host.node.wall_offset_s + by_s, host.node_time(self.now))

    def set_clock_rate(self, host: Host, rate: float, *, wall_steady: bool = False) -> None:
        """From now on the host's monotonic clock runs `rate` seconds in a second of the world, and its wall clock with it unless it is steady."""
        if rate <= 0.0:
            raise ValueError(f"clock rate {rate}: must be above 0")
        self._tell("clock", host)
        node_now = host.node_time(self.now) if host.node is None else host.read_clock(host.node, self.now)
        host.clock_base_s, host.node_base_s, host.clock_rate = self.now, node_now, rate
        host.wall_steady = wall_steady
        host.refresh()
        host.wake = INF
        self.touch(host)

    def limit_buffer(self, host: Host, datagrams: int, drained_per_s: float) -> None:
        """Let the host's socket buffer hold so many datagrams, taken out at that rate; 0 datagrams: no limit. What does not fit is lost."""
        host.buffer_max, host.buffer_per_s, host.buffer_level, host.buffer_seen_s = datagrams, drained_per_s, 0.0, self.now
        host.refresh()

    def _tell(self, what: str, host: Host) -> None:
        for listener in self.lifecycle:
            listener(what, host)


def _refuse_spoiled(node: Node, spoiled: Spoiled, source: Address, now: float) -> None:
    if spoiled.data is None:
        node.rejected["tag"] += 1
    else:
        node.receive_datagram(spoiled.data, source, now)
