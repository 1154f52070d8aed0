"""A small fleet in virtual time, for tests: the participants that a run would have, a workload, a network, faults and checkers. The test lets time pass."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from client import Client
from config import Config
from coordinator import Coordinator
from sllm.protocol.events import Event
from sllm.run.centralized import Centralized
from sllm.run.system import System
from sllm.run.virtual import add_to_world
from sllm.verify.all import Checkers
from sllm.virtual.faults import Schedule
from sllm.virtual.inject import Injector
from sllm.virtual.network import Network
from sllm.virtual.world import World
from worker import Worker

COORDINATOR = ("coordinator", 9000)
MakeCodec = Callable[[], Any]


class Fleet:
    """One coordinator, one client, some workers. Requests and faults come from the beginning, when nobody is ready yet. `trace` has every event.

    `kinds`: hardware of the first workers, the others have the configuration's. `client_kind` and the like: what plays the role instead.
    """

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
        config = dataclasses.replace(Config.from_env({"DEPLOYMENT_MODE": "local"}), seed=seed, workers=workers, models=models, **changes)
        config = dataclasses.replace(config, rate_per_s=rate_per_s, duration_s=0.0 if trace else duration_s, trace=trace or "", lengths=lengths)
        if kinds:
            mix = Counter([*kinds, *[config.hardware] * (workers - len(kinds))])
            config = dataclasses.replace(config, hardware=",".join(f"{kind}:{count}" for kind, count in mix.items()))
        roles = {"coordinator_kind": coordinator_kind, "worker_kind": worker_kind, "client_kind": client_kind}
        self.config = config
        self.system = System(config, wire=False, architecture=type("Roles", (Centralized,), roles), make_codec=make_codec)
        self.catalog = self.system.catalog
        self.network = network or Network()
        self.trace: list[Event] = []
        self.world = World(seed, self.network, wire=make_codec is not None)
        self.checkers = Checkers.watch(self.world, check if isinstance(check, tuple) else None) if check else None
        self.duration_s = duration_s
        hosts = {name: add_to_world(self.system, self.world, participant) for name, participant in self.system.participants.items()}
        self.coordinator: Any = hosts[COORDINATOR[0]].node
        client: Any = hosts[self.system.client].node
        self.client = client
        if trace or duration_s:
            requests, submit = self.system.workload(), client.submit
            self.world.feed(hosts[self.system.client], ((request.arrival_s, request) for request in requests), submit)
        self.injector = Injector(self.world, schedule or Schedule())
        self.injector.install()

    def record(self) -> Fleet:
        """Keep every event from now on in `trace`."""
        self.world.bus.subscribe(lambda node, event: self.trace.append(event))
        return self

    def run(self, within_s: float = 900.0) -> Fleet:
        """Arrivals, faults, then the liveness phase and the last look."""
        self.world.run(max(self.duration_s, self.injector.end_s))
        if self.checkers is not None:
            self.checkers.run_to_rest(within_s, 15.0 * max(1.0, self.config.report_interval_s))
        return self
