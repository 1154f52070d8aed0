"""Capabilities: which role has which, and that code for nodes of any role asks for nothing else."""

from __future__ import annotations

import ast
from pathlib import Path
from random import Random

import pytest
from simulated import Fleet

from client import Client
from sllm.protocol.capabilities import CarriesRequests, HasEngine, MadeOfParts, ReportsLoad, TracksWorkers, capable
from sllm.protocol.node import Node

ROOT = Path(__file__).parent.parent
CAPABILITIES = (CarriesRequests, HasEngine, MadeOfParts, ReportsLoad, TracksWorkers)
FOR_ANY_ROLE = sorted([*ROOT.glob("sllm/verify/*.py"), *ROOT.glob("sllm/observe/*.py"), *ROOT.glob("sllm/run/*.py")])
REFLECTING = {  # what is looked up by name there, and is no attribute of a role
    "sllm/verify/world.py": {"owner", "base"},  # every table that an object has
    "sllm/observe/logs.py": {"record"},  # what a log line was given
    "sllm/observe/results.py": {"recorder"},  # columns
    "sllm/run/command_line.py": {"arguments", "config", "options"},  # flags
    "sllm/run/listing.py": {"thing", "value"},  # columns
}


def test_each_role_has_its_capabilities() -> None:
    fleet = Fleet(1, check=False)
    coordinator, worker, client = (fleet.world.hosts[name].node for name in ("coordinator", "worker-1", "client"))
    have = {node: [capability for capability in CAPABILITIES if capable(node, capability) is node] for node in (coordinator, worker, client)}
    assert have == {coordinator: [MadeOfParts, TracksWorkers], worker: [HasEngine, MadeOfParts, ReportsLoad], client: [CarriesRequests]}
    assert [capable(Node("n", 1), capability) for capability in CAPABILITIES] == [None] * len(CAPABILITIES)
    assert capable(None, TracksWorkers) is None


def test_a_class_of_nodes_is_looked_at_once() -> None:
    looks: list[object] = []

    class Looked(Client):
        @property
        def in_flight(self) -> int:
            looks.append(self)
            return 0

    fleet = Fleet(1, check=False)
    nodes = [Looked(fleet.config, ("coordinator", 9000), Random(number), number) for number in (1, 2)]
    assert [capable(node, CarriesRequests) for node in nodes for _ in range(3)] == [node for node in nodes for _ in range(3)]
    assert looks == [nodes[0]]


@pytest.mark.parametrize("path", FOR_ANY_ROLE, ids=lambda path: path.stem)
def test_no_attribute_of_a_role_is_looked_up_by_its_name(path: Path) -> None:
    looked_up = {
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
    }
    assert looked_up <= REFLECTING.get(path.relative_to(ROOT).as_posix(), set())
