"""The entry points as real processes: a fleet started by hand, signals, deaths, wrong settings. Every wait is for a log line or an exit."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from config import Config

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 60.0  # a bound for what never comes, not a time anything is expected to take

QUICK = {
    "ENGINE": "queue", "SERVICE": "deterministic", "SERVICE_MEAN": "0.05", "SLOTS": "4", "REPORT_INTERVAL": "0.2", "WORKER_TIMEOUT": "1.0",
    "RETRY_INITIAL": "0.1", "RETRY_MAX": "0.3", "WORKER_TRIES": "3", "POLL_INTERVAL": "0.3", "COORDINATOR_SILENT": "1.0", "RATE": "40",
    "DURATION": "2", "LOG_FORMAT": "json", "DEPLOYMENT_MODE": "local",
}  # fmt: skip


class Process:
    """An entry point of this project, and the log lines it has printed."""

    def __init__(self, role: str, home: Path, *arguments: str, code: str = "", **settings: str) -> None:
        """`code` is run in the entry point's place: to change a constant of its first."""
        environ = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT) if code else "", **QUICK, **settings}
        self.role = role
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self.process = subprocess.Popen(
            [sys.executable, "-u", *(("-c", code) if code else (str(ROOT / f"entrypoint_{role}.py"),)), *arguments],
            env=environ, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def told(self) -> list[dict[str, Any]]:
        """Its log, parsed: every line must be a JSON object."""
        return [json.loads(line) for line in list(self.lines)]

    def wait_for(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first log line for which it holds."""
        with self._changed:
            for _ in range(10_000):
                for line in self.told:
                    if holds(line):
                        return line
                if self._ended or not self._changed.wait(PATIENCE_S):
                    break
        self.process.kill()
        raise AssertionError(f"{self.role} never said it; it said:\n" + "\n".join(self.lines) + self.process.communicate()[1])

    def wait_event(self, event: str, **fields: object) -> dict[str, Any]:
        return self.wait_for(lambda line: line.get("event") == event and all(line.get(name) == value for name, value in fields.items()))

    def up(self) -> dict[str, Any]:
        return self.wait_for(lambda line: line["message"].endswith(" is up"))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def exit_status(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        return status


class Bench:
    """Starts processes that share a home, and with it the automatic key file."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[Process] = []

    def start(self, role: str, *arguments: str, code: str = "", **settings: str) -> Process:
        process = Process(role, self.home, *arguments, code=code, **settings)
        self.started.append(process)
        return process

    def coordinator(self, **settings: str) -> tuple[Process, str]:
        """A coordinator on a free port, and that port."""
        process = self.start("coordinator", **{"COORDINATOR_PORT": "0", **settings})
        return process, process.up()["udp"].rpartition(":")[2]

    def fleet(self, count: int, **settings: str) -> tuple[Process, list[Process], str]:
        """A coordinator that knows `count` workers."""
        coordinator, port = self.coordinator(**settings)
        workers = [self.worker(i, port, **settings) for i in range(count)]
        for i in range(count):
            coordinator.wait_event("WorkerStateChanged", worker_id=f"worker-{i}", new="READY")
        return coordinator, workers, port

    def worker(self, index: int, port: str, **settings: str) -> Process:
        return self.start("worker", **{**settings, "WORKER_ID": f"worker-{index}", "WORKER_PORT": "0", "COORDINATOR_PORT": port})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for process in bench.started:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait()
        process._thread.join(PATIENCE_S)
        for pipe in (process.process.stdout, process.process.stderr):
            assert pipe is not None
            pipe.close()


def closing(client: Process) -> dict[str, Any]:
    """The client's last word; its books must balance."""
    figures = client.wait_event("Results")
    assert figures["sent"] == figures["completed"] + figures["failed"] + figures["rejected"] + figures["in_flight"]
    return figures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str | urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_fleet_started_by_hand_serves_and_ends(bench: Bench) -> None:
    coordinator, workers, port = bench.fleet(2)
    client = bench.start("client", COORDINATOR_PORT=port)
    assert client.exit_status() == 0
    figures = closing(client)
    assert figures["completed"] == figures["sent"] > 20
    assert figures["duplicates"] == 0
    for process in (*workers, coordinator):
        process.signal(signal.SIGTERM)
    assert [process.exit_status() for process in (*workers, coordinator)] == [0, 0, 0]
    for process in bench.started:
        for line in process.told:  # parses, line for line
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
            assert {"level", "message"} <= line.keys()
            assert line["level"] in ("info", "warning"), line
        assert process.process.stderr is not None
        assert process.process.stderr.read() == ""
    left = [path.relative_to(bench.home) for path in bench.home.rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["cluster.key"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(("127.0.0.1", int(port)))


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("role", ["coordinator", "worker", "client"])
def test_a_process_whose_standard_streams_are_closed_does_its_work(role: str, closed: str, tmp_path: Path) -> None:
    port = free_port()
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), **QUICK, "COORDINATOR_PORT": "0" if role == "coordinator" else str(free_port()),
        "WORKER_PORT": "0", "HEALTH_PORT": str(port), "DURATION": "1000",
    }  # fmt: skip
    shell = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / f'entrypoint_{role}.py'))} {closed}"
    with subprocess.Popen(["sh", "-c", shell], env=environ, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError):
                if get(f"http://127.0.0.1:{port}/livez") == (200, "ok\n"):
                    break
        process.send_signal(signal.SIGTERM)
        if role == "client":
            process.send_signal(signal.SIGTERM)  # a second one: nobody answers what it has sent
        _, told = process.communicate(timeout=PATIENCE_S)
    assert told == ""
    assert process.returncode in ((0, 1, 143) if role == "client" else (0,))


