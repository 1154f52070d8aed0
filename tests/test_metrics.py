"""Metrics against a strict reader of the text format, and against what the roles tell."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter as Tally
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from roles import tell

from sllm.observe import metrics
from sllm.observe.causes import REFUSALS
from sllm.observe.metrics import ClientMetrics, CoordinatorMetrics, Counter, Histogram, Registry, RoleMetrics, WorkerMetrics
from sllm.protocol import events
from sllm.protocol.messages import ACTIONS, ERROR_CODES, EngineSnapshot

SAMPLE = re.compile(r'^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\S+)$')
LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\\n]|\\["\\n])*)"')


def read(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """A strict reader of format 0.0.4: one HELP and one TYPE before the samples of a name, no series twice, histograms cumulative."""
    assert text.endswith("\n")
    kinds: dict[str, str] = {}
    helps: set[str] = set()
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    current = ""
    for line in text.rstrip("\n").split("\n"):
        if line.startswith("# HELP "):
            current = line.split()[2]
            assert current not in helps, f"HELP of {current} twice"
            helps.add(current)
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name == current
            assert name not in kinds
            assert kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == name.endswith("_total")
            kinds[name] = kind
            continue
        match = SAMPLE.match(line)
        assert match, f"not a sample: {line!r}"
        name, inside, value = match.groups()
        assert name == current or (kinds[current] == "histogram" and name in {current + end for end in ("_bucket", "_sum", "_count")}), line
        labels = tuple((key, re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text)) for key, text in LABEL.findall(inside or ""))
        assert len(dict(labels)) == len(labels)
        series = found.setdefault(name, {})
        assert labels not in series, f"series twice: {line}"
        series[labels] = float(value)
    for name, kind in kinds.items():
        if kind == "histogram":
            check_histogram(name, found)
    return found


def check_histogram(name: str, found: dict[str, Any]) -> None:
    by_series: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for labels, count in found.get(f"{name}_bucket", {}).items():
        rest = tuple(pair for pair in labels if pair[0] != "le")
        by_series.setdefault(rest, []).append((float(dict(labels)["le"]), count))
    for rest, buckets in by_series.items():
        bounds, counts = zip(*buckets, strict=True)
        assert list(bounds) == sorted(bounds)
        assert bounds[-1] == float("inf")
        assert list(counts) == sorted(counts)
        assert counts[-1] == found[f"{name}_count"][rest]
        assert rest in found[f"{name}_sum"]


def make_all() -> list[RoleMetrics]:
    return [CoordinatorMetrics(1.7e9), WorkerMetrics(1.7e9), ClientMetrics(1.7e9)]


def busy_coordinator() -> CoordinatorMetrics:
    made = CoordinatorMetrics(1.7e9)
    for action in ACTIONS:
        tell(made, events.RequestRouted(0.0, "r", "m", "w", action, 0.5, 1.2e-5))
    for code in ERROR_CODES:
        tell(made, events.RequestRefused(0.0, "r", "m", code))
    tell(made, events.WorkerStateChanged(0.0, "w", 1, "", "READY", "reported"))
    node = SimpleNamespace(rejected=Tally(tag=3), reports_accepted=10, reports_rejected=Tally(replayed=2), degraded="")
    made.collect(node)
    made.collect_driver(
        SimpleNamespace(received=5, sent=6, send_errors=Tally(unresolved=1), sends_deferred=0, internal_errors={}),
        SimpleNamespace(kernel_drops=7, receive_buffer_bytes=425984),
    )
    made.collect_fleet({"READY": 4, "DEAD": 1}, 3, 2, 1)
    return made


def test_the_coordinator_tells_what_happened() -> None:
    found = read(busy_coordinator().render())
    assert found["sllm_requests_routed_total"] == {(("action", action),): 1.0 for action in ACTIONS}
    assert found["sllm_requests_refused_total"] == {(("code", code),): 1.0 for code in ERROR_CODES}
    assert found["sllm_datagrams_rejected_total"] == {(("reason", reason),): 3.0 * (reason == "tag") for reason in REFUSALS}
    assert found["sllm_reports_rejected_total"] == {(("reason", "replayed"),): 2.0}
    assert found["sllm_reports_accepted_total"] == {(): 10.0}
    assert found["sllm_kernel_drops_total"] == {(): 7.0}
    assert found["sllm_workers"] == {(("state", "READY"),): 4.0, (("state", "DEAD"),): 1.0}
    assert found["sllm_placement_duration_seconds_count"] == {(): 3.0}
    assert found["sllm_placement_duration_seconds_bucket"][(("le", "2e-05"),)] == 3.0
    assert found["process_start_time_seconds"] == {(): 1.7e9}


def test_a_state_that_empties_goes_back_to_zero() -> None:
    made = busy_coordinator()
    made.collect_fleet({"READY": 5}, 0, 0, 0)
    assert read(made.render())["sllm_workers"] == {(("state", "READY"),): 5.0, (("state", "DEAD"),): 0.0}


def test_the_worker_tells_what_happened() -> None:
    made = WorkerMetrics(1.7e9)
    tell(made, events.RequestAdmitted(0.0, "w", "r", "m"))
    tell(made, events.ModelLoaded(0.0, "w", "m", "disk", 1.5))
    tell(made, events.ModelEvicted(0.0, "w", "m"))
    tell(made, events.CoordinatorSilent(0.0, "w", 10.0))
    tell(made, events.RequestServed(2.0, "w", "r", "m", 20, 0.2, 0.3, 2.0))
    made.collect(SimpleNamespace(rejected=Tally(), reports_sent=9, service=SimpleNamespace(refused=2), state="DRAINING"))
    made.collect_engine(EngineSnapshot(8, 1, 2, 1, 0.5, 0.0, 0.25, 5, 0.01, 1.0, 10, ("a", "b"), ("a",), (("c", 1.0),), (), ("d",), False))
    found = read(made.render())
    assert found["sllm_worker_requests_total"] == {(("outcome", name),): count for name, count in (("admitted", 1.0), ("completed", 1.0), ("refused", 2.0))}
    assert found["sllm_worker_model_loads_total"] == {(("tier", "disk"),): 1.0}
    assert found["sllm_worker_model_load_seconds_sum"] == {(("tier", "disk"),): 1.5}
    assert found["sllm_worker_output_tokens_total"] == {(): 20.0}
    assert found["sllm_worker_queue_wait_seconds_sum"] == {(): 0.2}
    assert found["sllm_worker_first_token_seconds_sum"] == {(): 0.3}
    assert found["sllm_worker_request_seconds_sum"] == {(): 2.0}
    assert found["sllm_worker_models"][(("tier", "gpu"),)] == 2.0
    assert found["sllm_worker_draining"] == {(): 1.0}
    assert found["sllm_worker_kv_used_ratio"] == {(): 0.25}


def test_the_client_tells_what_happened() -> None:
    made = ClientMetrics(1.7e9)
    tell(made, events.RequestSent(0.0, "r", "m"))
    tell(made, events.RequestCompleted(3.0, "r", "m", "w", "serve", 0.0, 0.5, 3.0, 0.1, 0.0, 0.0, 10, 20, 1, 0))
    tell(made, events.RequestFailed(0.0, "r2", "m", 0.0, "gone"))
    made.collect(SimpleNamespace(rejected=Tally(), in_flight=4))
    found = read(made.render())
    assert found["sllm_client_requests_total"] == {(("outcome", name),): 1.0 for name in ("sent", "completed", "failed")}
    assert found["sllm_client_in_flight_requests"] == {(): 4.0}
    assert found["sllm_client_first_token_seconds_sum"] == {(): 0.5}


def test_names_follow_the_conventions_and_no_label_names_a_worker_or_request() -> None:
    for made in make_all():
        for name, metric in made.registry._metrics.items():
            assert name.startswith(("sllm_", "process_"))
            assert metric.help.endswith(".")
            assert not {"worker", "worker_id", "request", "request_id", "model", "instance", "job"} & set(metric.labels)
            if isinstance(metric, Histogram):
                assert name.endswith("_seconds")
        read(made.render())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="install promtool (Debian: apt-get install prometheus)")
def test_promtool_agrees() -> None:
    for made in [*make_all(), busy_coordinator()]:
        checked = subprocess.run(["promtool", "check", "metrics"], input=made.render(), text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_worker_that_leaves_in_order_is_not_lost() -> None:
    made = CoordinatorMetrics(1.7e9)
    moves = [
        ("", "READY", "reported"), ("READY", "SUSPECT", "silent for 3.0 s"), ("SUSPECT", "DEAD", "silent for 10.0 s"), ("DEAD", "READY", "restarted"),
        ("READY", "DRAINING", "reported"), ("DRAINING", "DEAD", "reported"),
    ]  # fmt: skip
    for old, new, reason in moves:
        tell(made, events.WorkerStateChanged(0.0, "w", 1, old, new, reason))
    found = read(made.render())
    assert (found["sllm_workers_lost_total"], found["sllm_workers_returned_total"]) == ({(): 1.0}, {(): 1.0})


def test_a_rate_sees_the_first_refusal() -> None:
    """What can be counted is there as 0 before it is."""
    found = read(CoordinatorMetrics(1.7e9).render())
    assert found["sllm_requests_refused_total"] == {(("code", code),): 0.0 for code in ERROR_CODES}
    assert found["sllm_datagrams_rejected_total"] == {(("reason", reason),): 0.0 for reason in REFUSALS}


@given(st.lists(st.tuples(st.floats(0, 1e4), st.text(max_size=8)), max_size=50))
def test_any_label_and_any_value_can_be_read_back(observed: list[tuple[float, str]]) -> None:
    registry = Registry()
    counter = registry.counter("c_total", "With \\ and\nnewline.", ("reason",))
    histogram = registry.histogram("h_seconds", "H.", (0.1, 1.0, 10.0), ("reason",))
    for value, label in observed:
        counter.add(value, label)
        histogram.observe(value, label)
    found = read(registry.render())
    totals: dict[str, float] = {}
    for value, label in observed:
        totals[label] = totals.get(label, 0.0) + value
    assert {labels[0][1]: value for labels, value in found.get("c_total", {}).items()} == pytest.approx(totals)
    assert sum(found.get("h_seconds_count", {}).values()) == len(observed)


def test_labels_are_bounded() -> None:
    counter = Counter("c_total", "C.", ("reason",))
    for i in range(10 * metrics.SERIES_MAX):
        counter.add(1, f"reason-{i}")
    assert len(counter.values) == metrics.SERIES_MAX + 1
    assert counter.values[("other",)] == 9 * metrics.SERIES_MAX


@pytest.mark.parametrize("value", [0.1, 0.1000001, 1.0, 1.1])
def test_a_bucket_holds_what_is_at_most_its_bound(value: float) -> None:
    histogram = Histogram("h_seconds", "H.", (0.1, 1.0))
    histogram.observe(value)
    lines = dict(line.rsplit(" ", 1) for line in histogram.samples())
    assert lines['h_seconds_bucket{le="0.1"}'] == str(int(value <= 0.1))
    assert lines['h_seconds_bucket{le="1"}'] == str(int(value <= 1.0))
    assert lines['h_seconds_bucket{le="+Inf"}'] == "1"


def test_what_cannot_be_a_metric_is_refused() -> None:
    registry = Registry()
    registry.gauge("a", "A.")
    for make in (
        lambda: registry.gauge("a", "A again."),
        lambda: registry.gauge("bad name", "B."),
        lambda: registry.gauge("b", "B.", ("bad-label",)),
        lambda: registry.counter("requests", "No _total."),
        lambda: registry.histogram("h", "H.", ()),
        lambda: registry.histogram("h", "H.", (2.0, 1.0)),
        lambda: registry.counter("c_total", "C.", ("x",)).add(1),
    ):
        with pytest.raises(ValueError, match=r"."):
            make()


def test_numbers() -> None:
    assert [metrics.number(value) for value in (1, 1.5, float("inf"), float("-inf"), float("nan"), 1e20, 0.1)] == [
        "1", "1.5", "+Inf", "-Inf", "NaN", "1e+20", "0.1",
    ]  # fmt: skip
