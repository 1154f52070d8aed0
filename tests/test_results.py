import json
import math
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import REPORTS, RUN, events, recorded, results_of

from sllm.events import (
    ModelEvicted,
    ModelLoaded,
    ModelLoadStarted,
    RequestAdmitted,
    RequestCompleted,
    RequestFailed,
    RequestRouted,
    RequestSent,
    WorkerStateChanged,
)
from sllm.report.json import KEYS, TOP_KEYS, to_json, validate_results
from sllm.results import (
    DISTRIBUTIONS,
    STATISTICS,
    TIMELINE_MAX,
    FleetFigures,
    Invariants,
    Recorder,
    ReportFigures,
    StateTimeline,
    percentile,
    rounded,
    summarize,
)

values = st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=2, max_size=300)


@given(values)
def test_percentiles_are_those_of_the_standard_library(numbers):
    cuts = statistics.quantiles(numbers, n=100, method="inclusive")
    ordered = sorted(numbers)
    for percent in range(1, 100):
        assert percentile(ordered, percent) == pytest.approx(cuts[percent - 1], rel=1e-9, abs=1e-9)
    assert percentile(ordered, 0) == ordered[0]
    assert percentile(ordered, 100) == ordered[-1]


@given(values)
def test_summary_is_exact_and_in_order(numbers):
    summary = summarize(numbers)
    assert tuple(summary) == STATISTICS
    assert summary["mean"] == rounded(math.fsum(numbers) / len(numbers))
    assert summary["max"] == rounded(max(numbers))
    tail = [summary[name] for name in STATISTICS[1:]]
    assert tail == sorted(tail)


def test_summary_of_one_value_and_of_none():
    assert set(summarize([0.25]).values()) == {0.25}
    assert set(summarize([]).values()) == {None}
    assert percentile([], 50) is None


def test_keys_are_those_of_the_schema_in_order():
    results = results_of(recorded())
    assert list(results) == [
        "schema", "run", "requests", "actions", "ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "stall_s", "decision_s", "slo", "fleet", "reports", "invariants",
    ]  # fmt: skip
    assert list(results["run"]) == [
        "mode", "architecture", "workers", "hardware", "policy", "seed", "duration_s", "duration_asked_s", "interrupted", "wall_s", "requests_per_wall_s",
        "workload", "engine_profile", "loader",
    ]  # fmt: skip
    assert list(results["requests"]) == ["sent", "completed", "failed", "rejected", "in_flight", "duplicates"]
    assert list(results["actions"]) == ["serve", "cold_start", "migrate"]
    for name in DISTRIBUTIONS:
        assert list(results[name]) == ["mean", "p50", "p90", "p95", "p99", "max"]
    assert list(results["slo"]) == ["ttft_s", "attainment"]
    assert list(results["fleet"]) == ["ready", "utilisation", "load_imbalance", "cold_start_rate", "model_hit_rate"]
    assert list(results["reports"]) == ["sent", "accepted", "lost", "under_way", "rejected"]
    assert list(results["invariants"]) == ["checked", "violations"]
    assert results["schema"] == 1
    assert tuple(results) == TOP_KEYS
    assert all(KEYS[name] == tuple(results[name]) for name in KEYS)


def test_figures_follow_from_the_events():
    told = events(3000, seed=7)
    recorder = Recorder()
    for event in told:
        recorder.observe(event)
    results = results_of(recorder)
    kinds = Counter(type(event) for event in told)
    done = [event for event in told if isinstance(event, RequestCompleted)]
    assert results["requests"]["sent"] == kinds[RequestSent] == 3000
    assert results["requests"]["completed"] == len(done)
    assert results["requests"]["failed"] == kinds[RequestFailed] > 0
    assert results["requests"]["in_flight"] > 0
    for name, field in (("ttft_s", "ttft_s"), ("e2e_s", "e2e_s"), ("tpot_s", "tpot_s"), ("queue_wait_s", "queue_wait_s")):
        assert results[name] == summarize([getattr(event, field) for event in done])
    routed = [event for event in told if isinstance(event, RequestRouted)]
    assert results["decision_s"] == summarize([event.decision_s for event in routed])
    assert results["actions"]["cold_start"] == sum(event.action == "cold_start" for event in routed)
    assert results["fleet"]["cold_start_rate"] == rounded(results["actions"]["cold_start"] / len(routed))
    assert results["slo"]["attainment"] == rounded(sum(event.ttft_s <= 2.0 for event in done) / 3000)
    assert results["fleet"]["utilisation"] == 0.2
    assert results["fleet"]["load_imbalance"] == rounded(20 / 15)
    assert results["reports"] == {"sent": 240, "accepted": 236, "lost": 1, "under_way": 0, "rejected": {"bad_tag": 2, "replayed": 1}}
    assert validate_results(results) == []


