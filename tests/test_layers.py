"""Rules of the house, held by reading the source: who may import whom, who may touch clocks, sockets and pickles."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import OUTPUTS, SWITCHES, Config
from sllm.run.command_line import flag_fields

ROOT = Path(__file__).parent.parent
ROLES = ("coordinator", "worker", "client", "gossip")
FLOORS: tuple[tuple[str, ...], ...] = (
    ("sllm", "config", "sllm.protocol", "sllm.inputs"),
    ("client", "sllm.requests", "sllm.live", "sllm.virtual", "sllm.workload", "sllm.wire", "sllm.models"),
    ("sllm.observe", "sllm.verify", "sllm.engine", "sllm.fleet"),
    ("sllm.deploy", "sllm.service", "sllm.placement"),
    ("worker", "sllm.routing"),
    ("coordinator", "gossip"),
    ("sllm.run",),
    ("commands",),
    ("experiments",),
    ("bench",),
)
"""Rooms, floor by floor from the ground. A room imports rooms of its own floor and of those below."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

PURE_ROOMS = (
    "sllm.protocol", "sllm.requests", "sllm.wire", "sllm.fleet", "sllm.placement", "sllm.routing", "sllm.service", "sllm.engine", "sllm.models",
    "sllm.workload",
)  # fmt: skip
READERS = {  # modules of those rooms that read files or packages, which is their whole purpose
    "sllm.models.catalogue", "sllm.placement.registry", "sllm.workload.traces", "sllm.workload.traces.recorded", "sllm.workload.lengths",
    "sllm.workload.modelmap", "sllm.workload.shares", "sllm.workload.superpose",
}  # fmt: skip
IMPURE = {"time", "socket", "threading", "asyncio", "os", "logging", "selectors", "select", "signal", "subprocess", "secrets", "tempfile", "shutil"}
FILES = {"pathlib", "gzip", "importlib", "pkgutil"}
DRIVERS = {"sllm.live", "sllm.virtual"}
WITH_ENVIRONMENT = {"config", "sllm.deploy.key_secret"}
KNOW_CONFIG = {"sllm.run", "sllm.deploy", "commands", "experiments", "bench"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Module name and syntax tree of everything but the tests."""
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("sllm/**/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("bench/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> set[str]:
    """Modules that are imported, anywhere in the tree; of `from package import name` both package and package.name, for a name may be a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


MODULES = dict(sources())
RUNTIME = {name: tree for name, tree in MODULES.items() if name.split(".")[0] not in ("experiments", "bench")}


def room_of(module: str) -> str | None:
    """The room that a module is in; None if the module is not of this project."""
    parts = module.split(".")
    if parts[0] == "sllm":
        inner = ".".join(parts[:2])
        return inner if inner in FLOOR else "sllm" if len(parts) == 1 or inner in ("sllm.__version__", "sllm.COMPILED") else f"a new room {inner}"
    if parts[0].startswith("entrypoint_") or parts[0].endswith("_simulation"):
        return "commands"
    return parts[0] if parts[0] in FLOOR else None


ROOMS_USED = {
    name: {room for module in imports(tree) if ((room := room_of(module)) and module in MODULES) or (module.rsplit(".", 1)[0] in MODULES and room)}
    for name, tree in MODULES.items()
}  # fmt: skip


def is_pure(name: str) -> bool:
    return name in ROLES or room_of(name) in PURE_ROOMS


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_roles_and_mechanisms_do_no_io(name: str) -> None:
    used = {module.split(".")[0] for module in imports(MODULES[name])}
    assert not used & IMPURE
    calls = {node.func.id for node in ast.walk(MODULES[name]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    if name not in READERS:
        assert not used & FILES
        assert not calls & {"open", "print", "input", "exec", "eval", "compile", "__import__"}


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_randomness_is_passed_in(name: str) -> None:
    """`random` is imported for the class Random only, and no function of the module is called."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert {alias.name for alias in node.names} == {"Random"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{name}: random.{node.attr}"


def test_every_module_has_a_room() -> None:
    assert [name for name in MODULES if room_of(name) not in FLOOR] == []


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_point_down(name: str) -> None:
    floor = FLOOR[str(room_of(name))]
    assert {room for room in ROOMS_USED[name] if FLOOR[room] > floor} == set()


def test_no_two_rooms_import_each_other() -> None:
    """Nor does a longer way of imports lead back to where it began."""
    ways: dict[str, set[str]] = {}
    for name, used in ROOMS_USED.items():
        room = str(room_of(name))
        ways.setdefault(room, set()).update(used - {room})
    while leaves := [room for room, used in ways.items() if not used & ways.keys()]:
        for room in leaves:
            del ways[room]
    assert ways == {}


@pytest.mark.parametrize("name", list(RUNTIME))
def test_a_driver_knows_no_role_and_no_other_driver(name: str) -> None:
    room = room_of(name)
    if room in DRIVERS:
        assert not ROOMS_USED[name] & (DRIVERS | set(ROLES)) - {room}
    if name in ROLES:
        assert not ROOMS_USED[name] & (DRIVERS | set(ROLES)) - {name}


def test_only_those_who_assemble_processes_know_the_configuration() -> None:
    assert [name for name, used in ROOMS_USED.items() if "config" in used and room_of(name) not in KNOW_CONFIG | {"config"}] == []


def test_the_configuration_knows_nothing_of_the_project() -> None:
    assert ROOMS_USED["config"] == set()


def test_numbers_that_people_read_are_written_out() -> None:
    """`:g` without a number of digits writes 1e+06 and rounds to six."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("sllm/**/*.py"), *ROOT.glob("experiments/*.py")]
    assert [path.name for path in sources if ":g}" in path.read_text(encoding="utf-8")] == []


def test_only_the_wire_unpickles() -> None:
    assert [name for name, tree in RUNTIME.items() if {"pickle", "marshal", "shelve"} & imports(tree)] == ["sllm.wire.codecs.pickle"]


def test_only_commands_read_the_environment() -> None:
    """`config` reads it for `from config import config`; nothing below does."""
    for name, tree in RUNTIME.items():
        if room_of(name) == "commands" or name in WITH_ENVIRONMENT:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("environ", "getenv"), name


def test_it_runs_with_the_standard_library_alone() -> None:
    own = {name.split(".")[0] for name in MODULES}
    for name, tree in RUNTIME.items():
        foreign = {module.split(".")[0] for module in imports(tree)} - own - set(sys.stdlib_module_names)
        assert not foreign, f"{name} imports {foreign}"


def documented(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def test_every_flag_and_variable_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [field.metadata["env"] for field in dataclasses.fields(Config)] + [field.metadata["flag"] for field in flag_fields()]
    words += [word for flag, env, *_ in (*OUTPUTS, *SWITCHES) for word in (flag, env)]
    assert [word for word in words if not documented(text, word)] == []
