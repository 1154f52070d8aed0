"""Linters and schemas over Dockerfiles, Compose file, workflow and manifests; who may speak to whom; what make says. No engine needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML: make venv")

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = sorted(path.parent for path in (ROOT / "k8s/overlays").glob("*/kustomization.yaml"))
FOREIGN = "monitoring.coreos.com/"  # kinds that an operator brings: no schema of Kubernetes' own


def tool(name: str) -> str:
    """A linter's path: of the virtual environment the tests run in, or anywhere."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed: make venv")
    return found


def passes(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, input=stdin, text=True, capture_output=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


# --- linters and schemas --------------------------------------------------------------------------------------------------------------


def test_hadolint() -> None:
    passes(tool("hadolint"), "Dockerfile.worker", "Dockerfile.coordinator")


def test_checkov() -> None:
    passes(tool("checkov"), "--config-file", ".checkov.yaml", "--directory", ".")


def test_compose_schema() -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_actions_are_named_by_commit() -> None:
    """A tag can be moved; a commit cannot."""
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        used = re.findall(r"uses: *(\S+)(.*)", path.read_text(encoding="utf-8"))
        assert used, path
        for action, comment in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" +# v\d+\.\d+\.\d+", comment), f"{action}: which version it is"


def test_workflow_schema() -> None:
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", ".github/workflows/ci.yml")


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_overlays_build_and_fit_the_schemas(folder: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: make venv")
    if shutil.which("kubectl") is None:
        pytest.skip("install kubectl (https://kubernetes.io/docs/tasks/tools/)")
    built = [document for document in yaml.safe_load_all(passes("kubectl", "kustomize", str(folder))) if document]
    for document in built:
        if not document["apiVersion"].startswith(FOREIGN):
            validate.validate(document, "1.25", strict=True)
    if folder.name == "production":
        images = {c["image"] for d in built if d["kind"] in ("Deployment", "StatefulSet", "Job") for c in d["spec"]["template"]["spec"]["containers"]}
        assert all(image.startswith("registry.example.com/") and not image.endswith(":latest") for image in images)
        assert {d["kind"] for d in built} >= {"PodDisruptionBudget"}
        assert [d["spec"]["replicas"] for d in built if d["kind"] == "StatefulSet"] == [10]


# --- network policies: who may speak to whom ----------------------------------------------------------------------------------------------


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", ()):
        assert rule["operator"] == "In"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


POD = {name: {"app.kubernetes.io/name": name} for name in ("central-coordinator", "worker", "load-generator", "stranger")}
POLICIES = [document["spec"] for document in yaml.safe_load_all((ROOT / "k8s/network-policies.yaml").read_text(encoding="utf-8"))]
DNS, API = {"k8s-app": "kube-dns"}, {"component": "api-server"}


def allowed(way: str, pod: dict[str, str], peer: dict[str, str], namespace: str, port: int, protocol: str) -> bool:
    """One side of a conversation, as a network plugin decides it."""
    policies = [policy for policy in POLICIES if selects(policy["podSelector"], pod) and way.capitalize() in policy["policyTypes"]]
    if not policies:
        return True
    end = "from" if way == "ingress" else "to"
    for rule in (rule for policy in policies for rule in policy.get(way, ())):
        if not any((p["port"], p["protocol"]) == (port, protocol) for p in rule["ports"]):
            continue
        if end not in rule:
            return True
        for who in rule[end]:
            home = selects(who["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}) if "namespaceSelector" in who else namespace == "sllm-system"
            if home and selects(who["podSelector"], peer):
                return True
    return False


def reaches(source: str, target: str, port: int, protocol: str = "UDP") -> bool:
    here = "sllm-system"
    return allowed("egress", POD[source], POD[target], here, port, protocol) and allowed("ingress", POD[target], POD[source], here, port, protocol)


def test_what_is_needed_is_allowed_and_nothing_else() -> None:
    pairs = {
        (source, target, port)
        for source in POD for target in POD for port in (53, 80, 443, 8000, 8080, 9000) if reaches(source, target, port) or reaches(source, target, port, "TCP")
    }  # fmt: skip
    assert pairs == {
        ("worker", "central-coordinator", 9000), ("worker", "central-coordinator", 8080), ("load-generator", "central-coordinator", 9000),
        ("load-generator", "worker", 8000),
    }  # fmt: skip
    for name, labels in POD.items():
        looks_up = name in ("worker", "load-generator")
        assert allowed("egress", labels, DNS, "kube-system", 53, "UDP") is looks_up, name
        assert allowed("egress", labels, DNS, "elsewhere", 53, "UDP") is False, name
        assert allowed("egress", labels, API, "default", 443, "TCP") is (name == "central-coordinator"), name


# --- Makefile and requirements - -------------------------------------------------------------------------------------------------------------


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (\S+)$", text, re.M))
    listed = set(re.findall(r"^  (\S+) +\S", passes("make", "help"), re.M))
    assert targets == listed
    assert listed >= {
        "run", "test", "check", "bench", "simulate", "validate", "parity", "clean", "build-docker", "build-multiarch", "run-docker", "stop-docker", "logs",
        "load-kind", "deploy-k8s", "undeploy-k8s", "scale-workers", "status-k8s", "quick-docker", "quick-k8s", "test-docker", "test-k8s",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "missing"),
    [("build-docker", "docker"), ("run-docker", "docker"), ("logs", "docker"), ("test-docker", "docker"),
     ("scale-docker", "docker"), ("load-docker", "docker"), ("load-k8s", "kubectl"),
     ("deploy-k8s", "kubectl"), ("undeploy-k8s", "kubectl"), ("scale-workers", "kubectl"), ("status-k8s", "kubectl")],
)  # fmt: skip
def test_make_says_what_is_missing(target: str, missing: str, tmp_path: Path) -> None:
    for name in ("bash", "sed", "git", "awk", "env"):
        found = shutil.which(name)
        if found:
            (tmp_path / name).symlink_to(found)
    (tmp_path / ".ready").touch()
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, target, f"READY={tmp_path / '.ready'}", "REPLICAS=3"], cwd=ROOT, env={"PATH": str(tmp_path), "SHELL": "/bin/sh"},
        text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"make {target}: {missing} is missing" in done.stderr


@pytest.mark.parametrize("target", ["scale-docker", "scale-workers"])
@pytest.mark.parametrize("replicas", ["", "many", "-1", "3x"])
def test_scaling_demands_a_number(target: str, replicas: str) -> None:
    done = subprocess.run(["make", target, f"REPLICAS={replicas}"], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert f"make {target}: say how many workers: make {target} REPLICAS=10" in done.stderr


def test_a_load_generators_settings_come_along() -> None:
    """What is given on the command line or stands in the environment; nothing else."""
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}

    def set_by(*arguments: str, **environ: str) -> set[str]:
        done = subprocess.run(["make", "-n", "load-k8s", *arguments], cwd=ROOT, env={**clean, **environ}, text=True, capture_output=True, check=True)
        (line,) = [line for line in done.stdout.splitlines() if "set env" in line]
        return set(re.findall(r"\b[A-Z_]+=[^\s']+", line))

    assert set_by() == {"DURATION=30"}
    assert set_by("RATE=5", "DURATION=60", MODELS="2") == {"RATE=5", "DURATION=60", "MODELS=2"}


def test_another_namespace_is_put_everywhere() -> None:
    """As `make deploy-k8s NAMESPACE=team-a` does: the name stands nowhere else than where it is meant."""
    done = subprocess.run(["make", "-n", "deploy-k8s", "NAMESPACE=team-a"], cwd=ROOT, text=True, capture_output=True, check=True)
    command = next(line for line in done.stdout.splitlines() if line.startswith("cat k8s/*.yaml"))
    built = list(yaml.safe_load_all(passes("sh", "-c", command.partition("| kubectl")[0])))
    assert {document["metadata"].get("namespace", "") for document in built} == {"", "team-a"}
    assert [document["metadata"]["name"] for document in built if document["kind"] == "Namespace"] == ["team-a"]
    assert "sllm-system" not in str(built)


def test_the_guides_own_overlay_builds(tmp_path: Path) -> None:
    """Another namespace and a prefix, as the deployment guide has it; what refers to a name follows it."""
    if shutil.which("kubectl") is None:
        pytest.skip("install kubectl (https://kubernetes.io/docs/tasks/tools/)")
    (recipe,) = re.findall(r"```\n(# kustomization\.yaml.*?)```", (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "kustomization.yaml").write_text(recipe)
    shutil.copytree(ROOT / "k8s", tmp_path / "sllm/k8s")
    built = list(yaml.safe_load_all(passes("kubectl", "kustomize", str(tmp_path))))
    named = {(document["kind"], document["metadata"]["name"]): document for document in built}
    assert {document["metadata"]["namespace"] for (kind, _), document in named.items() if kind != "Namespace"} == {"team-a"}
    assert ("Namespace", "team-a") in named
    assert named["ConfigMap", "blue-sllm"]["data"]["COORDINATOR_HOST"] == "blue-central-coordinator"
    assert ("Service", "blue-central-coordinator") in named
    binding = named["RoleBinding", "blue-cluster-key"]
    (subject,) = binding["subjects"]
    assert (subject["name"], subject["namespace"], binding["roleRef"]["name"]) == ("blue-central-coordinator", "team-a", "blue-cluster-key")
    for kind, name in (("Deployment", "blue-central-coordinator"), ("StatefulSet", "blue-worker")):
        (container,) = named[kind, name]["spec"]["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": "blue-sllm"}}]
    assert named["StatefulSet", "blue-worker"]["spec"]["serviceName"] == "blue-worker"


