"""The manifests on a real Kubernetes cluster. The tests go through one fleet's life in the order they are written in."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments import (
    LOAD,
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

NAMESPACE = "sllm-system"

pytestmark = [
    pytest.mark.k8s,
    pytest.mark.skipif(not works("kubectl", "get", "--raw", "/readyz"), reason="choose a cluster with kubectl config use-context"),
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
    container["env"] = [{"name": name, "value": value} for name, value in {**LOAD, **variables}.items()]
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
    warnings = [event for event in get("events", "--field-selector=type=Warning")["items"] if event["reason"] != "Unhealthy"]  # a start takes a probe or two
    assert [(event["reason"], event["message"]) for event in warnings] == [], "everybody waits for the key in silence"
    assert [status["restartCount"] for pod in get("pods")["items"] for status in pod["status"]["containerStatuses"]] == [0] * 4


def test_the_key_is_the_clusters_own(applied: str) -> None:
    secret = get("secret", "cluster-key")
    assert list(secret["data"]) == ["cluster.key"]
    [coordinator] = pods("central-coordinator")
    said = json_lines(kubectl("logs", coordinator, "--container=cluster-key"))
    assert said[-1]["message"].endswith(": made")
    account = f"system:serviceaccount:{NAMESPACE}:central-coordinator"
    may = {
        verb: run("kubectl", "auth", "can-i", verb, "secrets", "-n", NAMESPACE, f"--as={account}", check=False).stdout.strip()
        for verb in ("create", "get", "list", "delete")
    }
    assert may == {"create": "yes", "get": "no", "list": "no", "delete": "no"}


def test_a_second_apply_changes_nothing(applied: str) -> None:
    lines = run("kubectl", "apply", "-f", "k8s/").stdout.splitlines()
    assert lines
    assert [line for line in lines if not line.endswith(" unchanged")] == []
    assert run("kubectl", "diff", "-f", "k8s/", check=False).returncode == 0


def test_a_new_version_is_applied_over_the_old_one(applied: str, tmp_path: Path) -> None:
    """Other images, labels and settings, as kustomize makes them; the key stays. The server is asked, as a GitOps operator would ask it."""
    key = get("secret", "cluster-key")["data"]
    for image in ("sllm-coordinator", "sllm-worker"):
        run("docker", "tag", f"{image}:latest", f"{image}:next")
    shutil.copytree(ROOT / "k8s/base", tmp_path / "base")
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [base]\nlabels:\n- {pairs: {version: next}, includeTemplates: true}\n"
        "images:\n- {name: sllm-coordinator, newTag: next}\n- {name: sllm-worker, newTag: next}\n"
    )
    before = {name: worker["incarnation"] for name, worker in ready_fleet(3).workers.items()}
    for how in ([], ["--server-side", "--force-conflicts"]):
        done = run("kubectl", "apply", "-k", str(tmp_path), *how)
        assert "rror" not in done.stderr
    kubectl("rollout", "status", "deployment/central-coordinator", "--timeout=120s")
    kubectl("rollout", "status", "statefulset/worker", "--timeout=240s")
    after = ready_fleet(3)
    assert all(after.workers[name]["incarnation"] > before[name] for name in before)
    for name in ("central-coordinator", "worker"):
        assert {pod["spec"]["containers"][0]["image"].partition(":")[2] for pod in pods(name).values()} == {"next"}
    assert get("secret", "cluster-key")["data"] == key
    run("kubectl", "apply", "--server-side", "--force-conflicts", "-f", "k8s/")
    kubectl("rollout", "status", "statefulset/worker", "--timeout=240s")


def test_another_namespace(applied: str) -> None:
    """Beside the first fleet; each has a key of its own."""
    other = "sllm-e2e-elsewhere"
    try:
        run("make", "deploy-k8s", f"NAMESPACE={other}", "OVERLAY=dev", timeout_s=300.0)
        wait_for("its coordinator to have a worker", lambda: "'READY': 1" in run("make", "status-k8s", f"NAMESPACE={other}").stdout)
        there = json.loads(run("kubectl", "-n", other, "get", "secret", "cluster-key", "-o", "json").stdout)
        assert there["data"] != get("secret", "cluster-key")["data"]
        assert ready_fleet(3).state["datagrams"]["rejected"] == {}
    finally:
        run("make", "undeploy-k8s", f"NAMESPACE={other}", timeout_s=240.0, check=False)


def test_a_deleted_key_is_made_anew(applied: str) -> None:
    """The fleet goes on with what it has until a coordinator starts; then all take the new one over."""
    before = get("secret", "cluster-key")
    kubectl("delete", "secret", "cluster-key")
    kubectl("rollout", "restart", "deployment/central-coordinator", "statefulset/worker")
    kubectl("rollout", "status", "deployment/central-coordinator", "--timeout=120s")
    kubectl("rollout", "status", "statefulset/worker", "--timeout=240s")
    ready_fleet(3)
    assert get("secret", "cluster-key")["data"] != before["data"]


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


def test_killing_a_worker(applied: str, tmp_path: Path) -> None:
    """Its pod dies without a goodbye: what it had is placed again soon."""
    ready_fleet(3)
    with load(tmp_path, RATE="10") as job:
        wait_for("worker-2 to be busy", lambda: busy("worker-2"))
        kubectl("delete", "pod", "worker-2", "--grace-period=0", "--force")
        killed_at = time.time()
        outcome = job.outcome()
        outcome.assert_nothing_lost()
        outcome.assert_placed_again_soon("worker-2", killed_at)
    ready_fleet(3)


def test_deleting_the_coordinator(applied: str, tmp_path: Path) -> None:
    """Its Service's address stays, and the new one has everybody back within four seconds of its socket being open."""
    [(name, old)] = pods("central-coordinator").items()
    before = ready_fleet(3).state["incarnation"]
    with load(tmp_path, RATE="10") as job:
        wait_for("load", lambda: fleet().state["summary"]["running"] > 0)
        kubectl("delete", "pod", name)
        assert ready_fleet(3).state["incarnation"] > before
        job.outcome().assert_nothing_lost()
    [(successor, new)] = pods("central-coordinator").items()
    assert new["status"]["podIP"] != old["status"]["podIP"]
    lines = json_lines(kubectl("logs", successor))
    [up] = [when(line) for line in lines if line["message"] == "coordinator is up"]
    back = {line["worker_id"]: when(line) - up for line in reversed(lines) if line.get("event") == "WorkerStateChanged" and line["new"] == "READY"}
    assert back.keys() == {"worker-0", "worker-1", "worker-2"}
    assert max(back.values()) <= 4.0, back


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
    before = get("secret", "cluster-key")
    key.write_bytes(base64.b64decode(before["data"]["cluster.key"]))
    with load(tmp_path, **STEADY) as job:
        wait_for("load", lambda: fleet().state["summary"]["running"] > 0)
        everybody = [*pods("central-coordinator"), *pods("worker"), f"job/{job.name}"]
        for step, keys in ROTATION:
            run(sys.executable, "-m", "sllm.deploy.keys", str(key), *step.split())
            patch = run("kubectl", "create", "secret", "generic", "cluster-key", f"--from-file={key}", "--dry-run=client", "--output=json").stdout
            (tmp_path / "patch.json").write_text(patch)
            kubectl("patch", "secret", "cluster-key", "--type=merge", f"--patch-file={tmp_path / 'patch.json'}")
            kubectl("annotate", "pods", "--selector=app.kubernetes.io/part-of=sllm", "--overwrite", f"sllm/keys={step.lstrip('-').replace(' ', '-')}")
            for one in everybody:
                wait_for(f"{one} to have keys {keys}", partial(has_keys, partial(kubectl, "logs", one), keys), 150.0)
        kubectl("exec", f"job/{job.name}", "--", *STOP)
        job.outcome().assert_nothing_lost()
    state = ready_fleet(3).state
    assert state["keys"] == ROTATION[-1][1]
    assert state["datagrams"]["rejected"] == {}
    after = get("secret", "cluster-key")
    assert base64.b64decode(after["data"]["cluster.key"]) == key.read_bytes()
    assert after["metadata"]["labels"] == before["metadata"]["labels"] != {}


def test_load_from_the_makefile(applied: str) -> None:
    """RATE, DURATION and any other variable of a client."""
    done = run("make", "load-k8s", "RATE=2", "DURATION=2", env={"MODELS": "1"})
    assert json_lines(done.stdout.splitlines()[-1])[0]["event"] == "Results"
    told = next(line for line in json_lines(kubectl("logs", "job/load-generator")) if line["message"] == "configuration")
    assert (told["RATE"], told["DURATION"], told["MODELS"]) == (2.0, 2.0, 1)


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
