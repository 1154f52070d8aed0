"""Fault schedules: what is read, what is refused and how, and what each kind does to a host."""

from __future__ import annotations

import dataclasses
import io
import re
from math import exp, isfinite
from pathlib import Path
from random import Random
from typing import Any

import pytest
from simulated import Fleet

from experiments.harness import Simulation, configuration, silent
from sllm.observe.report.json import validate_results
from sllm.observe.report.outputs import Outputs
from sllm.protocol.errors import UsageError
from sllm.protocol.events import CoordinatorReady
from sllm.protocol.messages import Address, AnyEnvelope, ScheduleRequest
from sllm.protocol.node import Node
from sllm.run.virtual import VirtualRun
from sllm.virtual.faults import Fault, Schedule, load_schedule, parse_schedule
from sllm.virtual.inject import Injector
from sllm.virtual.kinds import KINDS
from sllm.virtual.network import SIGMA_MAX, Latency, Network
from sllm.virtual.world import World

SCENARIOS = sorted((Path(__file__).parent.parent / "experiments/scenarios").glob("*.toml"))
NAMES = {"flaky-network", "rolling-worker-crashes", "coordinator-restart", "split-brain", "thundering-herd", "slow-worker", "clock-jump", "churn"}


# --- reading ------------------------------------------------------------------------------------------------------------------------


def test_a_fault_is_read_with_its_defaults() -> None:
    (fault,) = parse_schedule('[[fault]]\nat = 10\nkind = "crash"\nhosts = ["worker-1"]\nfor = 5.0\n', 1).faults
    assert (fault.at_s, fault.kind, fault.for_s, dict(fault.options)) == (10.0, "crash", 5.0, {"hosts": ["worker-1"], "stagger": 0.0})
    assert fault.describe() == "at 10 s crash worker-1 for 5 s"
    assert fault.end_s == 15.0


def test_repetitions_come_in_order_of_time() -> None:
    text = '[[fault]]\nat = 1\nkind = "freeze"\nhosts = ["w"]\nfor = 0.5\nevery = 2\nuntil = 7\n[[fault]]\nat = 2\nkind = "crash"\nhosts = ["v"]\n'
    schedule = parse_schedule(text, 1)
    assert [(fault.at_s, fault.kind) for fault in schedule.faults] == [(1, "freeze"), (2, "crash"), (3, "freeze"), (5, "freeze")]
    assert schedule.end_s == 5.5
    assert not schedule.heals, "the crash is for good"
    assert schedule.describe()[1] == "at 2 s crash v for good"


def test_an_empty_schedule_is_none() -> None:
    assert parse_schedule("", 1).faults == ()
    assert Schedule().end_s == 0.0
    assert Schedule().heals


