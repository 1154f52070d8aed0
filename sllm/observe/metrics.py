"""Metrics in Prometheus' text format 0.0.4, fed by events and by the counters of nodes.

Labels are bounded: actions, codes, reasons, states, tiers. There is no label for a worker, a model or a request.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sllm import __version__
from sllm.fleet.states import DEAD
from sllm.observe.causes import REFUSALS
from sllm.protocol import events
from sllm.protocol.bus import Handler
from sllm.protocol.messages import ERROR_CODES, EngineSnapshot

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
DECISION_BUCKETS_S = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2.5e-2, 0.1)
SERIES_MAX = 100  # label values of one metric; further values count as "other"

_NAME = re.compile(r"^[a-zA-Z_:][a-zA-Z0-9_:]*$")
Labels = tuple[str, ...]


def escape_label(value: str) -> str:
    """A label's value, escaped for the text format."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number(value: float) -> str:
    """A sample's value in the text format; whole numbers without a fraction."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


class Metric(ABC):
    """A name, its help, and a value for each combination of its labels."""

    kind = ""

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        if not _NAME.match(name) or any(not _NAME.match(label) or label in ("le", "__name__") for label in labels):
            raise ValueError(f"not a metric name with label names: {name} {labels}")
        self.name = name
        self.help = help_text
        self.labels = tuple(labels)

    def _key(self, series: Mapping[Labels, Any], values: Sequence[str]) -> Labels:
        key = tuple(values)
        if len(key) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {key}")
        if key in series or len(series) < SERIES_MAX:
            return key
        return ("other",) * len(key)

    def _braces(self, key: Labels, *extra: tuple[str, str]) -> str:
        pairs = [*zip(self.labels, key, strict=True), *extra]
        return "{" + ",".join(f'{name}="{escape_label(value)}"' for name, value in pairs) + "}" if pairs else ""

    @abstractmethod
    def samples(self) -> Iterable[str]:
        """The metric's lines, one for each set of label values."""

    def render(self) -> str:
        help_text = self.help.replace("\\", "\\\\").replace("\n", "\\n")
        return "\n".join((f"# HELP {self.name} {help_text}", f"# TYPE {self.name} {self.kind}", *self.samples())) + "\n"


class Gauge(Metric):
    """A value that goes up and down."""

    kind = "gauge"

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help_text, labels)
        self.values: dict[Labels, float] = {} if self.labels else {(): 0.0}

    def set(self, value: float, *labels: str) -> None:
        self.values[self._key(self.values, labels)] = value

    def samples(self) -> Iterable[str]:
        for key, value in self.values.items():
            yield f"{self.name}{self._braces(key)} {number(value)}"


