"""Configuration from the environment: defaults by place, every value checked, errors that name the variable."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import config as config_module
from config import Config, ConfigError, describe_misspelt, misspelt, resolve_defaults

LOCAL = {"DEPLOYMENT_MODE": "local"}


def test_local_defaults() -> None:
    config = Config.from_env(LOCAL)
    assert config.get_coordinator_address() == ("127.0.0.1", 9000)
    assert config.bind_host == "127.0.0.1"
    assert config.get_worker_id().startswith("worker-")
    assert (config.report_interval_s, config.worker_timeout_s, config.queue_threshold, config.memory_threshold) == (1.0, 10.0, 10, 0.9)


def test_containers_listen_everywhere_and_are_named_after_their_host() -> None:
    config = Config.from_env({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "worker-2"})
    assert (config.deployment_mode, config.bind_host, config.coordinator_host) == ("kubernetes", "0.0.0.0", "central-coordinator")
    assert config.get_worker_id() == "worker-2"
    assert Config.from_env({"DEPLOYMENT_MODE": "docker", "WORKER_ID": "w"}).get_worker_id() == "w"


def test_a_host_name_that_is_no_id_matters_to_a_worker_without_an_id_alone() -> None:
    """The defaults of a place are worked out to say what differs from them, too."""
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "h" * 64}
    assert resolve_defaults(Config(), environ).worker_id == "h" * 64
    with pytest.raises(ConfigError, match="HOSTNAME"):
        Config.from_env(environ)
    assert Config.from_env({**environ, "WORKER_ID": "w"}).worker_id == "w"


BAD = [
    ("COORDINATOR_PORT", "70000", "at most 65535"), ("COORDINATOR_PORT", "nine", "whole number"), ("REPORT_INTERVAL", "-1", "at least 0"),
    ("REPORT_INTERVAL", "nan", "number"), ("WORKER_TIMEOUT", "0", "above 0"), ("LOG_FORMAT", "xml", "text, json"), ("DEPLOYMENT_MODE", "moon", "kubernetes"),
    ("MEMORY_THRESHOLD", "1.5", "at most 1"), ("WORKERS", "1.5", "whole number"), ("RATE", "inf", "number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_a_bad_value_names_its_variable(name: str, value: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_env({**LOCAL, name: value})
    message = str(caught.value)
    assert name in message
    assert value in message
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("field", dataclasses.fields(Config), ids=lambda f: f.name)
def test_every_field_reads_its_own_variable(field: dataclasses.Field[object]) -> None:
    rules = field.metadata
    assert rules["meaning"]
    if field.type == "str":
        text = rules["choices"][-1] if rules["choices"] else "other"
    else:
        text = str(int(min((rules["low"] or rules["above"] or 0) + 1, rules["high"] or 10**6)))
    config = Config.from_env({**LOCAL, rules["env"]: text})
    assert str(getattr(config, field.name)) in (text, str(float(text)) if field.type == "float" else text)


def test_an_empty_variable_keeps_the_default() -> None:
    assert Config.from_env({**LOCAL, "REPORT_INTERVAL": "  "}).report_interval_s == 1.0


def test_variables_and_flags_are_unique() -> None:
    fields = dataclasses.fields(Config)
    assert len({f.metadata["env"] for f in fields}) == len(fields)
    flags = [f.metadata["flag"] for f in fields if f.metadata["flag"]]
    assert len(set(flags)) == len(flags)


def test_the_process_wide_configuration_is_built_on_first_use() -> None:
    root = Path(config_module.__file__).parent
    code = "from config import config; import config as m; print(config.get_coordinator_address(), m.config is config)"
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env={"COORDINATOR_PORT": "9001", **LOCAL}, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "('127.0.0.1', 9001) True"


def test_the_description_has_every_variable_and_no_secret() -> None:
    shown = Config.from_env({**LOCAL, "CLUSTER_KEY_FILE": "/keys/cluster.key"}).describe()
    assert shown["CLUSTER_KEY_FILE"] == "/keys/cluster.key"
    assert set(shown) == {f.metadata["env"] for f in dataclasses.fields(Config)}


MISSPELT = {
    "WORKER_TIMOUT": "WORKER_TIMEOUT", "WORKERTIMEOUT": "WORKER_TIMEOUT", "WORKER_TIME_OUT": "WORKER_TIMEOUT", "REPORT_INTERVALL": "REPORT_INTERVAL",
    "LOG_LEVLE": "LOG_LEVEL", "DURATON": "DURATION", "DRAIN_TIME": "DRAIN_TIMEOUT", "COORDINATOR_ADDR": "COORDINATOR_PORT", "HTTP_HOST": "HTTP_HOSTS",
    "WORKER_UDP_PORT": "WORKER_PORT", "CLUSTER_KEYFILE": "CLUSTER_KEY_FILE", "REQUESTS_CVS": "REQUESTS_CSV", "WORKER_X": "WORKERS_MAX",
}  # fmt: skip
NOISE = """
    PATH HOME LESS LANG LC_ALL SHELL TERM EDITOR PWD OLDPWD USER LOGNAME MAIL HOSTNAME DISPLAY TMPDIR SHLVL COLUMNS LINES CI DEBUG HOST PORT MODE
    SERVICE_NAME OTEL_SERVICE_NAME CLUSTER_NAME LOG_DIR LOG_FILE HTTP_PROXY HTTPS_PROXY NO_PROXY no_proxy HTTP_PORT SUBNET MODEL MODEL_DIR MODEL_NAME
    MEMORY_LIMIT QUEUE_URL HEALTH_CHECK REQUESTS_CA_BUNDLE SEEDS TRACEPARENT TRACE_ID RATE_LIMIT REQUEST_ID POLICY_NAME ENGINE_URL BIND_ADDR RETRY
    WORKSPACE NODE_NAME SLOT JOB_COMPLETION_INDEX NVIDIA_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES PYTHONPATH PYTHONUNBUFFERED VIRTUAL_ENV TAG REGISTRY
    OVERLAY REPLICAS KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_SERVICE_PORT_HTTPS KUBERNETES_PORT_443_TCP
    KUBERNETES_PORT_443_TCP_ADDR CENTRAL_COORDINATOR_SERVICE_HOST CENTRAL_COORDINATOR_PORT_9000_UDP COORDINATOR_SERVICE_HOST COORDINATOR_SERVICE_PORT
    COORDINATOR_SERVICE_PORT_HTTP COORDINATOR_PORT_9000_UDP COORDINATOR_PORT_9000_UDP_PROTO COORDINATOR_PORT_9000_UDP_PORT
    COORDINATOR_PORT_9000_UDP_ADDR COORDINATOR_PORT_8080_TCP WORKER_SERVICE_HOST WORKER_PORT_8000_UDP_ADDR worker_timout Worker_Timout
"""


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_variable_is_noticed_and_what_was_meant(name: str) -> None:
    assert misspelt({name: "1", **LOCAL}, ["REQUESTS_CSV"]) == {name: MISSPELT[name]}


def test_the_usual_noise_of_an_environment_is_not() -> None:
    assert misspelt(dict.fromkeys(NOISE.split(), "1")) == {}
    assert misspelt({"WORKER_A_PORT": "udp://10.0.0.1:8000", "COORDINATOR_EAST_PORT": "tcp://10.0.0.1:80"}) == {}
    assert misspelt({f.metadata["env"]: "1" for f in dataclasses.fields(Config)}) == {}


def test_all_of_them_are_one_line_that_can_be_shown() -> None:
    line = describe_misspelt(misspelt({"WORKER_TIMOUT": "1", "WORKER_PROT": "2", "SLLM_MODE_OF_OPERATION": "3", "WORKER_\u202eX": "4", "WORKER_\n": "5"}))
    assert line == "ignored, as no variables of ours: SLLM_MODE_OF_OPERATION, WORKER_PROT (is WORKER_PORT meant?), WORKER_TIMOUT (is WORKER_TIMEOUT meant?)"
