"""The seed sweep: a sound fleet holds, a seed is the same run every time, and each planted bug is caught within fifty seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from client import Client
from coordinator import Coordinator
from experiments import simulate
from experiments.simulate import Outcome, draw_scenario, main, run_seed
from sllm.dispatch import Ledger
from sllm.events import RequestCompleted
from sllm.fleet import Fleet
from sllm.messages import READY, Address, Enveloped, ScheduleError
from sllm.placement.registry import policies
from sllm.sim.network import Network
from worker import Worker

SEEDS = range(1, 51)


def test_a_sound_fleet_breaks_nothing() -> None:
    for seed in range(1, 31):
        outcome = run_seed(seed, small=True)
        assert not outcome.problem, f"seed {seed}: {outcome.scenario}\n{outcome.problem}"
        assert outcome.checked > 0, f"seed {seed}"


def test_a_seed_is_the_same_run_every_time() -> None:
    for seed in (3, 5, 11):
        assert run_seed(seed, small=True) == run_seed(seed, small=True), f"seed {seed}"


def test_bytes_on_the_wire_give_the_run_that_objects_give() -> None:
    seed = next(seed for seed in SEEDS if draw_scenario(seed).wire)
    outcome = run_seed(seed)
    assert not outcome.problem, f"seed {seed}: {outcome.scenario}\n{outcome.problem}"


def test_the_sweep_draws_every_policy_and_faults_on_every_role() -> None:
    scenarios = [draw_scenario(seed, small=True) for seed in SEEDS]
    assert {scenario.config.policy.partition(":")[0] for scenario in scenarios} == set(policies())
    hit = {host for scenario in scenarios for fault in scenario.schedule.faults for host in fault.options.get("hosts") or ()}
    assert {"coordinator", "client", "random:1:worker-*"} <= hit
    assert {scenario.config.engine for scenario in scenarios} == {"llm", "queue"}


# --- planted bugs -------------------------------------------------------------------------------------------------------------------


def leak_cost(patch: pytest.MonkeyPatch) -> None:
    """What a report has acknowledged goes on counting as in flight."""
    patch.setattr(Ledger, "release", lambda self, number: self.entries.pop(number, None) is not None)


def accept_replays(patch: pytest.MonkeyPatch) -> None:
    """A report is applied whatever its number and incarnation."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        row = self.fleet.rows.get(envelope[0])
        if row is not None and (envelope[1], envelope[2]) <= (row.incarnation, row.sequence):
            row.incarnation, row.sequence = envelope[1], envelope[2] - 1
        original(self, envelope, addr, now)

    patch.setattr(Coordinator, "_on_report", on_report)


def route_to_the_dead(patch: pytest.MonkeyPatch) -> None:
    """Whoever stops being READY stays among those who are given work."""
    original: Callable[..., Any] = Fleet.step

    def step(self: Fleet, row: Any, what: str) -> Any:
        moved = original(self, row, what)
        if moved and moved[0] == READY:
            self.reindex(row)
        return moved

    patch.setattr(Fleet, "step", step)


def complete_twice(patch: pytest.MonkeyPatch) -> None:
    """A response that comes twice is a completion twice."""
    original: Callable[..., None] = Client._on_response

    def on_response(self: Client, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        message: Any = envelope[4]
        known = message.request_id in self._pending
        original(self, envelope, addr, now)
        if not known:
            self.events.append(
                RequestCompleted(now, message.request_id, "m", envelope[0], "serve", now, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 1, 1, 0)
            )

    patch.setattr(Client, "_on_response", on_response)


def forget_when_turned_away(patch: pytest.MonkeyPatch) -> None:
    """An error worth trying again after ends the request without a word."""

    def on_schedule_error(self: Client, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        message = envelope[4]
        assert type(message) is ScheduleError
        pending = self._pending.get(message.request_id)
        if pending is not None:
            self._end(pending)

    patch.setattr(Client, "_on_schedule_error", on_schedule_error)


def load_twice(patch: pytest.MonkeyPatch) -> None:
    """Every request for a model on its way begins a load of its own."""
    original: Callable[..., None] = Worker._on_inference_request

    def on_inference_request(self: Worker, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        self._present.clear()
        original(self, envelope, addr, now)

    patch.setattr(Worker, "_on_inference_request", on_inference_request)


def count_twice(patch: pytest.MonkeyPatch) -> None:
    """Each report is entered into the books twice."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        original(self, envelope, addr, now)
        self.reports_accepted += 1

    patch.setattr(Coordinator, "_on_report", on_report)


def drop_reports(patch: pytest.MonkeyPatch) -> None:
    """Now and then a report is neither applied nor refused."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        if envelope[2] % 50 != 25:
            original(self, envelope, addr, now)

    patch.setattr(Coordinator, "_on_report", on_report)


def count_copies_twice(patch: pytest.MonkeyPatch) -> None:
    """A report that the network delivers twice is in its books three times."""
    original: Callable[..., Any] = Network.carry

    def carry(self: Network, source: str, target: str, envelope: Enveloped[Any], now: float) -> Any:
        before = self.duplicated_reports
        copies = original(self, source, target, envelope, now)
        self.duplicated_reports += self.duplicated_reports - before
        return copies

    patch.setattr(Network, "carry", carry)


BUGS: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("in-flight", leak_cost),
    ("member-order", accept_replays),
    ("live-dispatch", route_to_the_dead),
    ("conservation", complete_twice),
    ("conservation", forget_when_turned_away),
    ("single-flight", load_twice),
    ("report-books", count_twice),
    ("report-books", drop_reports),
    ("report-books", count_copies_twice),
]


@pytest.mark.parametrize(("checker", "plant"), BUGS, ids=[plant.__name__ for _, plant in BUGS])
def test_a_planted_bug_is_caught_within_fifty_seeds(
    checker: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    found = []
    for seed in SEEDS:
        problem = run_seed(seed, small=True).problem
        if f"invariant {checker!r} broken" in problem:
            assert f"with seed {seed}:" in problem
            assert run_seed(seed, small=True).problem == problem, "the same seed breaks again, to the byte"
            return
        found.append(problem.splitlines()[0] if problem else "")
    pytest.fail(f"not caught by {checker} in {len(SEEDS)} seeds; found instead: {sorted(set(found))}")


# --- the command line ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_that_holds_says_so_and_exits_with_0(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "run_seed", lambda seed: Outcome(seed, "a fleet", "", "d1", 10, 20))
    assert main(["--seeds", "3", "--jobs", "1"]) == 0
    assert "3 of 3 seeds, 0 failed, 30 requests, 60 checks" in capsys.readouterr().out


def test_a_failing_seed_is_told_with_the_command_that_replays_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "run_seed", lambda seed: Outcome(seed, "a fleet", "it broke" if seed == 8 else "", "d1", 10, 20))
    assert main(["--first", "7", "--seeds", "3", "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "seed 8 FAILED: a fleet" in said
    assert "it broke" in said
    assert "python3 experiments/simulate.py --first 8 --seeds 1" in said
    assert "failing seeds: 8" in said


def test_a_seed_that_comes_to_no_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(scenario: object) -> None:
        while True:
            pass

    monkeypatch.setattr(simulate, "run_scenario", endless)
    monkeypatch.setattr(simulate, "WALL_MAX_S", 1)
    assert "not done after 1 s of wall time" in run_seed(1, small=True).problem


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--jobs", "0"], ["--first", "-1"]])
def test_numbers_that_make_no_sweep_are_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