@pytest.mark.parametrize("asked", ["--print-config", "--help", "--version"])
def test_what_is_asked_for_on_a_closed_stdout_is_an_output_error(asked: str, tmp_path: Path) -> None:
    shell = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'entrypoint_worker.py'))} {asked} >&-"
    done = subprocess.run(["sh", "-c", shell], env={"PATH": os.environ["PATH"]}, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (3, "worker: stdout: cannot write: it is closed\n")


def test_health_metrics_and_state_over_http(bench: Bench) -> None:
    http_port = str(free_port())
    coordinator, port = bench.coordinator(HEALTH_PORT=http_port, HTTP_HOSTS="fleet.example, page.example", HOSTNAME="node-7")
    base = coordinator.up()["http"]
    for host, expected in {"fleet.example": 200, "page.example:443": 200, "node-7": 200, "localhost": 200, "evil.example": 421, "fleet": 421}.items():
        assert get(urllib.request.Request(f"{base}/livez", headers={"Host": host}))[0] == expected, host
    coordinator.wait_event("CoordinatorReady")
    worker_port = str(free_port())
    worker = bench.worker(0, port, HEALTH_PORT=worker_port, DEMO_MODELS="2")
    coordinator.wait_event("WorkerStateChanged", new="READY")
    client = bench.start("client", COORDINATOR_PORT=port, DURATION="0.5")
    assert client.exit_status() == 0
    assert get(f"{base}/livez") == (200, "ok\n")
    assert get(f"{base}/readyz")[0] == 200
    _, metrics = get(f"{base}/metrics")
    completed = closing(client)["completed"]
    routed = sum(float(value) for value in re.findall(r"^sllm_requests_routed_total\{.*\} (\S+)$", metrics, re.MULTILINE))
    assert routed >= completed
    assert 'sllm_workers{state="READY"} 1' in metrics
    status, body = get(f"{base}/state?limit=10")
    state = json.loads(body)
    assert (status, state["role"], state["total"], state["ready"]) == (200, "coordinator", 1, True)
    assert state["workers"][0]["worker_id"] == "worker-0"
    assert state["keys"] == {"signs": 1, "accepted": [1]}
    assert get(f"{base}/state?limit=x") == (400, "limit='x': must be a whole number, at most 1000\n")
    assert "<title>sllm fleet" in get(f"{base}/")[1]
    worker_base = worker.up()["http"]
    assert get(f"{worker_base}/readyz") == (200, "ready\n")
    assert f'sllm_worker_requests_total{{outcome="completed"}} {completed}' in get(f"{worker_base}/metrics")[1]
    assert f"sllm_worker_first_token_seconds_count {completed}\n" in get(f"{worker_base}/metrics")[1]
    assert json.loads(get(f"{worker_base}/state")[1])["served"] == completed
    assert get(f"{worker_base}/")[0] == 404
    for arguments, expected in ((["--healthcheck"], 0), (["--healthcheck", "readyz"], 0)):
        assert bench.start("worker", *arguments, HEALTH_PORT=worker_port).exit_status() == expected
    worker.signal(signal.SIGTERM)
    assert worker.exit_status() == 0
    assert bench.start("worker", "--healthcheck", HEALTH_PORT=worker_port).exit_status() == 1


def test_a_worker_that_dies_costs_no_request(bench: Bench) -> None:
    coordinator, workers, port = bench.fleet(3)
    client = bench.start("client", COORDINATOR_PORT=port, LOG_LEVEL="debug")
    client.wait_event("RequestCompleted")
    workers[1].process.kill()
    coordinator.wait_event("WorkerStateChanged", worker_id="worker-1", new="SUSPECT")
    coordinator.wait_event("WorkerStateChanged", worker_id="worker-1", new="DEAD")
    assert client.exit_status() == 0
    figures = closing(client)
    assert figures["completed"] == figures["sent"]
    again = bench.worker(1, port)
    coordinator.wait_for(lambda line: line.get("worker_id") == "worker-1" and line.get("old") == "DEAD" and line.get("new") == "READY")
    incarnations = {line["incarnation"] for line in coordinator.told if line.get("worker_id") == "worker-1"}
    assert len(incarnations) == 2
    again.signal(signal.SIGINT)
    assert again.exit_status() == 0


def test_a_coordinator_that_restarts_costs_no_request(bench: Bench) -> None:
    coordinator, workers, port = bench.fleet(2)
    client = bench.start("client", COORDINATOR_PORT=port, LOG_LEVEL="debug", DURATION="3")
    client.wait_event("RequestCompleted")
    coordinator.process.kill()
    coordinator.exit_status()
    second, _ = bench.coordinator(COORDINATOR_PORT=port)
    for i in range(2):
        second.wait_event("WorkerStateChanged", worker_id=f"worker-{i}", new="READY")
    assert second.wait_event("CoordinatorReady")["workers"] == 2
    for worker in workers:
        worker.wait_event("CoordinatorChanged")
    assert client.exit_status() == 0
    figures = closing(client)
    assert figures["completed"] == figures["sent"]


def test_a_worker_told_to_stop_finishes_what_it_runs(bench: Bench) -> None:
    coordinator, (worker,), port = bench.fleet(1, SERVICE_MEAN="1.0", LOG_LEVEL="debug")
    client = bench.start("client", COORDINATOR_PORT=port, RATE="2", ARRIVALS="deterministic", DURATION="0.9", SERVICE_MEAN="1.0")
    worker.wait_event("RequestAdmitted")
    worker.signal(signal.SIGTERM)
    coordinator.wait_event("WorkerStateChanged", new="DRAINING")
    assert worker.exit_status() == 0
    told = [line.get("event") for line in worker.told]
    assert told.count("RequestServed") == told.count("RequestAdmitted") >= 1
    assert told[-1] == "WorkerDrained"
    assert coordinator.wait_event("WorkerStateChanged", new="LEFT")["reason"] == "reported"
    replacement = bench.worker(9, port, SERVICE_MEAN="0.05")  # for what the first would not take any more
    assert client.exit_status() == 0
    replacement.signal(signal.SIGTERM)
    assert replacement.exit_status() == 0


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(bench: Bench, second: int, status: int) -> None:
    _, (worker,), port = bench.fleet(1, SERVICE_MEAN="1000", LOG_LEVEL="debug")
    client = bench.start("client", COORDINATOR_PORT=port, DURATION="0.5", SERVICE_MEAN="1000")
    worker.wait_event("RequestAdmitted")
    worker.signal(signal.SIGTERM)
    worker.wait_for(lambda line: line["message"] == "stopping: SIGTERM")
    worker.signal(second)
    assert worker.exit_status() == status
    client.wait_for(lambda line: line["message"].endswith(" is up"))
    client.signal(signal.SIGINT)
    client.wait_for(lambda line: line["message"] == "stopping: SIGINT")
    client.signal(signal.SIGINT)
    assert client.exit_status() == 130


def test_a_drain_has_a_bound(bench: Bench) -> None:
    _, (worker,), port = bench.fleet(1, SERVICE_MEAN="1000", LOG_LEVEL="debug", DRAIN_TIMEOUT="0.2")
    client = bench.start("client", COORDINATOR_PORT=port, DURATION="0.5", SERVICE_MEAN="1000", DRAIN_TIMEOUT="0")
    worker.wait_event("RequestAdmitted")
    worker.signal(signal.SIGTERM)
    assert worker.exit_status() == 0
    client.signal(signal.SIGTERM)
    assert client.exit_status() == 1  # something was left undone
    assert closing(client)["in_flight"] > 0


def test_a_client_writes_its_requests_down(bench: Bench, tmp_path: Path) -> None:
    _, _, port = bench.fleet(1)
    path = tmp_path / "requests.csv"
    client = bench.start("client", COORDINATOR_PORT=port, DURATION="0.5", REQUESTS_CSV=str(path), VIRTUAL="0")
    assert client.exit_status() == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == closing(client)["completed"] > 0
    assert {(row["outcome"], row["worker_id"]) for row in rows} == {("completed", "worker-0")}
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_closed_loop_load_comes_from_a_process_too(bench: Bench, tmp_path: Path) -> None:
    """Three users at 50 ms a request and slots for all: each sends as soon as its last request has ended, and stops when the time is over."""
    _, _, port = bench.fleet(1)
    rows_path = tmp_path / "rows.csv"
    settings = {"RATE": "", "CONCURRENCY": "3", "DURATION": "2", "COORDINATOR_PORT": port, "REQUESTS_CSV": str(rows_path)}
    client = bench.start("client", **settings)
    assert client.exit_status() == 0
    with rows_path.open() as file:
        rows = list(csv.DictReader(file))
    by_user: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        arrival_s = float(row["arrival_s"])
        by_user.setdefault(row["request_id"].partition("-")[0], []).append((arrival_s, arrival_s + float(row["e2e_s"])))
    assert sorted(by_user) == ["u1", "u2", "u3"]
    for times in by_user.values():
        times.sort()
        assert len(times) >= 3
        assert all(begun_s >= ended_s - 1e-6 for (_, ended_s), (begun_s, _) in itertools.pairwise(times))


def test_a_client_gives_up_on_a_name_that_never_resolves(bench: Bench) -> None:
    code = "import entrypoint_client as e, sys; e.UNRESOLVED_S = 0.5; sys.exit(e.main([]))"
    client = bench.start("client", code=code, COORDINATOR_HOST="nowhere.invalid")
    assert client.exit_status() == 1
    figures = closing(client)
    assert figures["sent"] == 0
    assert figures["level"] == "error"
    assert figures["message"] == "no request was sent: COORDINATOR_HOST='nowhere.invalid' has no address"


def test_a_client_whose_requests_fail_says_so(bench: Bench) -> None:
    _, port = bench.coordinator()
    client = bench.start("client", COORDINATOR_PORT=port, DURATION="0.1", REQUEST_TIMEOUT="0.5")
    assert client.exit_status() == 1
    assert closing(client)["completed"] == 0


@pytest.mark.parametrize(
    ("role", "settings", "message"),
    [
        ("worker", {"WORKER_PORT": "http"}, r"worker: WORKER_PORT='http': must be a whole number.*"),
        ("worker", {"REPORT_INTERVAL": "-1"}, r"worker: REPORT_INTERVAL='-1': must be .*"),
        ("worker", {"HARDWARE": "abacus"}, r"worker: .*'abacus'.*"),
        ("worker", {"SERVICE": "magic"}, r"worker: .*'magic'.*"),
        ("worker", {"MODEL_CATALOG": "/nowhere/models.toml"}, r"worker: .*/nowhere/models\.toml.*"),
        ("worker", {"CLUSTER_KEY_FILE": "/nowhere/key"}, r"worker: .*/nowhere/key.*"),
        ("worker", {"LOG_LEVEL": "loud"}, r"worker: LOG_LEVEL='loud': must be one of debug, info, warning, error"),
        ("coordinator", {"POLICY": "wishful"}, r"coordinator: .*'wishful'.*"),
        ("coordinator", {"COORDINATOR_PORT": "70000"}, r"coordinator: COORDINATOR_PORT='70000': .*at most 65535.*"),
        ("coordinator", {"BIND_HOST": "203.0.113.7"}, r"coordinator: cannot listen on 203\.0\.113\.7:9000 \(COORDINATOR_PORT\): not an address .*"),
        ("client", {"TRACE": "/nowhere/trace.csv"}, r"client: .*/nowhere/trace\.csv.*"),
        ("client", {"DEPLOYMENT_MODE": "docker"}, r"client: CLUSTER_KEY_FILE is not set.*"),
        ("client", {"REQUESTS_CSV": "/nowhere/requests.csv"}, r"client: REQUESTS_CSV /nowhere/requests\.csv: cannot write: No such file or directory"),
        *(("client", {name: value}, rf"client: {name}='{value}': is for centralized_simulation\.py; .*") for name, value in
          {"RESULTS_JSON": "out", "REPORT_HTML": "out", "RECORD": "out", "FAULTS": "in", "FAIL_IF": "failed>0", "VIRTUAL": "1", "WIRE": "1",
           "SPEEDUP": "60"}.items()),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], role: str, settings: dict[str, str], message: str
) -> None:
    environ = {"HOME": str(tmp_path), **QUICK, **settings}
    monkeypatch.setattr(os, "environ", environ)
    assert importlib.import_module(f"entrypoint_{role}").main([]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert re.fullmatch(message, line), line
    assert out == ""


def trace_of(folder: Path, names: int) -> str:
    """A trace whose requests, a hundredth of a second apart, name as many models; the first of them twice."""
    path = folder / "trace.csv"
    rows = [f"{i / 100},10,5,name-{i % names}\n" for i in range(names + 1)]
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens,model\n" + "".join(rows))
    return str(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "names 9 models, but only 8 of the catalogue can be asked for; .* coordinator, workers and load generator the same larger MODELS, .*"),
        ({"MODELS": "5"}, "names 9 models, but only 5 of the catalogue can be asked for; .* the same larger MODELS, .*"),
        ({"MODEL_CATALOG": "two.toml"}, "names 9 models, but only 2 of the catalogue can be asked for; .* a larger MODEL_CATALOG"),
    ],
)
def test_a_fleet_with_fewer_models_than_the_trace_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: dict[str, str], message: str
) -> None:
    """The load generator must not ask for models that the fleet's catalogue does not have."""
    (tmp_path / "two.toml").write_text('[model."opt-6.7b"]\ncount = 2\n')
    monkeypatch.chdir(tmp_path)
    trace = trace_of(tmp_path, 9)
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), **QUICK, "TRACE": trace, **settings})
    assert importlib.import_module("entrypoint_client").main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"client: {re.escape(trace)}: {message}", line), line


