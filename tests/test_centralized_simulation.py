"""The command line as a user meets it: whole runs in a subprocess, live and virtual, good input and bad."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sllm.observe.report.json import validate_results
from sllm.observe.results import without_wall
from sllm.protocol.errors import UsageError
from sllm.run.command_line import parse, repeat_command

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


def results(*arguments: str, **extra: Any) -> dict[str, Any]:
    done = run(*arguments, "--json", "-", **extra)
    content: dict[str, Any] = json.loads(done.stdout)
    assert validate_results(content) == []
    return content


def books_balance(content: dict[str, Any]) -> None:
    requests, reports = content["requests"], content["reports"]
    assert requests["sent"] == requests["completed"] + requests["failed"] + requests["rejected"] + requests["in_flight"]
    assert reports["sent"] == reports["accepted"] + reports["lost"] + reports["under_way"] + sum(reports["rejected"].values())


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
    assert content["wall"]["decision_s"]["p50"] > 0
    for word in ("time to first token", "end to end", "cold start", "Reports"):
        assert word in done.stderr
    with rows.open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == content["requests"]["sent"]
    assert "<svg" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "requests.csv"]


@pytest.mark.skipif(not TRACE.exists(), reason="put AzureLLMInferenceTrace_conv.csv of github.com/Azure/AzurePublicDataset into ../shared/traces")
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
    runs = [without_wall(results(*arguments, PYTHONHASHSEED=str(seed))) for seed in (1, 2)]
    assert json.dumps(runs[0]) == json.dumps(runs[1])
    other = without_wall(results(*arguments, "--seed", "2"))
    assert other["ttft_s"] != runs[0]["ttft_s"]


def test_two_runs_of_a_seed_are_the_same_bytes_but_for_what_is_of_this_machine() -> None:
    arguments = ("--virtual", "--workers", "4", "--duration", "60", "--rate", "6", "--warmup", "10", "--quiet", "--json", "-")
    texts = [run(*arguments, PYTHONHASHSEED=str(seed)).stdout for seed in (1, 2)]
    wall = [text[text.index('  "wall": {') : text.index('  "requests": {')] for text in texts]
    assert wall[0] != wall[1]
    assert texts[0].replace(wall[0], "") == texts[1].replace(wall[1], "")


def test_the_results_alone_are_enough_to_repeat_the_run(tmp_path: Path) -> None:
    faults = tmp_path / "some faults.toml"
    faults.write_text('[[fault]]\nat = 20.0\nkind = "crash"\nhosts = ["worker-1"]\nfor = 10.0\n')
    first = results(
        "--virtual", "--hardware", "h100-80g:2,a100-80g:2", "--rate", "3.3", "--faults", str(faults), "--arrivals", "gamma", "--cv", "3", "--duration", "50",
        "--slo-tpot", "0.02", "--warmup", "7", "--fail-if", "failed>1000", "--fail-if", "attainment<0", "--quiet", "--json", "-",
        SEED="7", POLICY="power_of_two:choices=3", SUSPECT_INTERVALS="4", SERVICE_MEAN="3",
    )  # fmt: skip
    command = shlex.split(repeat_command(first))
    assert command[0] == "env"
    assert {"SUSPECT_INTERVALS=4.0", "--virtual", "--faults", str(faults)} < set(command)
    done = subprocess.run([*command, "--quiet", "--json", "-"], capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=100, check=True)
    assert without_wall(json.loads(done.stdout)) == {**without_wall(first), "run": {**first["run"], "settings": json.loads(done.stdout)["run"]["settings"]}}
    again, asked = json.loads(done.stdout)["run"]["settings"], first["run"]["settings"]
    assert {name: (again[name], asked[name]) for name in asked if again[name] != asked[name]} == {"SERVICE_MEAN": (1.0, 3.0)}, "without effect, so left out"


def test_a_threshold_that_is_missed_is_exit_status_4_and_says_so() -> None:
    done = run("--virtual", "--fail-if", "ttft_p99>60", "--fail-if", "sent>0,completed<1", "--json", "-", expect=4)
    assert "centralized_simulation.py: --fail-if sent>0: it is " in done.stderr
    assert done.stderr.count("--fail-if") == 1
    assert [one["missed"] for one in json.loads(done.stdout)["slo"]["thresholds"]] == [False, True, False]
    assert "fail if ttft_p99>60: " in done.stderr
    run("--virtual", "--quiet", FAIL_IF="ttft_p99>60")
    run("--virtual", "--quiet", FAIL_IF="sent>0", expect=4)


def test_the_table_goes_to_stdout_unless_an_output_does() -> None:
    arguments = ("--virtual", "--duration", "5")
    done = run(*arguments)
    assert "time to first token" in done.stdout
    assert done.stderr == ""
    for output in ("-", "/dev/stdout"):
        taken = run(*arguments, "--json", output)
        assert json.loads(taken.stdout)["requests"]
        assert "time to first token" in taken.stderr
    quiet = run(*arguments, "--quiet")
    assert quiet.stdout == quiet.stderr == ""


def measured(content: dict[str, Any]) -> dict[str, Any]:
    """All but the machine and the settings."""
    return {key: value for key, value in without_wall(content).items() if key != "run"}


def test_objects_and_signed_bytes_give_the_same_results() -> None:
    arguments = ("--virtual", "--workers", "4", "--duration", "100", "--rate", "4", "--loss", "0.05", "--quiet")
    assert measured(results(*arguments)) == measured(results(*arguments, "--wire"))


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


def test_a_mixed_fleet_has_as_many_workers_as_its_counts_say() -> None:
    run_section = results("--virtual", "--hardware", "h100-80g:3,a5000-24g:4", "--duration", "20", "--quiet")["run"]
    assert (run_section["workers"], run_section["hardware"]) == (7, {"h100-80g": 3, "a5000-24g": 4})


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
    (["--workers", "2000000"], ["at most 1000000"]),
    (["--service", "deterministic"], ["--service:", "--engine queue"]),
    (["--service-mean", "2"], ["--service-mean:", "--engine queue"]),
    (["--service-load", "2"], ["--service-load:", "--engine queue"]),
    (["--cv", "3"], ["--cv:", "--arrivals gamma"]),
    (["--arrivals", "deterministic", "--cv", "3"], ["--cv:", "--arrivals gamma"]),
    (["--trace", "x.csv", "--rate", "3"], ["--rate:", "--trace"]),
    (["--trace", "x.csv", "--arrivals", "gamma"], ["--arrivals:", "--trace"]),
    (["--trace", "x.csv", "--cv", "2"], ["--cv:", "--trace"]),
    (["--latency-ms", "5"], ["--latency-ms:", "--virtual"]),
    (["--loss", "0.1"], ["--loss:", "--virtual"]),
    (["--wire"], ["--wire:", "--virtual"]),
    (["--workers", "5", "--hardware", "h100-80g:3,a5000-24g:3"], ["--hardware", "sum to 6", "5 workers"]),
    (["--hardware", "h100-80g:3,abacus:2"], ["abacus"]),
    (["--hardware", "h100-80g:3,a5000-24g"], ["--hardware", "a5000-24g"]),
    (["--fail-if", "ttft_p99"], ["--fail-if", "ttft_p99>2"]),
    (["--fail-if", "nothing>1"], ["--fail-if", "nothing", "ttft_p99", "attainment"]),
    (["--warmup", "30"], ["--warmup 30", "30 s", "--duration"]),
    (["--slo-ttft", "0"], ["--slo-ttft", "above 0"]),
    (["--hardware", "h100-80g:999999,a5000-24g:2"], ["--hardware", "at most"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: " ".join(value))
def test_wrong_usage_is_one_clear_line(arguments: list[str], words: list[str]) -> None:
    done = run(*arguments, expect=2)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_model_that_fits_no_worker_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('[model.giant]\npreset = "llama-2-70b"\n[model.small]\npreset = "opt-6.7b"\n')
    for mode in (["--virtual"], []):
        done = run("--catalog", str(path), *mode, expect=2)
        assert done.stderr.count("\n") == 1
        for word in ("giant", "140.0 GB", "72.0 GB", "h100-80g"):
            assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--models", "1", "--zipf", "2"], "--zipf"), (["--engine", "queue", "--keep-alive", "3"], "--keep-alive"),
        (["--engine", "queue", "--hardware", "a100-80g"], "--hardware"),
    ],
)  # fmt: skip
def test_a_flag_that_is_merely_useless_is_warned_about(arguments: list[str], flag: str) -> None:
    done = run("--virtual", "--duration", "5", "--quiet", *arguments)
    (line,) = done.stderr.splitlines()
    assert f"warning: {flag}: has no effect" in line


def test_a_flag_that_says_what_is_so_anyway_is_no_error() -> None:
    assert run("--virtual", "--duration", "5", "--quiet", "--speedup", "1", "--service-load", "0").stderr == ""
    assert "--loss" not in run("--duration", "20", "--speedup", "100", "--quiet", "--loss", "0").stderr


def test_variables_without_effect_are_passed_over() -> None:
    """All processes of a fleet share them."""
    settings: dict[str, Any] = {"SERVICE_MEAN": "2", "SERVICE": "deterministic", "CV": "3", "SPEEDUP": "5", "KEEP_ALIVE": "3"}
    assert run("--virtual", "--duration", "5", "--quiet", **settings).stderr == ""
    live = run("--duration", "20", "--speedup", "100", "--quiet", LATENCY_MS="5", LOSS="0.5", WIRE="1", FAULTS="/nowhere").stderr
    assert not any(word in live.upper() for word in ("LATENCY", "LOSS", "WIRE", "FAULTS"))


def test_a_recording_names_its_models_itself(tmp_path: Path) -> None:
    recording = tmp_path / "workload.jsonl"
    run("--virtual", "--duration", "5", "--rate", "5", "--record", str(recording), "--quiet", "--zipf", "0")
    done = run("--virtual", "--trace", str(recording), "--quiet", "--zipf", "0")
    assert "warning: --zipf: has no effect" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss", "1"], ["0 of 5 workers", "515 were lost and 0 still under way", "(--loss 1)"]),
        (["--loss", "1", "--wire"], ["0 of 5 workers", "(--loss 1)"]),
        (["--loss", "0.95", "--report-interval", "20"], ["of 5 workers", "(--loss 0.95)"]),
        (["--latency-ms", "60000"], ["0 of 5 workers", "stale", "(--latency-ms 60000)"]),
    ],
)
def test_a_fleet_that_never_starts_ends_the_run_with_the_reason(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    done = run("--virtual", *arguments, "--json", str(tmp_path / "x"), "--quiet", expect=2)
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--json", "--requests-csv", "--html", "--record", "--faults", "--trace", "--catalog", "--model-map", "--policy", "--workers"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_value_of_a_flag_is_refused(flag: str, empty: str) -> None:
    with pytest.raises(UsageError, match=rf"^{flag}: is empty$"):
        parse(["--virtual", flag, empty], {}, "program", "")


def test_an_empty_profile_is_the_hardwares_own() -> None:
    assert parse(["--engine-profile", ""], {}, "program", "")[0].engine_profile == ""


def test_a_run_that_sends_nothing_says_why(tmp_path: Path) -> None:
    slow = tmp_path / "slow.toml"
    slow.write_text('[model.opt-13b]\n[hardware.box]\npreset = "h100-80g"\ngpu_tflops = 1e-9\n')
    done = run("--virtual", "--quiet", "--catalog", str(slow), "--hardware", "box")
    said = r"no request was sent: none came within 30 s at the default rate, half of what this fleet can serve \(--rate, --catalog\): one in [\d,]{5,} s\n"
    assert re.search(said, done.stderr)
    done = run("--virtual", "--quiet", "--rate", "0.0001")
    assert done.stderr == "centralized_simulation.py: warning: no request was sent: none came within 30 s at --rate: one in 10,000 s\n"
    assert "no request was sent" not in run("--virtual", "--quiet").stderr


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


CSV = "arrived_at,num_prefill_tokens,num_decode_tokens,model\n"
RECORD = '{"timestamp": 0, "input_length": 10, "output_length": 5}\n'
MALFORMED = [
    ("a,b\n1,2\n", ["line 1", "no known format"]),
    ("arrived_at,Arrived_At ,num_prefill_tokens,num_decode_tokens\n0,0,1,1\n", ["line 1", "'Arrived_At'", "column 1"]),
    (CSV + '0,1,1,"x\n', ["line 2", "quote"]),
    (CSV + "0,1,1,x\nlate,1,1,x\n", ["line 3", "arrived_at", "'late'"]),
    (CSV + "0,1,1,x\n1,1\n", ["line 3", "2 columns", "4"]),
    (CSV + "0,1,1," + "x" * 129 + "\n", ["line 2", "column model", "128"]),
    (CSV + "1732600000000,1,1,x\n", ["line 2", "milliseconds"]),
    (RECORD + RECORD.replace('{"', '{"timestamp": 0, "'), ["line 2", "'timestamp'", "twice"]),
    (RECORD.replace(": 0", ": 0.489"), ["line 1", "timestamp", "0.489", "seconds"]),
    (RECORD + RECORD.replace("}", ', "model": "x"}'), ["line 2", "model", "first request"]),
    (RECORD.replace("}", ', "model": 7}'), ["line 1", "model", "'7'"]),
]


@pytest.mark.parametrize(("content", "words"), MALFORMED, ids=lambda value: repr(value)[:40])
def test_every_malformed_trace_is_one_clear_line(content: str, words: list[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.dat"
    trace.write_text(content)
    done = run("--virtual", "--workers", "4", "--quiet", "--trace", str(trace), expect=2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"centralized_simulation.py: error: {trace}, line ")
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("mode", [["--virtual"], ["--speedup", "100"]])
def test_the_models_of_a_trace_are_kept_apart_and_said(mode: list[str], tmp_path: Path) -> None:
    trace, rows, model_map = tmp_path / "trace.csv", tmp_path / "rows.csv", tmp_path / "map.toml"
    names = ["GPT-4", "ChatGPT", "ChatGPT", "Claude"] * 5
    lines = "".join(f"{3 * i}, {name}, 210, 19, 229, Conversation log\n" for i, name in enumerate(names))
    trace.write_text("Timestamp, Model, Request tokens, Response tokens, Total tokens, Log Type\n" + lines)
    model_map.write_text('Claude = "mistral-7b"\n')
    arguments = (*mode, "--workers", "3", "--trace", str(trace), "--model-map", str(model_map), "--requests-csv", str(rows), "--json", "-")
    done = run(*arguments)
    models = {"ChatGPT": "llama-3.1-8b", "GPT-4": "opt-6.7b", "Claude": "mistral-7b"}
    with rows.open(encoding="utf-8") as file:
        sent = {row["request_id"]: row["model"] for row in csv.DictReader(file)}
    assert sent == {f"r{i}": models[name] for i, name in enumerate(names)}
    told = json.loads(done.stdout)["run"]["workload"]["trace_models"]
    assert told == [{"name": name, "model": model, "requests": names.count(name)} for name, model in models.items()]
    assert "Models     ChatGPT as llama-3.1-8b: 10   GPT-4 as opt-6.7b: 5   Claude as mistral-7b: 5\n" in done.stderr
    assert f"warning: {trace}: model names not in the catalogue: 2 of 3" in done.stderr


def test_help_lists_every_option() -> None:
    text = run("--help").stdout
    for word in ("--workers", "--virtual", "--report-interval", "[WORKERS", "Exit status"):
        assert word in text