class Counter(Gauge):
    """A value that only grows. Its name ends in `_total`. `set` takes over a total counted elsewhere."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Sequence[str] = ()) -> None:
        if not name.endswith("_total"):
            raise ValueError(f"a counter's name ends in _total: {name}")
        super().__init__(name, help_text, labels)

    def add(self, amount: float = 1.0, *labels: str) -> None:
        key = self._key(self.values, labels)
        self.values[key] = self.values.get(key, 0.0) + amount

    def begin(self, *values: str) -> Counter:
        """Show 0 for these values of the only label from the start, so that `rate` sees the first increase. Returns the counter."""
        for value in values:
            self.add(0.0, value)
        return self

    def set_all(self, totals: Mapping[str, float]) -> None:
        """Set the total of each value of the only label."""
        for value, total in totals.items():
            self.set(total, value)


class Histogram(Metric):
    """Counts by upper bound, cumulative when rendered, with sum and count."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> None:
        super().__init__(name, help_text, labels)
        if list(buckets) != sorted(set(buckets)) or not buckets:
            raise ValueError(f"{name}: buckets must grow")
        self.buckets = tuple(buckets)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        if not self.labels:
            self._series(())

    def _series(self, labels: Sequence[str]) -> tuple[Labels, list[int]]:
        key = self._key(self._counts, labels)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0] * (len(self.buckets) + 1)
            self._sums[key] = 0.0
        return key, counts

    def observe(self, value: float, *labels: str) -> None:
        key, counts = self._series(labels)
        counts[bisect_left(self.buckets, value)] += 1
        self._sums[key] += value

    def samples(self) -> Iterable[str]:
        for key, counts in self._counts.items():
            total = 0
            for bound, count in zip((*self.buckets, float("inf")), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{self._braces(key, ('le', number(bound)))} {total}"
            yield f"{self.name}_sum{self._braces(key)} {number(self._sums[key])}"
            yield f"{self.name}_count{self._braces(key)} {total}"


class Registry:
    """Metrics by name. ValueError for a name that is taken."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}

    def _add(self, metric: Metric) -> None:
        if metric.name in self._metrics:
            raise ValueError(f"metric {metric.name} is there already")
        self._metrics[metric.name] = metric

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        metric = Counter(name, help_text, labels)
        self._add(metric)
        return metric

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        metric = Gauge(name, help_text, labels)
        self._add(metric)
        return metric

    def histogram(self, name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        metric = Histogram(name, help_text, buckets, labels)
        self._add(metric)
        return metric

    def render(self) -> str:
        return "".join(metric.render() for metric in self._metrics.values())


# --- the metrics of each role -------------------------------------------------------------------------------------------------------


class RoleMetrics:
    """Metrics of one process: `handlers` count events, `collect` takes over counters of the node and the driver, `render` gives the text of a scrape."""

    def __init__(self, role: str, started_wall_s: float) -> None:
        self.registry = Registry()
        add = self.registry
        info = add.gauge("sllm_build_info", "Always 1; the labels say what runs.", ("version", "role", "python"))
        info.set(1, __version__, role, ".".join(map(str, sys.version_info[:3])))
        add.gauge("process_start_time_seconds", "Start of the process, seconds since 1970.").set(started_wall_s)
        self.received = add.counter("sllm_datagrams_received_total", "Datagrams read from the sockets.")
        self.sent = add.counter("sllm_datagrams_sent_total", "Datagrams handed to the network.")
        self.rejected = add.counter("sllm_datagrams_rejected_total", "Datagrams heard and not accepted, by reason.", ("reason",)).begin(*REFUSALS)
        self.send_errors = add.counter("sllm_datagrams_send_errors_total", "Datagrams that could not be sent, by reason.", ("reason",))
        self.internal_errors = add.counter("sllm_internal_errors_total", "Exceptions of our own, dropped with what was handled, by place.", ("place",))
        self.deferred = add.counter("sllm_datagrams_send_deferred_total", "Datagrams that waited for room in the send buffer.")
        self.kernel_drops = add.counter("sllm_kernel_drops_total", "Datagrams dropped by the kernel because the receive buffer was full.")
        self.buffer = add.gauge("sllm_receive_buffer_bytes", "Effective size of the main socket's receive buffer.")
        self.log_drops = add.counter("sllm_log_lines_dropped_total", "Log lines thrown away because nobody read them in time.")
        self.up = add.gauge("sllm_ready", "1 while the process says it is ready.")
        self.handlers: dict[type, Handler] = {}

    def collect(self, node: Any) -> None:
        """Take over the node's own counters. Each role's metrics extend this method."""
        self.rejected.set_all(node.rejected)

    def collect_driver(self, driver: Any, host: Any) -> None:
        """Take over the driver's counters and those of the node's sockets."""
        self.received.set(driver.received)
        self.sent.set(driver.sent)
        self.send_errors.set_all(driver.send_errors)
        self.deferred.set(driver.sends_deferred)
        self.internal_errors.set_all(driver.internal_errors)
        self.kernel_drops.set(host.kernel_drops)
        self.buffer.set(host.receive_buffer_bytes)

    def render(self) -> str:
        return self.registry.render()


class CoordinatorMetrics(RoleMetrics):
    """Metrics of the coordinator."""

    def __init__(self, started_wall_s: float) -> None:
        super().__init__("coordinator", started_wall_s)
        add = self.registry
        self.routed = add.counter("sllm_requests_routed_total", "Requests given a place, by action.", ("action",))
        self.refused = add.counter("sllm_requests_refused_total", "Requests that were given none, by code.", ("code",)).begin(*ERROR_CODES)
        self.placement = add.histogram("sllm_placement_duration_seconds", "Time one placement took.", DECISION_BUCKETS_S)
        self.eta = add.histogram("sllm_placement_eta_seconds", "Estimated time to first token of the places given.", LATENCY_BUCKETS_S)
        self.accepted = add.counter("sllm_reports_accepted_total", "Load reports applied.")
        self.reports_rejected = add.counter("sllm_reports_rejected_total", "Authentic load reports not applied, by reason.", ("reason",))
        self.workers = add.gauge("sllm_workers", "Workers known, by state.", ("state",))
        self.transitions = add.counter("sllm_worker_transitions_total", "Changes of a worker's state, by the new state.", ("state",))
        self.lost = add.counter("sllm_workers_lost_total", "Workers that fell silent for good without having said that they leave.")
        self.returned = add.counter("sllm_workers_returned_total", "Workers that were lost and have reported again.")
        self.running = add.gauge("sllm_fleet_running_requests", "Requests the workers said they run.")
        self.waiting = add.gauge("sllm_fleet_waiting_requests", "Requests the workers said are waiting.")
        self.pending = add.gauge("sllm_fleet_pending_requests", "Requests sent to workers that no report has confirmed yet.")
        self.degraded = add.gauge("sllm_degraded", "1 while expiry of silent workers is held.")
        self.handlers = {
            events.RequestRouted: self._on_routed,
            events.RequestRefused: lambda node, event: self.refused.add(1, event.code),
            events.WorkerStateChanged: self._on_state_changed,
        }

    def _on_state_changed(self, node: object, event: events.WorkerStateChanged) -> None:
        self.transitions.add(1, event.new)
        if event.new == DEAD and event.reason != "reported":  # a worker that reports its own end is not lost
            self.lost.add()
        elif event.old == DEAD:
            self.returned.add()

    def _on_routed(self, node: object, event: events.RequestRouted) -> None:
        self.routed.add(1, event.action)
        self.placement.observe(event.decision_s)
        self.eta.observe(event.eta_s)

    def collect(self, node: Any) -> None:
        super().collect(node)
        self.accepted.set(node.reports_accepted)
        self.reports_rejected.set_all(node.reports_rejected)
        self.degraded.set(1 if node.degraded else 0)

    def collect_fleet(self, states: Mapping[str, int], running: int, waiting: int, pending: int) -> None:
        """Totals over the fleet, from the last picture."""
        for state in self.workers.values:
            self.workers.values[state] = 0.0
        for name, count in states.items():
            self.workers.set(count, name)
        self.running.set(running)
        self.waiting.set(waiting)
        self.pending.set(pending)


class WorkerMetrics(RoleMetrics):
    """Metrics of one worker."""

    def __init__(self, started_wall_s: float) -> None:
        super().__init__("worker", started_wall_s)
        add = self.registry
        self.requests = add.counter("sllm_worker_requests_total", "Requests by outcome: admitted, completed, refused.", ("outcome",))
        self.tokens = add.counter("sllm_worker_output_tokens_total", "Tokens produced.")
        self.ttft = add.histogram("sllm_worker_first_token_seconds", "Arrival here to first token.", LATENCY_BUCKETS_S)
        self.queue_wait = add.histogram("sllm_worker_queue_wait_seconds", "Arrival here to start of the prefill.", LATENCY_BUCKETS_S)
        self.duration = add.histogram("sllm_worker_request_seconds", "Arrival here to last token.", LATENCY_BUCKETS_S)
        self.running = add.gauge("sllm_worker_running_requests", "Requests in the batch.")
        self.waiting = add.gauge("sllm_worker_waiting_requests", "Requests waiting for a place, memory or their model.")
        self.kv_used = add.gauge("sllm_worker_kv_used_ratio", "Used part of the KV cache, 0 to 1.")
        self.models = add.gauge("sllm_worker_models", "Models by where they are: gpu, loading, host, disk.", ("tier",))
        self.loads = add.counter("sllm_worker_model_loads_total", "Models loaded, by the tier they came from.", ("tier",))
        self.load_time = add.histogram("sllm_worker_model_load_seconds", "Time a model load took.", LATENCY_BUCKETS_S, ("tier",))
        self.evictions = add.counter("sllm_worker_model_evictions_total", "Models that left the GPU.")
        self.reports = add.counter("sllm_worker_reports_sent_total", "Load reports sent.")
        self.silences = add.counter("sllm_worker_coordinator_silences_total", "Times the coordinator was silent for too long.")
        self.draining = add.gauge("sllm_worker_draining", "1 while the worker takes nothing new.")
        self.handlers = {
            events.RequestAdmitted: lambda node, event: self.requests.add(1, "admitted"),
            events.RequestServed: self._on_served,
            events.ModelLoaded: self._on_loaded,
            events.ModelEvicted: lambda node, event: self.evictions.add(),
            events.CoordinatorSilent: lambda node, event: self.silences.add(),
        }

    def _on_served(self, node: object, event: events.RequestServed) -> None:
        self.requests.add(1, "completed")
        self.tokens.add(event.output_tokens)
        self.queue_wait.observe(event.queue_wait_s)
        self.ttft.observe(event.first_token_s)
        self.duration.observe(event.total_s)

    def _on_loaded(self, node: object, event: events.ModelLoaded) -> None:
        self.loads.add(1, event.tier_from)
        self.load_time.observe(event.load_s, event.tier_from)

    def collect(self, node: Any) -> None:
        super().collect(node)
        self.reports.set(node.reports_sent)
        self.requests.set(node.service.refused, "refused")
        self.draining.set(0 if node.state in ("STARTING", "READY") else 1)

    def collect_engine(self, snapshot: EngineSnapshot) -> None:
        """Load as the engine sees it."""
        self.running.set(snapshot.running)
        self.waiting.set(snapshot.waiting)
        self.kv_used.set(snapshot.kv_used)
        self.models.set(len(snapshot.gpu_models), "gpu")
        self.models.set(len(snapshot.loading), "loading")
        self.models.set(len(snapshot.host_models), "host")
        self.models.set(len(snapshot.disk_models), "disk")


class ClientMetrics(RoleMetrics):
    """Metrics of a load generator."""

    def __init__(self, started_wall_s: float) -> None:
        super().__init__("client", started_wall_s)
        add = self.registry
        self.requests = add.counter("sllm_client_requests_total", "Requests by outcome: sent, completed, failed, rejected.", ("outcome",))
        self.actions = add.counter("sllm_client_completed_by_action_total", "Completed requests, by how they were placed.", ("action",))
        self.retries = add.counter("sllm_client_placements_retried_total", "Placements given up for another.")
        self.ttft = add.histogram("sllm_client_first_token_seconds", "Time to first token.", LATENCY_BUCKETS_S)
        self.e2e = add.histogram("sllm_client_request_seconds", "Time to last token.", LATENCY_BUCKETS_S)
        self.in_flight = add.gauge("sllm_client_in_flight_requests", "Requests not yet over.")
        self.handlers = {
            events.RequestSent: lambda node, event: self.requests.add(1, "sent"),
            events.RequestFailed: lambda node, event: self.requests.add(1, "failed"),
            events.RequestRejected: lambda node, event: self.requests.add(1, "rejected"),
            events.RequestRetried: lambda node, event: self.retries.add(),
            events.RequestCompleted: self._on_completed,
        }

    def _on_completed(self, node: object, event: events.RequestCompleted) -> None:
        self.requests.add(1, "completed")
        self.actions.add(1, event.action)
        self.ttft.observe(event.ttft_s)
        self.e2e.observe(event.e2e_s)

    def collect(self, node: Any) -> None:
        super().collect(node)
        self.in_flight.set(node.in_flight)
