"""A load generator as a process: waits for the coordinator, sends the workload its environment describes, prints what came of it.

Exit status 0 when every request was completed, 1 when any failed, was rejected or was left, or when the coordinator's name never got an address.
"""

from __future__ import annotations

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

from client import Client
from config import Config
from sllm.deploy.launch import launch
from sllm.deploy.shell import Service
from sllm.live.bridge import Answer
from sllm.live.http import Page
from sllm.models.catalogue import Catalog
from sllm.observe.metrics import ClientMetrics
from sllm.observe.recorder import Recorder
from sllm.observe.report.csv import RequestsCsv
from sllm.observe.statistics import summarize
from sllm.protocol.bus import EventBus
from sllm.protocol.errors import UsageError
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected
from sllm.protocol.limits import id_problem
from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.run.architecture import Birth
from sllm.run.assemble import build_catalog, build_workload, count_trace_models
from sllm.run.centralized import Centralized
from sllm.workload import Request, Workload
from sllm.workload.modelmap import TooFewModels
from sllm.workload.pump import Pump

RECEIVE_BUFFER_BYTES = 4 << 20
PROGRESS_S = 5.0
UNRESOLVED_S = 60.0  # a coordinator's name that has had no address for so long is a wrong one: better an end than a Job that waits for ever
ENDS = (RequestCompleted, RequestFailed, RequestRejected)  # of a request
# What a simulation does with these, a load generator cannot: it sees its own requests and no fleet. Rather one clear line than a wish ignored.
REFUSED = ("RESULTS_JSON", "REPORT_HTML", "RECORD", "FAULTS", "VIRTUAL", "WIRE", "FAIL_IF")


class ClientPart:
    """The client, its workload, and what the service needs to know of both."""

    page: Page | None = None

    def __init__(self, service: Service, node: Client, workload: Workload, requests_csv: RequestsCsv | None = None) -> None:
        self.node = node
        self.metrics = ClientMetrics(service.started_wall_s)
        self.recorder = Recorder()
        self._requests_csv = requests_csv
        self._service = service
        self._workload = workload
        self._pump: Pump[Request] | None = None  # None: no request can come yet
        self._begin_s: float | None = None  # when requests began to come
        self._exhausted = False
        self._give_up_at: float | None = None
        self._printed_at = 0.0

    # --- the workload -----------------------------------------------------------------------------------------------------------------

    def _begin(self, begin_s: float) -> None:
        """Requests come from now on."""
        self._begin_s = begin_s
        arrivals = ((begin_s + request.arrival_s, request) for request in self._workload)
        self._pump = Pump(arrivals, self.node.submit, lambda: self._service.clock.now, self._is_stopped)
        self._submit_due()

    def _is_stopped(self) -> bool:
        return self._exhausted or bool(self._service.interrupted_by)

    def _submit_due(self) -> None:
        """Hand in the requests whose time has come, and come back for the next."""
        assert self._pump is not None
        at = self._pump.hand_in()
        if self._pump.exhausted:
            self._end_arrivals()
        elif at < inf:
            self._service.driver.call_at(at, self._submit_due)
        if self._service.host is not None:
            self._service.host.touch()

    def _end_arrivals(self) -> None:
        """No more requests come; those of closed-loop load come until the time is over."""
        assert self._begin_s is not None
        end_s = 0.0 if self._workload.users is None else self._begin_s + self._workload.spec.until_s
        if end_s <= self._service.clock.now:
            self._exhausted = True
        else:
            self._service.driver.call_at(end_s, self._end_arrivals)

    def _go_on(self, node: Node, event: RequestCompleted | RequestFailed | RequestRejected) -> None:
        """A request has ended: closed-loop load sends its next one."""
        if self._begin_s is None or self._exhausted:
            return
        request = self._workload.following(event.request_id, self._service.clock.now - self._begin_s)
        if request is not None:
            self._service.driver.call_at(self._begin_s + request.arrival_s, partial(self._submit_one, request))

    def _submit_one(self, request: Request) -> None:
        if not self._exhausted:
            self.node.submit(request, self._service.clock.now)
            if self._service.host is not None:
                self._service.host.touch()

    # --- what the service asks ----------------------------------------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        if not self._service.resolved:
            return False, f"the coordinator's name {self._service.config.coordinator_host} has no address"
        if not self.node.acknowledged:
            return False, f"the coordinator at {':'.join(map(str, self.node.coordinator))} has not answered yet"
        return True, "sending" if not self._exhausted else "waiting for the last answers"

    def subscribe(self, bus: EventBus) -> None:
        bus.subscribe_all(self.metrics.handlers)
        bus.subscribe_all(self.recorder.handlers)
        if self._requests_csv is not None:
            bus.subscribe_all(self._requests_csv.handlers)
        bus.subscribe(self._go_on, *ENDS)

    def tick(self) -> None:
        now = self._service.clock.now
        if self._begin_s is None and not self._exhausted:
            if self._service.resolved:
                self._begin(now)  # a coordinator that does not answer yet is asked again by each request: none is lost
            else:
                self._exhausted = now >= UNRESOLVED_S
        if self.node.finds_nobody:
            self._service.renew_way()  # whatever balances datagrams may have led to a second coordinator, one without workers
        if now - self._printed_at >= PROGRESS_S:
            self._printed_at = now
            self.print_progress()

    def print_progress(self) -> None:
        seen = self.recorder.glance()
        fields = {**seen._asdict(), "in_flight": self.node.in_flight}
        self._service.log.info("%d of %d requests completed", seen.completed, seen.sent, extra={"fields": fields})

    def collect(self, answer: Callable[[], None]) -> None:
        answer()

    def state(self, answer: Answer) -> None:
        answer({**self.recorder.glance()._asdict(), "in_flight": self.node.in_flight, "coordinator": list(self.node.coordinator), "total": 1})

    def page_state(self, state: Any, query: Mapping[str, str]) -> dict[str, Any]:
        return dict(state)

    def stop(self) -> None:
        """Send nothing more; what is in flight may still come, within the drain timeout."""
        self._exhausted = True
        self._give_up_at = self._service.clock.now + self._service.config.drain_timeout_s

    def finished(self) -> bool:
        if not self._exhausted:
            return False
        return self.node.in_flight == 0 or (self._give_up_at is not None and self._service.clock.now >= self._give_up_at)

    # --- the end ----------------------------------------------------------------------------------------------------------------------

    def conclude(self) -> int:
        """Print the closing figures; the exit status."""
        seen, recorder, log = self.recorder.glance(), self.recorder, self._service.log
        figures: dict[str, Any] = {
            "sent": seen.sent, "completed": seen.completed, "failed": seen.failed, "rejected": seen.rejected, "in_flight": self.node.in_flight,
            "duplicates": recorder.duplicates, **recorder.actions,
        }  # fmt: skip
        for name in ("ttft_s", "e2e_s", "queue_wait_s"):
            statistics = summarize(getattr(recorder, name))
            figures |= {f"{name.removesuffix('_s')}_{which}_s": value for which, value in statistics.items() if value is not None}
        if self._begin_s is not None:
            figures["elapsed_s"] = round(self._service.clock.now - self._begin_s, 3)
        good = seen.sent > 0 and seen.completed == seen.sent
        verdict = "all requests completed" if good else "not all requests were completed" if seen.sent else "no request was sent"
        if not self._service.resolved:
            verdict += f": COORDINATOR_HOST={self._service.config.coordinator_host!r} has no address"
        log.log(logging.INFO if good else logging.ERROR, "%s", verdict, extra={"event": "Results", "fields": figures})
        return 0 if good else 1


