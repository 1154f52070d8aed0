"""What an architecture is: the members of a fleet, the role that each plays, and who talks to whom.

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


class Life(NamedTuple):
    """What one life of a member begins with."""

    node_id: str
    stream: str  # names the seeded streams of its random choices
    incarnation: int
    now: float  # of the clock that its driver hands in
    peers: tuple[Address, ...] = ()  # where those are heard that it talks to first, as its member lists them
    codec: Codec | None = None  # None: it speaks in objects
    wall_offset_s: float = 0.0
    advertise: Address = ("", 0)  # where it is heard; ("", 0): it is told later


class Member(NamedTuple):
    """A member of the fleet: a node with an address of its own, one life after the other."""

    name: str
    port: int  # in virtual time, where a member's host has the member's name
    make: Callable[[Life], Node]
    peers: tuple[str, ...] = ()  # members that stand before it in the list, and whose addresses it is told
    restarts: bool = True  # its next life takes up what the last one did

    @property
    def address(self) -> Address:
        """Where it is heard in virtual time."""
        return self.name, self.port


class Architecture(ABC):
    """The roles of one kind of fleet, made from a configuration."""

    name: ClassVar[str]
    """What results, settings and people call it."""

    def __init__(self, config: Config, catalog: Catalog, stopwatch: Callable[[], float] | None = None) -> None:
        """`stopwatch` gives wall seconds, to time decisions with; None: they are not timed."""
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
    def members(self) -> Iterator[Member]:
        """Every member, in the order in which they start."""

    @abstractmethod
    def check(self) -> None:
        """UsageError for what no member can start with. Called before any is made."""

    def count_ready(self, trackers: Sequence[TracksWorkers]) -> int:
        """How many workers would be given work, whoever is asked. `trackers`: the present life of each member that tracks workers; there is at least one."""
        counts: list[int] = [tracker.fleet.states[READY] for tracker in trackers]
        return min(counts)

    def has_started(self, trackers: Sequence[TracksWorkers]) -> bool:
        """Whether requests may come: whoever is asked places them, on any worker."""
        return self.count_ready(trackers) == len(self.workers) and all(tracker.ready for tracker in trackers)
