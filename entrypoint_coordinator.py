"""The coordinator as a process: configured by its environment, heard over UDP, watched over HTTP. `--help` lists the variables."""

from __future__ import annotations

if __name__ == "__main__":
    from sllm.report.standard import end_at_signals

    end_at_signals()

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from config import Config
from coordinator import Coordinator
from sllm.assemble import build_catalog
from sllm.events import CoordinatorReady, Event
from sllm.fleet import STATES
from sllm.messages import Address
from sllm.placement.registry import broken_policies, make_policy
from sllm.runtime.bridge import Answer
from sllm.runtime.fleetview import FleetPicture, History, Photographer, cells_of, page_of, summary_of
from sllm.runtime.launch import launch
from sllm.runtime.memory import GarbageTamer
from sllm.runtime.metrics import CoordinatorMetrics
from sllm.runtime.page import fleet_page
from sllm.runtime.service import Service
from sllm.streams import stream

RECEIVE_BUFFER_BYTES = 8 << 20  # asked for; about 60 ms of 100,000 reports a second while the loop does something else


class CoordinatorPart:
    """What the service needs to know of a coordinator."""

    def __init__(self, service: Service, node: Coordinator) -> None:
        self.node = node
        self.metrics = CoordinatorMetrics(service.started_wall_s)
        self.page = fleet_page()
        self._service = service
        self._history = History()
        self._ready_at = 0.0  # when the listening time was over
        driver = service.driver
        self._photographer = Photographer(
            lambda: node.fleet, lambda: service.clock.now, lambda step: driver.call_at(service.clock.now, step)
        )  # fmt: skip

    def ready(self) -> tuple[bool, str]:
        if not self.node.ready:
            return False, "listening for reports after a start"
        if self.node.rival:
            return False, "workers say that another coordinator answers under this address: stop one of them"
        if not self.node.fleet.rows:
            return True, "ready, no worker has reported yet"
        return True, f"ready, degraded: {self.node.degraded}" if self.node.degraded else "ready"

    def observe(self, event: Event) -> None:
        self._history.observe(event)
        if type(event) is CoordinatorReady:
            self._ready_at = event.at

    def tick(self) -> None:
        self._history.tick()

    def collect(self, answer: Callable[[], None]) -> None:
        def take(picture: FleetPicture) -> None:
            states = {state: self.node.fleet.states[state] for state in STATES}
            self.metrics.collect_fleet(states, picture.running, picture.waiting, picture.pending)
            answer()

        self._photographer.take(take)

    def state(self, answer: Answer) -> None:
        def take(picture: FleetPicture) -> None:
            if picture.at < self._ready_at:  # of before we were ready: it may lack who was heard until then
                self._photographer.latest = None
                self._photographer.take(take)
            else:
                answer((picture, self._figures(picture)))

        self._photographer.take(take)

    def _figures(self, picture: FleetPicture) -> dict[str, Any]:
        node, host = self.node, self._service.host
        assert host is not None
        history = self._history
        return {
            "policy": node.config.policy,
            "degraded": node.degraded,
            "summary": summary_of(picture),
            "requests": {"routed": dict(history.routed), "refused": dict(history.refused)},
            "reports": {"accepted": node.reports_accepted, "rejected": dict(node.reports_rejected)},
            "datagrams": {"rejected": dict(node.rejected), "kernel_drops": host.kernel_drops},
            "models": [
                {"name": name, "gpu": gpu, "loading": loading, "host": in_host, "routed": history.by_model[name]}
                for name, gpu, loading, in_host in picture.models
            ],
            "history": history.as_columns(),
        }

    def page_state(self, state: Any, query: Mapping[str, str]) -> dict[str, Any]:
        picture, figures = state
        grid = {"grid": cells_of(picture)} if query.get("view") == "page" else {}
        return {**figures, **grid, **page_of(picture, query)}

    def stop(self) -> None:
        """There is nothing to finish: the table comes back from the reports."""

    def finished(self) -> bool:
        return self._service.stopping


def serve(config: Config, environ: Mapping[str, str]) -> int:
    """Run until a signal asks for the end."""
    policy, catalog = make_policy(config.policy), build_catalog(config)
    with Service("coordinator", config, environ) as service:
        for problem in broken_policies():
            service.log.warning("a policy could not be read: %s", problem)

        def make(address: Address) -> CoordinatorPart:
            node = Coordinator(
                config, catalog, policy, stream(config.seed, "coordinator"), service.incarnation, codec=service.codec,
                wall_offset_s=service.clock.wall_offset_s, stopwatch=time.perf_counter, now=service.clock.now,
            )  # fmt: skip
            return CoordinatorPart(service, node)

        service.listen(make, config.coordinator_port, "COORDINATOR_PORT", count_drops=True, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
        service.tamer = GarbageTamer()
        service.run()
    return 0


def main(argv: Sequence[str]) -> int:
    return launch("coordinator", "The coordinator of a serverless LLM fleet.", argv, os.environ, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
