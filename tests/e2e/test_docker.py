"""The Compose fleet on a real Docker engine. The tests go through one fleet's life in the order they are written in."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import partial
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
    has_keys,
    json_lines,
    local_run,
    run,
    wait_for,
    when,
    works,
)  # fmt: skip

WORKERS = 3  # containers of the service `worker`, unless scaled
IMAGES = ("sllm-coordinator:latest", "sllm-worker:latest")

pytestmark = [
    pytest.mark.docker,
    pytest.mark.skipif(not (works("docker", "info") and works("docker", "compose", "version")), reason="start a Docker engine with Compose v2"),
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

    @property
    def coordinator(self) -> str:
        """Its container's name."""
        return f"{self.project}-central-coordinator"

    def workers(self) -> dict[str, str]:
        """Their containers by their ids: a worker is named after its container's host name."""
        containers = self.run("ps", "--all", "--quiet", "worker").split()
        return {self.inspect(container)["Config"]["Hostname"]: container for container in containers}

    def roles(self) -> list[str]:
        """The containers of the coordinator and of all workers."""
        return [self.coordinator, *self.workers().values()]

    def is_healthy(self, container: str) -> bool:
        return bool(self.inspect(container)["State"]["Health"]["Status"] == "healthy")

    def key_digests(self) -> set[str]:
        """SHA-256 of the key file, as each role sees it."""
        return {run("docker", "exec", container, "sha256sum", "/keys/cluster.key").stdout.split()[0] for container in self.roles()}

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(run("docker", "inspect", container).stdout)[0]
        return found

    def logs(self, container: str) -> str:
        done = run("docker", "logs", container)
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

    def all_ready(self, count: int = WORKERS) -> Fleet:
        """Wait until as many containers are there, and exactly these are ready, as the coordinator sees it."""

        def probe() -> Fleet | None:
            fleet, workers = self.fleet(), self.workers().keys()
            return fleet if fleet.state["ready"] and len(workers) == count and fleet.ready == set(workers) else None

        return wait_for(f"{count} ready workers", probe)

    def a_busy_worker(self) -> str:
        """The id of one that serves something."""

        def probe() -> str:
            return next(name for name, worker in self.fleet().workers.items() if worker["state"] == "READY" and worker["running"] > 0)

        return wait_for("a busy worker", probe)

    def make(self, *arguments: str, env: Mapping[str, str] | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A target of the Makefile, on this project."""
        return run("make", *arguments, env={**self.env, **(env or {}), "COMPOSE_PROJECT_NAME": self.project}, check=check, timeout_s=240.0)

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
    for container in compose.roles():
        wait_for(f"{container} to be healthy", partial(compose.is_healthy, container))
    took_s = time.monotonic() - begin
    assert took_s < 30.0
    assert compose.inspect(compose.run("ps", "--all", "--quiet", "cluster-key").strip())["State"]["ExitCode"] == 0
    fleet = compose.all_ready()
    assert all(worker["models"] for worker in fleet.workers.values()), "each loads models by itself"


def test_containers_are_locked_up(compose: Compose) -> None:
    for container in compose.roles():
        host = compose.inspect(container)["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
        assert host["Memory"] > 0
        assert host["NanoCpus"] > 0
        assert 0 < host["PidsLimit"] <= 128
        script = "import os; print(os.getuid(), os.getgid()); open('/app/x', 'w')"
        done = run("docker", "exec", container, "python3", "-c", script, check=False)
        assert done.stdout.split() == ["1000", "1000"]
        assert "Read-only file system" in done.stderr
        key = run("docker", "exec", container, "sh", "-c", "stat -c '%a %u' /keys/cluster.key; touch /keys/x", check=False)
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
    before = compose.all_ready().workers
    with compose.load(tmp_path, {**LOAD, "RATE": "10"}) as log:
        victim = compose.a_busy_worker()
        run("docker", "kill", compose.workers()[victim])
        killed_at = time.time()
        wait_for("the coordinator to notice", lambda: compose.fleet().workers[victim]["state"] == "DEAD", 30.0)
    outcome = Outcome.of(log.read_text())
    outcome.assert_nothing_lost()
    outcome.assert_placed_again_soon(victim, killed_at)
    compose.run("up", "--detach", "--no-deps", "worker")
    assert compose.all_ready().workers[victim]["incarnation"] > before[victim]["incarnation"]


def test_restarting_the_coordinator_loses_nothing(compose: Compose, tmp_path: Path) -> None:
    before = compose.all_ready().state["incarnation"]
    with compose.load(tmp_path) as log:
        wait_for("load", lambda: compose.fleet().state["summary"]["running"] > 0)
        compose.run("restart", "central-coordinator")
        assert compose.all_ready().state["incarnation"] > before
    Outcome.of(log.read_text()).assert_nothing_lost()
    lines = json_lines(compose.logs(compose.coordinator))
    begin = max(when(line) for line in lines if line["message"] == "coordinator is up")
    heard = {line["worker_id"]: when(line) for line in lines if line.get("event") == "WorkerStateChanged" and line["new"] == "READY" and when(line) >= begin}
    assert heard.keys() == compose.workers().keys()
    assert max(heard.values()) - begin <= 2 * REPORT_INTERVAL_S


def test_stopping_a_worker_finishes_what_it_runs(compose: Compose, tmp_path: Path) -> None:
    compose.all_ready()
    with compose.load(tmp_path) as log:
        name = compose.a_busy_worker()
        container = compose.workers()[name]
        run("docker", "stop", "--time", "45", container)
    Outcome.of(log.read_text()).assert_nothing_lost()
    assert compose.inspect(container)["State"]["ExitCode"] == 0
    events = [line.get("event") for line in json_lines(compose.logs(container))]
    assert "WorkerDrained" in events
    states = [line["new"] for line in json_lines(compose.logs(compose.coordinator)) if line.get("worker_id") == name and "new" in line]
    assert "DRAINING" in states
    compose.run("up", "--detach", "--no-deps", "worker")


def test_scaling_up_and_down_under_load(compose: Compose, tmp_path: Path) -> None:
    """Each container is a worker of its own; those that go drain, and leave nothing behind."""
    compose.all_ready()
    with compose.load(tmp_path) as log:
        compose.make("scale-docker", "REPLICAS=6")
        six = compose.all_ready(6).workers
        wait_for("load", lambda: compose.fleet().state["summary"]["running"] > 0)
        compose.make("scale-docker", f"REPLICAS={WORKERS}")
    Outcome.of(log.read_text()).assert_nothing_lost()
    compose.all_ready()
    gone = six.keys() - compose.workers().keys()
    lines = json_lines(compose.logs(compose.coordinator))
    for name in gone:
        states = [line["new"] for line in lines if line.get("worker_id") == name and "new" in line]
        assert "DRAINING" in states, f"{name} left in order: {states}"
        assert "SUSPECT" not in states, f"{name} said goodbye: {states}"


def test_a_load_generator_is_told_every_setting(compose: Compose) -> None:
    """MODELS reaches it from the environment, and it says which it has."""
    done = compose.make("load-docker", "DURATION=1", "RATE=2", env={"MODELS": "1", "ZIPF": "0"})
    told = next(line for line in json_lines("\n".join(line for line in done.stdout.splitlines() if line.startswith("{"))) if line["message"] == "configuration")
    assert (told["MODELS"], told["ZIPF"], told["RATE"], told["DURATION"]) == (1, 0.0, 2.0, 1.0)


def test_a_fleet_that_does_not_come_up_says_why(compose: Compose) -> None:
    try:
        done = compose.make("run-docker", env={"SUSPECT_INTERVALS": "none"}, check=False)
        assert done.returncode != 0
        assert f"make run-docker: {compose.coordinator}: " in done.stderr
        assert "SUSPECT_INTERVALS='none': must be a number" in done.stderr
    finally:
        compose.run("up", "--detach")
    compose.all_ready()


def test_there_cannot_be_two_coordinators(compose: Compose) -> None:
    compose.run("up", "--detach")
    done = run(*compose.command("up", "--detach", "--scale", "central-coordinator=2"), env=compose.env, check=False)
    assert done.returncode != 0 or "unique name" in done.stderr
    assert len(compose.run("ps", "--quiet", "central-coordinator").split()) == 1
    compose.all_ready()


def test_a_new_key_under_load_loses_nothing(compose: Compose, tmp_path: Path) -> None:
    """The steps of the deployment guide. Nobody may hear a word he does not believe on the way."""
    compose.run("up", "--detach")
    compose.all_ready()
    with compose.load(tmp_path, STEADY) as log:
        wait_for("load", lambda: compose.fleet().state["summary"]["running"] > 0)
        for step, keys in ROTATION:
            compose.run("run", "--rm", "--no-deps", "--entrypoint", f"python3 -m sllm.deploy.keys /keys/cluster.key {step}", "cluster-key")
            for container in compose.roles():
                wait_for(f"{container} to have keys {keys}", partial(has_keys, partial(compose.logs, container), keys))
            wait_for(f"the load generator to have keys {keys}", partial(has_keys, log.read_text, keys))
        run("docker", "exec", compose.generator, *STOP)
    Outcome.of(log.read_text()).assert_nothing_lost()
    state = compose.fleet().state
    assert state["keys"] == ROTATION[-1][1]
    assert state["datagrams"]["rejected"] == {}
    assert compose.fleet().ready == set(compose.workers())


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
    codes = {container: compose.inspect(container)["State"]["ExitCode"] for container in compose.roles()}
    assert codes == dict.fromkeys(compose.roles(), 0)
    assert took_s < 10.0, "nothing was running: nobody waits for the grace period"
    for container in compose.roles():
        assert json_lines(compose.logs(container))
    assert compose.run("logs", "cluster-key") == ""


def test_it_comes_back_with_the_same_key(compose: Compose) -> None:
    """The volume is kept; the one-shot service leaves the key that is there alone."""
    compose.run("up", "--detach")
    compose.all_ready()
    (before,) = compose.key_digests()
    compose.run("down", "--timeout", "45")
    assert compose.workers() == {}, "new containers come up next"
    compose.run("up", "--detach")
    compose.all_ready()
    assert compose.key_digests() == {before}


def test_compose_as_one_word_and_the_defaults() -> None:
    if not works("docker-compose", "version"):
        pytest.skip("install docker-compose (Debian: apt-get install docker-compose)")
    clean = dict.fromkeys(("SUBNET", "HTTP_PORT", "LOG_FORMAT"), "")
    config = json.loads(run("docker-compose", "config", "--format", "json", env=clean).stdout)
    assert config["networks"]["fleet"]["ipam"]["config"][0]["subnet"] == "172.28.0.0/16"
    assert config["services"].keys() == {"cluster-key", "central-coordinator", "worker"}, "the load generator waits under its profile"
    assert config["services"]["central-coordinator"]["ports"][0]["published"] == "8080"
