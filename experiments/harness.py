"""What the experiments share: virtual runs without a command line, work spread over all cores, and replaced sections of a document."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from config import Config
from simulation import VirtualRun
from sllm.cli import Options
from sllm.messages import LoadReport
from sllm.report.json import to_json
from sllm.results import WALL_CLOCK_KEYS
from sllm.schema import MESSAGES
from sllm.sim.faults import Schedule
from sllm.sim.hostile import Babbler, Mouth
from sllm.sim.inject import Injector
from sllm.streams import stream

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
R = TypeVar("R")


def configuration(**changes: Any) -> Config:
    """The defaults of a local run, whatever the environment says, with these fields changed."""
    return dataclasses.replace(Config.from_env({"DEPLOYMENT_MODE": "local"}), **changes)


def silent(*, virtual: bool = True, wire: bool = False) -> Options:
    """Options of a run that prints and writes nothing."""
    return Options(virtual, wire, faults="", json="", requests_csv="", html="", record="", quiet=True, no_color=True, dumb_terminal=True)


class Simulation(VirtualRun):
    """A virtual run with a schedule made in memory. `link`: fields of `sllm.sim.network.Link` for every link, from the start to the end.
    `strangers_per_s`: messages that holders of the key send to everybody, whatever keeps the rules but load reports, whose books are the workers'."""

    def __init__(
        self, config: Config, *, wire: bool = False, schedule: Schedule | None = None, link: dict[str, Any] | None = None, strangers_per_s: float = 0.0
    ) -> None:
        super().__init__(config, silent(wire=wire))
        self.schedule = schedule or Schedule()
        self.strangers_per_s = strangers_per_s
        if link:
            self.world.network.set_link(self.world.network.link._replace(**link))

    def _inject(self) -> float:
        injector = Injector(self.world, self.schedule)
        injector.install()
        return max(injector.end_s, self._add_strangers()) if self.strangers_per_s else injector.end_s

    def _add_strangers(self) -> float:
        """They speak from now on; returns until when."""
        names = self.system.catalog.names
        known = {"model": names, "worker_id": list(self.system.workers), "exclude": list(self.system.workers), "host": ["client", "coordinator", "nowhere"]}
        babbler = Babbler(stream(self.config.seed, "strangers"), known, [kind for kind in MESSAGES if kind is not LoadReport])
        until = self.world.now + self.config.duration_s
        mouth = Mouth(
            babbler, [host.address for host in self.world.hosts.values()], [f"stranger-{i}" for i in range(5)], per_s=self.strangers_per_s,
            now=self.world.now, until=until, codec=self.system.codec(),
        )  # fmt: skip
        self.world.add(mouth, ("strangers", 1))
        return until

    def complete(self) -> dict[str, Any]:
        """Conduct the run and return its results."""
        try:
            self.conduct()
        finally:
            self.close()
        return self.results()


def fingerprint(results: dict[str, Any], *more: object) -> str:
    """A short digest of everything in the results that the seed determines; equal for equal runs."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in results.items()}
    for path in WALL_CLOCK_KEYS:
        kept[path[0]] = None if len(path) == 1 else {key: value for key, value in kept[path[0]].items() if key != path[1]}
    return hashlib.blake2b((to_json(kept) + repr(more)).encode(), digest_size=8).hexdigest()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def spread(function: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[R]:
    """function(item) for every item, in order, over `jobs` processes; in this process if one is enough."""
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("fork").Pool(min(jobs, len(items)), maxtasksperchild=50) as pool:
        yield from pool.imap(function, items)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name -->` and `<!-- end of name -->` of a document. ValueError if they are not there."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    document = path.read_text(encoding="utf-8")
    head, found_begin, rest = document.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{path}: the markers {begin} and {end} are not there")
    path.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")
