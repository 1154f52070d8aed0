import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import REPORTS, RUN, events, fleet_of, recorded, results_of
from roles import tell

from sllm.engine.base import EngineUsage
from sllm.observe.recorder import Recorder
from sllm.observe.report.html import render_html
from sllm.observe.report.json import CHECKS, to_json, validate_results
from sllm.observe.report.table import render_table
from sllm.observe.results import DISTRIBUTIONS, TOP_KEYS, Begun, Invariants, ReportFigures, Slo, make_results
from sllm.observe.statistics import STATISTICS, percentile, rounded, summarize
from sllm.observe.timeline import LOOKS_MAX, TIMELINE_MAX, Look, StateTimeline, UsageTimeline
from sllm.protocol.events import (
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

values = st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=2, max_size=300)


@given(values)
def test_percentiles_are_those_of_the_standard_library(numbers: Any) -> None:
    cuts = statistics.quantiles(numbers, n=100, method="inclusive")
    ordered = sorted(numbers)
    for percent in range(1, 100):
        assert percentile(ordered, percent) == pytest.approx(cuts[percent - 1], rel=1e-9, abs=1e-9)
    assert percentile(ordered, 0) == ordered[0]
    assert percentile(ordered, 100) == ordered[-1]


@given(values)
def test_summary_is_exact_and_in_order(numbers: Any) -> None:
    summary = summarize(numbers)
    assert tuple(summary) == STATISTICS
    assert summary["mean"] == rounded(math.fsum(numbers) / len(numbers))
    assert summary["max"] == rounded(max(numbers))
    tail = [summary[name] or 0.0 for name in STATISTICS[1:]]
    assert tail == sorted(tail)


def test_summary_of_one_value_and_of_none() -> None:
    assert set(summarize([0.25]).values()) == {0.25}
    assert set(summarize([]).values()) == {None}
    assert percentile([], 50) is None


def test_keys_are_those_of_the_schema_in_order() -> None:
    results = results_of(recorded())
    assert list(results) == [
        "schema", "run", "wall", "requests", "actions", "ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "stall_s", "slo", "throughput", "fleet", "models",
        "workers", "reasons", "series", "reports", "invariants",
    ]  # fmt: skip
    assert list(results["run"]) == [
        "mode", "architecture", "version", "workers", "hardware", "policy", "seed", "duration_s", "duration_asked_s", "warmup_s", "interrupted", "workload",
        "engine_profile", "loader", "settings",
    ]  # fmt: skip
    assert list(results["wall"]) == ["wall_s", "requests_per_wall_s", "clock_lag", "compiled", "decision_s"]
    assert list(results["requests"]) == ["sent", "completed", "failed", "rejected", "in_flight", "duplicates"]
    assert list(results["actions"]) == ["serve", "cold_start", "migrate"]
    for name in DISTRIBUTIONS:
        assert list(results[name]) == ["mean", "p50", "p90", "p95", "p99", "max"]
    assert list(results["slo"]) == ["ttft_s", "tpot_s", "attainment", "goodput"]
    assert list(results["reasons"]) == ["failed", "rejected", "retried"]
    assert list(results["reports"]) == ["sent", "accepted", "lost", "under_way", "rejected"]
    assert list(results["invariants"]) == ["checked", "violations"]
    assert results["schema"] == 2
    assert tuple(results) == TOP_KEYS
    assert all(tuple(keys) == tuple(results[name])[: len(keys)] for name, keys in CHECKS.items())
    assert {*CHECKS, "schema", "models", "workers"} == set(TOP_KEYS), "every section is checked"


def test_the_document_names_every_figure() -> None:
    text = (Path(__file__).parent.parent / "docs" / "results.md").read_text(encoding="utf-8")
    assert [(section, key) for section, keys in CHECKS.items() for key in keys if f"`{key}`" not in text] == []


def test_figures_follow_from_the_events() -> None:
    told = events(3000, seed=7)
    recorder = Recorder()
    for event in told:
        tell(recorder, event)
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
    assert results["wall"]["decision_s"] == summarize([event.decision_s for event in routed])
    assert results["actions"]["cold_start"] == sum(event.action == "cold_start" for event in routed)
    assert results["fleet"]["cold_start_rate"] == rounded(results["actions"]["cold_start"] / len(routed))
    assert results["slo"]["attainment"] == rounded(sum(event.ttft_s <= 2.0 for event in done) / 3000)
    assert results["fleet"]["utilisation"] == 0.2
    assert results["fleet"]["load_imbalance"] == rounded(20 / 15)
    assert results["reports"] == {"sent": 240, "accepted": 236, "lost": 1, "under_way": 0, "rejected": {"bad_tag": 2, "replayed": 1}}
    assert validate_results(results) == []


