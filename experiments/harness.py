"""What the experiments share: virtual runs without a command line, work spread over all cores, and replaced sections of a document."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from config import Config
from experiments.strangers import ADDRESS, Strangers
from sllm.fleet.states import SUSPECT
from sllm.observe.report.json import to_json
from sllm.observe.results import ReportFigures, without_wall
from sllm.protocol.limits import REPORT_INTERVAL_MAX_S
from sllm.protocol.messages import DRAINING, READY, STARTING
from sllm.run.command_line import Options
from sllm.run.run import Run
from sllm.run.virtual import VirtualRun
from sllm.virtual.faults import Schedule
from sllm.virtual.network import Latency, Link
from sllm.workload import Request

ROOT = Path(__file__).resolve().parent.parent
PROBE = "probe-"  # how the ids of probes begin
START_S = 90.0  # within this a worker has loaded the models it begins with
LOADS_S = 600.0  # so long probes wait for loads that nobody needs any more; a fleet that still loads then is not asked
STRAGGLERS_S = 10.0  # no datagram is under way for longer
T = TypeVar("T")
R = TypeVar("R")


def configuration(**changes: Any) -> Config:
    """The defaults of a local run, whatever the environment says, with these fields changed."""
    return dataclasses.replace(Config.from_env({"DEPLOYMENT_MODE": "local"}), **changes)


def silent(*, virtual: bool = True, wire: bool = False) -> Options:
    """Options of a run that prints and writes nothing."""
    return Options(virtual, wire, faults="", json="", requests_csv="", html="", record="", quiet=True, no_color=True, dumb_terminal=True)


class Simulation(VirtualRun):
    """A virtual run with a schedule made in memory. `link`: fields of `sllm.virtual.network.Link` for every link, from the start to the end. `reshape`: called
    with each request of the workload for the one that is to come instead. `strangers_per_s`: messages of strangers while requests come. `probes`: so many
    more requests come when everything is at rest."""

    def __init__(
        self,
        config: Config,
        *,
        wire: bool = False,
        schedule: Schedule | None = None,
        link: dict[str, Any] | None = None,
        reshape: Callable[[Request], Request] = lambda request: request,
        strangers_per_s: float = 0.0,
        probes: int = 0,
    ) -> None:
        super().__init__(config, silent(wire=wire), schedule=schedule)
        self.unhealed = ""  # what has not come right although nothing goes wrong any more
        self._reshape = reshape
        self._probes = probes
        self._strangers_per_s = strangers_per_s
        self._strangers: Strangers | None = None
        self._trouble_ends_s = 0.0  # with strangers
        if link:
            self.world.network.set_link(self.world.network.link._replace(**link))

    def arrivals(self) -> Iterator[tuple[float, Request]]:
        for at, request in super().arrivals():
            yield at, self._reshape(request)

    def inject(self) -> None:
        super().inject()
        if self._strangers_per_s:
            self._trouble_ends_s = self.world.now + self.config.duration_s
            self._strangers = Strangers(self.system, per_s=self._strangers_per_s, until=self._trouble_ends_s, now=self.world.now)
            self.world.add(self._strangers, ADDRESS)

    def last_fault_s(self) -> float:
        """When nothing goes wrong any more: no fault of an experiment is passed over."""
        return max(self.injector.end_s, self._trouble_ends_s)

    def report_figures(self) -> ReportFigures:
        """What strangers reported counts as sent."""
        figures = super().report_figures()
        return figures._replace(sent=figures.sent + self._strangers.reports_sent) if self._strangers is not None else figures

    def come_to_rest(self) -> None:
        super().come_to_rest()
        if self._probes:
            self.world.network.set_link(Link(Latency("constant", 0.001)))  # the last thing that was wrong
            self.world.run(self.world.now + STRAGGLERS_S)
            loading = self._is_loading_on()
            self.unhealed = self._find_unhealed()
            if self._alive and not loading and not self.unhealed:
                self._probe()
                super().come_to_rest()

    def _is_loading_on(self) -> bool:
        """Let loads end: they are made one after the other, even for requests that have been given up meanwhile. Whether some have not."""
        fleet, last_s = self.system.tracker.fleet, self.world.now + LOADS_S
        while self.world.now < last_s:
            rows = [fleet.rows[name] for name in self.system.workers if name in fleet.rows]
            if not any(row.state == READY and row.engine.loading for row in rows):
                return False
            self.world.run(self.world.now + (self.config.report_interval_s or 1.0))
        return True

    @property
    def _alive(self) -> int:
        """Workers that run and could work."""
        return sum(host.node is not None for name, host in self.world.hosts.items() if name in self.system.workers)

    def _find_unhealed(self) -> str:
        """Wait for as long as a coordinator may need to know who lives and who does not; says what it still has wrong then."""
        config, fleet = self.config, self.system.tracker.fleet
        interval_s = config.report_interval_s or 1.0
        rarest_s = REPORT_INTERVAL_MAX_S if self._strangers is not None else interval_s
        timeout_s = max(config.worker_timeout_s, config.suspect_intervals * rarest_s)
        last_s = self.world.now + 2.0 * timeout_s + config.hold_max_s + 5.0 * interval_s + START_S
        while True:
            wrong = {state: fleet.states[state] for state in (STARTING, DRAINING, SUSPECT) if fleet.states[state]}
            if not wrong and fleet.states[READY] == self._alive and not self.system.tracker.degraded:
                return ""
            if self.world.now >= last_s:
                held = f", expiry held because {self.system.tracker.degraded}" if self.system.tracker.degraded else ""
                return f"{self._alive} workers live, the coordinator counts {fleet.states[READY]} READY and {wrong or 'no others'}{held}"
            self.world.run(self.world.now + interval_s)

    def _probe(self) -> None:
        """Ask for the first model of the catalogue, which fits every worker, in the last moment at which anything comes."""
        host = self.handles[self.system.client]
        for number in range(self._probes):
            self.submit(Request(0.0, f"{PROBE}{number}", self.system.catalog.names[0], 100, 10), host.read_clock())
        host.touch()

    def complete(self) -> dict[str, Any]:
        """Conduct the run and return its results."""
        return complete(self)


def complete(run: Run) -> dict[str, Any]:
    """Conduct a run, close it whatever happens, and return its results. Broken invariants are in them and in `run.violations`."""
    try:
        run.conduct()
    finally:
        run.close()
    return run.results()


def fingerprint(results: dict[str, Any], *more: object) -> str:
    """A short digest of everything that was measured and that the seed determines; equal for equal runs, as objects or as bytes on the wire."""
    kept = without_wall(results) | {"run": {key: value for key, value in results["run"].items() if key != "settings"}}
    return hashlib.blake2b((to_json(kept) + repr(more)).encode(), digest_size=8).hexdigest()


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def spread(function: Callable[[T], R], items: Sequence[T], jobs: int) -> Iterator[R]:
    """function(item) for every item, in order, over `jobs` processes, which Ctrl-C ends through this one; in this process if one is enough."""
    if jobs <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))  # for the processes of the pool, from their first moment on
    try:
        pool = multiprocessing.get_context("fork").Pool(min(jobs, len(items)), maxtasksperchild=50)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with pool:
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