ONE = '[[fault]]\nat = 1\nkind = "crash"\nhosts = ["w"]\n\n[[fault]]\n'
MISTAKES = [
    ("at = ]\n", r"f\.toml: .*line 1, column 6.*"),
    ("[[fault]]\nat = 1\n", r"f\.toml:1: fault 1: kind is missing; there are crash, freeze, .*"),
    (ONE + 'at = 1\nkind = "crush"\n', r"f\.toml:8: fault 2: kind='crush': no such kind; .*"),
    (ONE + 'kind = "crash"\nhosts = ["w"]\n', r"f\.toml:6: fault 2: at is missing: when it begins, s"),
    (ONE + 'at = -1\nkind = "crash"\nhosts = ["w"]\n', r"f\.toml:7: fault 2: at=-1: must be a number, at least 0 and at most 1000000000"),
    (ONE + 'at = "soon"\nkind = "crash"\nhosts = ["w"]\n', r"f\.toml:7: fault 2: at='soon': must be a number, .*"),
    (ONE + 'at = nan\nkind = "crash"\nhosts = ["w"]\n', r"f\.toml:7: fault 2: at=nan: must be a number, .*"),
    (ONE + 'at = 1\nkind = "crash"\nhosts = "w"\n', r"f\.toml:9: fault 2: hosts='w': must be a list of host names.*"),
    (ONE + 'at = 1\nkind = "crash"\nhosts = []\n', r"f\.toml:9: fault 2: hosts=\[\]: must be a list of host names.*"),
    (ONE + 'at = 1\nkind = "crash"\n', r"f\.toml:6: fault 2: hosts is missing: .*"),
    (ONE + 'at = 1\nkind = "crash"\nhosts = ["w"]\nform = 3\n', r"f\.toml:10: fault 2: 'form' is no key of crash; there are at, for, .*"),
    (ONE + 'at = 1\nkind = "degrade"\nloss = 1.5\n', r"f\.toml:9: fault 2: loss=1\.5: must be a number, at least 0 and at most 1"),
    (ONE + 'at = 1\nkind = "degrade"\nfor = 2\n', r"f\.toml:6: fault 2: nothing is degraded; give one of loss, .*"),
    (ONE + 'at = 1\nkind = "degrade"\nlatency_ms = ["uniform", 3, 1]\n', r"f\.toml:9: fault 2: latency_ms=.*in order"),
    (ONE + 'at = 1\nkind = "degrade"\nlatency_ms = "slow"\n', r"f\.toml:9: fault 2: latency_ms='slow': must be number, or .*"),
    (ONE + 'at = 1\nkind = "clock_drift"\nrate = 0\nhosts = ["w"]\n', r"f\.toml:9: fault 2: rate=0: must be a number, above 0 and at most 100"),
    (ONE + 'at = 1\nkind = "overflow"\nbuffer = 1.5\ndrain_per_s = 1\nhosts = ["w"]\n', r"f\.toml:9: fault 2: buffer=1\.5: must be a whole number, .*"),
    (ONE + 'at = 1\nkind = "cut"\nboth_ways = 1\n', r"f\.toml:9: fault 2: both_ways=1: must be true or false"),
    (ONE + 'at = 1\nkind = "zombie"\nhosts = ["w"]\n', r"f\.toml:6: fault 2: for is missing: a zombie comes back"),
    (ONE + 'at = 1\nkind = "crash"\nhosts = ["w"]\nevery = 2\n', r"f\.toml:10: fault 2: every and until go together"),
    (ONE + 'at = 1\nkind = "crash"\nhosts = ["w"]\nevery = 1e-6\nuntil = 9\n', r"f\.toml:10: fault 2: every=1e-06: repeats more than 10000 times until 9"),
    ("faults = 1\n", r"f\.toml:1: 'faults' is no key of a schedule; there are .*"),
    ("fault = 1\n", r"f\.toml:1: faults are written as \[\[fault\]\] tables"),
    ("random = 1\n", r"f\.toml:1: random faults are written as one \[random\] table"),
    ("[random]\nfrom = 1\n", r"f\.toml:1: \[random\]: until is missing: .*"),
    ("[random]\nuntil = 1\n", r"f\.toml:1: \[random\]: per_minute is missing: .*"),
    ("[random]\nuntil = 1\nper_minute = { crush = 1 }\n", r"f\.toml:3: \[random\]: per_minute: 'crush' is no kind of fault; .*"),
    ("[random]\nuntil = 1\nper_minute = { crash = -1 }\n", r"f\.toml:.*: \[random\]: per_minute\.crash=-1: must be a number, at least 0 and at most 60000"),
    ("[random]\nuntil = 1\nfor = [3, 1]\nper_minute = { crash = 1 }\n", r"f\.toml:3: \[random\]: for=\[3, 1\]: must be \[least, most\] seconds"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_named_with_file_line_fault_and_key(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_schedule(text, 1, "f.toml")
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: cannot be read: No such file"):
        load_schedule(str(tmp_path / "nowhere.toml"), 1)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot be read: not UTF-8"):
        load_schedule(str(tmp_path / "binary.toml"), 1)


def test_random_faults_come_from_the_seed() -> None:
    rates = ", ".join(f"{kind} = 20.0" for kind in KINDS)
    text = f"[random]\nfrom = 5\nuntil = 65\nfor = [1, 2]\nper_minute = {{ {rates} }}\n"
    faults = parse_schedule(text, 1).faults
    assert faults == parse_schedule(text, 1).faults
    assert faults != parse_schedule(text, 2).faults
    assert parse_schedule(text + "seed = 2\n", 1).faults == parse_schedule(text, 2).faults
    assert {fault.kind for fault in faults} == set(KINDS)
    assert all(5.0 <= fault.at_s < 65.0 and fault.for_s is not None and 1.0 <= fault.for_s <= 2.0 for fault in faults)
    assert len(faults) == pytest.approx(20 * len(KINDS), abs=6 * (20 * len(KINDS)) ** 0.5)
    assert all(fault.describe() for fault in faults)


# --- doing --------------------------------------------------------------------------------------------------------------------------


class Beat(Node):
    """Says so every second, to its events and to `peer`."""

    def __init__(self, name: str, incarnation: int, now: float, peer: Address) -> None:
        super().__init__(name, incarnation)
        self.peer = peer
        self.wake_at = now + 1.0
        self.draining = False
        self.heard = 0
        self.handlers = {ScheduleRequest: self._on_request}

    def _on_request(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        self.heard += 1

    def handle_timer(self, now: float) -> None:
        if now >= self.wake_at:
            self.wake_at += 1.0
            self.events.append(CoordinatorReady(now, self.incarnation))
            if not self.draining:
                self.send(ScheduleRequest("r", "m", 1, 1, 1, 0.0, ()), self.peer, now)

    def drain(self, now: float) -> None:
        self.draining = True


class Bench:
    """Three workers and a coordinator that beat, and a log of (time, who, first life?)."""

    def __init__(self, text: str, seed: int = 1) -> None:
        self.world = world = World(seed, Network())
        self.beats: list[tuple[float, str, bool]] = []
        world.bus.subscribe(lambda node, event: self.beats.append((round(world.now, 3), node.node_id, node.incarnation == 1)))
        for name, peer in (("coordinator", "worker-1"), ("worker-1", "coordinator"), ("worker-2", "coordinator"), ("worker-3", "coordinator")):
            def make(incarnation: int, now: float, name: str = name, peer: str = peer) -> Node:
                return Beat(name, incarnation, now, (peer, 1))

            world.add(make(1, 0.0), (name, 1), make)
        self.injector = Injector(world, parse_schedule(text, seed))
        self.injector.install()

    def run(self, until: float) -> Bench:
        self.world.run(until)
        return self

    def times(self, name: str, first_life: bool | None = None) -> list[float]:
        return [at for at, who, first in self.beats if who == name and first_life in (None, first)]

    def node(self, name: str) -> Any:
        return self.world.hosts[name].node


def fault(kind: str, **options: Any) -> str:
    lines = [f"{key.rstrip('_')} = {repr(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in options.items()]
    return f'[[fault]]\nkind = "{kind}"\n' + "\n".join(lines) + "\n"


def test_crash_ends_a_life_and_for_begins_the_next() -> None:
    bench = Bench(fault("crash", at=1.5, for_=2.0, hosts=["worker-1"])).run(6.0)
    assert bench.times("worker-1", True) == [1.0]
    assert bench.times("worker-1", False) == [4.5, 5.5]
    assert bench.times("worker-2") == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [text for _, text in bench.injector.log] == ["crash worker-1", "restart worker-1"]
    assert bench.injector.end_s == 3.5


def test_crash_without_for_is_for_good_and_a_second_one_is_skipped() -> None:
    bench = Bench(fault("crash", at=1.5, hosts=["worker-1"]) + fault("crash", at=2.5, for_=1.0, hosts=["worker-1"])).run(9.0)
    assert bench.times("worker-1") == [1.0]
    assert (bench.injector.applied, bench.injector.skipped) == (1, 1)


def test_stagger_hits_one_host_after_the_other() -> None:
    bench = Bench(fault("crash", at=1.5, for_=0.2, stagger=2.0, hosts=["worker-*"])).run(9.0)
    assert [round(at, 3) for at, text in bench.injector.log if text.startswith("crash")] == [1.5, 3.5, 5.5]
    assert bench.injector.end_s == pytest.approx(5.7)


def test_times_count_from_the_origin() -> None:
    bench = Bench("")
    late = Injector(bench.world, parse_schedule(fault("crash", at=1.5, for_=1.0, hosts=["worker-1"]), 1))
    late.install(origin_s=2.0)
    assert late.end_s == 4.5
    assert bench.run(6.0).times("worker-1") == [1.0, 2.0, 3.0, 5.5]


def test_freeze_holds_a_host_and_thaw_lets_it_catch_up() -> None:
    bench = Bench(fault("freeze", at=1.5, for_=2.0, hosts=["worker-2"])).run(5.0)
    assert bench.times("worker-2") == [1.0, 3.5, 3.5, 4.0, 5.0]


def test_zombie_comes_back_beside_its_replacement() -> None:
    bench = Bench(fault("zombie", at=1.5, for_=4.0, restart_after=1.0, linger=1.2, hosts=["worker-1"])).run(9.0)
    assert bench.times("worker-1", True) == [1.0, 5.5, 5.5, 5.5, 5.5, 6.0]
    assert bench.times("worker-1", False) == [3.5, 4.5, 5.5, 6.5, 7.5, 8.5]
    assert bench.injector.end_s == pytest.approx(6.7)


def test_drain_tells_the_node_and_replaces_it() -> None:
    bench = Bench(fault("drain", at=1.5, for_=2.0, hosts=["worker-1"])).run(5.0)
    assert bench.times("worker-1", True) == [1.0, 2.0, 3.0]
    assert bench.times("worker-1", False) == [4.5]
    assert bench.node("coordinator").heard == 1 + 1 + 5 + 5 - 2, "two last ones are on their way"


def test_slow_stretches_time_and_keeps_the_wall_clock_true() -> None:
    bench = Bench(fault("slow", at=1.0, for_=4.0, factor=2.0, hosts=["worker-1"])).run(8.0)
    assert bench.times("worker-1") == pytest.approx([1.0, 3.0, 5.0, 6.0, 7.0, 8.0], abs=1e-3)
    worker = bench.node("worker-1")
    assert worker.wall_offset_s == pytest.approx(2.0), "what the monotonic clock has lost"


def test_drifting_clocks_drift_together() -> None:
    bench = Bench(fault("clock_drift", at=0.0, rate=2.0, hosts=["worker-1"])).run(3.0)
    assert bench.times("worker-1") == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0], abs=1e-3)
    assert bench.node("worker-1").wall_offset_s == 0.0


def test_one_clock_fault_at_a_time() -> None:
    bench = Bench(fault("slow", at=1.0, for_=4.0, factor=2.0, hosts=["worker-1"]) + fault("clock_drift", at=2.0, rate=3.0, hosts=["worker-1"])).run(8.0)
    assert bench.injector.skipped == 1


def test_a_wall_clock_jumps_and_is_set_right() -> None:
    bench = Bench(fault("clock_jump", at=1.5, for_=2.0, by=-100.0, hosts=["worker-2"])).run(2.5)
    assert bench.node("worker-2").wall_offset_s == -100.0
    assert bench.node("coordinator").rejected["stale_time"] == 1
    assert bench.run(4.5).node("worker-2").wall_offset_s == 0.0


def test_overflow_loses_a_burst() -> None:
    bench = Bench(fault("overflow", at=1.5, for_=2.0, buffer=1, drain_per_s=5.0, hosts=["coordinator"])).run(4.5)
    assert bench.world.network.lost == {"overflow": 4}
    assert bench.node("coordinator").heard == 3 + 1 + 1 + 3


def test_a_cut_is_one_way_unless_said_otherwise() -> None:
    for both, lost in ((False, 2), (True, 4)):
        bench = Bench(fault("cut", at=1.5, for_=2.0, from_=["worker-1"], to=["coordinator"], both_ways=both)).run(5.0)
        assert bench.world.network.lost == {"cut": lost}


def test_isolation_is_both_ways_with_everybody() -> None:
    bench = Bench(fault("isolate", at=1.5, for_=2.0, hosts=["coordinator"])).run(5.0)
    assert bench.world.network.lost == {"cut": 2 * 4}
    assert bench.world.network.plain_latency_s is not None


def test_degrade_changes_the_links_named() -> None:
    bench = Bench(fault("degrade", at=1.5, for_=2.0, from_=["worker-*"], loss=1.0, latency_ms=7.0, bandwidth_kb_per_s=1000.0))
    bench.run(2.0)
    link = bench.world.network.link_between("worker-1", "coordinator")
    assert link is not None
    assert (link.loss, link.latency.a, link.bandwidth_bytes_per_s) == (1.0, 0.007, 1e6)
    assert bench.run(5.0).world.network.lost == {"random": 6}


def test_random_hosts_are_drawn_from_the_seed() -> None:
    text = fault("crash", at=1.5, hosts=["random:2"])
    picks = {seed: tuple(word for _, word in Bench(text, seed).run(2.0).injector.log) for seed in range(20)}
    assert all(len(pick) == 2 and len(set(pick)) == 2 for pick in picks.values())
    assert len(set(picks.values())) > 1
    assert picks[3] == tuple(word for _, word in Bench(text, 3).run(2.0).injector.log)
    assert not any("coordinator" in word for pick in picks.values() for word in pick)
    half = Bench(fault("crash", at=1.5, hosts=["random:50%:worker-*"])).run(2.0).injector
    assert half.applied == 2, "half of three, rounded up"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (fault("crash", at=1.0, hosts=["wroker-1"]), r"faults: fault 1: hosts: 'wroker-1' matches no host of this run; there are coordinator, worker-1.*"),
        (fault("crash", at=1.0, hosts=["random:0"]), r"faults: fault 1: 'random:0': must be like .*"),
        (fault("crash", at=1.0, hosts=["random:many"]), r"faults: fault 1: 'random:many': must be like .*"),
        (fault("cut", at=1.0, to=["nobody*"]), r"faults: fault 1: to: 'nobody\*' matches no host .*"),
    ],
)
def test_hosts_that_do_not_exist_are_a_usage_error_before_the_run(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Bench(text)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


def test_a_host_that_cannot_restart_is_a_usage_error_before_the_run() -> None:
    world = World(1, Network())
    world.add(Beat("worker-1", 1, 0.0, ("worker-1", 1)), ("worker-1", 1))
    with pytest.raises(UsageError, match="worker-1 cannot restart"):
        Injector(world, Schedule((Fault(1.0, "crash", 1.0, {"hosts": ["worker-1"], "stagger": 0.0}, "f"),))).install()
    Injector(world, Schedule((Fault(1.0, "crash", None, {"hosts": ["worker-1"], "stagger": 0.0}, "f"),))).install()


# --- the ready ones -----------------------------------------------------------------------------------------------------------------


def test_the_scenarios_are_there_and_say_what_they_show() -> None:
    assert {path.stem for path in SCENARIOS} >= NAMES
    for path in SCENARIOS:
        assert "# Shows: " in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_fleet_comes_through_every_scenario(path: Path) -> None:
    """With every checker on: nothing is broken, everything is finished, and the faults did happen."""
    schedule = load_schedule(str(path), 1)
    assert schedule.heals
    fleet = Fleet(1, workers=6, rate_per_s=4.0, schedule=schedule).run()
    assert fleet.injector.applied > 0
    assert fleet.client.in_flight == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_of_every_kind_is_carried_out_and_can_be_written_down(kind: str) -> None:
    """A kind declares its keys in one class and acts in one method: what the class draws fits its own keys, and the method takes it."""
    bench = Bench(f"[random]\nuntil = 20\nper_minute = {{ {kind} = 60 }}\n").run(40.0)
    assert bench.injector.applied > 0
    for drawn in bench.injector.schedule.faults:
        assert drawn.options.keys() == KINDS[kind].keys.keys()
        given = {key: value for key, value in drawn.options.items() if value is not None}
        assert [KINDS[kind].keys[key].rule.problem(value) for key, value in given.items() if key != "latency_ms"] == [""] * len(given)
        assert KINDS[kind].problem(drawn.for_s, drawn.options) == ""


# --- what comes too late --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        'at = 200000\nkind = "crash"\nhosts = ["worker-1"]', 'at = 1\nkind = "crash"\nhosts = ["worker-1"]\nfor = 200000',
        'at = 1\nkind = "zombie"\nhosts = ["worker-1"]\nfor = 200000', 'at = 1\nkind = "cut"\nto = ["worker-1"]\nfor = 200000',
        'at = 1\nkind = "crash"\nhosts = ["worker-*"]\nstagger = 100000\nfor = 1', 'at = 1\nkind = "freeze"\nhosts = ["client"]\nfor = 1e9',
    ],
)  # fmt: skip
def test_a_fault_far_beyond_the_run_does_not_keep_it_going(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "late.toml"
    path.write_text(f"[[fault]]\n{fault}\n")
    config = configuration(workers=3, duration_s=5.0, rate_per_s=4.0, request_timeout_s=30.0)
    run = VirtualRun(config, dataclasses.replace(silent(), faults=str(path)), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    assert run.results()["invariants"]["violations"] == []
    assert run.now < 200.0
    assert [warning for warning in run.warnings if "late.toml: faults that begin or end after" in warning and ": 1;" in warning]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[random]\nfrom = 30\nuntil = 25\nper_minute = { crash = 1 }\n', r"f\.toml:2: \[random\]: from=30: must be before until=25"),
        ('[random]\nuntil = 1e9\nper_minute = { crash = 1 }\n', r"f\.toml:2: \[random\]: until=1000000000: would draw about 16,666,667 faults, .* 100,000"),
        ('[[fault]]\nat = 5\nkind = "crash"\nhosts = ["w"]\nevery = 1\nuntil = 5\n', r"f\.toml:6: fault 1: until=5: must be after at=5"),
    ],
)  # fmt: skip
def test_times_that_make_no_faults_or_too_many_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_schedule(text, 1, "f.toml")
    assert re.fullmatch(message, str(caught.value)), str(caught.value)