def test_a_load_generator_says_what_the_models_of_its_trace_are(bench: Bench, tmp_path: Path) -> None:
    _, workers, port = bench.fleet(1)
    model_map = tmp_path / "map.toml"
    model_map.write_text('name-1 = "llama-3.1-8b"\n')
    client = bench.start("client", COORDINATOR_PORT=port, TRACE=trace_of(tmp_path, 2), MODEL_MAP=str(model_map), DURATION="")
    assert client.exit_status() == 0
    figures = closing(client)
    assert figures["completed"] == figures["sent"] == 3
    told = client.wait_event("TraceModels")["trace_models"]
    assert told == [{"name": "name-0", "model": "opt-6.7b", "requests": 2}, {"name": "name-1", "model": "llama-3.1-8b", "requests": 1}]
    (warning,) = [line["message"] for line in client.told if line["level"] == "warning"]
    assert "model names not in the catalogue: 1 of 2" in warning
    workers[0].signal(signal.SIGTERM)


def test_a_port_in_use_is_one_clear_line(bench: Bench) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken, socket.socket() as taken_tcp:
        taken.bind(("127.0.0.1", 0))
        taken_tcp.bind(("127.0.0.1", 0))
        taken_tcp.listen()
        udp, tcp = str(taken.getsockname()[1]), str(taken_tcp.getsockname()[1])
        for role, settings, message in (
            ("coordinator", {"COORDINATOR_PORT": udp}, f"coordinator: cannot listen on 127.0.0.1:{udp} (COORDINATOR_PORT): the port is in use"),
            ("worker", {"WORKER_PORT": udp}, f"worker: cannot listen on 127.0.0.1:{udp} (WORKER_PORT): the port is in use"),
            ("worker", {"WORKER_PORT": "0", "HEALTH_PORT": tcp}, f"worker: cannot listen on 127.0.0.1:{tcp} over TCP (HEALTH_PORT): the port is in use"),
        ):
            process = bench.start(role, **settings)
            assert process.exit_status() == 2
            assert process.process.stderr is not None
            assert process.process.stderr.read() == message + "\n"