def test_every_requirement_is_pinned() -> None:
    """To a version, and that to its files."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("requirements-dev.txt", "requirements-fast.txt")]
    lines = [line for text in texts for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    lines.remove("-r requirements-fast.txt")
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+( +--hash=sha256:[0-9a-f]{64})+", line)] == []
    assert "--require-hashes --requirement requirements-dev.txt" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")] == []


def test_the_deployment_guide_names_metrics_and_targets_that_exist() -> None:
    text = (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sllm").glob("*/*.py"))
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bsllm_[a-z0-9_]+", text)}
    assert [name for name in sorted(named) if f'"{name}"' not in source] == []
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"`make ([a-z][a-z0-9-]+)", text)) <= targets
    for path in re.findall(r"\bk8s/[\w/.-]*\w", text):
        assert (ROOT / path).exists(), path


def made_with(folder: Path, tool: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make ARGUMENTS` with `script` in the place of a tool."""
    (folder / tool).write_text(f"#!/bin/bash\n{script}\n")
    (folder / tool).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["make", *arguments], cwd=ROOT, env={**os.environ, "PATH": path}, text=True, capture_output=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("condition", "status", "told"),
    [("Complete", 0, ""), ("Failed: Job has reached the specified backoff limit", 2, "the load generator's job Failed: Job has reached")],
)
def test_load_on_a_cluster_ends_with_its_job(condition: str, status: int, told: str, tmp_path: Path) -> None:
    script = f"""case "$*" in
*"get job"*) echo -n "{condition}";;
*logs*) echo the last line;;
*"set env"*) cat k8s/examples/load-generator.yaml;;
*"-f -") cat;;
esac"""
    done = made_with(tmp_path, "kubectl", script, "load-k8s", "DURATION=600")
    assert done.returncode == status, done.stderr
    assert "the last line" in done.stdout
    assert told in done.stderr


def test_containers_that_said_nothing_are_not_quoted(tmp_path: Path) -> None:
    """Those that a failed one kept from starting."""
    script = """case "$*" in
*" up "*) exit 1;;
*"ps --all"*) echo one two;;
"inspect "*one) echo "sllm-coordinator: exited 2";;
"inspect "*two) echo "sllm-worker-1: created 0";;
"logs "*one) echo "WORKER_TIMEOUT='abc': not a number / & so";;
esac"""
    done = made_with(tmp_path, "docker", script, "run-docker", "COMPOSE=docker compose")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "it said last" in line]
    assert said == ["make run-docker: sllm-coordinator: exited 2; it said last: WORKER_TIMEOUT='abc': not a number / & so"]
