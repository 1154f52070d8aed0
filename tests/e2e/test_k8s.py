"""The manifests on a real Kubernetes cluster. The tests go through one fleet's life in the order they are written in."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments import LOAD, ROOT, ROTATION, STEADY, STOP, WORKLOAD, Fleet, Outcome, json_lines, keys_taken_over, local_run, run, wait_for, works

NAMESPACE = "sllm-system"

pytestmark = [
    pytest.mark.k8s,
    pytest.mark.skipif(not works("kubectl", "get", "--raw", "/readyz"), reason="no Kubernetes cluster answers kubectl"),
]


def kubectl(*arguments: str, timeout_s: float = 180.0) -> str:
    return run("kubectl", "--namespace", NAMESPACE, *arguments, timeout_s=timeout_s).stdout


def get(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(kubectl("get", *arguments, "--output", "json"))
    return found


def pods(name: str) -> dict[str, dict[str, Any]]:
    """The pods of an app that are not on their way out, by name."""
    found = get("pods", "--selector", f"app.kubernetes.io/name={name}")["items"]
    return {pod["metadata"]["name"]: pod for pod in found if "deletionTimestamp" not in pod["metadata"]}


def is_ready(pod: dict[str, Any]) -> bool:
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in pod["status"].get("conditions", ()))


def fleet() -> Fleet:
    """What the coordinator says, by way of its Service."""
    path = f"/api/v1/namespaces/{NAMESPACE}/services/central-coordinator:http/proxy/state?limit=1000"
    return Fleet(json.loads(run("kubectl", "get", "--raw", path, timeout_s=20).stdout))


def ready_fleet(count: int, timeout_s: float = 90.0) -> Fleet:
    """Wait until exactly worker-0 ... worker-(count - 1) are ready, as the coordinator sees it."""
    names = {f"worker-{number}" for number in range(count)}

    def probe() -> Fleet | None:
        now = fleet()
        return now if now.state["ready"] and now.ready == names else None

    return wait_for(f"{count} ready workers", probe, timeout_s)


class Load:
    """A load generator's Job under way."""

    def __init__(self, name: str) -> None:
        self.name = name

    def log(self) -> str:
        return kubectl("logs", f"job/{self.name}")

    def outcome(self) -> Outcome:
        def probe() -> bool:
            status = get("job", self.name)["status"]
            assert not status.get("failed"), self.log()[-3000:]
            return bool(status.get("succeeded"))

        wait_for("the load generator to end", probe, 150.0)
        return Outcome.of(self.log())