@pytest.mark.parametrize("role", ["coordinator", "worker", "client"])
def test_help_version_and_configuration(bench: Bench, role: str) -> None:
    shown = bench.start(role, "--help")
    assert shown.exit_status() == 0
    text = "\n".join(shown.lines)
    own = {"coordinator": "POLICY", "worker": "DRAIN_TIMEOUT", "client": "RATE"}[role]
    for variable in ("COORDINATOR_HOST", "CLUSTER_KEY_FILE", "LOG_FORMAT", "HEALTH_PORT", own):
        assert variable in text
    version = bench.start(role, "--version")
    assert version.exit_status() == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.lines[0])
    configuration = bench.start(role, "--print-config", COORDINATOR_HOST="somewhere")
    assert configuration.exit_status() == 0
    assert "COORDINATOR_HOST=somewhere" in configuration.lines
    wrong = bench.start(role, "--helthcheck")
    assert wrong.exit_status() == 2
    assert wrong.process.stderr is not None
    assert len(wrong.process.stderr.read().splitlines()) == 1
    assert not list(bench.home.rglob("*.key"))  # none of this makes a key


OLD_KEY, NEW_KEY = hashlib.sha256(b"old").hexdigest(), hashlib.sha256(b"new").hexdigest()
LOOKS_OFTEN = "import sllm.deploy.shell as s, sys; s.KEYS_S = 0.05; import entrypoint_coordinator as e; sys.exit(e.main([]))"


