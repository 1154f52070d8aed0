"""A simulated fleet as Prometheus sees it: each process's own metrics, scraped every `INTERVAL_S` of virtual time."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from simulated import Fleet

from coordinator import Coordinator
from sllm.observe.metrics import CoordinatorMetrics, RoleMetrics, WorkerMetrics
from sllm.protocol.bus import EventBus
from sllm.protocol.events import Event
from sllm.protocol.node import Node
from sllm.virtual.host import Host
from worker import Worker

INTERVAL_S = 15.0
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")


class Scrapes:
    """Watches a fleet while it runs. `series` has what was scraped: a value for each scrape, None where there was none."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.kernel_drops = 0  # on the coordinator's socket: nothing of a simulation, so a test says it
        self.log_drops = 0
        self.scraped = 0
        self.series: dict[str, list[str | None]] = {}
        self._metrics: dict[str, RoleMetrics] = {}
        self._buses: dict[str, EventBus] = {}  # what each process tells its own metrics
        for host in fleet.world.hosts.values():
            self._begin("restart", host)
        fleet.world.lifecycle.append(self._begin)
        fleet.world.bus.subscribe(self._observe)
        fleet.world.every(INTERVAL_S, self._scrape)

    def _begin(self, what: str, host: Host) -> None:
        """A new process begins with new counters."""
        if what == "restart" and isinstance(host.node, Coordinator | Worker):
            kind = CoordinatorMetrics if isinstance(host.node, Coordinator) else WorkerMetrics
            self._metrics[host.name] = metrics = kind(1.7e9 + self.fleet.world.now)
            self._buses[host.name] = bus = EventBus()
            bus.subscribe_all(metrics.handlers)

    def _observe(self, node: Node, event: Event) -> None:
        bus = self._buses.get(node.node_id)
        if bus is not None:
            bus.publish(node, [event])

    def _scrape(self) -> None:
        for name, metrics in self._metrics.items():
            host = self.fleet.world.hosts[name]
            node: Any = host.node
            if node is None or host.frozen or getattr(node, "drained", False):
                continue
            self._collect(metrics, node)
            for line in metrics.render().splitlines():
                match = SAMPLE.match(line)
                if match is not None:
                    metric, labels, value = match.groups()
                    where = f'{metric}{{instance="{name}",job="sllm"{"," + labels if labels else ""}}}'
                    values = self.series.setdefault(where, [])
                    values.extend([None] * (self.scraped - len(values)))
                    values.append(value)
        self.scraped += 1

    def _collect(self, metrics: RoleMetrics, node: Any) -> None:
        metrics.collect(node)
        network = self.fleet.network
        metrics.collect_driver(
            SimpleNamespace(received=network.delivered, sent=network.sent, send_errors={}, sends_deferred=0, internal_errors={}),
            SimpleNamespace(kernel_drops=self.kernel_drops, receive_buffer_bytes=425984),
        )
        metrics.log_drops.set(self.log_drops)
        if isinstance(metrics, CoordinatorMetrics):
            engines = [row.engine for row in node.fleet.rows.values()]
            pending = sum(row.pending for row in node.fleet.rows.values())
            metrics.collect_fleet(dict(node.fleet.states), sum(e.running for e in engines), sum(e.waiting for e in engines), pending)
            metrics.up.set(1 if node.ready else 0)
        else:
            metrics.up.set(1 if node.state == "READY" and node.acknowledged else 0)

    def as_promtool(self) -> list[dict[str, str]]:
        """The series in promtool's notation. A process that is gone leaves a mark, as one does whose target Prometheus no longer finds."""
        listed = []
        for name, values in self.series.items():
            notes: list[str] = []
            values = values + [None] * (self.scraped - len(values))
            for before, value in zip([None, *values], values, strict=False):
                notes.append(value if value is not None else "stale" if before is not None else "_")
            listed.append({"series": name, "values": " ".join(notes)})
        return listed