@contextlib.contextmanager
def load(folder: Path, **variables: str) -> Iterator[Load]:
    """The example's Job with these variables."""
    job = yaml.safe_load((ROOT / "k8s/examples/load-generator.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    wanted = {**{entry["name"]: entry["value"] for entry in container["env"]}, **LOAD, **variables}
    container["env"] = [{"name": name, "value": value} for name, value in wanted.items()]
    job["metadata"]["name"] = f"load-generator-{time.time_ns() // 1_000_000}"
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    name = kubectl("create", "--filename", str(file), "--output", "jsonpath={.metadata.name}").strip()
    try:
        yield Load(name)
    finally:
        kubectl("delete", "job", name, "--ignore-not-found", "--wait=false")


def busy(worker: str) -> bool:
    return bool(fleet().workers[worker]["running"] > 0)


@pytest.fixture(scope="module")
def applied() -> Iterator[str]:
    """What `kubectl apply -f k8s/` says on a cluster that knows nothing of us."""
    there = run("kubectl", "get", "namespace", NAMESPACE, check=False)
    if there.returncode == 0:
        pytest.fail(f"namespace {NAMESPACE} is in use on this cluster: make undeploy-k8s first")
    if works("docker", "info"):
        run("make", "build-docker", timeout_s=300)
    try:
        yield run("kubectl", "apply", "-f", "k8s/").stdout
    finally:
        run("make", "undeploy-k8s", timeout_s=240, check=False)


def test_apply_on_an_empty_cluster_is_enough(applied: str) -> None:
    assert "namespace/sllm-system created" in applied
    ready_fleet(3)
    wait_for("all pods ready", lambda: all(is_ready(pod) for name in ("central-coordinator", "worker") for pod in pods(name).values()))
    assert pods("worker").keys() == fleet().workers.keys() == {"worker-0", "worker-1", "worker-2"}
    assert wait_for("the key's Job", lambda: get("job", "cluster-key")["status"].get("succeeded")) == 1


def test_the_key_is_the_clusters_own(applied: str) -> None:
    secret = get("secret", "cluster-key")
    assert list(secret["data"]) == ["cluster.key"]
    said = json_lines(kubectl("logs", "job/cluster-key"))
    assert said[-1]["message"].endswith(": made")
    account = f"system:serviceaccount:{NAMESPACE}:cluster-key"
    may = {
        verb: run("kubectl", "auth", "can-i", verb, "secrets", "-n", NAMESPACE, f"--as={account}", check=False).stdout.strip()
        for verb in ("create", "get", "list", "delete")
    }
    assert may == {"create": "yes", "get": "no", "list": "no", "delete": "no"}


def test_the_key_job_leaves_a_key_alone(applied: str) -> None:
    before = get("secret", "cluster-key")
    kubectl("delete", "job", "cluster-key")
    run("kubectl", "apply", "-f", "k8s/cluster-key.yaml")
    wait_for("the key's Job", lambda: get("job", "cluster-key")["status"].get("succeeded"))
    assert json_lines(kubectl("logs", "job/cluster-key"))[-1]["message"].endswith(": is there already")
    assert get("secret", "cluster-key") == before


def test_a_second_apply_changes_nothing(applied: str) -> None:
    lines = run("kubectl", "apply", "-f", "k8s/").stdout.splitlines()
    assert lines
    assert [line for line in lines if not line.endswith(" unchanged")] == []


def test_pods_are_locked_up(applied: str) -> None:
    for name, container in (("central-coordinator", "coordinator"), ("worker", "worker")):
        pod = min(pods(name))
        script = "import os; print(os.getuid(), os.path.exists('/var/run/secrets/kubernetes.io')); open('/app/x', 'w')"
        done = run("kubectl", "-n", NAMESPACE, "exec", pod, "-c", container, "--", "python3", "-c", script, check=False)
        assert done.stdout.split() == ["1000", "False"]
        assert "Read-only file system" in done.stderr


def test_same_requests_as_on_this_machine(applied: str, tmp_path: Path) -> None:
    with load(tmp_path, **WORKLOAD) as job:
        there = job.outcome()
    there.assert_nothing_lost()
    here = local_run(tmp_path)
    here.assert_nothing_lost()
    assert there.completed == here.completed


def test_deleting_a_worker_brings_it_back_under_its_name(applied: str, tmp_path: Path) -> None:
    before = ready_fleet(3).workers["worker-1"]["incarnation"]
    with load(tmp_path) as job:
        wait_for("worker-1 to be busy", lambda: busy("worker-1"))
        kubectl("delete", "pod", "worker-1")
        job.outcome().assert_nothing_lost()
    assert ready_fleet(3).workers["worker-1"]["incarnation"] > before


def test_deleting_the_coordinator(applied: str, tmp_path: Path) -> None:
    [(name, old)] = pods("central-coordinator").items()
    before = ready_fleet(3).state["incarnation"]
    with load(tmp_path) as job:
        wait_for("load", lambda: fleet().state["summary"]["running"] > 0)
        kubectl("delete", "pod", name)
        assert ready_fleet(3).state["incarnation"] > before
        job.outcome().assert_nothing_lost()
    [(_, new)] = pods("central-coordinator").items()
    assert new["status"]["podIP"] != old["status"]["podIP"]


def test_scaling_up_and_down_under_load(applied: str, tmp_path: Path) -> None:
    run("make", "scale-workers", "REPLICAS=10")
    ready_fleet(10)
    with load(tmp_path) as job:
        wait_for("a worker that is to go to be busy", lambda: any(busy(f"worker-{number}") for number in range(3, 10)))
        run("make", "scale-workers", "REPLICAS=3")
        job.outcome().assert_nothing_lost()
    ready_fleet(3)
    wait_for("the others to be gone", lambda: pods("worker").keys() == {"worker-0", "worker-1", "worker-2"})


def test_a_rolling_restart_under_load(applied: str, tmp_path: Path) -> None:
    before = {name: worker["incarnation"] for name, worker in ready_fleet(3).workers.items()}
    with load(tmp_path) as job:
        wait_for("load", lambda: fleet().state["summary"]["running"] > 0)
        kubectl("rollout", "restart", "statefulset/worker")
        job.outcome().assert_nothing_lost()
    # A worker goes when the one before it is back, and each first finishes what it runs: load goes on until all have been restarted.
    while get("statefulset", "worker")["status"].get("updatedReplicas") != 3:
        with load(tmp_path) as job:
            job.outcome().assert_nothing_lost()
    kubectl("rollout", "status", "statefulset/worker", "--timeout=120s")
    after = ready_fleet(3).workers
    assert all(after[f"worker-{number}"]["incarnation"] > before[f"worker-{number}"] for number in range(3))  # those that left are listed for a while


def test_a_new_key_under_load_loses_nothing(applied: str, tmp_path: Path) -> None:
    """The steps of the deployment guide. Nobody may hear a word he does not believe on the way."""
    key = tmp_path / "cluster.key"
    ready_fleet(3)
    key.write_bytes(base64.b64decode(get("secret", "cluster-key")["data"]["cluster.key"]))
    with load(tmp_path, **STEADY) as job:
        wait_for("load", lambda: fleet().state["summary"]["running"] > 0)
        everybody = [*pods("central-coordinator"), *pods("worker"), f"job/{job.name}"]
        for step, keys in ROTATION:
            run(sys.executable, "-m", "sllm.runtime.keys", str(key), *step.split())
            secret = kubectl("create", "secret", "generic", "cluster-key", f"--from-file={key}", "--dry-run=client", "--output=json")
            (tmp_path / "secret.json").write_text(secret)
            kubectl("replace", "--filename", str(tmp_path / "secret.json"))
            kubectl("annotate", "pods", "--selector=app.kubernetes.io/part-of=sllm", "--overwrite", f"sllm/keys={step.lstrip('-').replace(' ', '-')}")
            for one in everybody:
                wait_for(f"{one} to have keys {keys}", lambda one=one, keys=keys: keys_taken_over(kubectl("logs", one)) == keys, 150.0)
        kubectl("exec", f"job/{job.name}", "--", *STOP)
        job.outcome().assert_nothing_lost()
    state = ready_fleet(3).state
    assert state["keys"] == ROTATION[-1][1]
    assert state["datagrams"]["rejected"] == {}


def test_status_says_what_the_coordinator_sees(applied: str) -> None:
    said = run("make", "status-k8s").stdout
    assert "coordinator: ready" in said
    assert "statefulset.apps/worker" in said


def test_logs_are_json(applied: str) -> None:
    for name in ("central-coordinator", "worker"):
        for pod in pods(name):
            assert json_lines(kubectl("logs", pod))


def test_the_tools_say_what_is_missing() -> None:
    env = {"PATH": "/usr/bin:/bin", "KUBECONFIG": "/nonexistent"}
    done = subprocess.run(["make", "status-k8s"], cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert "make status-k8s:" in done.stderr