def test_a_key_made_on_first_use_has_not_changed(bench: Bench) -> None:
    process = bench.start("coordinator", code=LOOKS_OFTEN, COORDINATOR_PORT="0")
    process.wait_event("CoordinatorReady")  # after a report interval: four looks
    process.signal(signal.SIGTERM)
    assert process.exit_status() == 0
    assert (bench.home / ".cache/sllm/cluster.key").exists()
    assert not any("keys" in line for line in process.told)


def test_keys_are_taken_over_without_a_restart(bench: Bench, tmp_path: Path) -> None:
    key = tmp_path / "cluster.key"
    key.write_text("1 " + OLD_KEY + "\n")
    key.chmod(0o600)
    process = bench.start("coordinator", code=LOOKS_OFTEN, COORDINATOR_PORT="0", CLUSTER_KEY_FILE=str(key))
    process.up()
    broken = tmp_path / "new.key"
    broken.write_text("nonsense\n")
    broken.chmod(0o600)
    os.utime(broken, ns=(1, 1))
    broken.replace(key)
    process.wait_for(lambda line: line["level"] == "error" and "the keys in use stay" in line["message"])
    good = tmp_path / "good.key"
    good.write_text("2 " + NEW_KEY + "\n1 " + OLD_KEY + "\n")
    good.chmod(0o600)
    os.utime(good, ns=(2, 2))
    good.replace(key)
    taken = process.wait_for(lambda line: line["message"] == "the cluster's keys have changed and were taken over")
    assert taken["keys"] == {"signs": 2, "accepted": [1, 2]}
    assert not any(NEW_KEY in line or OLD_KEY in line for line in process.lines)
    process.signal(signal.SIGTERM)
    assert process.exit_status() == 0


