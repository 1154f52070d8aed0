"""Configuration from the environment: defaults by place, every value checked, errors that name the variable."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import config as config_module
from config import Config
from sllm.errors import UsageError

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


BAD = [
    ("COORDINATOR_PORT", "70000", "at most 65535"), ("COORDINATOR_PORT", "nine", "whole number"), ("REPORT_INTERVAL", "-1", "at least 0"),
    ("REPORT_INTERVAL", "nan", "number"), ("WORKER_TIMEOUT", "0", "above 0"), ("LOG_FORMAT", "xml", "text, json"), ("DEPLOYMENT_MODE", "moon", "kubernetes"),
    ("MEMORY_THRESHOLD", "1.5", "at most 1"), ("WORKERS", "1.5", "whole number"), ("RATE", "inf", "number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_a_bad_value_names_its_variable(name: str, value: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
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
