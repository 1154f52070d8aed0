"""What is applied and built, read as text: schemas, names that must agree, settings that exist, rules of hardening. No engine, no cluster."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config import Config
from sllm.cli import OUTPUTS, SWITCHES
from sllm.runtime.launch import variables_of

yaml = pytest.importorskip("yaml", reason="needs PyYAML: make venv")

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
APPLIED = sorted(K8S.glob("*.yaml"))  # what `kubectl apply -f k8s/` takes, in its order
ALL = sorted(path for path in K8S.rglob("*.yaml"))
DOCKERFILES = ("Dockerfile.coordinator", "Dockerfile.worker")
VARIABLES = {field.metadata["env"] for field in dataclasses.fields(Config)}
FOREIGN = {"ServiceMonitor", "Kustomization"}  # kinds that are not Kubernetes' own
NEEDS_1_21 = {"PodDisruptionBudget"}
# Targets that concern no deployment.
LOCAL = {"run", "simulate", "validate", "parity", "engines", "bench", "venv", "test", "check", "clean", "help", "k8s-base"}


def documents(*paths: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in paths:
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if document:
                yield str(path.relative_to(ROOT)), document


def pods(*paths: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for _, document in documents(*paths):
        if document["kind"] in ("Deployment", "StatefulSet", "Job"):
            name = document["metadata"].get("name") or document["metadata"]["generateName"]
            yield f"{document['kind']}/{name}", document["spec"]["template"]["spec"]


def one(kind: str, name: str) -> dict[str, Any]:
    found = {str(document): document for _, document in documents(*APPLIED) if (document["kind"], document["metadata"]["name"]) == (kind, name)}
    assert len(found) == 1, f"{kind}/{name}: {len(found)} different ones"
    return next(iter(found.values()))


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return loaded


# --- schemas and style ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, -1], ids=["oldest", "newest"])
def test_every_manifest_fits_the_schemas_of_the_oldest_and_the_newest_kubernetes(which: int) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: make venv")
    version = validate.utils.all_versions()[which]
    checked = 0
    for where, document in documents(*ALL):
        if document["kind"] in FOREIGN:
            continue
        try:
            validate.validate(document, version, strict=True)
        except validate.ValidationError as error:
            pytest.fail(f"{where}, {document['kind']}, Kubernetes {version}: {error.message}")
        checked += 1
    assert checked > 20


def test_yaml_is_tidy() -> None:
    linter = pytest.importorskip("yamllint.linter", reason="needs yamllint: make venv")
    from yamllint.config import YamlLintConfig

    rules = YamlLintConfig(
        "{extends: default, rules: {line-length: {max: 170}, braces: {max-spaces-inside: 0}, comments: {min-spaces-from-content: 1},"
        " document-start: disable, octal-values: disable, truthy: {check-keys: false}}}"
    )
    paths = [*ALL, ROOT / "docker-compose.yml", K8S / "disruption-budgets" / "Kustomization"]
    problems = [f"{path.name}:{problem}" for path in paths for problem in linter.run(path.read_text(encoding="utf-8"), rules)]
    assert problems == []


# --- what is applied, and in which order ------------------------------------------------------------------------------------------------


def test_the_namespace_is_the_first_thing_a_folder_wide_apply_makes() -> None:
    first = next(documents(*APPLIED))[1]
    assert (first["kind"], first["metadata"]["name"]) == ("Namespace", "sllm-system")
    assert first["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    named = next(documents(K8S / "namespace.yaml"))[1]
    assert named == first


def test_everything_lies_in_the_one_namespace() -> None:
    for where, document in documents(*ALL):
        if document["kind"] not in ("Namespace", "Kustomization"):
            assert document["metadata"].get("namespace") == "sllm-system", where


def test_the_base_of_the_overlays_says_what_the_files_say() -> None:
    def keyed(*paths: Path) -> dict[tuple[str, str], dict[str, Any]]:
        return {(document["kind"], document["metadata"]["name"]): document for _, document in documents(*paths)}

    assert keyed(K8S / "base" / "all.yaml") == keyed(*APPLIED), "make k8s-base writes it anew"


def test_nothing_applied_by_default_needs_a_newer_cluster_or_another_operator() -> None:
    assert not {document["kind"] for _, document in documents(*APPLIED)} & (FOREIGN | NEEDS_1_21)


def test_no_key_lies_in_the_repository() -> None:
    for where, document in documents(*ALL):
        assert document["kind"] != "Secret", where
    for path in [*ALL, ROOT / "docker-compose.yml", *(ROOT / name for name in DOCKERFILES)]:
        assert not re.search(r"[0-9a-fA-F]{64}", path.read_text(encoding="utf-8")), path


# --- pods -------------------------------------------------------------------------------------------------------------------------------


def test_every_pod_meets_the_restricted_standard() -> None:
    seen = list(pods(*ALL))
    assert len(seen) >= 7  # three applied, the same in the base, the load generator
    for name, pod in seen:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert (security["runAsUser"], security["runAsGroup"]) == (1000, 1000), name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        for container in pod["containers"]:
            mine = container["securityContext"]
            assert mine["allowPrivilegeEscalation"] is False, name
            assert mine["readOnlyRootFilesystem"] is True, name
            assert mine["capabilities"] == {"drop": ["ALL"]}, name
            assert set(container["resources"]) == {"requests", "limits"}, name


def test_what_pods_ask_for_by_default() -> None:
    """Ten workers and a coordinator fit a node of two cores."""
    asked = {}
    for kind, name in (("Deployment", "central-coordinator"), ("StatefulSet", "worker")):
        (container,) = one(kind, name)["spec"]["template"]["spec"]["containers"]
        asked[name] = container["resources"]
    assert asked["central-coordinator"]["requests"] == {"cpu": "100m", "memory": "128Mi"}
    assert asked["worker"] == {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "200m", "memory": "256Mi"}}


def test_only_the_key_job_has_a_token_and_may_only_create_secrets() -> None:
    for name, pod in pods(*APPLIED):
        assert pod["automountServiceAccountToken"] is (name == "Job/cluster-key"), name
    assert all(not document["automountServiceAccountToken"] for _, document in documents(*APPLIED) if document["kind"] == "ServiceAccount")
    assert not [document for _, document in documents(*APPLIED) if document["kind"].startswith("Cluster")]
    assert one("Role", "cluster-key")["rules"] == [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}]


def test_a_worker_may_drain_for_longer_than_it_wants_to() -> None:
    drain_s = float(one("ConfigMap", "sllm")["data"]["DRAIN_TIMEOUT"])
    assert one("StatefulSet", "worker")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s
    default = re.search(r"DRAIN_TIMEOUT:-(\d+)", compose()["services"]["worker-1"]["environment"]["DRAIN_TIMEOUT"])
    assert default is not None
    assert float(str(compose()["services"]["worker-1"]["stop_grace_period"]).removesuffix("s")) > float(default[1])


def test_services_and_probes_lead_to_ports_that_exist() -> None:
    ports: dict[str, dict[str, tuple[int, str]]] = {}
    for kind, name in (("Deployment", "central-coordinator"), ("StatefulSet", "worker")):
        (container,) = one(kind, name)["spec"]["template"]["spec"]["containers"]
        ports[name] = {port["name"]: (port["containerPort"], port["protocol"]) for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in ports[name], (name, probe)
            assert container[probe]["httpGet"]["path"] == ("/readyz" if probe == "readinessProbe" else "/livez")
        for port in one("Service", name)["spec"]["ports"]:
            assert ports[name][port["targetPort"]] == (port["port"], port["protocol"])
    assert one("Service", "central-coordinator")["spec"]["publishNotReadyAddresses"] is True
    assert one("StatefulSet", "worker")["spec"]["serviceName"] == one("Service", "worker")["metadata"]["name"]


def test_selectors_find_the_pods_they_mean() -> None:
    labels = {
        document["metadata"]["name"]: document["spec"]["template"]["metadata"]["labels"]
        for _, document in documents(*APPLIED)
        if document["kind"] in ("Deployment", "StatefulSet", "Job")
    }
    for name in ("central-coordinator", "worker"):
        for wanted in (one("Service", name)["spec"]["selector"], one("NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"]):
            assert wanted.items() <= labels[name].items()
            assert not any(wanted.items() <= other.items() for other_name, other in labels.items() if other_name != name)
    assert one("NetworkPolicy", "default-deny")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


# --- settings ---------------------------------------------------------------------------------------------------------------------------


def test_every_variable_that_is_set_exists_and_has_a_value_that_is_taken() -> None:
    settings: list[tuple[str, dict[str, str]]] = [("k8s/configmap.yaml", one("ConfigMap", "sllm")["data"])]
    for name, pod in pods(*ALL):
        for container in pod["containers"]:
            settings.append((name, {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}))
    for name, service in compose()["services"].items():
        defaults = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for key, value in service.get("environment", {}).items()}
        settings.append((name, defaults))
    for where, values in settings:
        assert set(values) <= VARIABLES, f"{where}: {sorted(set(values) - VARIABLES)}"
        Config.from_env(values)


# --- images and Compose -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_nobody_in_particular_with_an_exec_form_entry_point(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("FROM")] == ["FROM python:3.11-slim AS build", "FROM python:3.11-slim"]
    assert re.search(r"^USER 1000:1000$", text, re.M)
    assert re.search(r'^ENTRYPOINT \["python3", "-u", "/app/entrypoint_\w+\.py"\]$', text, re.M)
    assert re.search(r"^HEALTHCHECK ", text, re.M)
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        for part in source.split():
            assert (ROOT / part).exists(), part
            assert f"!{part}" in (ROOT / ".dockerignore").read_text(encoding="utf-8").split(), part
    assert "--mount" not in text, "the classic builder has no mounts"


def test_compose_services_are_confined_and_wait_for_health() -> None:
    services = compose()["services"]
    assert set(services) == {"cluster-key", "central-coordinator", "worker-1", "worker-2", "worker-3", "load-generator"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] == "1000:1000", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        if name not in ("cluster-key", "central-coordinator"):
            assert service["depends_on"]["central-coordinator"] == {"condition": "service_healthy"}, name
        if name.startswith("worker") or name == "central-coordinator":
            assert service["restart"] == "unless-stopped", name
    assert services["load-generator"]["profiles"] == ["load"]
    assert "172.28.0.0/16" in compose()["networks"]["fleet"]["ipam"]["config"][0]["subnet"]


# --- documentation --------------------------------------------------------------------------------------------------------------------------


def test_the_deployment_guide_names_every_variable_and_every_target() -> None:
    guide = (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8")
    missing = sorted(name for name in VARIABLES | {env for _, env, *_ in (*OUTPUTS, *SWITCHES)} if f"`{name}`" not in guide)
    assert missing == []
    targets = re.findall(r"^([a-z][a-z0-9-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert [target for target in targets if target not in LOCAL and f"make {target}" not in guide] == []


def test_the_deployment_guide_says_who_reads_a_variable() -> None:
    guide = (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8")
    readers = {name: who.split(", ") for name, who in re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([a-z, ]+) \|", guide, re.M)}
    for role in ("coordinator", "worker", "client"):
        assert {name for name, who in readers.items() if role in who or "all" in who} == set(variables_of(role)), role