def test_an_exception_in_a_role_is_logged_with_its_stack_and_ends_nobody(bench: Bench) -> None:
    code = (
        "import entrypoint_coordinator, sys\n"
        "from sllm.routing.router import Router\n"
        "place, calls = Router.place, []\n"
        "def broken(self, request, now):\n"
        "    calls.append(now)\n"
        "    return place(self, request, now) if len(calls) > 3 else 1 // 0\n"
        "Router.place = broken\n"
        "sys.exit(entrypoint_coordinator.main([]))\n"
    )
    coordinator = bench.start("coordinator", code=code, COORDINATOR_PORT="0")
    port = coordinator.up()["udp"].rpartition(":")[2]
    bench.worker(0, port)
    coordinator.wait_event("WorkerStateChanged", worker_id="worker-0", new="READY")
    client = bench.start("client", COORDINATOR_PORT=port, DURATION="1", RATE="20")
    assert client.exit_status() == 0
    (told,) = [line for line in coordinator.told if line.get("event") == "InternalErrorCaught"]
    assert told["level"] == "error"
    assert "ZeroDivisionError" in told["message"]
    assert "in broken" in told["trace"]
    coordinator.signal(signal.SIGTERM)
    assert coordinator.exit_status() == 0


def key_file(folder: Path, key: str, name: str = "cluster.key") -> Path:
    path = folder / name
    path.write_text(f"1 {key}\n")
    path.chmod(0o600)
    return path


