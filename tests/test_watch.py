"""The fleet's page while a whole fleet runs in one process: live, and in virtual time that is held back."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_centralized_simulation import ROOT, environment, run

from experiments.harness import configuration, silent
from sllm.observe.results import without_wall
from sllm.run.virtual import VirtualRun
from sllm.run.watch import Pacer

WITHIN_S = 60.0


@contextmanager
def watched(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A run, and the address of its page."""
    command = [sys.executable, str(ROOT / "centralized_simulation.py"), *arguments, "--page"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("how", [("--speedup", "5"), ("--virtual", "--pace", "5")], ids=["live", "virtual"])
def test_the_page_shows_the_fleet_while_it_runs(how: tuple[str, ...]) -> None:
    with watched(*how, "--workers", "3", "--rate", "4", "--duration", "600") as (url, process):
        assert "<html" in ask(url)
        until = time.monotonic() + WITHIN_S
        while time.monotonic() < until:
            state = json.loads(ask(f"{url}state?view=page"))
            if state["requests"]["routed"].get("serve", 0) and state["summary"]["states"].get("READY") == 3:
                break
        assert state["total"] == 3
        assert len(state["grid"]["cells"]) == 3
        assert state["ready"] is True
        assert len(state["history"]["routed"]) > 0
        metrics = ask(f"{url}metrics")
        assert re.search(r'^sllm_workers\{state="READY"\} 3$', metrics, re.M)
        assert re.search(r"^sllm_ready 1$", metrics, re.M)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=WITHIN_S)
        assert process.returncode == 130
        assert "interrupted" in out
    with pytest.raises(OSError, match="refused"):
        ask(url)


def test_a_run_that_is_held_back_has_the_results_of_one_that_is_not() -> None:
    found = []
    for pace in (0.0, 100.0):
        config = configuration(workers=3, duration_s=20.0, rate_per_s=4.0, pace=pace)
        one = VirtualRun(config, silent())
        try:
            one.conduct()
        finally:
            one.close()
        results = one.results()
        assert results["wall"]["wall_s"] > (0.2 if pace else 0.0)
        found.append(without_wall(results))
    assert found[0] == found[1]


def test_time_is_held_back_and_nobody_waits_when_it_is_over() -> None:
    pacer = Pacer(1000.0)
    began = time.monotonic()
    pacer.hold(5.0, lambda: False)
    pacer.hold(105.0, lambda: False)
    assert time.monotonic() - began >= 0.1
    pacer.hold(1e9, lambda: True)
    pacer.hold(50.0, lambda: False)  # late
    assert time.monotonic() - began < WITHIN_S


@pytest.mark.parametrize(("arguments", "words"), [(["--pace", "3"], ["--pace", "--virtual"]), (["--virtual", "--page"], ["--page", "--pace"])])
def test_what_nobody_could_watch_is_refused(arguments: list[str], words: list[str]) -> None:
    (line,) = run(*arguments, expect=2).stderr.splitlines()
    assert all(word in line for word in words)


@pytest.mark.parametrize(("extra", "arguments", "served"), [({}, [], True), ({"PAGE": "0"}, [], False), ({}, ["--quiet"], False), ({}, ["--virtual"], False)])
def test_on_a_terminal_a_live_run_serves_its_page_by_itself(extra: dict[str, str], arguments: list[str], served: bool) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "centralized_simulation.py"), "--workers", "2", "--duration", "20", "--speedup", "40", *arguments]
    if "--virtual" in arguments:
        command = [word for word in command if word not in ("--speedup", "40")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment(TERM="xterm", **extra))
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # so a terminal ends whose other side is gone
        while piece := os.read(ours, 65536):
            text += piece
    os.close(ours)
    assert process.wait(WITHIN_S) == 0
    assert (b"http://127.0.0.1:" in text) is served


def test_no_page_unless_it_is_asked_for_or_somebody_watches(tmp_path: Path) -> None:
    assert "http" not in run("--duration", "20", "--speedup", "100").stderr
