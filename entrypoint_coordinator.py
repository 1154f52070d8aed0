"""The coordinator as a process: configured by its environment, heard over UDP, watched over HTTP. `--help` lists the variables."""

from __future__ import annotations

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

import os
import sys
import time
from collections.abc import Mapping, Sequence

from config import Config
from coordinator import Coordinator
from sllm.deploy.launch import launch
from sllm.deploy.shell import Service
from sllm.live.garbage import GarbageTamer
from sllm.observe.coordinatorview import CoordinatorView
from sllm.observe.page import fleet_page
from sllm.placement.registry import broken_policies, make_policy
from sllm.protocol.messages import Address
from sllm.protocol.seeds import rng_for
from sllm.run.assemble import build_catalog

RECEIVE_BUFFER_BYTES = 8 << 20  # asked for; about 60 ms of 100,000 reports a second while the loop does something else


class CoordinatorPart:
    """What the service needs to know of a coordinator."""

    def __init__(self, service: Service, node: Coordinator) -> None:
        self.node = node
        self.page = fleet_page()
        self._service = service
        clock, driver = service.clock, service.driver
        self._view = view = CoordinatorView(
            service.config.policy, lambda: node, lambda: clock.now, lambda step: driver.call_at(clock.now, step), self._kernel_drops, service.started_wall_s
        )  # fmt: skip
        self.metrics = view.metrics
        self.ready, self.subscribe, self.tick = view.ready, view.subscribe, view.tick
        self.collect, self.state, self.page_state = view.collect, view.state, view.page_state

    def _kernel_drops(self) -> int:
        assert self._service.host is not None
        return self._service.host.kernel_drops

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
                config, catalog, policy, rng_for(config.seed, "coordinator"), service.incarnation, codec=service.codec,
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
