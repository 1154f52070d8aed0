"""What is applied and built, read as text: schemas, names that must agree, settings that exist, rules of hardening. No engine, no cluster."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_readme import default, described

from config import OUTPUTS, SWITCHES, Config
from sllm.deploy.keys import FILE_NAME
from sllm.deploy.launch import variables_of

yaml = pytest.importorskip("yaml", reason="needs PyYAML: make venv")

ROOT = Path(__file__).resolve().parent.parent
K8S = ROOT / "k8s"
APPLIED = sorted(K8S.glob("*.yaml"))  # what `kubectl apply -f k8s/` takes, in its order
ALL = sorted(path for path in K8S.rglob("*.yaml"))
DOCKERFILES = ("Dockerfile.coordinator", "Dockerfile.worker")
VARIABLES = {field.metadata["env"] for field in dataclasses.fields(Config)}
DEPLOYMENTS_OWN = {  # settings that say where things are: those a deployment decides, or leaves to the container
    "ADVERTISE_HOST", "BIND_HOST", "CLUSTER_KEY_FILE", "COORDINATOR_HOST", "COORDINATOR_PORT", "DEPLOYMENT_MODE", "HEALTH_PORT", "WORKER_ID", "WORKER_PORT",
}  # fmt: skip
FOREIGN = {"ServiceMonitor", "Kustomization"}  # kinds that are not Kubernetes' own
NEEDS_1_21 = {"PodDisruptionBudget"}
# Targets that concern no deployment.
LOCAL = {
    "run", "compare", "saturation", "simulate", "validate", "parity", "engines", "bench", "venv", "test", "check", "clean", "help", "k8s-base", "bench-check",
    "fast", "slow",
}  # fmt: skip


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


def containers_of(pod: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that begin before the role as well."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


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


def test_nothing_is_applied_twice() -> None:
    names = [(document["kind"], document["metadata"]["name"]) for _, document in documents(*APPLIED)]
    assert sorted(names) == sorted(set(names))


def test_nothing_applied_has_a_template_that_cannot_be_changed() -> None:
    """A Job's cannot, and so no new version of one could be applied over the old."""
    assert not {document["kind"] for _, document in documents(*APPLIED)} & {"Job", "Pod"}


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
    assert len(seen) >= 5  # two applied, the same in the base, the load generator
    for name, pod in seen:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert (security["runAsUser"], security["runAsGroup"]) == (1000, 1000), name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        for container in containers_of(pod):
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


def test_only_what_makes_the_key_has_a_token_and_may_only_create_secrets() -> None:
    with_token = set()
    for name, pod in pods(*APPLIED):
        assert pod["automountServiceAccountToken"] is False, name
        projected = {volume["name"]: volume["projected"]["sources"] for volume in pod["volumes"] if "projected" in volume}
        tokens = {volume for volume, sources in projected.items() if any("serviceAccountToken" in source for source in sources)}
        with_token |= {(name, c["name"]) for c in containers_of(pod) if tokens & {mount["name"] for mount in c["volumeMounts"]}}
    assert with_token == {("Deployment/central-coordinator", "cluster-key")}
    assert all(not document["automountServiceAccountToken"] for _, document in documents(*APPLIED) if document["kind"] == "ServiceAccount")
    assert not [document for _, document in documents(*APPLIED) if document["kind"].startswith("Cluster")]
    assert one("Role", "cluster-key")["rules"] == [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}]
    assert [subject["name"] for subject in one("RoleBinding", "cluster-key")["subjects"]] == ["central-coordinator"]


