"""Architectures: whoever runs a fleet builds it from what its architecture says of its participants, and knows no role."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest

from experiments.harness import Simulation, complete, configuration, silent
from sllm.observe.report.json import validate_results
from sllm.protocol.capabilities import TracksWorkers
from sllm.protocol.messages import COORDINATOR_ID
from sllm.protocol.node import Node
from sllm.run.architecture import Birth, Participant
from sllm.run.centralized import CLIENT, Centralized
from sllm.run.live import LiveRun
from sllm.run.run import Run
from sllm.run.system import System
from sllm.run.virtual import VirtualRun
from sllm.virtual.faults import Fault, Schedule
from worker import Worker

SECOND = "second"  # coordinator


class Halves(Centralized):
    """Two coordinators, each with every other worker; the client asks the second one."""

    name = "halves"

    def participants(self) -> Iterator[Participant]:
        for name in (COORDINATOR_ID, SECOND):
            yield Participant(name, self.config.coordinator_port, self.make_coordinator)
        for number, (name, config) in enumerate(self.workers.items()):
            yield Participant(name, config.worker_port, partial(self.make_worker, config), (SECOND if number % 2 else COORDINATOR_ID,))
        yield Participant(CLIENT, 7000, self.make_client, (SECOND,), restarts=False)

    def make_coordinator(self, birth: Birth) -> Node:
        return super().make_coordinator(birth._replace(node_id=COORDINATOR_ID))  # workers and clients believe a coordinator of this name only

    def count_ready(self, trackers: Sequence[TracksWorkers]) -> int:
        return sum(super(Halves, self).count_ready([tracker]) for tracker in trackers)


@pytest.mark.parametrize("kind", [VirtualRun, LiveRun])
def test_a_run_starts_conducts_and_sends_home_whatever_its_architecture_is_made_of(kind: type[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "architecture", Halves)
    run = kind(
        configuration(workers=4, duration_s=5.0, rate_per_s=4.0, speedup=10.0 if kind is LiveRun else 1.0), silent(virtual=kind is VirtualRun), io.StringIO()
    )
    results = complete(run)
    assert validate_results(results) == []
    assert results["invariants"]["violations"] == []
    assert results["run"]["architecture"] == "halves"
    assert results["fleet"]["ready"] == 4
    assert results["requests"]["completed"] == results["requests"]["sent"] > 10
    assert {row["worker"] for row in results["workers"] if row["completed"]} <= {"worker-1", "worker-3"}
    reports = results["reports"]
    assert reports["sent"] == reports["accepted"] + sum(reports["rejected"].values())
    first, second = (run.system.trackers[name][-1] for name in (COORDINATOR_ID, SECOND))
    assert sorted(first.fleet.rows) == ["worker-0", "worker-2"]
    assert sorted(second.fleet.rows) == ["worker-1", "worker-3"]
    assert first.fleet.states["LEFT"] == second.fleet.states["LEFT"] == 2


def test_a_member_is_told_of_those_before_it_and_each_life_has_a_stream_of_its_own() -> None:
    system = System(configuration(workers=2), wire=False, architecture=Halves)
    births: list[Birth] = []
    for name, participant in system.participants.items():
        assert all(peer in system.addresses for peer in participant.peers)
        system.addresses[name] = participant.address
        system.participants[name] = participant._replace(make=partial(note_and_make, births, participant.make))
        for incarnation in (1, 2):
            system.make(name, incarnation, float(incarnation))
    assert len({birth.stream for birth in births}) == len(births) == 2 * len(system.participants)
    told = {birth.node_id: birth.peers for birth in births}
    assert (told["worker-0"], told["worker-1"]) == ((("coordinator", 9000),), (("second", 9000),))
    assert all(birth.advertise == system.participants[birth.node_id].address for birth in births)


def note_and_make(births: list[Birth], make: Callable[[Birth], Node], birth: Birth) -> Node:
    """Make the node, and keep what it is made of."""
    births.append(birth)
    return make(birth)


def test_the_books_have_every_life_of_a_worker() -> None:
    crash = Fault(3.0, "crash", 2.0, {"hosts": ["worker-0"], "stagger": 0.0}, "test")
    run = Simulation(configuration(workers=2, duration_s=15.0, rate_per_s=3.0), schedule=Schedule((crash,), "test"))
    results = run.complete()
    lives: list[Any] = run.system.lives["worker-0"]
    assert len(lives) == 2
    workers: list[Any] = [node for name in run.system.workers for node in run.system.lives[name]]
    assert results["reports"]["sent"] == sum(node.reports_sent for node in workers) > lives[1].reports_sent


def test_faults_count_from_when_requests_begin_to_come() -> None:
    crash = Fault(0.5, "crash", 1.0, {"hosts": ["worker-0"], "stagger": 0.0}, "test")
    run = Simulation(configuration(workers=2, duration_s=5.0, rate_per_s=3.0), schedule=Schedule((crash,), "test"))
    run.complete()
    assert run.began_s > 0.5, "the fleet was not up by then"
    assert [at for at, _ in run.injector.log] == pytest.approx([run.began_s + 0.5, run.began_s + 1.5])


def test_an_engine_of_a_live_run_wakes_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    run = LiveRun(configuration(workers=2, duration_s=1.0, rate_per_s=1.0), silent(virtual=False), io.StringIO())
    woken: list[tuple[str, float]] = []
    with run.driver:
        run.start_fleet()
        monkeypatch.setattr(Worker, "handle_timer", lambda self, now: woken.append((self.node_id, now)))
        worker: Any = run.system.lives["worker-1"][0]
        worker.engine.wake()
        assert woken == [("worker-1", run.now)]
    run.close()
