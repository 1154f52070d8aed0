"""The Compose fleet on a real Docker engine. The tests go through one fleet's life in the order they are written in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from deployments import (
    LOAD,
    REPORT_INTERVAL_S,
    ROOT,
    ROTATION,
    STEADY,
    STOP,
    WORKLOAD,
    Fleet,
    Outcome,
    json_lines,
    keys_taken_over,
    local_run,
    run,
    wait_for,
    works,
)  # fmt: skip

WORKERS = ("worker-1", "worker-2", "worker-3")
SERVICES = ("central-coordinator", *WORKERS)
IMAGES = ("sllm-coordinator:latest", "sllm-worker:latest")

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(not (works("docker", "info") and works("docker", "compose", "version")), reason="no Docker engine with Compose v2 answers"),
]


class Compose:
    """A Compose project of our own: its own name, network and port, beside whatever else runs here."""

    def __init__(self) -> None:
        self.project = f"sllm-e2e-{os.getpid()}"
        self.generator = f"{self.project}-load"
        self.env = {"HTTP_PORT": "0", "SUBNET": f"172.29.{os.getpid() % 256}.0/24", "LOG_FORMAT": "json", "LOG_LEVEL": "info"}

    def command(self, *arguments: str) -> list[str]:
        return ["docker", "compose", "--project-name", self.project, *arguments]

    def run(self, *arguments: str, timeout_s: float = 180.0) -> str:
        return run(*self.command(*arguments), env=self.env, timeout_s=timeout_s).stdout

    def container(self, service: str) -> str:
        return self.run("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("docker", "inspect", self.container(service)).stdout)[0]
        return found

    def logs(self, service: str) -> str:
        done = run("docker", "logs", self.container(service))
        assert done.stderr == "", "logs go to stdout only"
        return done.stdout

    def get(self, path: str) -> str:
        """From the coordinator's HTTP side."""
        address = self.run("port", "central-coordinator", "8080").strip()
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def fleet(self) -> Fleet:
        return Fleet(json.loads(self.get("/state?limit=1000")))

    def all_ready(self) -> Fleet:
        def probe() -> Fleet | None:
            fleet = self.fleet()
            return fleet if fleet.state["ready"] and fleet.ready == set(WORKERS) else None

        return wait_for("three ready workers", probe)

    @contextlib.contextmanager
    def load(self, folder: Path, variables: Mapping[str, str] = LOAD) -> Iterator[Path]:
        """A load generator at work; leaves once it has ended well. Gives the file of its log."""
        options = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
        log = folder / "load.jsonl"
        with log.open("w") as file:
            process = subprocess.Popen(
                self.command("--progress", "quiet", "run", "--rm", "--no-deps", "-T", "--name", self.generator, *options, "load-generator"),
                cwd=ROOT, env={**os.environ, **self.env}, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            try:
                yield log
                _, errors = process.communicate(timeout=120)
                assert process.returncode == 0, log.read_text()[-3000:] + errors
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    run("make", "build-docker", timeout_s=300)
    project = Compose()
    try:
        yield project
    finally:
        run(*project.command("--profile", "load", "down", "--volumes", "--timeout", "5"), env=project.env, check=False)


def test_up_is_healthy_within_half_a_minute(compose: Compose) -> None:
    begin = time.monotonic()
    compose.run("up", "--detach")
    for service in SERVICES:
        wait_for(f"{service} to be healthy", lambda service=service: compose.inspect(service)["State"]["Health"]["Status"] == "healthy")
    took_s = time.monotonic() - begin
    assert took_s < 30.0
    assert compose.inspect("cluster-key")["State"]["ExitCode"] == 0
    fleet = compose.all_ready()
    assert {name: worker["models"] != [] for name, worker in fleet.workers.items()} == dict.fromkeys(WORKERS, True), "each loads models by itself"


def test_containers_are_locked_up(compose: Compose) -> None:
    for service in SERVICES:
        host = compose.inspect(service)["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["Memory"] > 0
        assert host["NanoCpus"] > 0
        script = "import os; print(os.getuid(), os.getgid()); open('/app/x', 'w')"
        done = run("docker", "exec", compose.container(service), "python3", "-c", script, check=False)
        assert done.stdout.split() == ["1000", "1000"]
        assert "Read-only file system" in done.stderr
        key = run("docker", "exec", compose.container(service), "sh", "-c", "stat -c '%a %u' /keys/cluster.key; touch /keys/x", check=False)
        assert key.stdout.split() == ["600", "1000"]
        assert "Read-only file system" in key.stderr


@pytest.mark.parametrize("image", IMAGES)
def test_images(compose: Compose, image: str) -> None:
    config = json.loads(run("docker", "image", "inspect", image).stdout)[0]["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"][:2] == ["python3", "-u"]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    labels = {name.removeprefix("org.opencontainers.image.") for name in config["Labels"] if name.startswith("org.opencontainers.image.")}
    assert {"title", "description", "version", "revision", "licenses"} <= labels
    search = "for tool in gcc cc make pip pip3 git curl; do command -v $tool; done; python3 -m pip"
    tools = run("docker", "run", "--rm", "--entrypoint", "sh", image, "-c", search, check=False)
    assert tools.stdout == ""
    assert "No module named pip" in tools.stderr
    assert run("docker", "run", "--rm", "--read-only", "--network=none", image, "--version").stdout.strip()


def test_a_wrong_variable_is_one_line(compose: Compose) -> None:
    done = run("docker", "run", "--rm", "-e", "HEALTH_PORT=many", "sllm-worker:latest", check=False)
    assert done.returncode == 2
    assert "HEALTH_PORT='many'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_container_without_a_key_says_so(compose: Compose) -> None:
    done = run("docker", "run", "--rm", "sllm-worker:latest", check=False)
    assert done.returncode == 2
    assert "CLUSTER_KEY_FILE" in done.stderr


def test_same_requests_as_on_this_machine(compose: Compose, tmp_path: Path) -> None:
    with compose.load(tmp_path, WORKLOAD) as log:
        pass
    there = Outcome.of(log.read_text())
    there.assert_nothing_lost()
    here = local_run(tmp_path)
    here.assert_nothing_lost()
    assert there.completed == here.completed


def test_killing_a_worker_loses_nothing(compose: Compose, tmp_path: Path) -> None:
    before = compose.all_ready().workers["worker-2"]["incarnation"]
    with compose.load(tmp_path) as log:
        wait_for("worker-2 to be busy", lambda: compose.fleet().workers["worker-2"]["running"] > 0)
        compose.run("kill", "worker-2")
        wait_for("the coordinator to notice", lambda: compose.fleet().workers["worker-2"]["state"] == "DEAD", 30.0)
    outcome = Outcome.of(log.read_text())
    outcome.assert_nothing_lost()
    assert any(line.get("event") == "RequestRetried" for line in outcome.lines), "its requests went elsewhere"
    compose.run("up", "--detach", "--no-deps", "worker-2")
    assert compose.all_ready().workers["worker-2"]["incarnation"] > before


def when(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()


def test_restarting_the_coordinator_loses_nothing(compose: Compose, tmp_path: Path) -> None:
    before = compose.all_ready().state["incarnation"]
    with compose.load(tmp_path) as log:
        wait_for("load", lambda: compose.fleet().state["summary"]["running"] > 0)
        compose.run("restart", "central-coordinator")
        assert compose.all_ready().state["incarnation"] > before
    Outcome.of(log.read_text()).assert_nothing_lost()
    lines = json_lines(compose.logs("central-coordinator"))
    begin = max(when(line) for line in lines if line["message"] == "coordinator is up")
    heard = {line["worker_id"]: when(line) for line in lines if line.get("event") == "WorkerStateChanged" and line["new"] == "READY" and when(line) >= begin}
    assert heard.keys() == set(WORKERS)
    assert max(heard.values()) - begin <= 2 * REPORT_INTERVAL_S


def test_stopping_a_worker_finishes_what_it_runs(compose: Compose, tmp_path: Path) -> None:
    compose.all_ready()
    with compose.load(tmp_path) as log:
        wait_for("worker-3 to be busy", lambda: compose.fleet().workers["worker-3"]["running"] > 0)
        compose.run("stop", "worker-3")
    Outcome.of(log.read_text()).assert_nothing_lost()
    assert compose.inspect("worker-3")["State"]["ExitCode"] == 0
    events = [line.get("event") for line in json_lines(compose.logs("worker-3"))]
    assert "WorkerDrained" in events
    states = [line["new"] for line in json_lines(compose.logs("central-coordinator")) if line.get("worker_id") == "worker-3" and "new" in line]
    assert "DRAINING" in states


def test_a_new_key_under_load_loses_nothing(compose: Compose, tmp_path: Path) -> None:
    """The steps of the deployment guide. Nobody may hear a word he does not believe on the way."""
    compose.run("up", "--detach")
    compose.all_ready()
    with compose.load(tmp_path, STEADY) as log:
        wait_for("load", lambda: compose.fleet().state["summary"]["running"] > 0)
        for step, keys in ROTATION:
            compose.run("run", "--rm", "--no-deps", "--entrypoint", f"python3 -m sllm.runtime.keys /keys/cluster.key {step}", "cluster-key")
            for service in SERVICES:
                wait_for(f"{service} to have keys {keys}", lambda service=service, keys=keys: keys_taken_over(compose.logs(service)) == keys)
            wait_for(f"the load generator to have keys {keys}", lambda keys=keys: keys_taken_over(log.read_text()) == keys)
        run("docker", "exec", compose.generator, *STOP)
    Outcome.of(log.read_text()).assert_nothing_lost()
    state = compose.fleet().state
    assert state["keys"] == ROTATION[-1][1]
    assert state["datagrams"]["rejected"] == {}
    assert compose.fleet().ready == set(WORKERS)


def test_metrics_are_there(compose: Compose) -> None:
    text = compose.get("/metrics")
    assert "# TYPE sllm_requests_routed_total counter" in text
    assert 'sllm_workers{state="READY"}' in text
    assert "<html" in compose.get("/")


def test_stop_ends_all_well(compose: Compose) -> None:
    compose.run("up", "--detach")
    compose.all_ready()
    begin = time.monotonic()
    compose.run("stop")
    took_s = time.monotonic() - begin
    codes = {service: compose.inspect(service)["State"]["ExitCode"] for service in SERVICES}
    assert codes == dict.fromkeys(SERVICES, 0)
    assert took_s < 10.0, "nothing was running: nobody waits for the grace period"
    for service in SERVICES:
        assert json_lines(compose.logs(service))
    assert compose.logs("cluster-key") == ""


def test_it_comes_back_with_the_same_key(compose: Compose) -> None:
    """The volume is kept; the one-shot service leaves the key that is there alone."""
    compose.run("up", "--detach")
    compose.all_ready()


def test_compose_as_one_word_and_the_defaults() -> None:
    if not works("docker-compose", "version"):
        pytest.skip("there is no docker-compose command")
    clean = dict.fromkeys(("SUBNET", "HTTP_PORT", "LOG_FORMAT"), "")
    config = json.loads(run("docker-compose", "config", "--format", "json", env=clean).stdout)
    assert config["networks"]["fleet"]["ipam"]["config"][0]["subnet"] == "172.28.0.0/16"
    assert config["services"].keys() == {"cluster-key", *SERVICES}, "the load generator waits under its profile"
    assert config["services"]["central-coordinator"]["ports"][0]["published"] == "8080"