def _workload(config: Config, catalog: Catalog) -> Workload:
    """The requests to send. The catalogue is the fleet's: a load generator cannot make it larger, however many models its trace names."""
    try:
        return build_workload(config, catalog, count_trace_models(config), live=True)
    except TooFewModels as error:
        what = "a larger MODEL_CATALOG" if config.model_catalog else "the same larger MODELS, which sizes the demonstration catalogue"
        raise UsageError(f"{error}; or give coordinator, workers and load generator {what}") from None


def _refuse(config: Config, environ: Mapping[str, str]) -> None:
    """UsageError for what only a simulation can do."""
    asked = {name: environ.get(name, "").strip() for name in REFUSED}
    if config.speedup != 1.0:
        asked["SPEEDUP"] = f"{config.speedup:.12g}"
    for name, value in asked.items():
        if value not in ("", "0"):
            raise UsageError(f"{name}={value!r}: is for centralized_simulation.py; a load generator has its last log line, and REQUESTS_CSV")


def serve(config: Config, environ: Mapping[str, str]) -> int:
    """Send the workload and wait for every answer."""
    _refuse(config, environ)
    path = environ.get("REQUESTS_CSV", "").strip()
    fleet = Centralized(config, build_catalog(config))
    with contextlib.ExitStack() as stack:
        workload = stack.enter_context(_workload(config, fleet.catalog))
        requests_csv = stack.enter_context(RequestsCsv(path, "REQUESTS_CSV")) if path else None
        service = stack.enter_context(Service("client", config, environ))

        def make(address: Address) -> ClientPart:
            # The id must differ between clients that run at once: workers tell requests apart by it.
            where, when = environ.get("HOSTNAME", "").strip()[:40] or os.getpid(), time.time_ns() // 1_000_000 % 1_000_000
            name = f"client-{where}-{when}"
            if id_problem(name):
                name = f"client-{os.getpid()}-{when}"
            peers = (config.get_coordinator_address(),)
            birth = Birth(name, "client", service.incarnation, service.clock.now, peers, service.codec, service.clock.wall_offset_s)
            return ClientPart(service, fleet.make_client(birth), workload, requests_csv)

        if workload.model_map is not None:
            service.log.info("models of the trace", extra={"event": "TraceModels", "fields": workload.model_map.describe()})
        for warning in workload.warnings:
            service.log.warning("%s", warning)
        part = service.listen(make, 0, "", uplink=True, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
        assert isinstance(part, ClientPart)
        service.run()
        return part.conclude()


def main(argv: Sequence[str]) -> int:
    return launch("client", "A load generator for a serverless LLM fleet.", argv, os.environ, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
