"""Checkers of the books of datagrams and of load reports, of corrupted datagrams and of memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, ClassVar

from sllm.protocol.bus import Handler
from sllm.protocol.capabilities import CarriesRequests, HasEngine, MadeOfParts, ReportsLoad, TracksWorkers, capable
from sllm.protocol.events import RequestSent
from sllm.protocol.messages import LoadReport
from sllm.protocol.node import Node
from sllm.protocol.recent import Recent
from sllm.protocol.replay import GUARDED_MAX
from sllm.verify.base import Checker, Context, Cursor
from sllm.virtual.host import Host


class NetworkBooks(Checker):
    """Datagrams sent + duplicated = delivered + lost + in flight."""

    name = "network-books"

    def inspect(self) -> None:
        world = self.context.world
        if world is not None and world.network.in_flight < 0:
            self.fail(f"{world.network.in_flight} datagrams in flight")
        self.checked += 1

    def finish(self, at_rest: bool) -> None:
        world = self.context.world
        if world is not None and world.network.in_flight != world.datagrams_pending():
            self.fail(f"the books say {world.network.in_flight} datagrams are on their way, there are {world.datagrams_pending()}")


class ReportBooks(Checker):
    """Load reports sent by every life of every worker, and copies = accepted + rejected + lost + on their way; and no coordinator accepts one twice."""

    name = "report-books"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._past: Counter[str] = Counter()  # of lives that are over

    def on_life(self, what: str, host: Host) -> None:
        if what == "crash" and host.node is not None:
            self._accepted_once(host.node, self._books()["sent"])
            self._past.update(_report_books(host.node))

    def finish(self, at_rest: bool) -> None:
        world = self.context.world
        if world is None:
            return
        books, network = self._books(), world.network
        for node in self.context.nodes():
            self._accepted_once(node, books["sent"])
        copied, lost, pending = network.duplicated_by_kind[LoadReport], network.lost_by_kind[LoadReport], world.pending_of(LoadReport)
        if books["sent"] + copied != books["accepted"] + books["rejected"] + lost + pending:
            self.fail(
                f"{books['sent']} reports were sent and {copied} copied, but {books['accepted']} accepted, {books['rejected']} rejected, "
                f"{lost} lost, and {pending} are on their way"
            )
        self.checked += books["sent"]

    def _books(self) -> Counter[str]:
        """Of all lives so far."""
        books = self._past.copy()
        for node in self.context.nodes():
            books.update(_report_books(node))
        return books

    def _accepted_once(self, node: Node, sent: int) -> None:
        """The reports that were accepted and those known to have been missed are different reports."""
        tracker = capable(node, TracksWorkers)
        if tracker is not None:
            missed = sum(row.lost for row in tracker.fleet.rows.values() if self.context.is_host(row.worker_id))
            if tracker.reports_accepted + missed > sent:
                self.fail(f"{node.node_id} accepted {tracker.reports_accepted} reports and missed {missed}, but only {sent} were sent")


def _report_books(node: Node) -> Counter[str]:
    """The load reports that one life of a node has sent, accepted and rejected."""
    tracker, reporter = capable(node, TracksWorkers), capable(node, ReportsLoad)
    books: Counter[str] = Counter()
    if tracker is not None:
        books.update(accepted=tracker.reports_accepted, rejected=tracker.reports_rejected.total())
    if reporter is not None:
        books["sent"] = reporter.reports_sent
    return books


class InvalidIgnored(Checker):
    """A datagram with a wrong bit changes nothing but one counter."""

    name = "invalid-ignored"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        if context.world is not None:
            context.world.hear_spoiled = self._watch

    def _watch(self, node: Node, hear: Callable[[], None]) -> None:
        before = self._state(node)
        count = sum(node.rejected.values())
        hear()
        after, refused = self._state(node), sum(node.rejected.values()) - count
        if after != before or refused != 1:
            self.fail(f"{node.node_id} heard a corrupted datagram and went from {before} to {after}; {refused} more refused")
        self.checked += 1

    @staticmethod
    def _state(node: Node) -> tuple[Any, ...]:
        """What a datagram that is accepted would change."""
        tracker, carrier = capable(node, TracksWorkers), capable(node, CarriesRequests)
        accepted = tracker.reports_accepted if tracker is not None else 0
        return node.next_deadline(), len(node.outbox), len(node.events), accepted, carrier.in_flight if carrier is not None else 0


class BoundedMemory(Checker):
    """No table of a node grows beyond what the fleet and the requests of the last minutes account for."""

    name = "bounded-memory"
    SLACK = 2_000
    PER_HOST = 16
    PER_REQUEST = 4
    EVERY = 20  # inspections: growth is slow, and looking at every table is not cheap
    KEEP_S = 600.0  # nothing about a request is kept longer than this, but in tables with a cap of their own:
    CAPS: ClassVar[dict[str, int]] = {"_guard": GUARDED_MAX, "_finished": 50_000}

    NESTED: ClassVar[frozenset[str]] = frozenset({"_guard"})  # dictionaries of tables: each of those is looked at

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._sent = 0
        self._inspections = 0
        self._history: deque[tuple[float, int]] = deque([(0.0, 0)])
        self._cursor = Cursor()

    def handlers(self) -> dict[type, Handler]:
        return {RequestSent: self._on_sent}

    def _on_sent(self, node: Node, event: Any) -> None:
        self._sent += 1

    def limit(self) -> int:
        """Most entries a table may have now."""
        now = self.context.now()
        self._history.append((now, self._sent))
        while self._history[0][0] < now - self.KEEP_S and len(self._history) > 1:
            self._history.popleft()
        hosts = len(self.context.world.hosts) if self.context.world else 0
        return self.SLACK + self.PER_HOST * hosts + self.PER_REQUEST * (self._sent - self._history[0][1])

    def inspect(self) -> None:
        self._inspections += 1
        if self._inspections % self.EVERY:
            return
        limit = self.limit()
        for host in self._cursor.hosts(self.context):
            for owner in _owners(host.node):
                self._look(host.name, owner, limit)
        self.checked += 1

    def _look(self, name: str, owner: Any, limit: int) -> None:
        for attribute in _attributes(type(owner)) or getattr(owner, "__dict__", {}):
            value = getattr(owner, attribute, None)
            if isinstance(value, (dict, list, set, deque, Recent)):
                tables: list[Any] = [value.new, value.old] if isinstance(value, Recent) else [value]
                if isinstance(value, dict) and attribute in self.NESTED:
                    tables += (table for recent in value.values() for table in (recent.new, recent.old))
                entries = max(map(len, tables))
                if entries > max(limit, self.CAPS.get(attribute, 0)):
                    self.fail(f"{name}: {type(owner).__name__}.{attribute} has {entries} entries, more than the {limit} that can be accounted for")


def _owners(node: Node | None) -> list[Any]:
    """A node and those of its parts that keep tables."""
    if node is None:
        return []
    composed, tracker, server = capable(node, MadeOfParts), capable(node, TracksWorkers), capable(node, HasEngine)
    parts: list[Any] = [*composed.parts] if composed is not None else []
    if tracker is not None:
        parts.append(tracker.fleet)
    if server is not None:
        parts.append(server.engine)
    return [node, *parts]


def _attributes(kind: type) -> list[str]:
    """The slots of a class and its bases; empty if an object of the class keeps its attributes in a dictionary."""
    slots = [getattr(base, "__slots__", None) for base in kind.__mro__[:-1]]
    return [] if None in slots else [name for names in slots for name in names or ()]