@given(st.integers(0, 200), st.integers(0, 2**32), st.booleans())
def test_the_books_always_balance(count, seed, trouble):
    results = results_of(recorded(count, seed, trouble=trouble))
    assert validate_results(results) == []
    assert validate_results(json.loads(to_json(results))) == []
    if not trouble:
        assert results["requests"]["completed"] == results["requests"]["sent"] == count


def test_a_clients_own_count_is_held_against_the_events():
    recorder = recorded(100, trouble=False)
    results = recorder.results(RUN, FleetFigures(4, [1.0], 2.0), REPORTS, in_flight=1)
    assert validate_results(results) == ["requests: sent 100 is not completed 100 + failed 0 + rejected 0 + in_flight 1"]


def test_json_is_the_same_bytes_for_the_same_run():
    first, second = to_json(results_of(recorded(500, 3))), to_json(results_of(recorded(500, 3)))
    assert first == second
    assert first != to_json(results_of(recorded(500, 4)))
    assert json.loads(first) == results_of(recorded(500, 3))
    assert first.endswith("}\n")
    assert '"rate_per_s": 0.333333333\n' in first or '"rate_per_s": 0.333333333,' in first


def test_rejected_reports_are_in_order_whatever_the_counting_order():
    figures = [ReportFigures(6, 1, reasons) for reasons in ({"b": 2, "a": 3, "c": 0}, {"c": 0, "a": 3, "b": 2})]
    texts = {to_json(Recorder().results(RUN, FleetFigures(0, [], 0.0), figure)) for figure in figures}
    assert len(texts) == 1
    assert json.loads(texts.pop())["reports"] == {"sent": 6, "accepted": 1, "lost": 0, "under_way": 0, "rejected": {"a": 3, "b": 2}}


def test_a_run_without_requests_has_nulls_and_no_complaint():
    results = Recorder().results(RUN, FleetFigures(4, [0.0, 0.0], 10.0), REPORTS, Invariants(3))
    assert results["ttft_s"]["p99"] is None
    assert results["slo"]["attainment"] is None
    assert results["fleet"] == {"ready": 4, "utilisation": 0.0, "load_imbalance": None, "cold_start_rate": None, "model_hit_rate": None}
    assert validate_results(results) == []


def test_a_hit_finds_its_model_on_the_gpu():
    recorder = Recorder()
    for event in (
        ModelLoadStarted(0.0, "w", "preloaded"),  # nobody asked: no miss
        ModelLoaded(1.0, "w", "preloaded", "disk", 1.0),
        RequestAdmitted(2.0, "w", "r0", "preloaded"),  # hit
        RequestAdmitted(3.0, "w", "r1", "m"),  # miss: its load begins
        ModelLoadStarted(3.0, "w", "m"),
        RequestAdmitted(3.5, "w", "r2", "m"),  # miss: still loading
        RequestAdmitted(3.6, "v", "r3", "m"),  # hit: on another worker
        ModelLoaded(5.0, "w", "m", "remote", 2.0),
        RequestAdmitted(6.0, "w", "r4", "m"),  # hit
        ModelEvicted(7.0, "w", "m"),
    ):
        recorder.observe(event)
    results = results_of(recorder)
    assert results["fleet"]["model_hit_rate"] == 0.6
    assert recorder.loads == 2
    assert recorder.load_s == 3.0


def test_without_a_coordinator_actions_are_those_of_completed_requests():
    recorder = Recorder()
    for event in events(300):
        if type(event) in (RequestSent, RequestCompleted):
            recorder.observe(event)
    results = results_of(recorder)
    assert sum(results["actions"].values()) == results["requests"]["completed"] > 0
    assert results["fleet"]["model_hit_rate"] == rounded(1 - results["actions"]["cold_start"] / results["requests"]["completed"])
    assert validate_results(results) == []


