"""A run that is told to stop: Ctrl-C and SIGTERM, at any moment, live and in virtual time. What it says then is so."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from roles import in_turn
from test_centralized_simulation import ROOT, books_balance, environment

import centralized_simulation
from centralized_simulation import Signals
from experiments.harness import configuration, silent
from sllm.observe.report.html import render_html
from sllm.observe.report.json import validate_results
from sllm.observe.report.outputs import Outputs
from sllm.observe.report.table import render_table
from sllm.observe.report.text import span
from sllm.protocol.events import RequestCompleted, RequestSent, WorkerStateChanged
from sllm.protocol.messages import READY
from sllm.run.live import LiveRun
from sllm.run.run import Run
from sllm.run.virtual import VirtualRun
from sllm.workload import Request, write_recorded

PROGRAMS = [path for path in sorted(ROOT.glob("experiments/*.py")) if "__main__" in path.read_text(encoding="utf-8")]
EXPERIMENTS = [str(path.relative_to(ROOT)) for path in PROGRAMS if path.stem != "identical"]  # which imports nothing of the project, so nothing that takes long
WITHIN_S = 10.0  # of wall time on a busy machine; what is held to it took minutes, or had no end


def virtual(outputs: Outputs | None = None, **changes: Any) -> VirtualRun:
    return VirtualRun(configuration(workers=4, **changes), silent(), io.StringIO(), outputs)


def conducted(run: Run) -> dict[str, Any]:
    try:
        run.conduct()
    finally:
        run.close()
    run.put_in_flight()
    results = run.results()
    assert validate_results(results) == []
    books_balance(results)
    assert results["invariants"]["violations"] == []
    return results


def interrupt_after(run: VirtualRun, requests: int) -> None:
    """As a signal's handler would, while the request of that number is being sent."""

    def count(node: object, event: object) -> None:
        if len(run.recorder.sent_at) == requests:
            run.interrupt()

    run.world.bus.subscribe(count, RequestSent)


def test_nothing_comes_after_an_interrupt_and_the_figures_are_those_up_to_it() -> None:
    run = virtual(rate_per_s=20.0, duration_s=100.0)
    interrupt_after(run, 200)
    results = conducted(run)
    whole = conducted(virtual(rate_per_s=20.0, duration_s=100.0))
    assert results["requests"]["sent"] == 200
    assert results["requests"]["in_flight"] > 0, "what was under way is counted, neither finished nor lost"
    section = results["run"]
    assert section["interrupted"] is True
    assert section["duration_asked_s"] == 100.0
    assert section["duration_s"] == pytest.approx(run.recorder.sent_at[-1] - run.began_s), "the time in which requests came"
    assert results["fleet"]["ready"] == 4
    assert (whole["run"]["interrupted"], whole["run"]["duration_s"], whole["run"]["duration_asked_s"]) == (False, 100.0, 100.0)


def test_requests_in_flight_count_for_the_goal_as_far_as_it_is_known() -> None:
    """A run cut off says what the whole run says of the requests that it shares with it, and nothing of those whose time was not over."""
    whole = virtual(rate_per_s=20.0, duration_s=60.0)
    firsts: dict[str, float] = {}
    whole.world.bus.subscribe(lambda node, event: firsts.setdefault(event.request_id, event.ttft_s), RequestCompleted)
    conducted(whole)
    run = virtual(rate_per_s=20.0, duration_s=60.0)
    interrupt_after(run, 600)
    results = conducted(run)
    goal_s, ended_s = results["slo"]["ttft_s"], run.now
    sent = [f"r{index}" for index in range(600)]
    decided = [name for name, at in zip(sent, run.recorder.sent_at, strict=True) if min(at + firsts[name], at + goal_s) <= ended_s]
    assert len(decided) < 600
    assert results["requests"]["in_flight"] > 600 - len(decided), "of some in flight it is known"
    assert results["slo"]["attainment"] == pytest.approx(sum(firsts[name] <= goal_s for name in decided) / len(decided))