@given(st.integers(0, 200), st.integers(0, 2**32), st.booleans())
def test_the_books_always_balance(count: int, seed: int, trouble: bool) -> None:
    results = results_of(recorded(count, seed, trouble=trouble))
    assert validate_results(results) == []
    assert validate_results(json.loads(to_json(results))) == []
    if not trouble:
        assert results["requests"]["completed"] == results["requests"]["sent"] == count


def test_a_clients_own_count_is_held_against_the_events() -> None:
    recorder = recorded(100, trouble=False)
    results = make_results(recorder, RUN, fleet_of(1.0, measured_s=2.0), REPORTS, in_flight=1)
    assert validate_results(results) == ["requests: sent 100 is not completed 100 + failed 0 + rejected 0 + in_flight 1"]


def test_json_is_the_same_bytes_for_the_same_run() -> None:
    first, second = to_json(results_of(recorded(500, 3))), to_json(results_of(recorded(500, 3)))
    assert first == second
    assert first != to_json(results_of(recorded(500, 4)))
    assert json.loads(first) == results_of(recorded(500, 3))
    assert first.endswith("}\n")
    assert '"rate_per_s": 0.333333333\n' in first or '"rate_per_s": 0.333333333,' in first


def test_rejected_reports_are_in_order_whatever_the_counting_order() -> None:
    figures = [ReportFigures(6, 1, reasons) for reasons in ({"b": 2, "a": 3, "c": 0}, {"c": 0, "a": 3, "b": 2})]
    texts = {to_json(make_results(Recorder(), RUN, fleet_of(measured_s=0.0)._replace(ready=0), figure)) for figure in figures}
    assert len(texts) == 1
    assert json.loads(texts.pop())["reports"] == {"sent": 6, "accepted": 1, "lost": 0, "under_way": 0, "rejected": {"a": 3, "b": 2}}


def test_a_run_without_requests_has_nulls_and_no_complaint() -> None:
    results = make_results(Recorder(), RUN, fleet_of(0.0, 0.0, measured_s=10.0), REPORTS, Invariants(3))
    assert results["ttft_s"]["p99"] is None
    assert results["slo"]["attainment"] is None
    unused = {"utilisation": 0.0, "slot_occupancy": 0.0, "kv_occupancy": 0.0, "load_imbalance": None, "cold_start_rate": None, "model_hit_rate": None}
    assert results["fleet"] == {"ready": 4, **unused, "loads": 0, "loads_by_tier": {}, "load_mean_s": None}
    assert results["series"]["at_s"] == results["models"] == []
    assert validate_results(results) == []


def test_a_hit_finds_its_model_on_the_gpu() -> None:
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
        tell(recorder, event)
    results = results_of(recorder)
    assert results["fleet"]["model_hit_rate"] == 0.6
    assert recorder.loads == 2
    assert recorder.load_s == 3.0


def test_without_a_coordinator_actions_are_those_of_completed_requests() -> None:
    recorder = Recorder()
    for event in events(300):
        if type(event) in (RequestSent, RequestCompleted):
            tell(recorder, event)
    results = results_of(recorder)
    assert sum(results["actions"].values()) == results["requests"]["completed"] > 0
    assert results["fleet"]["model_hit_rate"] == rounded(1 - results["actions"]["cold_start"] / results["requests"]["completed"])
    assert validate_results(results) == []


def test_a_glance_is_close_to_the_results() -> None:
    recorder = recorded(20_000)
    glance, results = recorder.glance(), results_of(recorder)
    assert (glance.sent, glance.completed, glance.in_flight) == tuple(results["requests"][key] for key in ("sent", "completed", "in_flight"))
    assert glance.ttft_p50_s == pytest.approx(results["ttft_s"]["p50"], rel=0.05)
    assert Recorder().glance().ttft_p99_s is None


