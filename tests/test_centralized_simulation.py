"""The command line as a user meets it: whole runs in a subprocess, live and virtual, good input and bad."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sllm.report.json import validate_results
from sllm.results import WALL_CLOCK_KEYS

ROOT = Path(__file__).parent.parent
TRACE = ROOT.parent / "shared" / "traces" / "AzureLLMInferenceTrace_conv.csv"


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "TMPDIR", "SYSTEMROOT")}
    return {**kept, "DEPLOYMENT_MODE": "local", **extra}


def run(*arguments: str, expect: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "centralized_simulation.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**extra), timeout=200, check=False)
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def results(*arguments: str, **extra: str) -> dict[str, Any]:
    done = run(*arguments, "--json", "-", **extra)
    content: dict[str, Any] = json.loads(done.stdout)
    assert validate_results(content) == []
    return content


def books_balance(content: dict[str, Any]) -> None:
    requests, reports = content["requests"], content["reports"]
    assert requests["sent"] == requests["completed"] + requests["failed"] + requests["rejected"] + requests["in_flight"]
    assert reports["sent"] == reports["accepted"] + reports["lost"] + sum(reports["rejected"].values())


def without_wall_clock(content: dict[str, Any]) -> dict[str, Any]:
    for section, *keys in WALL_CLOCK_KEYS:
        if keys:
            del content[section][keys[0]]
        else:
            del content[section]
    return content


def test_a_misspelt_variable_is_one_warning() -> None:
    done = run("--virtual", "--duration", "1", "--quiet", WORKER_TIMOUT="3", WORKER_SERVICE_HOST="10.0.0.1")
    assert done.stderr == "centralized_simulation.py: warning: ignored, as no variables of ours: WORKER_TIMOUT (is WORKER_TIMEOUT meant?)\n"


# --- live ---------------------------------------------------------------------------------------------------------------------------


def test_a_live_run_completes_everything_and_says_so(tmp_path: Path) -> None:
    rows, page = tmp_path / "requests.csv", tmp_path / "report.html"
    done = run("--workers", "3", "--duration", "40", "--speedup", "20", "--rate", "2", "--json", "-", "--requests-csv", str(rows), "--html", str(page))
    content = json.loads(done.stdout)
    assert validate_results(content) == []
    books_balance(content)
    assert content["run"]["mode"] == "udp"
    assert content["requests"]["sent"] > 40
    assert content["requests"]["completed"] == content["requests"]["sent"]
    assert content["reports"]["lost"] == 0
    assert content["invariants"]["checked"] > 0
    assert content["decision_s"]["p50"] > 0
    for word in ("time to first token", "end to end", "cold start", "Reports"):
        assert word in done.stderr
    with rows.open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == content["requests"]["sent"]
    assert "<svg" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "requests.csv"]


@pytest.mark.skipif(not TRACE.exists(), reason="the real trace is not here")
def test_a_live_run_of_the_real_trace_loses_nothing() -> None:
    content = results("--workers", "8", "--trace", str(TRACE), "--speedup", "60", "--duration", "300", "--quiet")
    books_balance(content)
    assert content["requests"]["sent"] > 1000
    assert content["requests"]["completed"] == content["requests"]["sent"]


def test_ctrl_c_still_prints_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "centralized_simulation.py"), "--workers", "2", "--duration", "600", "--speedup", "5", "--rate", "5", "--json", "-"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    for line in process.stderr:  # progress tells when requests are being completed
        if " done" in line and " 0 done" not in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    content = json.loads(out)
    books_balance(content)
    assert content["requests"]["completed"] > 0
    assert "time to first token" in err


# --- virtual ------------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_whatever_the_hash_seed() -> None:
    arguments = ("--virtual", "--workers", "6", "--duration", "200", "--rate", "5", "--loss", "0.02", "--quiet")
    runs = [without_wall_clock(results(*arguments, PYTHONHASHSEED=str(seed))) for seed in (1, 2)]
    assert json.dumps(runs[0]) == json.dumps(runs[1])
    other = without_wall_clock(results(*arguments, "--seed", "2"))
    assert other["ttft_s"] != runs[0]["ttft_s"]


def test_objects_and_signed_bytes_give_the_same_results() -> None:
    arguments = ("--virtual", "--workers", "4", "--duration", "100", "--rate", "4", "--loss", "0.05", "--quiet")
    assert without_wall_clock(results(*arguments)) == without_wall_clock(results(*arguments, "--wire"))


@pytest.mark.parametrize("scenario", sorted((ROOT / "experiments" / "scenarios").glob("*.toml")), ids=lambda path: path.stem)
def test_every_ready_scenario_keeps_the_invariants(scenario: Path) -> None:
    content = results("--virtual", "--workers", "8", "--duration", "120", "--rate", "3", "--faults", str(scenario), "--quiet")
    books_balance(content)
    assert content["invariants"]["violations"] == []
    assert content["requests"]["completed"] > 0


def test_a_recorded_workload_is_replayed_exactly(tmp_path: Path) -> None:
    recording = tmp_path / "workload.jsonl.gz"
    first = results("--virtual", "--duration", "60", "--rate", "3", "--arrivals", "gamma", "--record", str(recording), "--quiet")
    with gzip.open(recording, "rt", encoding="utf-8") as file:
        assert len(file.readlines()) == first["requests"]["sent"] + 1
    again = results("--virtual", "--trace", str(recording), "--quiet")
    for key in ("requests", "ttft_s", "e2e_s", "actions"):
        assert again[key] == first[key]


def test_settings_come_from_the_environment_and_flags_win() -> None:
    assert results("--virtual", "--duration", "20", "--quiet", WORKERS="3", SEED="9")["run"]["workers"] == 3
    assert results("--virtual", "--duration", "20", "--quiet", "--workers", "4", WORKERS="3")["run"]["workers"] == 4


@pytest.mark.parametrize("policy", ["random", "round_robin", "power_of_two:choices=3", "least_loaded", "startup_time:margin_s=1"])
def test_every_policy_runs(policy: str) -> None:
    content = results("--virtual", "--workers", "5", "--duration", "100", "--rate", "3", "--policy", policy, "--quiet")
    assert content["requests"]["completed"] == content["requests"]["sent"] > 0


# --- bad input ----------------------------------------------------------------------------------------------------------------------

BAD: list[tuple[list[str], list[str]]] = [
    (["--wrkers", "5"], ["--wrkers"]),
    (["--workers", "many"], ["--workers", "many", "whole number"]),
    (["--workers", "0"], ["--workers", "0", "at least 1"]),
    (["--arrivals", "weekly"], ["--arrivals", "weekly", "poisson"]),
    (["--policy", "fastest"], ["fastest", "startup_time"]),
    (["--policy", "power_of_two:choices=x"], ["choices", "x"]),
    (["--hardware", "abacus"], ["abacus", "h100-80g"]),
    (["--trace", "/nowhere/trace.csv"], ["/nowhere/trace.csv"]),
    (["--catalog", "/nowhere/models.toml"], ["/nowhere/models.toml"]),
    (["--engine", "queue", "--service", "normal"], ["normal", "exponential"]),
    (["--report-interval", "0"], ["--report-interval", "--virtual"]),
    (["--faults", "x.toml"], ["--faults", "--virtual"]),
    (["--virtual", "--faults", "/nowhere/x.toml"], ["/nowhere/x.toml"]),
    (["--virtual", "--speedup", "2"], ["--speedup"]),
    (["--json", "/nowhere/results.json"], ["--json", "/nowhere/results.json"]),
    (["--requests-csv", "/nowhere/rows.csv"], ["--requests-csv", "/nowhere/rows.csv"]),
    (["extra"], ["extra"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(value))
def test_wrong_usage_is_one_clear_line(arguments: list[str], words: list[str]) -> None:
    done = run(*arguments, expect=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_bad_variable_is_one_clear_line() -> None:
    done = run("--virtual", expect=2, REPORT_INTERVAL="soon")
    assert done.stderr.count("\n") == 1
    assert "REPORT_INTERVAL='soon'" in done.stderr


def test_a_malformed_trace_names_file_line_and_column(tmp_path: Path) -> None:
    trace = tmp_path / "bad.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,many,109\n")
    for mode in (["--virtual"], ["--speedup", "100"]):
        done = run("--trace", str(trace), "--quiet", *mode, expect=2)
        assert done.stderr.count("\n") == 1
        for word in (str(trace), "line 3", "ContextTokens", "many"):
            assert word in done.stderr


def test_help_lists_every_option() -> None:
    text = run("--help").stdout
    for word in ("--workers", "--virtual", "--report-interval", "[WORKERS", "Exit status"):
        assert word in text
