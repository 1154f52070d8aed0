"""The architecture with one coordinator: workers report to it, clients ask it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from client import Client
from config import Config
from coordinator import Coordinator
from sllm.placement.registry import make_policy
from sllm.protocol.messages import COORDINATOR_ID
from sllm.protocol.node import Node
from sllm.protocol.seeds import rng_for
from sllm.run.architecture import Architecture, Life, Member
from sllm.run.assemble import build_engine
from worker import Worker

CLIENT, CLIENT_PORT = "client", 7000


class Centralized(Architecture):
    """One coordinator, the workers, one client."""

    name = "centralized"
    coordinator_kind: type[Coordinator] = Coordinator
    worker_kind: type[Worker] = Worker
    client_kind: type[Client] = Client

    def members(self) -> Iterator[Member]:
        peers = (COORDINATOR_ID,)
        yield Member(COORDINATOR_ID, self.config.coordinator_port, self.make_coordinator)
        for name, config in self.workers.items():
            yield Member(name, config.worker_port, partial(self.make_worker, config), peers)
        yield Member(CLIENT, CLIENT_PORT, self.make_client, peers, restarts=False)

    def check(self) -> None:
        make_policy(self.config.policy)
        for config in {config.hardware: config for config in self.workers.values()}.values():
            build_engine(config, self.catalog, rng_for(config.seed, "check"))

    def make_coordinator(self, life: Life) -> Node:
        return self.coordinator_kind(
            self.config, self.catalog, make_policy(self.config.policy), rng_for(self.config.seed, life.stream), life.incarnation,
            node_id=life.node_id, codec=life.codec, wall_offset_s=life.wall_offset_s, stopwatch=self.stopwatch, now=life.now,
        )  # fmt: skip

    def make_worker(self, config: Config, life: Life) -> Node:
        (coordinator,) = life.peers
        engine = build_engine(config, self.catalog, rng_for(config.seed, f"{life.stream}/service"))
        return self.worker_kind(
            config, self.catalog, engine, coordinator, rng_for(config.seed, life.stream), life.incarnation,
            node_id=life.node_id, codec=life.codec, wall_offset_s=life.wall_offset_s, advertise=life.advertise, now=life.now,
        )  # fmt: skip

    def make_client(self, life: Life) -> Client:
        (coordinator,) = life.peers
        return self.client_kind(
            self.config, coordinator, rng_for(self.config.seed, life.stream), life.incarnation,
            node_id=life.node_id, codec=life.codec, wall_offset_s=life.wall_offset_s, now=life.now,
        )  # fmt: skip
