"""A worker as a process: configured by its environment; it reports to the coordinator and serves what clients send. `--help` lists the variables."""

from __future__ import annotations

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from config import Config
from sllm.deploy.launch import launch
from sllm.deploy.shell import Service
from sllm.live.bridge import Answer
from sllm.live.http import Page
from sllm.live.sockets import local_address
from sllm.observe.metrics import WorkerMetrics
from sllm.protocol.bus import EventBus
from sllm.protocol.messages import READY, STARTING, Address, EngineSnapshot
from sllm.protocol.seeds import rng_for
from sllm.run.assemble import build_catalog, build_engine
from worker import Worker

RECEIVE_BUFFER_BYTES = 1 << 20
SOURCE = "source"  # ADVERTISE_HOST: clients reach the worker where its reports come from, whatever that is
WILDCARDS = ("", "0.0.0.0", "::")


def own_host(config: Config, coordinator: Address) -> str:
    """The host under which the coordinator and the clients reach this worker; "": where its datagrams come from. Each report says the host, because a report
    is signed and the address that a datagram comes from is not. The host changes with the coordinator's address and with our own. A worker that listens
    everywhere and speaks to its coordinator over loopback may be heard through a published port of a container: then only the coordinator knows the host."""
    if config.advertise_host:
        return "" if config.advertise_host == SOURCE else config.advertise_host
    if config.bind_host not in WILDCARDS:
        return config.bind_host
    own = local_address(coordinator)
    return "" if own == "::1" or own.startswith("127.") else own


class WorkerPart:
    """What the service needs to know of a worker."""

    page: Page | None = None

    def __init__(self, service: Service, node: Worker) -> None:
        self.node = node
        self.metrics = WorkerMetrics(service.started_wall_s)
        self._service = service
        node.engine.wake = self._wake

    def _wake(self) -> None:
        """Something happened in an engine that could not know when it would. What happens before there is a socket waits for the first timer."""
        if self._service.host is not None:
            self._service.host.wake()

    def ready(self) -> tuple[bool, str]:
        if not self._service.resolved:
            return False, f"the coordinator's name {self._service.config.coordinator_host} has no address"
        if self.node.state in (STARTING, READY) and not self.node.acknowledged:
            return False, f"the coordinator at {':'.join(map(str, self.node.coordinator))} has not acknowledged a report yet"
        if self.node.reporter.displaced:
            return False, f"a newer worker reports under the name {self.node.node_id}: give each an id of its own (WORKER_ID)"
        if self.node.reporter.rival:
            return False, "two coordinators answer under one address: stop one of them"
        why = {STARTING: "loading the first models", READY: "ready"}.get(self.node.state, "draining")
        return self.node.state == READY, why

    def subscribe(self, bus: EventBus) -> None:
        bus.subscribe_all(self.metrics.handlers)

    def tick(self) -> None:
        if self.node.reporter.suspects_rival(self._service.clock.now):
            self._service.renew_way()  # whatever balances datagrams leads to the other one in time

    def collect(self, answer: Callable[[], None]) -> None:
        self.metrics.collect_engine(self._snapshot())
        answer()

    def _snapshot(self) -> EngineSnapshot:
        """What the engine is at; what it did until now goes out."""
        snapshot = self.node.snapshot(self._service.clock.now)
        if self._service.host is not None:
            self._service.host.touch()
        return snapshot

    def state(self, answer: Answer) -> None:
        node = self.node
        snap = self._snapshot()
        answer(
            {
                "state": node.state,
                "coordinator": list(node.coordinator),
                "hardware": node.config.hardware,
                "running": snap.running,
                "waiting": snap.waiting,
                "slots": snap.slots,
                "wait_s": round(snap.wait_s, 4),
                "kv_used": round(snap.kv_used, 4),
                "gpu_free_bytes": snap.gpu_free_bytes,
                "models": list(snap.gpu_models),
                "loading": [name for name, _ in snap.loading],
                "host": list(snap.host_models),
                "served": node.service.served,
                "refused": node.service.refused,
                "reports_sent": node.reports_sent,
                "rejected": dict(node.rejected),
                "total": 1,
            }
        )

    def page_state(self, state: Any, query: Mapping[str, str]) -> dict[str, Any]:
        return dict(state)

    def stop(self) -> None:
        self.node.drain(self._service.clock.now)

    def finished(self) -> bool:
        return self.node.drained


def serve(config: Config, environ: Mapping[str, str]) -> int:
    """Run until a signal asks for the end; then finish what runs, within the drain timeout."""
    catalog = build_catalog(config)
    engine = build_engine(config, catalog, rng_for(config.seed, f"{config.get_worker_id()}/service"))
    with Service("worker", config, environ) as service:

        def make(address: Address) -> WorkerPart:
            node = Worker(
                config, catalog, engine, config.get_coordinator_address(), rng_for(config.seed, config.get_worker_id()), service.incarnation,
                node_id=config.get_worker_id(), codec=service.codec, wall_offset_s=service.clock.wall_offset_s,
                advertise=("", address[1]), own_host=partial(own_host, config), now=service.clock.now,
            )  # fmt: skip
            return WorkerPart(service, node)

        service.listen(make, config.worker_port, "WORKER_PORT", uplink=True, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
        service.run()
    return 0


def main(argv: Sequence[str]) -> int:
    return launch("worker", "One worker of a serverless LLM fleet.", argv, os.environ, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
