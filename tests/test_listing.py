"""`--list` shows everything that the registries have, with parameters and defaults."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
from test_centralized_simulation import ROOT, environment, run

from config import Config
from sllm.engine import ENGINES
from sllm.models.presets import HARDWARE, MODELS
from sllm.placement.registry import policies
from sllm.run.command_line import LISTINGS
from sllm.run.listing import LISTS, render_listing
from sllm.virtual.faults import COMMON, RANDOM_KEYS
from sllm.virtual.kinds import KINDS
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.lengths import LENGTHS
from sllm.workload.traces import FORMATS

NAMES = {
    "policies": list(policies()), "hardware": list(HARDWARE), "models": list(MODELS), "traces": [*FORMATS, "columns"], "engines": list(ENGINES),
    "faults": [*KINDS, *COMMON, *RANDOM_KEYS, "per_minute"], "arrivals": list(ARRIVALS), "lengths": list(LENGTHS),
}  # fmt: skip


@pytest.mark.parametrize("what", LISTINGS)
def test_everything_there_is_is_listed(what: str) -> None:
    text = run("--list", what).stdout
    assert text == render_listing(what, Config())
    for name in NAMES[what]:
        assert re.search(rf"(^|[\s\"]){re.escape(name)}\b", text, re.MULTILINE), name


def test_the_lists_are_those_of_the_command_line() -> None:
    assert tuple(LISTS) == LISTINGS
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(Config)}
    assert tuple(ENGINES) == choices["engine"]
    assert tuple(ARRIVALS) == choices["arrivals"]
    assert "choose from" in run("--list", "nothing", expect=2).stderr


def test_parameters_stand_there_with_defaults_and_units() -> None:
    assert "sample=8, margin_s=0.25 (s), eviction_s=0.2 (s)" in render_listing("policies", Config())
    assert "--service-mean (default 1 s)" in render_listing("engines", Config())
    queue = render_listing("engines", Config()).partition("queue\n")[2].partition("Engine profiles")[0]
    assert "--loader" not in queue
    assert "--service-load" in queue
    assert "factor: factor on the time that everything on the host takes (required)" in render_listing("faults", Config())
    h100 = next(line.split() for line in render_listing("hardware", Config()).splitlines() if line.startswith("h100-80g "))
    assert h100[1:9] == ["80", "256", "3000", "52.3", "23.7", "1.25", "3350", "989"]


def test_a_catalogues_own_models_and_hardware_are_listed() -> None:
    catalog = str(ROOT / "examples" / "catalog.toml")
    models = run("--list", "models", "--catalog", catalog).stdout
    assert models.index("support-bot-6") < models.index("Presets")
    assert run("--list", "hardware", "--catalog", catalog).stdout.splitlines()[1].startswith("our-box")


def test_a_list_that_cannot_be_written_is_said() -> None:
    command = [sys.executable, str(ROOT / "centralized_simulation.py"), "--list", "policies"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