def test_pods_need_no_secret_to_begin_and_look_at_the_mounted_one_before_they_ask_for_any() -> None:
    folder = one("ConfigMap", "sllm")["data"]["CLUSTER_KEY_FILE"]
    for name, pod in pods(*APPLIED):
        (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
        assert volume["secret"]["optional"] is True, f"{name}: a Secret that is not there yet is a warning"
        (first,) = pod["initContainers"]
        assert first["command"][2].startswith(f"[ -e {folder}/{FILE_NAME} ] || exec python3 -m sllm.deploy.key_secret "), name
        for container in containers_of(pod):
            assert {"name": volume["name"], "mountPath": folder, "readOnly": True} in container["volumeMounts"], (name, container["name"])


def test_there_is_never_a_second_coordinator() -> None:
    spec = one("Deployment", "central-coordinator")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert "lifecycle" not in spec["template"]["spec"]["containers"][0], "a preStop would let the old one go on beside the new one"
    for path in sorted((K8S / "overlays").rglob("kustomization.yaml")):
        assert "central-coordinator" not in {entry["name"] for entry in yaml.safe_load(path.read_text()).get("replicas", ())}, path


def test_a_worker_may_drain_for_longer_than_it_wants_to() -> None:
    drain_s = float(one("ConfigMap", "sllm")["data"]["DRAIN_TIMEOUT"])
    assert one("StatefulSet", "worker")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s
    grace = str(compose()["services"]["worker"]["stop_grace_period"])
    assert float(grace.removesuffix("s")) > Config.from_env({}).drain_timeout_s


def test_services_and_probes_lead_to_ports_that_exist() -> None:
    ports: dict[str, dict[str, tuple[int, str]]] = {}
    for kind, name in (("Deployment", "central-coordinator"), ("StatefulSet", "worker")):
        (container,) = one(kind, name)["spec"]["template"]["spec"]["containers"]
        ports[name] = {port["name"]: (port["containerPort"], port["protocol"]) for port in container["ports"]}
        for probe in ("livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in ports[name], (name, probe)
            assert container[probe]["httpGet"]["path"] == ("/readyz" if (name, probe) == ("worker", "readinessProbe") else "/livez")
        for port in one("Service", name)["spec"]["ports"]:
            assert ports[name][port["targetPort"]] == (port["port"], port["protocol"])
    assert one("StatefulSet", "worker")["spec"]["serviceName"] == one("Service", "worker")["metadata"]["name"]


def test_a_new_coordinator_gets_datagrams_as_soon_as_its_socket_is_open_and_a_dying_one_none() -> None:
    (container,) = one("Deployment", "central-coordinator")["spec"]["template"]["spec"]["containers"]
    assert "publishNotReadyAddresses" not in one("Service", "central-coordinator")["spec"], "it would keep a dying pod's address"
    assert "startupProbe" not in container, "it would delay the first look at the readiness"
    assert container["readinessProbe"]["periodSeconds"] == 1


def test_selectors_find_the_pods_they_mean() -> None:
    labels = {
        document["metadata"]["name"]: document["spec"]["template"]["metadata"]["labels"]
        for _, document in documents(*APPLIED)
        if document["kind"] in ("Deployment", "StatefulSet")
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
        for container in containers_of(pod):
            settings.append((name, {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}))
    for name, service in compose()["services"].items():
        defaults = {key: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value or "")) for key, value in service.get("environment", {}).items()}
        settings.append((name, defaults))
    for where, values in settings:
        known = VARIABLES | set(variables_of("client"))
        assert set(values) <= known, f"{where}: {sorted(set(values) - known)}"
        Config.from_env(values)


@pytest.mark.parametrize(("service", "role"), [("central-coordinator", "coordinator"), ("worker", "worker"), ("load-generator", "client")])
def test_every_setting_of_a_role_reaches_it_with_compose(service: str, role: str) -> None:
    """One whose name stands there without a value is taken from the shell; those with a default are too."""
    passed = compose()["services"][service]["environment"]
    decided = {name for name, value in passed.items() if value is not None and f"${{{name}:-" not in str(value)}
    assert decided <= DEPLOYMENTS_OWN
    assert set(variables_of(role)) - DEPLOYMENTS_OWN == set(passed) - decided
    assert not {"WORKER_ID", "ADVERTISE_HOST"} & set(passed), "all containers would have the same"


def test_every_setting_of_a_role_reaches_it_on_kubernetes() -> None:
    """All that the ConfigMap says does, for nothing stands before it but what pods are told of themselves."""
    for name, pod in pods(*APPLIED, K8S / "examples" / "load-generator.yaml"):
        for container in pod["containers"]:
            assert container["envFrom"] == [{"configMapRef": {"name": "sllm"}}], name
            assert all("valueFrom" in entry for entry in container.get("env", ())), name
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^LOAD_VARIABLES := ((?:.*\\\n)*.*)$", text, re.M)
    assert listed is not None
    assert set(listed[1].replace("\\", " ").split()) == set(variables_of("client")) - DEPLOYMENTS_OWN


# --- images and Compose -------------------------------------------------------------------------------------------------------------------


def reachable(module: str, seen: set[str]) -> set[str]:
    """The modules of this project that an import of this one brings along, itself included, wherever in their files the imports stand."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if module in seen or not path.exists():
        return seen
    seen.add(module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            reachable(name, seen)
    return seen


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_every_module_that_its_entry_points_import(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    copied = {word.removesuffix(".py") for line in re.findall(r"^COPY (.*) \./$", text, re.M) for word in line.split() if word.endswith(".py")}
    wanted: set[str] = set()
    for entry in sorted(module for module in copied if module.startswith("entrypoint_")):
        wanted |= {module for module in reachable(entry, set()) if "." not in module}
    assert wanted
    assert wanted - copied == set()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_nobody_in_particular_with_an_exec_form_entry_point(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("FROM")] == ["FROM $BUILD_IMAGE AS build", "FROM $BASE_IMAGE"]
    assert "ARG BASE_IMAGE=python:3.11-slim\nARG BUILD_IMAGE=$BASE_IMAGE\n" in text
    service = {"Dockerfile.coordinator": "central-coordinator", "Dockerfile.worker": "worker"}[name]
    assert compose()["services"][service]["build"]["args"] == {"BASE_IMAGE": "${BASE_IMAGE:-python:3.11-slim}"}
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
    assert set(services) == {"cluster-key", "central-coordinator", "worker", "load-generator"}
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"] == "1000:1000", name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        if name not in ("cluster-key", "central-coordinator"):
            assert service["depends_on"]["central-coordinator"] == {"condition": "service_healthy"}, name
        if name in ("worker", "central-coordinator"):
            assert service["restart"] == "unless-stopped", name
    assert not {"hostname", "container_name", "ports"} & set(services["worker"]), "each of its containers has a name of its own, and no port of this machine"
    assert services["load-generator"]["profiles"] == ["load"]
    checks = {name: services[name]["healthcheck"]["test"][-1] for name in ("central-coordinator", "worker")}
    assert checks == {"central-coordinator": "--healthcheck=livez", "worker": "--healthcheck=readyz"}, "workers wait for a coordinator, which waits for them"
    assert "172.28.0.0/16" in compose()["networks"]["fleet"]["ipam"]["config"][0]["subnet"]


# --- documentation --------------------------------------------------------------------------------------------------------------------------


def test_the_deployment_guide_names_every_variable_and_every_target() -> None:
    guide = (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8")
    missing = sorted(name for name in VARIABLES | {env for _, env, *_ in (*OUTPUTS, *SWITCHES)} if f"`{name}`" not in guide)
    assert missing == []
    targets = re.findall(r"^([a-z][a-z0-9-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert [target for target in targets if target not in LOCAL and f"make {target}" not in guide] == []


def test_the_deployment_guide_and_the_readme_say_the_same_of_a_variable() -> None:
    guide = (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8")
    told = {name: [cell.strip() for cell in (default, unit, meaning)] for name, default, unit, meaning in re.findall(
        r"^\| `(\w+)` \|([^|]*)\|([^|]*)\| [a-z, ]+ \|(.*)\|$", guide, re.M,
    )}  # fmt: skip
    fields = {field.metadata["env"]: field for field in dataclasses.fields(Config)}
    expected = {name: [default(field), field.metadata["unit"], described(field)] for name, field in fields.items()}
    assert {name: cells for name, cells in told.items() if name in fields} == {name: cells for name, cells in expected.items() if name in told}
    assert len(told) > 0.9 * len(fields)


def test_the_deployment_guide_says_who_reads_a_variable() -> None:
    guide = (ROOT / "DEPLOYMENT.md").read_text(encoding="utf-8")
    readers = {name: who.split(", ") for name, who in re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([a-z, ]+) \|", guide, re.M)}
    for role in ("coordinator", "worker", "client"):
        assert {name for name, who in readers.items() if role in who or "all" in who} == set(variables_of(role)), role
