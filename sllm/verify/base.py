"""The base class of checkers, the context that they may read, and the error that they raise."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from sllm.protocol.bus import Handler
from sllm.protocol.capabilities import TracksWorkers, capable
from sllm.protocol.events import Event, RequestRouted
from sllm.protocol.node import Node
from sllm.virtual.host import Host
from sllm.virtual.world import World

ROWS_PER_LOOK = 4  # rows of a fleet table read in one inspection; the next inspection goes on with the following rows
HOSTS_PER_LOOK = 16
ROUNDING_S = 1e-6  # tolerance for sums of float costs and for times converted between clocks


class InvariantViolation(Exception):
    """An invariant was broken. The text has the seed, the time and the last events, so that anybody can reproduce the violation."""

    def __init__(self, checker: str, problem: str, seed: int, at_s: float, recent: Iterable[Event] = ()) -> None:
        self.checker = checker
        self.problem = problem
        self.seed = seed
        self.at_s = at_s
        self.recent = tuple(recent)
        lines = [f"invariant {checker!r} broken at {at_s:.6f} s with seed {seed}: {problem}", f"the last {len(self.recent)} events:"]
        super().__init__("\n".join([*lines, *(f"  {_without_wall_clock(event)}" for event in self.recent)]))


def _without_wall_clock(event: Event) -> Event:
    """The event without its field of wall time, which differs from run to run, so that the same seed gives the same text to the byte."""
    return event.replace(decision_s=0.0) if isinstance(event, RequestRouted) else event


class Context:
    """The objects that a checker may read. A live run has no world, so only its events are checked."""

    def __init__(self, seed: int, now: Callable[[], float], recent: deque[Event], world: World | None = None) -> None:
        self.seed = seed
        self.now = now
        self.recent = recent
        self.world = world

    def nodes(self) -> list[Node]:
        """Every node that runs now."""
        return [host.node for host in self.world.hosts.values() if host.node is not None] if self.world else []

    def trackers(self) -> list[TracksWorkers]:
        """The nodes that run now and track workers."""
        return [tracker for node in self.nodes() if (tracker := capable(node, TracksWorkers)) is not None]

    def still_nodes(self) -> set[object]:
        """The nodes on frozen hosts, whose work comes to no end."""
        return {host.node for host in self.world.hosts.values() if host.node is not None and host.stands_still} if self.world else set()

    def is_host(self, worker_id: str) -> bool:
        """Whether `worker_id` is a worker of the world. The reports of other workers, and the acts of the workers of a live run, cannot be checked."""
        return self.world is not None and worker_id in self.world.hosts


class Checker:
    """Base of the checkers, each of which checks one invariant. Every subclass in a file of this folder checks every run."""

    name: ClassVar[str] = ""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.checked = 0  # number of checks made

    def handlers(self) -> dict[type, Handler]:
        """The handler of each kind of event that the checker needs."""
        return {}

    def on_life(self, what: str, host: Host) -> None:
        """A host crashed, froze, ... (World.lifecycle)."""

    def inspect(self) -> None:
        """Inspect some nodes, at a cost that does not grow with the fleet."""

    def finish(self, at_rest: bool) -> None:
        """The run is over; `at_rest`: every request has ended, and enough time has passed for every report and acknowledgement to arrive."""

    @property
    def at_rest(self) -> bool:
        """Whether nothing that this checker follows is under way."""
        return True

    @property
    def finished(self) -> int:
        """The number of things followed by this checker that have come to an end. While the number grows, work goes on."""
        return 0

    def fail(self, problem: str) -> None:
        raise InvariantViolation(self.name, problem, self.context.seed, self.context.now(), self.context.recent)


class Cursor:
    """Iterates over a fleet again and again, a bounded number of steps at a time."""

    def __init__(self) -> None:
        self._pending: list[Any] = []

    def hosts(self, context: Context) -> list[Host]:
        """The next hosts, at most `HOSTS_PER_LOOK`."""
        assert context.world is not None
        if not self._pending:
            self._pending = list(context.world.hosts)
        batch = self._pending[-HOSTS_PER_LOOK:]
        del self._pending[-HOSTS_PER_LOOK:]
        return [context.world.hosts[name] for name in batch]

    def rows(self, context: Context) -> list[tuple[TracksWorkers, Any]]:
        """The next rows, at most `ROWS_PER_LOOK`, each with the node whose table it is in."""
        if not self._pending:
            self._pending = [(node, worker_id) for node in context.trackers() for worker_id in node.fleet.rows]
        batch = self._pending[-ROWS_PER_LOOK:]
        del self._pending[-ROWS_PER_LOOK:]
        return [(node, node.fleet.rows[worker_id]) for node, worker_id in batch if worker_id in node.fleet.rows]


def every_row(context: Context) -> list[tuple[TracksWorkers, Any]]:
    """The rows of all tables, each with the node whose table it is in."""
    return [(node, row) for node in context.trackers() for row in list(node.fleet.rows.values())]
