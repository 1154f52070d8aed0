"""The compiled form of the program: the same results as the interpreted one, and no compiled module outlives a change of its source."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import compile as compiler

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(bool(compiler.problem()), reason=compiler.problem())


def copy_tree(to: Path) -> Path:
    """What git knows of this checkout, and what is new in it."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=tree, capture_output=True, text=True, timeout=280, check=False)


def files(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A compiled copy of this checkout."""
    made = copy_tree(tmp_path_factory.mktemp("compiled"))
    before = files(made)
    done = run(made, "tools/compile.py")
    assert done.returncode == 0, done.stdout + done.stderr
    yield made
    done = run(made, "tools/compile.py", "--remove")
    assert done.returncode == 0, done.stderr
    assert sorted(files(made) ^ before) == [], "what was compiled is removed, and nothing else"


def test_the_list_names_the_roles_and_what_every_message_runs_through() -> None:
    names = {str(path) for path in compiler.sources(ROOT)}
    assert {"coordinator.py", "worker.py", "client.py", "sllm/protocol/node.py", "sllm/engine/batch.py", "sllm/virtual/world.py"} <= names
    assert not [name for name in names if "policies" in name or "codecs" in name or "verify" in name], "files that people add stay interpreted"


@needs_compiler
def test_compiled_and_interpreted_runs_give_the_same_bytes(tree: Path) -> None:
    done = run(tree, "experiments/identical.py", "--pure")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"[2-9][0-9] configurations, 0 wrong", done.stderr), "twenty and more of them"


@needs_compiler
def test_results_say_that_the_program_was_compiled(tree: Path) -> None:
    flags = "--workers", "2", "--virtual", "--duration", "5", "--quiet", "--json", "-"
    assert [json.loads(run(where, "centralized_simulation.py", *flags).stdout)["wall"]["compiled"] for where in (tree, copy_of_source(tree))] == [True, False]


def copy_of_source(tree: Path) -> Path:
    """The same sources without what was compiled."""
    return copy_tree(tree.with_name("interpreted"))


@needs_compiler
def test_a_policy_of_ones_own_works_compiled(tree: Path) -> None:
    done = run(tree, "centralized_simulation.py", "--workers", "3", "--virtual", "--duration", "5", "--policy", "examples/policy.py", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


@needs_compiler
def test_a_source_that_changed_is_refused_by_name(tree: Path) -> None:
    source = tree / "sllm/protocol/node.py"
    before = source.read_bytes()
    source.write_bytes(before + b"\n")
    try:
        done = run(tree, "centralized_simulation.py", "--workers", "2", "--virtual", "--duration", "5")
    finally:
        source.write_bytes(before)
    assert (done.returncode, done.stderr) == (2, "sllm/protocol/node.py has changed since it was compiled: make fast, or make slow\n")