def test_a_key_file_that_is_gone_or_open_to_others_is_told_and_taken_again_when_mended(bench: Bench, tmp_path: Path) -> None:
    key = key_file(tmp_path, OLD_KEY)
    process = bench.start("coordinator", code=LOOKS_OFTEN, COORDINATOR_PORT="0", CLUSTER_KEY_FILE=str(key))
    process.up()
    away = key.rename(tmp_path / "away")
    process.wait_for(lambda line: line["level"] == "error" and line["message"] == f"cluster key {key}: is gone; the keys in use stay")
    away.rename(key)
    process.wait_for(lambda line: "can be read again, and has the same keys" in line["message"])
    new = tmp_path / "new.key"
    new.write_text(f"2 {NEW_KEY}\n1 {OLD_KEY}\n")
    new.chmod(0o644)
    new.replace(key)
    process.wait_for(lambda line: line["level"] == "error" and "others may read it; chmod 600" in line["message"])
    times = key.stat()
    key.chmod(0o600)  # the time of the content stays as it was
    assert key.stat().st_mtime_ns == times.st_mtime_ns
    taken = process.wait_for(lambda line: line["message"] == "the cluster's keys have changed and were taken over")
    assert taken["keys"] == {"signs": 2, "accepted": [1, 2]}
    process.signal(signal.SIGTERM)
    assert process.exit_status() == 0
    assert [line["level"] for line in process.told].count("error") == 2, "each trouble is told once, however often it is looked at"


def test_a_wrong_key_is_said_by_both_sides_and_nobody_is_ready(bench: Bench, tmp_path: Path) -> None:
    right, wrong = key_file(tmp_path, OLD_KEY), key_file(tmp_path, NEW_KEY, "wrong.key")
    coordinator, port = bench.coordinator(CLUSTER_KEY_FILE=str(right))
    looks_often = LOOKS_OFTEN.replace("entrypoint_coordinator", "entrypoint_worker")
    settings = {"COORDINATOR_PORT": port, "CLUSTER_KEY_FILE": str(wrong), "COORDINATOR_SILENT": "0.6"}
    worker = bench.start("worker", code=looks_often, WORKER_PORT="0", WORKER_ID="worker-0", HEALTH_PORT=str(free_port()), **settings)
    client = bench.start("client", HEALTH_PORT=str(free_port()), DURATION="0", **settings)
    refused = coordinator.wait_event("DatagramsRefused")
    assert (refused["level"], refused["source"], refused["reason"]) == ("warning", "127.0.0.1", "tag")
    assert refused["message"].startswith("datagrams from 127.0.0.1 are refused: they are signed with another key than ours of that number")
    silent = worker.wait_event("CoordinatorSilent")
    assert silent["level"] == "warning"
    assert silent["message"].startswith(f"the coordinator 127.0.0.1:{port} has never answered for ")
    for cause in ("COORDINATOR_HOST", f"firewall let UDP port {port} through", "the same cluster key"):
        assert cause in silent["message"]
    client.wait_event("CoordinatorSilent")
    status, why = get(worker.up()["http"] + "/readyz")
    assert (status, why) == (503, f"the coordinator at 127.0.0.1:{port} has not acknowledged a report yet\n")
    status, why = get(client.up()["http"] + "/readyz")
    assert (status, why) == (503, f"the coordinator at 127.0.0.1:{port} has not answered yet\n")
    assert json.loads(get(worker.up()["http"] + "/state")[1])["ready"] is False
    key_file(tmp_path, OLD_KEY, "wrong.key")
    coordinator.wait_event("WorkerStateChanged", new="READY")
    for process in (worker, client):
        base = process.up()["http"]
        for _ in range(6000):
            if get(base + "/readyz")[0] == 200:
                break
            time.sleep(0.01)
        assert get(base + "/readyz")[0] == 200
    assert [line.get("event") for line in coordinator.told].count("DatagramsRefused") == 1
    client.signal(signal.SIGTERM)
    client.exit_status()