# --- what never comes to an end -----------------------------------------------------------------------------------------------------


def test_a_lognormal_latency_of_a_sigma_beyond_all_numbers_is_refused() -> None:
    text = '[[fault]]\nat = 0\nkind = "degrade"\nlatency_ms = ["lognormal", 1000, 1000]\n'
    with pytest.raises(UsageError, match=r"f\.toml:4: fault 1: latency_ms=.*sigma is 1000, must be at most 10"):
        parse_schedule(text, 1, "f.toml")
    largest = Latency("lognormal", 1e6, SIGMA_MAX)
    rng = Random(1)
    assert all(isfinite(largest.draw_s(rng)) for _ in range(10_000))
    assert isfinite(largest.a * exp(SIGMA_MAX * 8.6)), "a normal deviate made of 53 random bits is never beyond that"


@pytest.mark.parametrize(
    "fault",
    ['kind = "freeze"', 'kind = "slow"\nfactor = 1e6', 'kind = "clock_drift"\nrate = 1e-9', 'kind = "slow"\nfactor = 50'],
    ids=lambda text: text.replace("\n", " "),
)
@pytest.mark.parametrize("hosts", ["*", "client", "worker-*", "coordinator"])
def test_a_host_that_stands_still_or_is_slow_for_good_breaks_no_invariant(fault: str, hosts: str) -> None:
    schedule = parse_schedule(f'[[fault]]\nat = 3\n{fault}\nhosts = ["{hosts}"]\n', 1)
    results = Simulation(configuration(workers=3, duration_s=5.0, rate_per_s=4.0, request_timeout_s=20.0), schedule=schedule).complete()
    assert results["invariants"]["violations"] == []
    assert validate_results(results) == []
    if "freeze" in fault:
        assert (results["requests"]["in_flight"] > 0) == (hosts in ("*", "client")), "its client waits for those without end"


def test_requests_of_a_client_that_stands_still_are_rows_too(tmp_path: Path) -> None:
    faults, rows = tmp_path / "faults.toml", tmp_path / "rows.csv"
    faults.write_text('[[fault]]\nat = 1\nkind = "freeze"\nhosts = ["client"]\n')
    with Outputs({"--requests-csv": str(rows)}, {}) as outputs:
        run = VirtualRun(configuration(workers=3, duration_s=5.0, rate_per_s=4.0), dataclasses.replace(silent(), faults=str(faults)), io.StringIO(), outputs)
        run.conduct()
        run.put_in_flight()
        run.close()
        results = run.results()
        for step in outputs.finish({}):
            step()
    listed = rows.read_text().splitlines()[1:]
    assert len(listed) == results["requests"]["sent"]
    assert sum(",in_flight," in row and "the run ended" in row for row in listed) == results["requests"]["in_flight"] > 0
