"""Every policy in the folder keeps the same contract; each keeps its own promise."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from roles import CATALOG, MODEL, ask, coordinator, report

from experiments.harness import configuration, silent
from sllm.models.model import HOST
from sllm.placement import policies as folder
from sllm.placement import registry
from sllm.placement.costs import make_costs
from sllm.placement.registry import make_policy, policies
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import (
    COLD_START,
    DRAINING,
    HIGH,
    LOW,
    NO_WORKERS,
    NORMAL,
    READY,
    SATURATED,
    SERVE,
    LoadReport,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
)
from sllm.run.virtual import VirtualRun

SECOND = CATALOG.names[1]


def test_every_file_in_the_folder_is_found() -> None:
    files = {path.stem for path in Path(folder.__path__[0]).glob("*.py")} - {"__init__"}
    assert set(policies()) == files
    assert {"random", "round_robin", "power_of_two", "startup_time"} <= files


LIMITS = {LOW: 5, NORMAL: 10, HIGH: 20}  # requests that may wait on a worker before it gets none of a priority, at a queue threshold of 10


def may_get(request: ScheduleRequest, reports: dict[str, LoadReport]) -> set[str]:
    """The workers that the rules let a request go to when nothing is in flight, worked out without any index."""
    ready = {name for name, said in reports.items() if said.state == READY}
    allowed = ready - set(request.exclude) or ready  # to a worker that failed rather than to nobody
    return {name for name in allowed if reports[name].engine.waiting < LIMITS[request.priority]}


@pytest.mark.parametrize("name", policies())
class TestContract:
    def test_it_places_on_a_worker_that_the_rules_allow_and_says_no_only_when_there_is_none(self, name: str) -> None:
        """Each report acknowledges what was sent, so that only the reports decide who may get a request."""
        node, talk = coordinator(name, queue_threshold=10)
        rng = Random(f"contract/{name}")
        seen: Counter[str] = Counter()
        for now in range(1, 200):
            drains, excluded, waits = rng.choice((0.1, 0.6, 1.0)), rng.choice((0.2, 0.9)), rng.choice(((0, 0, 3), (4, 9, 19), (9, 19, 30)))
            reports = {}
            for worker in (f"w{i}" for i in range(6)):
                sent = node.fleet.rows[worker].ledger.next_number - 1 if worker in node.fleet.rows else 0
                waiting = rng.choice(waits)
                reports[worker] = report(
                    state=DRAINING if rng.random() < drains else READY, gpu_models=tuple(m for m in CATALOG.names if rng.random() < 0.4),
                    waiting=waiting, running=256 if waiting else 3, epoch=node.incarnation, dispatch_high=sent,
                )  # fmt: skip
                talk.say(worker, reports[worker], float(now))
            assert not any(row.pending for row in node.fleet)
            request = ask(
                f"r{now}", rng.choice(CATALOG.names), exclude=tuple(worker for worker in reports if rng.random() < excluded), priority=rng.choice(list(LIMITS))
            )
            talk.node.outbox.clear()
            talk.say("c", request, now + 0.5)
            (answer,) = [envelope.message for envelope, _ in talk.node.outbox]
            assert answer.request_id == request.request_id
            allowed = may_get(request, reports)
            if isinstance(answer, ScheduleError):
                assert allowed == set()
                assert answer.code == (SATURATED if any(said.state == READY for said in reports.values()) else NO_WORKERS)
                seen[answer.code] += 1
                continue
            assert isinstance(answer, ScheduleResponse)
            assert answer.worker_id in allowed
            row = node.fleet.rows[answer.worker_id]
            assert answer.action == (SERVE if request.model in reports[answer.worker_id].engine.gpu_models else COLD_START)
            assert answer.eta_s > 0.0
            ((number, entry),) = row.ledger.entries.items()
            assert (number, entry.request_id) == (answer.dispatch.number, request.request_id)
            assert (entry.load_s > 0.0) is (answer.action == COLD_START), "a load is entered with the request that begins it"
            assert sum(other.pending for other in node.fleet) == 1
            seen["excluded" if answer.worker_id in request.exclude else answer.action] += 1
        assert seen.keys() == {SERVE, COLD_START, "excluded", SATURATED, NO_WORKERS}, "every way to go was gone"

    def test_none_admits_no_answer(self, name: str) -> None:
        node, talk = coordinator(name, queue_threshold=10)
        talk.say("full", report(running=256, waiting=10, blocked=10), 1.0)
        talk.say("smaller queue", report(running=256, waiting=3, blocked=3, queue_max=3), 1.0)
        talk.say("c", ask(), 1.0)
        (error,) = talk.heard(ScheduleError)
        assert error.code == SATURATED
        assert "10 requests wait" in error.detail
        assert not any(row.pending for row in node.fleet)

    def test_a_worker_that_was_full_is_looked_at_again_when_its_work_must_be_over(self, name: str) -> None:
        """Reports may be a minute apart. What ran at the last one is over by its own estimate, and nobody has said so."""
        _, talk = coordinator(name, queue_threshold=10)
        talk.say("full", report(running=256, waiting=12, blocked=12, wait_s=1.0, left_s=1.0, round_s=0.02, interval_s=60.0), 1.0)
        talk.say("c", ask("r0"), 1.1)
        (error,) = talk.heard(ScheduleError)
        assert error.code == SATURATED
        talk.say("c", ask("r1"), 21.0)
        (answer,) = talk.heard(ScheduleResponse)
        assert answer.worker_id == "full"

    @pytest.mark.parametrize(("queue_threshold", "waiting", "served"), [(1, 0, True), (1, 1, False), (4, 1, True), (4, 2, False)])
    def test_the_lowest_priority_may_fill_half_of_a_queue_and_at_least_one_place(self, name: str, queue_threshold: int, waiting: int, served: bool) -> None:
        _, talk = coordinator(name, queue_threshold=queue_threshold)
        talk.say("a", report(running=256, waiting=waiting, blocked=waiting), 1.0)
        talk.say("c", ask(priority=LOW), 1.0)
        assert bool(talk.heard(ScheduleResponse)) is served

    def test_the_same_randomness_gives_the_same_placements(self, name: str) -> None:
        def run() -> list[str]:
            _, talk = coordinator(name)
            for i in range(20):
                talk.say(f"w{i}", report(), 1.0)
            for i in range(50):
                talk.say("c", ask(f"r{i}"), 1.1)
            return [answer.worker_id for answer in talk.heard(ScheduleResponse)]

        assert run() == run()


def placements(policy: str, count: int, workers: dict[str, dict[str, object]]) -> Counter[str]:
    """How often each worker is chosen when every placement starts from the same reports."""
    chosen: Counter[str] = Counter()
    node, talk = coordinator(policy)
    for i in range(count):
        for name, state in workers.items():
            talk.say(name, report(epoch=100, dispatch_high=10**6, **state), 1.0)  # whatever was sent has been counted in
        for row in node.fleet:
            for number in list(row.ledger.entries):
                node.fleet.give_up(row, number)
        talk.say("c", ask(f"r{i}"), 1.0)
        chosen[talk.heard(ScheduleResponse)[-1].worker_id] += 1
    return chosen


def test_random_spreads_evenly() -> None:
    chosen = placements("random", 2000, {f"w{i}": {} for i in range(4)})
    assert all(abs(count - 500) < 5 * 19.4 for count in chosen.values())  # standard deviation 19.4


def test_round_robin_takes_turns() -> None:
    assert set(placements("round_robin", 40, {f"w{i}": {} for i in range(4)}).values()) == {10}


def test_power_of_two_leaves_the_longest_queue_alone() -> None:
    chosen = placements("power_of_two", 1500, {"a": {"running": 9}, "b": {"running": 1}, "c": {"running": 5}})
    assert chosen["a"] == 0
    assert abs(chosen["b"] - 1000) < 5 * 18.3  # in two of three pairs; standard deviation 18.3


def test_least_loaded_joins_the_shortest_queue() -> None:
    assert set(placements("least_loaded", 100, {"a": {"running": 2}, "b": {"running": 1}, "c": {"running": 1}})) == {"b", "c"}


def test_round_robin_takes_turns_in_a_fleet_of_several_kinds_of_hardware() -> None:
    kinds: dict[str, dict[str, object]] = {f"w{i}": {"hardware": ("h100-80g", "a100-80g", "h100-80g-tp4")[i % 3]} for i in range(6)}
    assert placements("round_robin", 60, kinds) == dict.fromkeys(kinds, 10)


@pytest.mark.parametrize("name", ["random", "round_robin", "power_of_two", "least_loaded"])
@pytest.mark.parametrize(("wait_s", "load_queue_s"), [(0.0, 0.0), (0.0, 3.0), (60.0, 3.0), (60.0, 0.0)])
def test_an_estimate_is_the_longer_of_wait_and_loads_and_then_the_prefill(name: str, wait_s: float, load_queue_s: float) -> None:
    _, talk = coordinator(name)
    talk.say("a", report(gpu_models=(), host_models=(MODEL,), wait_s=wait_s, load_queue_s=load_queue_s), 1.0)
    costs, model, hardware = make_costs("llm", 1.0, 0.0), CATALOG.models[MODEL], CATALOG.get_hardware("h100-80g")
    load_s, prefill_s = costs.load_s(model, hardware, HOST), costs.prefill_s(model, hardware, 1000)
    assert 0.0 < load_s < 50.0
    talk.say("c", ask(), 1.0)
    (answer,) = talk.heard(ScheduleResponse)
    assert answer.action == COLD_START
    assert answer.eta_s == pytest.approx(max(load_queue_s + load_s, wait_s) + prefill_s)
    talk.say("warm", report(wait_s=wait_s), 1.0)
    talk.say("c", ask("r1", exclude=("a",)), 1.0)
    (answer,) = talk.heard(ScheduleResponse)
    assert (answer.worker_id, answer.action) == ("warm", SERVE)
    assert answer.eta_s == pytest.approx(wait_s + prefill_s)


def test_startup_time_weighs_a_wait_against_a_load() -> None:
    for wait_s, expected in ((0.0, SERVE), (0.3, SERVE), (30.0, COLD_START)):
        _, talk = coordinator("startup_time")
        talk.say("warm", report(wait_s=wait_s), 1.0)
        talk.say("idle", report(gpu_models=(SECOND,), host_models=(MODEL,)), 1.0)
        talk.say("c", ask(), 1.0)
        (answer,) = talk.heard(ScheduleResponse)
        assert answer.action == expected


def test_startup_time_prefers_the_nearer_tier_and_the_free_memory() -> None:
    _, talk = coordinator("startup_time")
    talk.say("remote", report(gpu_models=(), host_models=(), disk_complete=False), 1.0)
    talk.say("host", report(gpu_models=(), host_models=(MODEL,)), 1.0)
    talk.say("full", report(gpu_models=(SECOND,), host_models=(MODEL,), gpu_free_bytes=0), 1.0)
    talk.say("c", ask(), 1.0)
    (answer,) = talk.heard(ScheduleResponse)
    assert (answer.worker_id, answer.action) == ("host", COLD_START)


def test_a_full_kv_cache_is_a_last_resort() -> None:
    _, talk = coordinator("startup_time", memory_threshold=0.9)
    talk.say("full", report(kv_used=0.95), 1.0)
    talk.say("free", report(gpu_models=()), 1.0)
    talk.say("c", ask("r0"), 1.0)
    assert talk.heard(ScheduleResponse)[0].worker_id == "free"
    talk.say("c", ask("r1", exclude=("free",)), 1.0)
    assert talk.heard(ScheduleResponse)[0].worker_id == "full"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fastest", "startup_time"), ("power_of_two:d=3", "choices"), ("power_of_two:choices=x", "whole number"), ("power_of_two:choices=0", "at least 1"),
        ("startup_time:margin_s=-1", "negative"), ("startup_time:margin_s=nan", "from -1000000000 to"), ("startup_time:eviction_s=inf", "from -1000000000 to"),
        ("startup_time:margin_s=1e308", "from -1000000000 to"), ("power_of_two:choices=10000000000", "from -1000000000 to"),
        ("startup_time:sample=2,margin_s=1,sample=3", "sample is given twice"), ("random:x", "none"), ("", "startup_time"),
    ],
)  # fmt: skip
def test_a_bad_policy_is_one_clear_line(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_policy(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_come_from_the_text() -> None:
    assert make_policy("power_of_two:choices=5") == type(make_policy("power_of_two"))(choices=5)  # type: ignore[call-arg]


BROKEN = {
    "unfinished.py": ("def place(:\n", "line 1: SyntaxError"),
    "forgetful.py": ("import sys\nimport no_such_module\n", "line 2: ModuleNotFoundError"),
    "angry.py": ("x = 1\n\nraise RuntimeError('two\\nlines')\n", "line 3: RuntimeError: two lines"),
    "leaving.py": ("raise SystemExit(7)\n", "line 1: SystemExit"),
    "nameless.py": ("from sllm.placement.base import Policy\nclass Nameless(Policy):\n    def place(self, query, fleet): ...\n", "AttributeError"),
}


@pytest.fixture
def with_broken_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, (text, _) in BROKEN.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    registry._list_folder.cache_clear()
    yield
    registry._list_folder.cache_clear()


@pytest.mark.usefixtures("with_broken_policies")
def test_a_broken_file_is_an_error_only_for_who_asks_for_its_policy() -> None:
    assert make_policy("least_loaded").name == "least_loaded"
    for name, (_, why) in BROKEN.items():
        with pytest.raises(UsageError) as caught:
            make_policy(Path(name).stem)
        assert f"sllm/placement/policies/{name}" in str(caught.value)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"'fastest' is not known; there are least_loaded.*not readable: .*angry\.py"):
        make_policy("fastest")


@pytest.mark.usefixtures("with_broken_policies")
def test_a_run_with_another_policy_warns_of_a_broken_file() -> None:
    run = VirtualRun(configuration(), silent(), io.StringIO())
    assert len(run.warnings) == len(BROKEN)
    assert any("sllm/placement/policies/unfinished.py, line 1" in warning for warning in run.warnings)
