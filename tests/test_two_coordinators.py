"""Two coordinators behind one address, as processes: flows stay with one of them, so only new sockets find out."""

from __future__ import annotations

from balancer import Balancer
from test_entrypoints import Bench, bench, closing, free_port, get

__all__ = ["bench"]

OFTEN = """
import sys
import entrypoint_worker
from sllm.deploy import shell as service
service.RENEW_S = 0.3
sys.exit(entrypoint_worker.main([]))
"""


def test_both_become_unready_and_say_so_though_each_flow_stays_with_one(bench: Bench) -> None:
    pairs = [bench.coordinator(HEALTH_PORT=str(free_port())) for _ in range(2)]
    for coordinator, _ in pairs:
        coordinator.wait_event("CoordinatorReady")
    with Balancer(*(port for _, port in pairs)) as balancer:
        worker = bench.start("worker", code=OFTEN, WORKER_ID="worker-0", WORKER_PORT="0", COORDINATOR_PORT=balancer.port)
        worker.wait_event("RivalSeen")
        for coordinator, _ in pairs:
            coordinator.wait_event("RivalSeen")
            status, why = get(f"{coordinator.up()['http']}/readyz")
            assert (status, "two coordinators" in why or "another coordinator" in why) == (503, True), why


def test_a_client_led_to_one_without_workers_finds_the_other(bench: Bench) -> None:
    empty, port = bench.coordinator()
    empty.wait_event("CoordinatorReady")
    _, _, whole_port = bench.fleet(1)
    with Balancer(port, whole_port) as balancer:
        client = bench.start("client", COORDINATOR_PORT=balancer.port, RATE="10", DURATION="0.5", REQUEST_TIMEOUT="15")
        assert client.exit_status() == 0
        assert closing(client)["completed"] > 0