def test_the_timeline_of_states_is_bounded_and_ends_right() -> None:
    timeline = StateTimeline()
    for index in range(20_000):
        timeline.move(index * 0.5, f"w{index % 50}", ("READY", "SUSPECT", "DEAD")[index // 50 % 3])
        assert len(timeline.points) <= TIMELINE_MAX
    assert sum(timeline.points[-1][1].values()) == 50
    moments = [at for at, _ in timeline.points]
    assert moments == sorted(moments)
    assert moments[-1] == 19_999 * 0.5


def test_a_coordinator_that_restarts_does_not_count_workers_twice() -> None:
    recorder = Recorder()
    for event in (WorkerStateChanged(1.0, "w", 1, "", "READY", ""), WorkerStateChanged(9.0, "w", 1, "", "READY", "")):
        tell(recorder, event)
    assert recorder.fleet.counts == {"READY": 1}


BROKEN = [
    (("schema",), 1, "schema: 1 is not 2"),
    (("run", "mode"), "", "run.mode: '' is not a text"),
    (("wall", "wall_s"), None, "wall.wall_s: None is not a number of at least 0"),
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
    (("fleet", "kv_occupancy"), 1.5, "fleet.kv_occupancy: 1.5 is above 1"),
    (("wall", "decision_s"), {}, "wall.decision_s: 'mean' is missing"),
    (("models",), {}, "models: is not a list of objects"),
    (("series", "at_s"), None, "series.at_s: None is not a list"),
    (("reports", "lost"), 0, "reports: sent 240 is not accepted 236 + lost 0 + under way 0 + rejected 3"),
    (("reports", "rejected"), {"x": 0}, "reports.rejected: {'x': 0}: 0 is not a whole number above 0"),
    (("invariants", "violations"), [1], "invariants.violations: [1] is not a list of texts"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), BROKEN, ids=[".".join(path) + f"={value}" for path, value, _ in BROKEN])
def test_what_is_wrong_is_said(path: Any, value: Any, complaint: Any) -> None:
    results = results_of(recorded())
    target = results
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    wrong = validate_results(results)
    assert any(line.startswith(complaint) for line in wrong), wrong


def test_missing_and_disordered_keys_are_said_and_unknown_ones_accepted() -> None:
    results = results_of(recorded())
    assert validate_results([]) == ["the results are not an object"]
    assert validate_results({**results, "more": 1, "slo": {"new": {}, **results["slo"]}}) == []
    assert validate_results({key: value for key, value in results.items() if key != "slo"}) == ["results: 'slo' is missing"]
    assert validate_results(dict(reversed(results.items())))[0].startswith("results: the keys are out of order")
    assert validate_results({**results, "fleet": 3}) == ["fleet: is not an object"]


def test_the_end_of_a_run_in_which_all_go_home_is_no_part_of_the_timeline() -> None:
    timeline = StateTimeline()
    for name in ("a", "b"):
        timeline.move(1.0, name, "READY")
    timeline.end()
    for name in ("a", "b"):
        timeline.move(9.0, name, "LEFT")
    assert timeline.points == [(1.0, {"READY": 2})]


def test_what_was_in_use_is_a_part_of_what_there_is() -> None:
    fleet = results_of(recorded())["fleet"]
    assert fleet["slot_occupancy"] == rounded(2.0 * 60.0 / (4 * 10 * 75.0))
    assert fleet["kv_occupancy"] == rounded(5.0 * 60.0 / (4 * 50 * 75.0))
    workers = results_of(recorded())["workers"]
    assert [row["worker"] for row in workers] == [f"worker-{index}" for index in range(4)]
    assert workers[1]["utilisation"] == rounded(20.0 / 75.0)
    assert workers[1]["slot_occupancy"] == rounded(40.0 / 750.0)


def test_rows_of_models_and_workers_add_up_to_the_whole() -> None:
    recorder = recorded(1000)
    results = results_of(recorder)
    for key in ("sent", "completed", "failed", "rejected"):
        assert sum(row[key] for row in results["models"]) == results["requests"][key]
    for rows in (results["models"], results["workers"]):
        assert sum(row["completed"] for row in rows) == results["requests"]["completed"]
        assert sum(row["output_tokens"] for row in rows) == sum(recorder.output_tokens) == results["throughput"]["output_tokens"]
        assert sum(row["loads"] for row in rows) == results["fleet"]["loads"] > 0
    assert sum(row["cold_starts"] for row in results["models"]) == results["actions"]["cold_start"]
    sent = [row["sent"] for row in results["models"]]
    assert sent == sorted(sent, reverse=True)


def test_targets_are_met_together_and_goodput_is_what_met_them_a_second() -> None:
    recorder = recorded(500, trouble=False)
    pairs = list(zip(recorder.ttft_s, recorder.tpot_s, strict=True))
    met = sum(ttft <= 0.2 and tpot <= 0.02 for ttft, tpot in pairs)
    assert 0 < met < sum(ttft <= 0.2 for ttft, _ in pairs)
    slo = make_results(recorder, RUN, fleet_of(1.0), REPORTS, slo=Slo(0.2, 0.02))["slo"]
    assert (slo["ttft_s"], slo["tpot_s"], slo["attainment"]) == (0.2, 0.02, rounded(met / 500))
    assert slo["goodput"] == rounded(met / 75.0), "no request came or ended after the 75 s"
    assert make_results(recorder, RUN, fleet_of(1.0), REPORTS, slo=Slo(0.2, 0.02), begun=Begun(0, 100))["slo"]["attainment"] == rounded(met / 400)


def test_the_warm_up_is_counted_and_in_no_statistics() -> None:
    told = events(2000, seed=5)
    recorder, later = Recorder(), Recorder()
    for event in told:
        tell(recorder, event)
    late = {event.request_id for event in told if isinstance(event, RequestSent) and event.at >= 20.0}
    for event in told:
        if getattr(event, "request_id", None) in late:
            tell(later, event)
    results = make_results(recorder, RUN, fleet_of(10.0, measured_s=40.0, warmup_s=20.0), REPORTS)
    only = make_results(later, RUN, fleet_of(10.0, measured_s=40.0, began_s=20.0), REPORTS)
    assert results["run"]["warmup_s"] == 20.0
    assert results["requests"]["sent"] == 2000 > only["requests"]["sent"] == len(late) > 0
    for key in (*DISTRIBUTIONS, "slo"):
        assert results[key] == only[key], key
    per_s = ("requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "over_s")
    assert [results["throughput"][key] for key in per_s] == [only["throughput"][key] for key in per_s]
    whole, part = ({row["model"]: row for row in content["models"]} for content in (results, only))
    assert all(whole[name]["ttft_p99_s"] == part[name]["ttft_p99_s"] and whole[name]["sent"] > part[name]["sent"] for name in part)


@given(st.integers(1, 3000), st.floats(0.01, 10.0))
def test_a_timeline_of_use_is_bounded_and_exact_at_its_looks(count: int, step_s: Any) -> None:
    timeline = UsageTimeline()
    timeline.begin(Look(5.0, EngineUsage(), 0), step_s)
    for number in range(1, count + 1):
        if timeline.next_at > 5.0 + number * step_s * (1 + 1e-9):
            continue
        timeline.add(Look(timeline.next_at, EngineUsage(busy_s=float(number) ** 2), number))
        assert len(timeline.looks) <= LOOKS_MAX
    steps = [round((look.at - 5.0) / step_s) for look in timeline.looks]
    assert steps == list(range(0, steps[-1] + 1, round(timeline.step_s / step_s)))
    for look in timeline.looks:
        assert timeline.at(look.at).busy_s == look.usage.busy_s == round((look.at - 5.0) / step_s) ** 2
        assert timeline.waiting(look.at) == look.waiting
    assert timeline.at(4.0) == timeline.looks[0].usage
    assert timeline.at(1e9) == timeline.looks[-1].usage


def test_a_series_has_at_least_thirty_bins_and_loses_nothing() -> None:
    for count in (1, 7, 2000):
        recorder = recorded(count)
        for timeline in (None, UsageTimeline()):
            if timeline is not None:
                timeline.begin(Look(0.0, EngineUsage(), 0), 4.0)
                for number in range(1, 16):
                    timeline.add(Look(4.0 * number, EngineUsage(4.0 * number, 8.0 * number, 0.0, 200.0 * number), number))
            results = make_results(recorder, RUN, fleet_of(60.0, timeline=timeline), REPORTS)
            series = results["series"]
            assert len(series["at_s"]) >= 30
            assert {len(column) for key, column in series.items() if key != "bin_s"} == {len(series["at_s"])}
            for key, total in (("sent", "sent"), ("completed", "completed")):
                assert sum(series[key]) == results["requests"][total]
            assert sum(series["given_up"]) == results["requests"]["failed"] + results["requests"]["rejected"]
            assert series["in_flight"][-1] == results["requests"]["in_flight"]
            if timeline is not None and count == 2000:
                assert series["utilisation"][0] == 1.0
                assert series["slot_occupancy"][0] == 0.2
                assert series["waiting"][:3] == [0, 1, 1]


def test_a_run_that_ended_in_its_warm_up_has_counts_and_no_statistics() -> None:
    recorder = recorded(300)
    results = make_results(recorder, RUN, fleet_of(0.0, measured_s=0.0, warmup_s=1000.0), REPORTS)
    assert validate_results(results) == []
    assert results["requests"]["completed"] > 0
    assert {results["ttft_s"]["p50"], results["slo"]["attainment"], results["slo"]["goodput"], results["throughput"]["requests_per_s"]} == {None}
    assert {results["fleet"][key] for key in ("utilisation", "slot_occupancy", "kv_occupancy", "load_imbalance")} == {None}
    assert "300 sent" in render_table(results)
    assert "of 300 sent" in render_html(results, recorder)
