"""Workloads from the command line: whole runs, what replays them, and combinations that make no sense."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from test_centralized_simulation import results, run

from experiments.harness import configuration
from sllm.run.assemble import build_catalog, default_rate

SHAPES = [
    ["--sessions", "turns=4,gap=3", "--rate", "5"],
    ["--priorities", "high=1,normal=2,low=1", "--mix", "opt-6.7b=2,mistral-7b=1"],
    ["--stages", "5s:5,5s:20,10s:0"],
    ["--lengths", "lognormal:100,200,50,60,1000", "--rate", "5"],
    ["--concurrency", "6", "--think", "0.5", "--sessions", "turns=3"],
    ["--concurrency", "6"],
]


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("arguments", SHAPES, ids=" ".join)
def test_a_recording_of_any_workload_replays_it_exactly(arguments: list[str], tmp_path: Path) -> None:
    first, again, recording, second = (tmp_path / name for name in ("a.csv", "b.csv", "w.jsonl", "v.jsonl"))
    duration = [] if "--stages" in arguments else ["--duration", "20"]
    run("--virtual", "--quiet", *duration, *arguments, "--record", str(recording), "--requests-csv", str(first))
    run("--virtual", "--quiet", "--trace", str(recording), "--record", str(second), "--requests-csv", str(again))
    assert second.read_bytes() == recording.read_bytes()
    assert len(rows(first)) > 20
    assert rows(again) == rows(first)


@pytest.mark.parametrize("mode", [["--virtual"], ["--speedup", "10"]])
def test_closed_loop_load_never_has_more_requests_under_way_than_users(mode: list[str], tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    content = results(*mode, "--quiet", "--duration", "40", "--concurrency", "4", "--think", "1", "--requests-csv", str(out))
    assert content["requests"]["sent"] == content["requests"]["completed"] > 20
    assert content["run"]["workload"] == {"concurrency": 4, "think_s": 1.0, "lengths": "azure-conv", "zipf": 1.1}
    by_user: dict[str, list[tuple[float, float]]] = {}
    for row in rows(out):
        arrival_s = float(row["arrival_s"])
        by_user.setdefault(row["request_id"].partition("-")[0], []).append((arrival_s, arrival_s + float(row["e2e_s"])))
    assert len(by_user) == 4
    for times in by_user.values():
        times.sort()
        assert all(ended_s <= begun_s + 1e-6 for (_, ended_s), (begun_s, _) in itertools.pairwise(times))


def test_the_requests_of_a_user_are_the_same_under_every_policy(tmp_path: Path) -> None:
    asked = []
    for policy in ("startup_time", "round_robin"):
        recording = tmp_path / policy
        run("--virtual", "--quiet", "--duration", "20", "--concurrency", "8", "--policy", policy, "--record", str(recording))
        made = [json.loads(line) for line in recording.read_text().splitlines()[1:]]
        asked.append({row["request_id"]: (row["model"], row["prompt_tokens"], row["output_tokens"]) for row in made})
    both = asked[0].keys() & asked[1].keys()
    assert len(both) > 50
    assert all(asked[0][request_id] == asked[1][request_id] for request_id in both)
    assert asked[0].keys() != asked[1].keys()


def test_a_strangers_file_runs_with_one_flag(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    trace.write_text("start;in;out;llm\n" + "".join(f"{1700000000 + i};{100 + i};20;{'a' if i % 3 else 'b'}\n" for i in range(30)))
    done = run("--virtual", "--trace", str(trace), "--columns", "arrival=start,prompt=in,output=out,model=llm", "--json", "-")
    workload = json.loads(done.stdout)["run"]["workload"]
    assert {row["name"]: row["requests"] for row in workload["trace_models"]} == {"a": 20, "b": 10}
    done = run("--virtual", "--trace", str(trace), expect=2)
    assert "say which columns hold what: --columns arrival=NAME" in done.stderr
    done = run("--virtual", "--trace", str(trace), "--columns", "arrival=begin,prompt=in,output=out", expect=2)
    assert done.stderr.startswith(f"centralized_simulation.py: error: {trace}, line 1: no column arrival='begin'")


def test_a_trace_at_twice_its_rate_says_so(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{i},100,20\n" for i in range(30)))
    content = results("--virtual", "--trace", str(trace), "--trace-rate", "2")
    assert content["requests"]["sent"] == content["requests"]["completed"] == 60
    assert (content["run"]["workload"]["trace_rate"], content["run"]["workload"]["trace_rate_by"]) == (2.0, "superposition")


def test_lengths_may_be_those_of_a_file_of_any_origin(tmp_path: Path) -> None:
    trace, out = tmp_path / "t.csv", tmp_path / "r.csv"
    trace.write_text("at;in;out\n0;10;5\n1;20;6\n")
    run("--virtual", "--quiet", "--lengths", f"empirical:{trace}", "--columns", "arrival=at,prompt=in,output=out", "--rate", "5", "--requests-csv", str(out))
    assert {(row["prompt_tokens"], row["output_tokens"]) for row in rows(out)} == {("10", "5"), ("20", "6")}


def test_a_fleet_may_be_a_file(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('h100-80g = 2\n"a5000-24g" = 1\n')
    content = results("--virtual", "--fleet", str(fleet), "--duration", "5")
    assert content["run"]["hardware"] == {"h100-80g": 2, "a5000-24g": 1}
    for text, said in (("h100-80g = 0\n", "'h100-80g' = 0"), ("", "names no hardware"), ("h100-80g\n", "line 1"), ('h100-80g = "2"\n', "number of workers")):
        fleet.write_text(text)
        done = run("--virtual", "--fleet", str(fleet), expect=2)
        assert done.stderr.startswith(f"centralized_simulation.py: error: fleet {fleet}: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_mix_makes_the_demonstration_catalogue_as_large_as_it_needs() -> None:
    content = results("--virtual", "--mix", "llama-3.1-8b-3=1", "--duration", "5", "--rate", "5")
    assert content["requests"]["completed"] > 0
    assert content["run"]["workload"]["mix"] == "llama-3.1-8b-3=1"


T = ["--trace", "t.csv"]
REFUSED = [
    ([*T, "--lengths", "fixed:1,1"], "--lengths"), ([*T, "--sessions", "turns=2"], "--sessions"), ([*T, "--stages", "5s:1"], "--stages"),
    ([*T, "--concurrency", "2"], "--concurrency"), (["--concurrency", "2", "--rate", "1"], "--rate"),
    (["--concurrency", "2", "--arrivals", "gamma"], "--arrivals"), (["--concurrency", "2", "--stages", "5s:1"], "--stages"),
    (["--stages", "5s:1", "--rate", "1"], "--rate"), (["--stages", "5s:1", "--duration", "9"], "--duration"), (["--think", "1"], "--think"),
    (["--concurrency", "2", "--sessions", "gap=3"], "--sessions"), (["--trace-rate", "2"], "--trace-rate"), (["--model-map", "x"], "--model-map"),
    (["--columns", "arrival=a,prompt=b,output=c"], "--columns"), (["--fleet", "f.toml", "--hardware", "a100-80g"], "--hardware"),
    (["--mix", "opt-6.7b=1", "--zipf", "1"], "--zipf"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "flag"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_a_combination_that_contradicts_itself_is_refused(arguments: list[str], flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.toml").write_text("h100-80g = 2\n")
    done = run("--virtual", *arguments, expect=2)
    assert done.stderr.startswith(f"centralized_simulation.py: error: {flag}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["--engine", "queue", "--lengths", "fixed:1,1"], "--lengths"), (["--models", "1", "--mix", "llama-3.1-8b=1"], "--mix")],
)
def test_a_workload_flag_that_is_merely_useless_is_warned_about(arguments: list[str], flag: str) -> None:
    (line,) = run("--virtual", "--duration", "5", "--quiet", *arguments).stderr.splitlines()
    assert f"warning: {flag}: has no effect" in line


def test_variables_do_what_flags_do(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    run("--virtual", "--quiet", "--duration", "10", "--concurrency", "3", "--lengths", "fixed:100,20", "--priorities", "low=1", "--record", str(first))
    settings: dict[str, Any] = {"CONCURRENCY": "3", "LENGTHS": "fixed:100,20", "PRIORITIES": "low=1", "DURATION": "10"}
    run("--virtual", "--quiet", "--record", str(second), **settings)
    assert first.read_bytes() == second.read_bytes()


def test_the_table_says_that_repeated_prompts_are_computed_again() -> None:
    done = run("--virtual", "--duration", "5", "--sessions", "turns=3")
    assert "Sessions   3 turns in the mean   no prefix cache: what a prompt repeats is computed again\n" in done.stdout + done.stderr


def test_the_default_rate_goes_by_lengths_mix_and_sessions() -> None:
    def rate(**changes: Any) -> float:
        config = configuration(**changes)
        return default_rate(config, build_catalog(config))

    assert rate(lengths="fixed:100,10") > rate() > rate(lengths="fixed:4000,800")
    assert rate(mix="opt-2.7b=1") > rate(mix="opt-6.7b=1")
    assert rate(sessions="turns=8") < rate(sessions="turns=1")
    assert abs(rate(sessions="turns=1") - rate()) < 1e-9
