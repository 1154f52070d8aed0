"""The seed sweep: a sound fleet holds, a seed is the same run every time, and each planted bug is caught within fifty seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from client import Client
from config import Config
from coordinator import Coordinator
from experiments import simulate
from experiments.draw import LIMITS_CATALOG, Bounds, draw_scenario, limit_requests
from experiments.harness import Simulation, configuration
from experiments.simulate import Outcome, main, run_seed
from sllm.fleet.hold import Hold
from sllm.fleet.ledger import Ledger
from sllm.fleet.table import Fleet
from sllm.models.catalogue import Catalog
from sllm.models.model import Hardware, Model
from sllm.placement.costs import EngineCosts
from sllm.placement.registry import policies
from sllm.protocol.events import RequestCompleted
from sllm.protocol.limits import TOKENS_MAX
from sllm.protocol.messages import READY, Address, AnyEnvelope, LoadReport, ScheduleError
from sllm.protocol.replay import ReplayWindow
from sllm.requests.pending import ABANDONED
from sllm.run.assemble import build_catalog
from sllm.virtual.faults import Fault, Schedule
from sllm.virtual.network import Network
from sllm.workload import Request
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


@pytest.mark.parametrize("strangers", [False, True])
def test_bytes_on_the_wire_give_the_run_that_objects_give(strangers: bool) -> None:
    drawn = ((seed, draw_scenario(seed)) for seed in itertools.count(1))
    seed = next(seed for seed, scenario in drawn if scenario.wire and bool(scenario.strangers_per_s) == strangers)
    outcome = run_seed(seed)
    assert not outcome.problem, f"seed {seed}: {outcome.scenario}\n{outcome.problem}"


def test_the_sweep_draws_every_policy_and_faults_on_every_role() -> None:
    scenarios = [draw_scenario(seed, small=True) for seed in SEEDS]
    assert {scenario.config.policy.partition(":")[0] for scenario in scenarios} == set(policies())
    hit = {host for scenario in scenarios for fault in scenario.schedule.faults for host in fault.options.get("hosts") or ()}
    assert {"coordinator", "client", "random:1:worker-*"} <= hit
    assert {scenario.config.engine for scenario in scenarios} == {"llm", "queue"}


def test_the_sweep_draws_what_fleets_meet_seldom() -> None:
    scenarios = [draw_scenario(seed) for seed in range(1, 301)]
    configs = [scenario.config for scenario in scenarios]
    assert {12.0, 15.0, 30.0, 60.0} <= {config.report_interval_s for config in configs}
    assert all(config.request_timeout_s > 4.0 * config.report_interval_s for config in configs)
    assert any(config.models >= 200 and config.workers <= 6 for config in configs)
    assert any("," in config.hardware and not config.model_catalog for config in configs)
    assert any(config.queue_threshold > config.queue_max for config in configs)
    assert any(config.forget_after_s < config.hold_max_s for config in configs)
    assert len({config.worker_timeout_s for config in configs}) > 2
    assert any(scenario.strangers_per_s for scenario in scenarios)
    dead = [sum(fault.for_s is None for fault in scenario.schedule.faults) / scenario.config.workers for scenario in scenarios]
    assert any(0.5 < part < 1.0 for part in dead)
    assert any(part == 1.0 for part in dead)
    ahead = {host for scenario in scenarios for fault in scenario.schedule.faults if fault.where == "drawn clock_jump" for host in fault.options["hosts"]}
    assert {"coordinator", "worker-0"} <= ahead


@pytest.mark.parametrize("hardware", ["small-box", "a5000-24g", "h100-80g", "small-box:1,h100-80g-tp8:1"])
def test_requests_at_limits_are_at_them_just_within_and_just_beyond(hardware: str) -> None:
    config = configuration(workers=hardware.count(":") or 1, hardware=hardware, model_catalog=str(LIMITS_CATALOG))
    bounds = Bounds(config, build_catalog(config))
    reshape = limit_requests(Random(1), bounds, 1.0)
    requests = [reshape(Request(0.0, f"r{i}", "tiny", 100, 10)) for i in range(3000)]
    sizes = [(bounds.catalog[request.model], request.prompt_tokens + request.output_tokens) for request in requests]
    largest = [(model, bounds.most_tokens(model)) for model, _ in sizes]
    for beyond in (0, 1):
        assert any(tokens == most + beyond and most for (_, tokens), (_, most) in zip(sizes, largest, strict=True))
        assert any(tokens == model.context_tokens + beyond and model.context_tokens for model, tokens in sizes)
    assert all(bounds.fits(model, most) and not bounds.fits(model, most + 1) for model, most in largest if most)
    assert not any(bounds.fits(model, tokens) for model, tokens in sizes if model.name == "giant")
    assert {request.priority for request in requests} == {0, 1, 2}
    assert {(request.prompt_tokens, request.output_tokens) for request in requests} >= {(1, 1), (TOKENS_MAX, 1)}


def test_a_run_is_at_rest_only_when_a_silent_worker_would_be_suspect() -> None:
    """Until then what was sent to it counts as in flight, and rightly."""
    config = configuration(workers=2, duration_s=10.0, rate_per_s=10.0, policy="random", suspect_intervals=60.0)
    death = Fault(9.9, "crash", None, {"hosts": ["worker-0"], "stagger": 0.0})
    results = Simulation(config, schedule=Schedule((death,))).complete()
    assert not results["invariants"]["violations"]
    assert results["fleet"]["ready"] == 1


# --- planted bugs -------------------------------------------------------------------------------------------------------------------


def leak_cost(patch: pytest.MonkeyPatch) -> None:
    """What a report has acknowledged goes on counting as in flight."""
    patch.setattr(Ledger, "release", lambda self, number: self.entries.pop(number, None) is not None)


def accept_replays(patch: pytest.MonkeyPatch) -> None:
    """A report is applied whatever its number and incarnation."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        row = self.fleet.rows.get(envelope.sender_id)
        if row is not None and (envelope.incarnation, envelope.sequence) <= (row.incarnation, row.sequence):
            row.incarnation, row.sequence = envelope.incarnation, envelope.sequence - 1
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

    def on_response(self: Client, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        message: Any = envelope.message
        known = message.request_id in self._pending
        original(self, envelope, addr, now)
        if not known:
            self.events.append(
                RequestCompleted(now, message.request_id, "m", envelope.sender_id, "serve", now, 0.0, 0.0, 0.0, 0.0, 0.0, 1, 1, 1, 0)
            )

    patch.setattr(Client, "_on_response", on_response)


def forget_when_turned_away(patch: pytest.MonkeyPatch) -> None:
    """An error worth trying again after ends the request without a word."""

    def on_schedule_error(self: Client, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        message = envelope.message
        assert type(message) is ScheduleError
        pending = self._pending.get(message.request_id)
        if pending is not None:
            self._end(pending, ABANDONED)

    patch.setattr(Client, "_on_schedule_error", on_schedule_error)


def load_twice(patch: pytest.MonkeyPatch) -> None:
    """Every request for a model on its way begins a load of its own."""
    original: Callable[..., None] = Worker._on_inference_request

    def on_inference_request(self: Worker, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        self.service._present.clear()
        original(self, envelope, addr, now)

    patch.setattr(Worker, "_on_inference_request", on_inference_request)


def count_twice(patch: pytest.MonkeyPatch) -> None:
    """Each report is entered into the books twice."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        original(self, envelope, addr, now)
        self.membership.accepted += 1

    patch.setattr(Coordinator, "_on_report", on_report)


def drop_reports(patch: pytest.MonkeyPatch) -> None:
    """Now and then a report is neither applied nor refused."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        if envelope.sequence % 50 != 25:
            original(self, envelope, addr, now)

    patch.setattr(Coordinator, "_on_report", on_report)


def count_copies_twice(patch: pytest.MonkeyPatch) -> None:
    """A report that the network delivers twice is in its books three times."""
    original: Callable[..., Any] = Network.carry

    def carry(self: Network, source: str, target: str, envelope: AnyEnvelope, now: float) -> Any:
        before = self.duplicated_by_kind[LoadReport]
        copies = original(self, source, target, envelope, now)
        self.duplicated_by_kind[LoadReport] += self.duplicated_by_kind[LoadReport] - before
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


def never_forget_a_life(patch: pytest.MonkeyPatch) -> None:
    """The highest incarnation ever heard of a worker is the only one that counts."""
    original: Callable[..., None] = Coordinator._on_report

    def on_report(self: Coordinator, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        row = self.fleet.rows.get(envelope.sender_id)
        if row is not None and envelope.incarnation < row.incarnation:
            self.reports_rejected["old_incarnation"] += 1
        else:
            original(self, envelope, addr, now)

    patch.setattr(Coordinator, "_on_report", on_report)


def guard_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Who has once spoken with a clock that was ahead is not heard until that time has come."""
    patch.setattr(ReplayWindow, "is_over", lambda self, incarnation, sequence, now, life_timeout_s: False)


def hold_for_ever(patch: pytest.MonkeyPatch) -> None:
    """Nobody is declared dead while most of the fleet is silent, be it for good."""
    original: Callable[..., bool] = Hold.look

    def look(self: Hold, silent: int, members: int, now: float) -> bool:
        self._since = math.inf
        return original(self, silent, members, now)

    patch.setattr(Hold, "look", look)


class TrueCosts(EngineCosts):
    """The rules of memory, whatever is planted."""

    def kv_bytes(self, model: Model, tokens: int) -> int:
        return tokens * model.kv_bytes_per_token

    def fits(self, model: Model, hardware: Hardware, kv_bytes: int) -> bool:
        return model.size_bytes + kv_bytes <= hardware.usable_gpu_bytes


class TrueBounds(Bounds):
    """What is planted must not reach the rule that it is held against."""

    def __init__(self, config: Config, catalog: Catalog) -> None:
        super().__init__(config, catalog)
        if config.engine == "llm":
            self.costs = TrueCosts()


def place_anything_anywhere(patch: pytest.MonkeyPatch) -> None:
    """Placement looks at no worker's memory."""
    patch.setattr(EngineCosts, "fits", lambda self, model, hardware, kv_bytes: True)


def call_all_too_large(patch: pytest.MonkeyPatch) -> None:
    """Half of the KV cache is not used."""
    patch.setattr(EngineCosts, "kv_bytes", lambda self, model, tokens: 2 * tokens * model.kv_bytes_per_token)


WRONGS: list[tuple[str, Callable[[pytest.MonkeyPatch], None]]] = [
    ("workers live, the coordinator counts", never_forget_a_life),
    ("workers live, the coordinator counts", hold_for_ever),
    ("everything was at rest, nothing was wrong any more, and requests failed", guard_for_ever),
    ("does not fit", place_anything_anywhere),
    ("REQUEST_TOO_LARGE", call_all_too_large),
]


@pytest.mark.parametrize(("said", "plant"), WRONGS, ids=[plant.__name__ for _, plant in WRONGS])
def test_what_does_not_come_right_again_or_ends_wrongly_is_caught_within_fifty_seeds(
    said: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "Bounds", TrueBounds)
    plant(monkeypatch)
    found = []
    for seed in SEEDS:
        problem = run_seed(seed, small=True).problem
        if said in problem:
            return
        found.append(problem.splitlines()[0] if problem else "")
    pytest.fail(f"not caught in {len(SEEDS)} seeds; found instead: {sorted(set(found))}")


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
