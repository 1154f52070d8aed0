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
from sllm.run.architecture import Architecture, Birth, Participant
from sllm.run.assemble import build_engine
from worker import Worker

CLIENT, CLIENT_PORT = "client", 7000


class Centralized(Architecture):
    """One coordinator, the workers, one client."""

    name = "centralized"
    coordinator_kind: type[Coordinator] = Coordinator
    worker_kind: type[Worker] = Worker
    client_kind: type[Client] = Client

    def participants(self) -> Iterator[Participant]:
        peers = (COORDINATOR_ID,)
        yield Participant(COORDINATOR_ID, self.config.coordinator_port, self.make_coordinator)
        for name, config in self.workers.items():
            yield Participant(name, config.worker_port, partial(self.make_worker, config), peers)
        yield Participant(CLIENT, CLIENT_PORT, self.make_client, peers, restarts=False)

    def check(self) -> None:
        make_policy(self.config.policy)
        for config in {config.hardware: config for config in self.workers.values()}.values():
            build_engine(config, self.catalog, rng_for(config.seed, "check"))

    def make_coordinator(self, birth: Birth) -> Node:
        return self.coordinator_kind(
            self.config, self.catalog, make_policy(self.config.policy), rng_for(self.config.seed, birth.stream), birth.incarnation,
            node_id=birth.node_id, codec=birth.codec, wall_offset_s=birth.wall_offset_s, stopwatch=self.stopwatch, now=birth.now,
        )  # fmt: skip

    def make_worker(self, config: Config, birth: Birth) -> Node:
        (coordinator,) = birth.peers
        engine = build_engine(config, self.catalog, rng_for(config.seed, f"{birth.stream}/service"))
        return self.worker_kind(
            config, self.catalog, engine, coordinator, rng_for(config.seed, birth.stream), birth.incarnation,
            node_id=birth.node_id, codec=birth.codec, wall_offset_s=birth.wall_offset_s, advertise=birth.advertise, now=birth.now,
        )  # fmt: skip

    def make_client(self, birth: Birth) -> Client:
        (coordinator,) = birth.peers
        return self.client_kind(
            self.config, coordinator, rng_for(self.config.seed, birth.stream), birth.incarnation,
            node_id=birth.node_id, codec=birth.codec, wall_offset_s=birth.wall_offset_s, now=birth.now,
        )  # fmt: skip
