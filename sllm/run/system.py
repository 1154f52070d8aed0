"""The fleet of one run in one process: the participants of an architecture, every life of each remembered, so that the books include those that crashed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from itertools import chain
from typing import Any, TypeVar

from config import Config
from sllm.deploy.keys import ephemeral_keyring
from sllm.engine.base import EngineUsage
from sllm.observe.results import ReportFigures, WorkerFigures
from sllm.protocol.capabilities import CarriesRequests, HasEngine, ReportsLoad, TracksWorkers, capable
from sllm.protocol.messages import Address
from sllm.protocol.node import Codec, Node
from sllm.run.architecture import Architecture, Birth, Participant
from sllm.run.assemble import build_catalog, build_workload, count_trace_models, mix_models
from sllm.run.centralized import Centralized
from sllm.wire.frame import FrameCodec
from sllm.workload import Workload

T = TypeVar("T")
Lives = dict[str, list[T]]
"""Every life of each participant, by the participant's name."""


class System:
    """The fleet of one run. Every random choice comes from a stream of the configuration's seed, named by participant and life. Nodes are told apart by their
    capabilities (`sllm.protocol.capabilities`) alone, so that any architecture can be run."""

    def __init__(
        self,
        config: Config,
        *,
        wire: bool,
        architecture: type[Architecture] = Centralized,
        stopwatch: Callable[[], float] | None = None,
        make_codec: Callable[[], Codec | None] | None = None,
    ) -> None:
        """`wire`: nodes send signed bytes, with a key of this run's own. `make_codec`: makes the codec of each life instead. UsageError for settings with which
        the fleet cannot be made."""
        self.config = config
        self._trace_models = count_trace_models(config)
        self.catalog = build_catalog(config, self._trace_models, mix_models(config))
        self.architecture = architecture(config, self.catalog, stopwatch)
        self.architecture.check()
        self.participants: dict[str, Participant] = {participant.name: participant for participant in self.architecture.participants()}
        self.workers = list(self.architecture.workers)
        self.hardware = Counter(own.hardware for own in self.architecture.workers.values())  # workers by hardware
        self.addresses: dict[str, Address] = {}  # of participants; whoever drives their nodes puts the addresses in
        self.lives: Lives[Node] = {name: [] for name in self.participants}
        self.trackers: Lives[TracksWorkers] = {}
        self.carriers: Lives[CarriesRequests] = {}
        self._servers: Lives[HasEngine] = {}
        self._reporters: Lives[ReportsLoad] = {}
        keyring = ephemeral_keyring() if wire else None
        self.codec = make_codec or (lambda: FrameCodec(keyring) if keyring is not None else None)

    def make(self, name: str, incarnation: int, now: float, wall_offset_s: float = 0.0) -> Node:
        """The next life of a participant."""
        participant, lives = self.participants[name], self.lives[name]
        peers = tuple(self.addresses[peer] for peer in participant.peers)
        own = self.addresses.get(name, ("", 0))
        node = participant.make(Birth(name, f"{name}/{len(lives) + 1}", incarnation, now, peers, self.codec(), wall_offset_s, own))
        lives.append(node)
        _note(self.trackers, name, capable(node, TracksWorkers))
        _note(self.carriers, name, capable(node, CarriesRequests))
        _note(self._servers, name, capable(node, HasEngine))
        _note(self._reporters, name, capable(node, ReportsLoad))
        return node

    def workload(self, *, live: bool = False) -> Workload:
        """The requests of this run, from the configuration."""
        return build_workload(self.config, self.catalog, self._trace_models, live=live)

    # --- how it stands --------------------------------------------------------------------------------------------------------------

    @property
    def tracker(self) -> TracksWorkers:
        """Who tracks workers, and whose view is shown as the fleet's: the present life of the first participant that does."""
        return next(iter(self.trackers.values()))[-1]

    @property
    def client(self) -> str:
        """The participant that requests are handed to."""
        return next(iter(self.carriers))

    @property
    def carrier(self) -> CarriesRequests:
        """The present life of that participant."""
        return next(iter(self.carriers.values()))[-1]

    @property
    def ready(self) -> int:
        """Workers that would be given work now."""
        return self.architecture.count_ready(self._present_trackers) if self.trackers else 0

    @property
    def started(self) -> bool:
        """Whether requests may come."""
        return self.architecture.has_started(self._present_trackers)

    @property
    def _present_trackers(self) -> list[TracksWorkers]:
        return [lives[-1] for lives in self.trackers.values()]

    @property
    def in_flight(self) -> int:
        return sum(carrier.in_flight for carrier in _all(self.carriers))

    def unfinished(self) -> Iterator[Any]:
        """The requests in flight, as `CarriesRequests` gives them."""
        return chain.from_iterable(carrier.unfinished() for carrier in _all(self.carriers))

    @property
    def waiting(self) -> int:
        """Requests that wait at the workers."""
        return sum(lives[-1].engine.waiting for lives in self._servers.values())

    # --- what it has done -----------------------------------------------------------------------------------------------------------

    def usage(self, now: float) -> list[EngineUsage]:
        """What each worker had in use since its start, all its lives together, where all go by one clock and none crashes."""
        engines = ([server.engine for server in self._servers[name]] for name in self.workers)
        return [reduce(EngineUsage.plus, [engine.usage(now) for engine in lives], EngineUsage()) for lives in engines]

    def worker_figures(self, usages: Iterable[EngineUsage]) -> list[WorkerFigures]:
        """What each worker is, and what it had in use."""
        rows = []
        for (name, config), usage in zip(self.architecture.workers.items(), usages, strict=True):
            engine = self._servers[name][-1].engine
            rows.append(WorkerFigures(name, config.hardware, engine.slots, engine.memory_bytes, usage))
        return rows

    def report_figures(self, copies: int = 0, lost: int | None = None, under_way: int = 0) -> ReportFigures:
        """The books of the reports; `copies` the network made count as sent. `lost` is what it lost; None: nobody knows but by what was not heard.
        `under_way` is what the network still has."""
        rejected: Counter[str] = Counter()
        accepted = 0
        for tracker in _all(self.trackers):
            rejected.update(tracker.reports_rejected)
            accepted += tracker.reports_accepted
        return ReportFigures(sum(reporter.reports_sent for reporter in _all(self._reporters)) + copies, accepted, rejected, lost, under_way)


def _note(lives: Lives[T], name: str, node: T | None) -> None:
    if node is not None:
        lives.setdefault(name, []).append(node)


def _all(lives: Lives[T]) -> Iterator[T]:
    """Every life of every participant."""
    return chain.from_iterable(lives.values())
