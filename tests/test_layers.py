"""Rules of the house, held by reading the source: who may import whom, who may touch clocks, sockets and pickles."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import Config
from sllm.cli import OUTPUTS, SWITCHES, flag_fields

ROOT = Path(__file__).parent.parent
ROLES = {"coordinator", "worker", "client"}
COMMANDS = {
    "simulation", "run", "system", "centralized_simulation", "entrypoint_coordinator", "entrypoint_worker", "entrypoint_client", "sllm.runtime.key_secret",
}  # fmt: skip
IMPURE = {"time", "socket", "threading", "asyncio", "os", "logging", "selectors", "select", "signal", "subprocess", "secrets"}
DRIVERS = ("sllm.runtime", "sllm.sim", "sllm.report")  # they meet the world: sockets, clocks, terminals


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Module name and syntax tree of everything that runs (tests, benchmarks and experiments left out)."""
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("sllm/**/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


MODULES = dict(sources())


def is_driver(name: str) -> bool:
    return name.startswith(DRIVERS)


def is_pure(name: str) -> bool:
    return name in ROLES or (name.startswith("sllm") and not is_driver(name))


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_roles_and_mechanisms_do_no_io(name: str) -> None:
    assert not {module.split(".")[0] for module in imports(MODULES[name])} & IMPURE


@pytest.mark.parametrize("name", [name for name in MODULES if is_pure(name)])
def test_randomness_is_passed_in(name: str) -> None:
    """`random` is imported for the class Random only, and no function of the module is called."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            assert {alias.name for alias in node.names} == {"Random"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{name}: random.{node.attr}"


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_point_down(name: str) -> None:
    used = imports(MODULES[name])
    if name == "config" or name.startswith("sllm"):
        assert not used & (ROLES | COMMANDS), "a mechanism knows no role"
    if name in ROLES:
        assert not {module for module in used if is_driver(module)}, "a role knows no driver"
        assert not used & (COMMANDS | ROLES - {name}), "a role knows no other role"
    if is_pure(name) and name.startswith("sllm"):
        assert not {module for module in used if is_driver(module)}, "a mechanism knows no driver"


def test_numbers_that_people_read_are_written_out() -> None:
    """`:g` without a number of digits writes 1e+06 and rounds to six."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("sllm/**/*.py"), *ROOT.glob("experiments/*.py")]
    assert [path.name for path in sources if ":g}" in path.read_text(encoding="utf-8")] == []


def test_only_the_wire_unpickles() -> None:
    assert [name for name, tree in MODULES.items() if {"pickle", "marshal", "shelve"} & imports(tree)] == ["sllm.wire"]


def test_only_commands_read_the_environment() -> None:
    """`config` reads it for `from config import config`; nothing below does."""
    for name, tree in MODULES.items():
        if name in COMMANDS or name == "config":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("environ", "getenv"), name


def test_it_runs_with_the_standard_library_alone() -> None:
    import sys

    own = {name.split(".")[0] for name in MODULES}
    for name, tree in MODULES.items():
        foreign = {module.split(".")[0] for module in imports(tree)} - own - set(sys.stdlib_module_names)
        assert not foreign, f"{name} imports {foreign}"


def documented(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def test_every_flag_and_variable_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [field.metadata["env"] for field in dataclasses.fields(Config)] + [field.metadata["flag"] for field in flag_fields()]
    words += [word for flag, env, *_ in (*OUTPUTS, *SWITCHES) for word in (flag, env)]
    assert [word for word in words if not documented(text, word)] == []
