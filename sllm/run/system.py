"""The roles of one fleet in one process, made from a configuration, every life of each remembered, so that the books include those that crashed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import reduce

from client import Client
from config import Config
from coordinator import Coordinator
from sllm.deploy.keys import ephemeral_keyring
from sllm.engine.base import EngineUsage
from sllm.observe.results import ReportFigures, WorkerFigures
from sllm.placement.registry import make_policy
from sllm.protocol.messages import READY, Address
from sllm.protocol.node import Codec
from sllm.protocol.seeds import rng_for
from sllm.run.assemble import build_catalog, build_engine, build_workload, count_trace_models, mix_models
from sllm.run.hardware_mix import hardware_of_workers
from sllm.wire.frame import FrameCodec
from sllm.workload import Workload
from worker import Worker


class System:
    """The roles of one fleet. Every random choice comes from a stream of the configuration's seed, named by role and life."""

    def __init__(self, config: Config, *, wire: bool, stopwatch: Callable[[], float] | None = None) -> None:
        self.config = config
        self._trace_models = count_trace_models(config)
        self.catalog = build_catalog(config, self._trace_models, mix_models(config))
        kinds = hardware_of_workers(config.hardware, config.workers)
        configs = {kind: dataclasses.replace(config, hardware=kind) for kind in dict.fromkeys(kinds)}
        self.hardware: Counter[str] = Counter(kinds)  # workers by hardware
        self.coordinator_address: Address = ("coordinator", config.coordinator_port)
        self.coordinators: list[Coordinator] = []  # every life
        self.workers: dict[str, list[Worker]] = {f"worker-{i}": [] for i in range(config.workers)}
        self._worker_configs = {name: configs[kind] for name, kind in zip(self.workers, kinds, strict=True)}
        self.clients: list[Client] = []
        self._stopwatch = stopwatch
        self._keyring = ephemeral_keyring() if wire else None
        make_policy(config.policy)  # a bad one is an error before anything starts
        for worker_config in configs.values():
            build_engine(worker_config, self.catalog, rng_for(config.seed, "check"))

    def codec(self) -> Codec | None:
        return FrameCodec(self._keyring) if self._keyring is not None else None

    def make_coordinator(self, incarnation: int, now: float, wall_offset_s: float = 0.0) -> Coordinator:
        life = len(self.coordinators) + 1
        node = Coordinator(
            self.config, self.catalog, make_policy(self.config.policy), rng_for(self.config.seed, f"coordinator/{life}"), incarnation,
            codec=self.codec(), wall_offset_s=wall_offset_s, stopwatch=self._stopwatch, now=now,
        )  # fmt: skip
        self.coordinators.append(node)
        return node

    def make_worker(self, name: str, incarnation: int, now: float, wall_offset_s: float = 0.0, advertise: Address = ("", 0)) -> Worker:
        """The next life of a worker. `advertise` is where it is reached, which its reports say."""
        lives = self.workers[name]
        config = self._worker_configs[name]
        seed, role = config.seed, f"{name}/{len(lives) + 1}"
        engine = build_engine(config, self.catalog, rng_for(seed, f"{role}/service"))
        node = Worker(
            config, self.catalog, engine, self.coordinator_address, rng_for(seed, role), incarnation,
            node_id=name, codec=self.codec(), wall_offset_s=wall_offset_s, advertise=advertise, now=now,
        )  # fmt: skip
        lives.append(node)
        return node

    def make_client(self, incarnation: int, now: float, wall_offset_s: float = 0.0) -> Client:
        rng = rng_for(self.config.seed, f"client/{len(self.clients) + 1}")
        node = Client(self.config, self.coordinator_address, rng, incarnation, codec=self.codec(), wall_offset_s=wall_offset_s, now=now)
        self.clients.append(node)
        return node

    def workload(self, *, live: bool = False) -> Workload:
        """The requests of this run, from the configuration."""
        return build_workload(self.config, self.catalog, self._trace_models, live=live)

    @property
    def all_workers(self) -> list[Worker]:
        """Every life of every worker."""
        return [node for lives in self.workers.values() for node in lives]

    @property
    def ready(self) -> int:
        """Workers that the present coordinator would give work to."""
        return self.coordinators[-1].fleet.states[READY]

    @property
    def started(self) -> bool:
        return self.coordinators[-1].ready and self.ready == len(self.workers)

    @property
    def in_flight(self) -> int:
        return sum(client.in_flight for client in self.clients)

    def usage(self, now: float) -> list[EngineUsage]:
        """What each worker had in use since its start, all its lives together, where all go by one clock and none crashes."""
        return [reduce(EngineUsage.plus, [node.engine.usage(now) for node in lives], EngineUsage()) for lives in self.workers.values()]

    @property
    def waiting(self) -> int:
        """Requests that wait at the workers."""
        return sum(lives[-1].engine.waiting for lives in self.workers.values() if lives)

    def worker_figures(self, usages: Iterable[EngineUsage]) -> list[WorkerFigures]:
        """What each worker is, and what it had in use."""
        rows = []
        for (name, lives), usage in zip(self.workers.items(), usages, strict=True):
            engine = lives[-1].engine
            rows.append(WorkerFigures(name, self._worker_configs[name].hardware, engine.slots, engine.memory_bytes, usage))
        return rows

    def report_figures(self, copies: int = 0, lost: int | None = None, under_way: int = 0) -> ReportFigures:
        """The books of the reports; `copies` the network made count as sent. `lost` is what it lost; None: nobody knows but by what was not heard.
        `under_way` is what the network still has."""
        rejected: Counter[str] = Counter()
        for coordinator in self.coordinators:
            rejected.update(coordinator.reports_rejected)
        sent = sum(worker.reports_sent for worker in self.all_workers) + copies
        return ReportFigures(sent, sum(c.reports_accepted for c in self.coordinators), rejected, lost, under_way)
