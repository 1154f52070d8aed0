"""All checkers of invariants, which watch every run.

A checker handles events as they happen (O(1) each), inspects a bounded number of nodes at regular intervals, and inspects all nodes at the end. A checker
knows nodes by their capabilities (`sllm.protocol.capabilities`), never by their class. A broken invariant raises InvariantViolation with the seed, the time
and the last events; the same seed breaks the same invariant at the same moment.

A new checker is a subclass of Checker with a name, in any file of this folder; the checkers are found by listing the folder.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType

from sllm import verify
from sllm.inputs.folder import read_folder
from sllm.protocol.bus import EventBus
from sllm.verify.base import Checker, Context, InvariantViolation
from sllm.virtual.host import Host
from sllm.virtual.world import World

__all__ = ["Checkers", "InvariantViolation", "list_checkers"]


@cache
def list_checkers() -> dict[str, type[Checker]]:
    """Every checker of this folder, by name, in alphabetical order. ImportError names the files that cannot be imported, because a run without their checkers
    would not check all invariants."""
    folder = read_folder(verify, _checkers_of)
    if folder.broken:
        raise ImportError("\n".join(folder.broken.values()))
    return folder.found


def _checkers_of(module: ModuleType) -> dict[str, type[Checker]]:
    kinds = (kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Checker) and kind.__module__ == module.__name__)
    return {kind.name: kind for kind in kinds if kind.name}


class Checkers:
    """The checkers of one run."""

    def __init__(self, context: Context, names: Iterable[str] | None = None) -> None:
        """`names` of checkers; None: all. KeyError for a name that no checker has."""
        self.context = context
        known = list_checkers()
        self.all = [known[name](context) for name in (known if names is None else names)]

    @classmethod
    def watch(cls, world: World, names: Iterable[str] | None = None, inspect_every_s: float = 1.0) -> Checkers:
        """Watch a world. Call it before hosts are added, so that no event is missed."""
        checkers = cls(Context(world.seed, lambda: world.now, world.bus.recent, world), names)
        checkers.subscribe(world.bus)
        world.lifecycle.append(checkers.on_life)
        world.every(inspect_every_s, checkers.inspect)
        return checkers

    @classmethod
    def live(cls, seed: int, bus: EventBus, now: Callable[[], float]) -> Checkers:
        """Watch the events of a live run."""
        checkers = cls(Context(seed, now, bus.recent))
        checkers.subscribe(bus)
        return checkers

    def subscribe(self, bus: EventBus) -> None:
        """Subscribe each checker to the events that it needs."""
        for checker in self.all:
            bus.subscribe_all(checker.handlers())

    def on_life(self, what: str, host: Host) -> None:
        for checker in self.all:
            checker.on_life(what, host)

    def inspect(self) -> None:
        for checker in self.all:
            checker.inspect()

    def finish(self, at_rest: bool) -> None:
        """The last inspection. `at_rest` only after every request has ended and some report intervals have passed without a fault."""
        for checker in self.all:
            checker.finish(at_rest)

    @property
    def counts(self) -> dict[str, int]:
        """The number of checks, by checker."""
        return {checker.name: checker.checked for checker in self.all}

    @property
    def checked(self) -> int:
        return sum(checker.checked for checker in self.all)

    @property
    def at_rest(self) -> bool:
        """Whether no work is left that a node could go on with: no request at a client, no request at a worker."""
        return all(checker.at_rest for checker in self.all)

    def run_to_rest(self, within_s: float, grace_s: float, step_s: float = 1.0) -> float:
        """The liveness phase, after the last arrival and fault: run until no work is left, then `grace_s` longer for the last reports and acknowledgements
        (some report intervals), then make the last inspection. Both times are by the slowest clock. InvariantViolation if nothing comes to an end for
        `within_s`; the whole phase may take longer, because overloaded workers still do work that clients have given up. Returns the seconds until no work
        was left."""
        world = self.context.world
        assert world is not None
        slowest = min((host.clock.rate for host in world.hosts.values() if host.clock.rate < 1.0 and not host.stands_still), default=1.0)
        within_s, grace_s = within_s / slowest, grace_s / slowest
        began = since = world.now
        finished = self._finished
        while not self.at_rest:
            if world.now >= since + within_s:  # the same sum as below; the difference `now - since` could round to less than `within_s` for ever
                problem = f"not at rest, and nothing has come to an end for {within_s:.12g} s"
                raise InvariantViolation("liveness", problem, world.seed, world.now, world.bus.recent)
            world.run(min(world.now + step_s, since + within_s))
            if self._finished != finished:
                finished, since = self._finished, world.now
        took_s = world.now - began
        world.run(world.now + grace_s)
        self.finish(at_rest=self.at_rest)
        return took_s

    @property
    def _finished(self) -> int:
        return sum(checker.finished for checker in self.all)
