"""A small fleet in virtual time, for tests: the real roles, a workload, a network, faults and checkers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from client import Client
from config import Config
from coordinator import Coordinator
from sllm.engine import LlmEngine
from sllm.models.catalogue import Catalog
from sllm.placement.registry import make_policy
from sllm.protocol.events import Event
from sllm.protocol.node import Node
from sllm.protocol.seeds import rng_for
from sllm.verify.all import Checkers
from sllm.virtual.faults import Schedule
from sllm.virtual.inject import Injector
from sllm.virtual.network import Network
from sllm.virtual.world import World
from sllm.workload import WorkloadSpec, generate
from worker import Worker

COORDINATOR = ("coordinator", 9000)
MakeCodec = Callable[[], Any]


class Fleet:
    """One coordinator, one client, some workers. `trace` has every event. `kinds`: hardware of the first workers, the others have the configuration's."""

    def __init__(
        self,
        seed: int = 1,
        *,
        workers: int = 4,
        rate_per_s: float = 4.0,
        duration_s: float = 30.0,
        network: Network | None = None,
        schedule: Schedule | None = None,
        make_codec: MakeCodec | None = None,
        check: bool | tuple[str, ...] = True,
        client_kind: type[Client] = Client,
        coordinator_kind: type[Coordinator] = Coordinator,
        worker_kind: type[Worker] = Worker,
        trace: str | None = None,
        lengths: str = "azure-conv",
        models: int = 8,
        kinds: Sequence[str] = (),
        **changes: Any,
    ) -> None:
        self.config = config = dataclasses.replace(Config.from_env({"DEPLOYMENT_MODE": "local"}), **changes)
        self.catalog = catalog = Catalog.demo(models)
        self.network = network or Network()
        self.trace: list[Event] = []
        self.world = world = World(seed, self.network, wire=make_codec is not None)
        self.checkers = Checkers.watch(world, None if check is True else check) if check else None
        self.duration_s = duration_s
        codec = make_codec or (lambda: None)

        def coordinator(incarnation: int, now: float) -> Coordinator:
            rng = rng_for(seed, f"coordinator/{incarnation}")
            return coordinator_kind(config, catalog, make_policy(config.policy), rng, incarnation, codec=codec(), now=now)

        def worker(name: str, own: Config) -> Callable[[int, float], Node]:
            def make(incarnation: int, now: float) -> Node:
                engine = LlmEngine(catalog, catalog.get_hardware(own.hardware))
                rng = rng_for(seed, f"{name}/{incarnation}")
                return worker_kind(
                    own, catalog, engine, COORDINATOR, rng, incarnation, node_id=name, codec=codec(), advertise=(name, 8000), now=now
                )  # fmt: skip

            return make

        self.coordinator = coordinator(1, 0.0)
        world.add(self.coordinator, COORDINATOR, coordinator)
        for number in range(1, workers + 1):
            name = f"worker-{number}"
            make = worker(name, dataclasses.replace(config, hardware=kinds[number - 1]) if number <= len(kinds) else config)
            world.add(make(1, 0.0), (name, 8000), make)
        self.client = client_kind(config, COORDINATOR, Random(f"{seed}/client"), 1, codec=codec())
        host = world.add(self.client, ("client", 7000))
        spec = WorkloadSpec(rate_per_s=rate_per_s, duration_s=None if trace else duration_s, trace=trace, lengths=lengths)
        world.feed(host, ((request.arrival_s, request) for request in generate(spec, catalog.names, seed)), self.client.submit)
        self.injector = Injector(world, schedule or Schedule())
        self.injector.install()

    def record(self) -> Fleet:
        """Keep every event from now on in `trace`."""
        self.world.bus.subscribe(lambda node, event: self.trace.append(event))
        return self

    def run(self, within_s: float = 900.0) -> Fleet:
        """Arrivals, faults, then the liveness phase and the last look."""
        self.world.run(max(self.duration_s, self.injector.end_s))
        if self.checkers is not None:
            self.checkers.settle(within_s, 15.0 * max(1.0, self.config.report_interval_s))
        return self
