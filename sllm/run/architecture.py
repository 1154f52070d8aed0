"""What an architecture is: the participants of a fleet, the role that each plays, and who talks to whom.

A new architecture is a subclass of `Architecture` in a file beside this one, and its roles. Live runs, virtual runs, tests and experiments build a whole fleet
with `sllm.run.system.System`; an entry point has the architecture make the one node of its process.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

from config import Config
from sllm.models.catalogue import Catalog
from sllm.protocol.capabilities import TracksWorkers
from sllm.protocol.messages import READY, Address
from sllm.protocol.node import Codec, Node
from sllm.run.hardware_mix import hardware_of_workers


class Birth(NamedTuple):
    """What one life of a participant begins with."""

    node_id: str
    stream: str  # names the seeded streams of its random choices
    incarnation: int
    now: float  # of the clock that its driver hands in
    peers: tuple[Address, ...] = ()  # the addresses of the participant's peers, in the order in which the participant lists them
    codec: Codec | None = None  # None: the node sends objects
    wall_offset_s: float = 0.0  # added to the node's clock it gives the wall clock
    advertise: Address = ("", 0)  # where the node is heard; ("", 0): not known yet, `Node.relocate` says it


class Participant(NamedTuple):
    """One that takes part in a fleet under a name and an address of its own: a role, one life after the other."""

    name: str
    port: int  # in virtual time, where the participant's host has the participant's name
    make: Callable[[Birth], Node]  # makes one life
    peers: tuple[str, ...] = ()  # those whose addresses each life is told; they start before this participant
    restarts: bool = True  # False: a client, whose requests end with its life

    @property
    def address(self) -> Address:
        """Where the participant is heard in virtual time."""
        return self.name, self.port


class Architecture(ABC):
    """The roles of one kind of fleet, made from a configuration."""

    name: ClassVar[str]
    """What results, settings and people call it."""

    def __init__(self, config: Config, catalog: Catalog, stopwatch: Callable[[], float] | None = None) -> None:
        """`stopwatch` gives wall seconds, to time placement decisions with; None: decisions are not timed."""
        self.config = config
        self.catalog = catalog
        self.stopwatch = stopwatch

    @cached_property
    def workers(self) -> dict[str, Config]:
        """The configuration of each worker: that of the fleet, but for the hardware. UsageError if the mix of hardware is for another number of workers."""
        kinds = hardware_of_workers(self.config.hardware, self.config.workers)
        configs = {kind: dataclasses.replace(self.config, hardware=kind) for kind in dict.fromkeys(kinds)}
        return {f"worker-{number}": configs[kind] for number, kind in enumerate(kinds)}

    @abstractmethod
    def participants(self) -> Iterator[Participant]:
        """Every participant, in the order in which they start."""

    @abstractmethod
    def check(self) -> None:
        """Called before any participant is made. UsageError for a setting with which a participant cannot start."""

    def count_ready(self, trackers: Sequence[TracksWorkers]) -> int:
        """The number of workers that would be given work, whoever is asked. `trackers`: the present life of each participant that tracks workers, one at
        least."""
        counts: list[int] = [tracker.fleet.states[READY] for tracker in trackers]
        return min(counts)

    def has_started(self, trackers: Sequence[TracksWorkers]) -> bool:
        """Whether requests may come: each tracker is ready to place requests, and has every worker to choose from."""
        return self.count_ready(trackers) == len(self.workers) and all(tracker.ready for tracker in trackers)