def test_table_report_and_rows_say_interrupted(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    with Outputs({"--requests-csv": str(rows)}, {}) as outputs:
        run = virtual(outputs, rate_per_s=20.0, duration_s=100.0)
        interrupt_after(run, 200)
        results = conducted(run)
        for step in outputs.finish({}):
            step()
    for text in (render_table(results), render_html(results, run.recorder)):
        assert f"interrupted: requests came for {span(run.window_s)} of the 100 s asked for" in " ".join(text.split())
    with rows.open(encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == results["requests"]["sent"]
    open_rows = [row for row in listed if row["outcome"] == "in_flight"]
    assert len(open_rows) == results["requests"]["in_flight"]
    assert {row["reason"] for row in open_rows} == {"interrupted"}


def test_an_interrupt_cuts_through_a_burst_of_one_instant(tmp_path: Path) -> None:
    burst = tmp_path / "burst.jsonl"
    write_recorded(str(burst), [Request(0.0, f"r{i}", "opt-6.7b", 100, 10) for i in range(5000)])
    run = virtual(trace=str(burst))
    interrupt_after(run, 100)
    results = conducted(run)
    assert results["requests"]["sent"] == 100
    assert results["run"]["duration_asked_s"] is None


def test_an_interrupt_during_the_start_leaves_an_empty_run() -> None:
    run = virtual(rate_per_s=20.0)
    run.world.bus.subscribe(lambda node, event: run.interrupt() if event.new == READY else None, WorkerStateChanged)
    results = conducted(run)
    assert results["requests"]["sent"] == 0
    assert (results["run"]["interrupted"], results["run"]["duration_s"]) == (True, 0.0)
    assert "interrupted" in render_table(results)


def test_an_interrupt_before_the_workers_are_made_makes_none() -> None:
    run = virtual(rate_per_s=20.0)
    run.interrupt()
    assert conducted(run)["requests"]["sent"] == 0
    assert not any(run.system.lives.values())


def test_an_interrupt_while_requests_are_being_made_ends_the_making() -> None:
    """A trace may have millions of rows without a request in them."""
    run = virtual(rate_per_s=20.0)
    made = 0

    def endless(requests: Iterator[Request]) -> Iterator[Request]:
        nonlocal made
        yield from (next(requests) for _ in range(10))
        while True:
            made += 1
            if made == 1000:
                run.interrupt()  # as a signal's handler does: in the middle of it

    run.workload._requests = endless(run.workload._requests)
    assert conducted(run)["run"]["interrupted"] is True
    assert made == 1000


def test_an_interrupt_while_the_last_answers_are_awaited() -> None:
    run = virtual(rate_per_s=20.0, duration_s=10.0)
    run.exhaust = in_turn(run.exhaust, run.interrupt)  # type: ignore[method-assign]
    results = conducted(run)
    assert results["requests"]["sent"] > 100
    assert results["run"]["interrupted"] is True


def test_a_live_run_takes_no_new_arrivals_after_an_interrupt() -> None:
    run = LiveRun(configuration(workers=2, rate_per_s=50.0, duration_s=600.0), silent(virtual=False), io.StringIO())
    submit = run.submit
    sent: list[float] = []

    def count(*arguments: Any) -> None:
        submit(*arguments)
        sent.append(run.now)
        if len(sent) == 20:
            run.interrupt()

    run.submit = count  # type: ignore[assignment,method-assign]
    results = conducted(run)
    assert len(sent) == results["requests"]["sent"] == 20
    assert results["run"]["interrupted"] is True
    assert results["run"]["duration_s"] < 60.0


# --- signals ------------------------------------------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A run that writes its requests to stdout as they come."""
    command = [sys.executable, str(ROOT / "centralized_simulation.py"), *arguments, "--record", "-"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1 << 16)  # requests have come
    return process


@pytest.mark.parametrize("mode", [["--virtual"], []], ids=["virtual", "live"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_flood_at_once(tmp_path: Path, mode: list[str], number: int, status: int) -> None:
    results = tmp_path / "results.json"
    process = start("--workers", "2", "--rate", "1e7", "--json", str(results), *mode)
    process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=100)
    assert time.monotonic() - began < WITHIN_S
    assert process.returncode == status
    assert b"Traceback" not in err
    assert b"interrupted" in err
    content = json.loads(results.read_text())
    assert validate_results(content) == []
    assert content["run"]["interrupted"] is True
    assert content["requests"]["in_flight"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    """Whether the second comes while the run ends or while its figures are written, there is no traceback and nothing half-written."""
    process = start("--workers", "2", "--rate", "1e7", "--virtual", "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert not [path for path in tmp_path.iterdir() if path.name not in ("a.json", "a.html")]


def test_the_first_signal_ends_the_run_the_second_the_process() -> None:
    told: list[str] = []

    class Told:
        def interrupt(self) -> None:
            told.append("interrupt")

    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signals.run = Told()  # type: ignore[assignment]
        signal.raise_signal(signal.SIGTERM)
        assert told == ["interrupt"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.status == 143, "of the first"
    assert told == ["interrupt"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_outside_of_the_run_ends_it_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """While the catalogue is read, or the report is drawn."""
    monkeypatch.setattr(centralized_simulation, "render_html", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    paths = {flag: str(tmp_path / flag) for flag in ("--html", "--record", "--requests-csv")}
    assert centralized_simulation.main(["--virtual", "--duration", "2", "--quiet", *(text for pair in paths.items() for text in pair)]) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_signal_that_comes_when_the_work_is_done_is_quiet() -> None:
    """The interpreter takes seconds to take a large fleet apart: the process does not wait for that."""
    code = "import signal; from sllm.observe.report.standard import run_command as run; run('p', lambda: signal.raise_signal({}) or 0)"
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        done = subprocess.run([sys.executable, "-c", code.format(int(number))], capture_output=True, cwd=ROOT, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (status, b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("program", [*sorted(path.name for path in ROOT.glob("entrypoint_*.py")), "centralized_simulation.py", *EXPERIMENTS])
def test_a_signal_while_a_program_is_imported_ends_it_without_a_word(program: str, number: int, tmp_path: Path) -> None:
    """The signal comes when the catalogue imports its reader of TOML."""
    (tmp_path / "tomllib.py").write_text(f"import os\nos.kill(os.getpid(), {number})\n")
    command = [sys.executable, str(ROOT / program), "--help"]
    done = subprocess.run(command, env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_ctrl_c_in_an_experiment_is_status_130_and_no_traceback() -> None:
    """One process of several must not speak for itself either."""
    code = "import os, signal\nfrom experiments.harness import spread\nfrom sllm.observe.report.standard import run_script\n"
    code += "def interrupt(item):\n    os.killpg(0, signal.SIGINT)\nrun_script(lambda: len(list(spread(interrupt, range(100), 2))))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=60, start_new_session=True, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "")