@pytest.mark.parametrize("role", ["coordinator", "worker", "client"])
def test_a_misspelt_variable_is_one_line(bench: Bench, role: str) -> None:
    process = bench.start(role, COORDINATOR_PORT="0" if role == "coordinator" else "9", WORKER_PORT="0", WORKER_TIMOUT="3", WORKER_SERVICE_HOST="10.0.0.1")
    line = process.wait_event("UnknownVariables")
    assert line["level"] == "warning"
    assert line["message"] == "ignored, as no variables of ours: WORKER_TIMOUT (is WORKER_TIMEOUT meant?)"


def test_the_configuration_line_is_what_was_changed_for_this_role(bench: Bench) -> None:
    process = bench.start("coordinator", COORDINATOR_PORT="0", WORKER_TIMEOUT="7", DRAIN_TIMEOUT="5", RATE="3", LOG_LEVEL="debug")
    line = process.wait_for(lambda line: line["message"] == "configuration")
    told = {name: line[name] for name in line if name.isupper()}
    assert told == {
        "COORDINATOR_PORT": 0, "WORKER_TIMEOUT": 7.0, "LOG_LEVEL": "debug", "LOG_FORMAT": "json", "REPORT_INTERVAL": 0.2, "COORDINATOR_SILENT": 1.0,
        "ENGINE": "queue", "SERVICE_MEAN": 0.05,
    }  # fmt: skip
    everything = process.wait_for(lambda line: line["message"] == "configuration, all of it")
    assert everything["level"] == "debug"
    assert everything["RATE"] == 3.0
    assert everything.keys() > {field.metadata["env"] for field in dataclasses.fields(Config)}


def test_an_untouched_configuration_says_nothing(tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-u", str(ROOT / "entrypoint_worker.py")], env=environ, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[2] == "configuration":
                break
        process.kill()
    assert re.fullmatch(r"\S+ info +configuration role=worker version=\S+\n", line)


def test_a_worker_without_file_descriptors_goes_on_with_what_it_has(bench: Bench) -> None:
    code = """
import sys
import entrypoint_worker
from sllm.protocol.errors import UsageError
from sllm.live import udp
real = udp.bound_socket
opened = []
def bound_socket(*arguments):
    opened.append(arguments)
    if len(opened) == 3:
        raise UsageError("no file descriptor left")
    return real(*arguments)
udp.bound_socket = bound_socket
sys.exit(entrypoint_worker.main([]))
"""
    worker = bench.start("worker", code=code, WORKER_PORT="0", COORDINATOR_PORT="9", COORDINATOR_SILENT="0.2")
    worker.wait_for(lambda line: line["message"] == "no file descriptor left; the old socket stays")
    worker.signal(signal.SIGTERM)
    assert worker.exit_status() == 0


def test_a_log_that_nobody_reads_stops_nothing(bench: Bench) -> None:
    """The pipe of the log is full; the process lives, answers, and ends when told to."""
    http = free_port()
    environ = {"PATH": os.environ["PATH"], "HOME": str(bench.home), **QUICK, "COORDINATOR_PORT": "0", "HEALTH_PORT": str(http), "LOG_LEVEL": "debug"}
    process = subprocess.Popen([sys.executable, str(ROOT / "entrypoint_coordinator.py")], env=environ, stdout=subprocess.PIPE)
    with process:
        try:
            for _ in range(6000):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", http), timeout=10):
                    break
                time.sleep(0.01)
            for number in range(500):  # of 300 characters each: more than a pipe holds
                assert get(f"http://127.0.0.1:{http}/livez?{number}{'x' * 300}")[0] == 200
            assert "sllm_log_lines_dropped_total 0" in get(f"http://127.0.0.1:{http}/metrics")[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
