"""What checkers are made of: the base class, what they may look at, and the error they raise."""

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

ROWS_PER_LOOK = 4  # rows of a fleet table looked at each time; the next look goes on where this one stopped
HOSTS_PER_LOOK = 16
ROUNDING_S = 1e-6  # by which sums of float costs and times converted between clocks may be off


class InvariantViolation(Exception):
    """Something that must hold did not. The text has the seed, the time and the last events, so that anybody can see the violation again."""

    def __init__(self, checker: str, problem: str, seed: int, at_s: float, recent: Iterable[Event] = ()) -> None:
        self.checker = checker
        self.problem = problem
        self.seed = seed
        self.at_s = at_s
        self.recent = tuple(recent)
        lines = [f"invariant {checker!r} broken at {at_s:.6f} s with seed {seed}: {problem}", f"the last {len(self.recent)} events:"]
        super().__init__("\n".join([*lines, *(f"  {_without_wall_clock(event)}" for event in self.recent)]))


def _without_wall_clock(event: Event) -> Event:
    """The event without what took wall time, which differs from run to run: the same seed gives the same text to the byte."""
    return event.replace(decision_s=0.0) if isinstance(event, RequestRouted) else event


class Context:
    """What a checker may look at. A live run has no world, so only its events are checked."""

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
        """The nodes on hosts that stand still: what is open there comes to no end."""
        return {host.node for host in self.world.hosts.values() if host.node is not None and host.stands_still} if self.world else set()

    def is_host(self, worker_id: str) -> bool:
        """Whether this is a worker of the world. Nothing is known of what other workers report, nor of what the workers of a live run do."""
        return self.world is not None and worker_id in self.world.hosts


class Checker:
    """Base of the checkers: each holds one thing that must hold. A class of this kind in a file of this folder is a checker of every run."""

    name: ClassVar[str] = ""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.checked = 0  # how often the thing was looked at

    def handlers(self) -> dict[type, Handler]:
        """The method for each kind of event that the checker wants to see."""
        return {}

    def on_life(self, what: str, host: Host) -> None:
        """A host crashed, froze, ... (World.lifecycle)."""

    def inspect(self) -> None:
        """Look at some nodes: O(1) whatever the size of the fleet."""

    def finish(self, at_rest: bool) -> None:
        """The run is over; `at_rest`: every request has ended and time enough has passed for every report and acknowledgement."""

    @property
    def at_rest(self) -> bool:
        """Nothing this checker follows is under way."""
        return True

    @property
    def finished(self) -> int:
        """How many of the things that this checker follows have come to an end. While the number grows, work goes on."""
        return 0

    def fail(self, problem: str) -> None:
        raise InvariantViolation(self.name, problem, self.context.seed, self.context.now(), self.context.recent)


class Cursor:
    """Goes round a fleet a bounded number of steps at a time."""

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