def test_a_glance_is_close_to_the_results():
    recorder = recorded(20_000)
    glance, results = recorder.glance(), results_of(recorder)
    assert (glance.sent, glance.completed, glance.in_flight) == tuple(results["requests"][key] for key in ("sent", "completed", "in_flight"))
    assert glance.ttft_p50_s == pytest.approx(results["ttft_s"]["p50"], rel=0.05)
    assert Recorder().glance().ttft_p99_s is None


def test_the_timeline_of_states_is_bounded_and_ends_right():
    timeline = StateTimeline()
    for index in range(20_000):
        timeline.move(index * 0.5, f"w{index % 50}", ("READY", "SUSPECT", "DEAD")[index // 50 % 3])
        assert len(timeline.points) <= TIMELINE_MAX
    assert sum(timeline.points[-1][1].values()) == 50
    moments = [at for at, _ in timeline.points]
    assert moments == sorted(moments)
    assert moments[-1] == 19_999 * 0.5


def test_a_coordinator_that_restarts_does_not_count_workers_twice():
    recorder = Recorder()
    for event in (WorkerStateChanged(1.0, "w", 1, "", "READY", ""), WorkerStateChanged(9.0, "w", 1, "", "READY", "")):
        recorder.observe(event)
    assert recorder.fleet.counts == {"READY": 1}


BROKEN = [
    (("schema",), 2, "schema: 2 is not 1"),
    (("run", "mode"), "", "run.mode: '' is not a text"),
    (("run", "wall_s"), None, "run.wall_s: None is not a number of at least 0"),
    (("run", "workload"), [], "run.workload: [] is not an object"),
    (("requests", "sent"), 2001, "requests: sent 2001 is not"),
    (("requests", "completed"), True, "requests.completed: True is not a whole number"),
    (("requests", "in_flight"), -1, "requests.in_flight: -1 is not a whole number"),
    (("actions", "serve"), 5, "actions: "),
    (("ttft_s", "p50"), 1e9, "ttft_s: percentiles do not grow"),
    (("ttft_s", "mean"), 1e9, "ttft_s: mean 1000000000.0 is above the maximum"),
    (("ttft_s", "p99"), float("nan"), "ttft_s.p99: nan is not a number"),
    (("e2e_s", "max"), None, "e2e_s: some figures are null"),
    (("slo", "attainment"), 1.2, "slo.attainment: 1.2 is above 1"),
    (("fleet", "ready"), 5, "fleet.ready: 5 of 4 workers"),
    (("fleet", "load_imbalance"), 0.5, "fleet.load_imbalance: 0.5 is below 1"),
    (("fleet", "cold_start_rate"), 0.9, "fleet.cold_start_rate: 0.9 is not"),
    (("reports", "lost"), 0, "reports: sent 240 is not accepted 236 + lost 0 + under way 0 + rejected 3"),
    (("reports", "rejected"), {"x": 0}, "reports.rejected: {'x': 0}: 0 is not a whole number above 0"),
    (("invariants", "violations"), [1], "invariants.violations: [1] is not a list of texts"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), BROKEN, ids=[".".join(path) + f"={value}" for path, value, _ in BROKEN])
def test_what_is_wrong_is_said(path, value, complaint):
    results = results_of(recorded())
    target = results
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    wrong = validate_results(results)
    assert any(line.startswith(complaint) for line in wrong), wrong


def test_missing_unknown_and_disordered_keys_are_said():
    results = results_of(recorded())
    assert validate_results([]) == ["the results are not an object"]
    assert validate_results({**results, "more": 1}) == ["results: 'more' is not of the schema"]
    assert validate_results({key: value for key, value in results.items() if key != "slo"}) == ["results: 'slo' is missing"]
    assert validate_results(dict(reversed(results.items())))[0].startswith("results: the keys are out of order")
    assert validate_results({**results, "fleet": 3}) == ["fleet: is not an object"]


def test_the_end_of_a_run_in_which_all_go_home_is_no_part_of_the_timeline():
    timeline = StateTimeline()
    for name in ("a", "b"):
        timeline.move(1.0, name, "READY")
    timeline.end()
    for name in ("a", "b"):
        timeline.move(9.0, name, "LEFT")
    assert timeline.points == [(1.0, {"READY": 2})]
