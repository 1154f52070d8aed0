"""Thresholds: what they say, what they refuse, and the settings that repeat a run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

import pytest
from report_samples import recorded, results_of

from config import Config
from experiments.harness import ROOT
from sllm.observe.recorder import Recorder
from sllm.protocol.errors import UsageError
from sllm.run.command_line import NOT_OF_A_RUN, parse, repeat_command, settings_of
from sllm.run.thresholds import FIGURES, judge, parse_thresholds


def test_every_figure_is_in_the_results() -> None:
    results = results_of(recorded())
    for name in FIGURES:
        (threshold,) = parse_thresholds(f"{name}>1e30")
        value = threshold.value(results)
        assert (value is None) is name.startswith("stall_"), "nothing of what was recorded stood still"
        assert value is None or (value >= 0 and not threshold.is_missed(results)), name


@pytest.mark.parametrize(("comparison", "missed"), [(">", False), (">=", True), ("<", False), ("<=", True), ("==", True), ("!=", False)])
def test_a_threshold_is_missed_if_its_comparison_holds(comparison: str, missed: bool) -> None:
    results = results_of(recorded())
    (one,) = judge(parse_thresholds(f" failed {comparison} {results['requests']['failed']} "), results)
    assert one["missed"] is missed
    assert one["value"] == results["requests"]["failed"]


def test_a_figure_of_nothing_misses_whatever_was_asked() -> None:
    results = results_of(Recorder())
    assert [one["missed"] for one in judge(parse_thresholds("ttft_p99>2,ttft_p99<2,failed>0"), results)] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "words"), [("ttft_p99", ["'ttft_p99'", "number"]), ("ttft_p42>1", ["no figure 'ttft_p42'", "ttft_p50", "goodput"]), ("failed>x", ["failed>x"])]
)
def test_a_bad_expression_says_what_is_wrong(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        parse_thresholds(f"failed>0,{text}")
    assert all(word in str(error.value) for word in words)


def changed(field: dataclasses.Field[Any]) -> Any:
    """Another value that the field can have."""
    rules: Mapping[str, Any] = field.metadata
    default: Any = field.default
    if rules["choices"]:
        return next(choice for choice in rules["choices"] if choice and choice != field.default)
    if isinstance(field.default, str):
        fitting = {"POLICY": "power_of_two:choices=3", "HARDWARE": "a100-80g:3,h100-80g:2", "SERVICE": "deterministic"}
        return {**fitting, "FLEET": str(ROOT / "examples" / "fleet.toml")}.get(rules["env"], "a file.toml")
    kind: Any = type(field.default)
    for candidate in (kind(default * 2 + 1), kind(default / 3), kind(0.123456789012345)):
        fits = (rules["low"] is None or candidate >= rules["low"]) and (rules["high"] is None or candidate <= rules["high"])
        if fits and (rules["above"] is None or candidate > rules["above"]) and candidate != field.default:
            return candidate
    raise AssertionError(field.name)


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(Config) if f.metadata["env"] not in NOT_OF_A_RUN], ids=lambda field: str(field.name))
def test_the_command_of_a_run_has_each_setting_that_has_an_effect(field: dataclasses.Field[Any]) -> None:
    """What the command sets is what the run had, by flag or by variable; what is left out is without effect in that run."""
    companions = {"cv": ["--arrivals", "gamma"], "trace": [], "speedup": []}.get(field.name, [] if field.name == "loss" else ["--virtual"])
    if field.name in ("latency_ms", "loss", "cv"):
        companions = [*companions, "--virtual"]
    if field.name in ("model_map", "trace_rate", "trace_columns"):
        companions = [*companions, "--trace", "a trace.csv"]
    if field.name == "think_s":
        companions = [*companions, "--concurrency", "2"]
    if field.name.startswith("service"):
        companions += ["--engine", "queue"]
    value = changed(field)
    config, options = parse(companions, {field.metadata["env"]: str(value), "DEPLOYMENT_MODE": "local"}, "p", "")
    settings = json.loads(json.dumps(settings_of(config, options)))
    words = shlex.split(repeat_command({"run": {"settings": settings}}))
    assert words[0] in ("env", "python3")
    start = words.index("python3")
    environ = dict(word.split("=", 1) for word in words[1:start])
    again, options_again = parse(words[start + 2 :], {**environ, "DEPLOYMENT_MODE": "local"}, "p", "")
    assert getattr(again, field.name) == getattr(config, field.name) == value
    assert settings_of(again, options_again) == settings_of(config, options)
