"""Rules of the house, held by reading the source: who may import whom, who may touch clocks, sockets and pickles."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator
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
    ("bench", "tools"),
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
PURE_LIBRARY = {  # what pure modules may import of the standard library: nothing that reaches out of the process or tells the time
    "__future__", "abc", "array", "bisect", "collections", "copy", "csv", "dataclasses", "decimal", "enum", "functools", "hashlib", "heapq", "hmac",
    "itertools", "json", "math", "operator", "pickle", "random", "re", "string", "struct", "typing", "types", "zlib",
}  # fmt: skip
PURE_NAMES = {  # and of these modules only that
    "datetime": {"date", "datetime", "timedelta", "timezone", "UTC"}, "io": {"BytesIO", "StringIO"}, "sys": {"intern"},
}  # fmt: skip
READERS_LIBRARY = {"gzip", "inspect", "io", "pathlib", "sys"}  # and what readers may import besides
FORBIDDEN_NAMES = {"open", "print", "input", "exec", "eval", "compile", "__import__", "__builtins__", "globals"}
CLOCKS = {"now", "utcnow", "today"}  # of a datetime or date
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv"}
UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "multiprocessing", "concurrent"}
DRIVERS = {"sllm.live", "sllm.virtual"}
WITH_ENVIRONMENT = {"config", "sllm.deploy.key_secret"}
KNOW_CONFIG = {"sllm.run", "sllm.deploy", "commands", "experiments", "bench"}
KNOW_ROLES = {"sllm.run", "commands", "experiments", "bench"}  # a role that is made of another one besides
MEET_NODES = {"sllm.protocol", "sllm.live", "sllm.virtual", "sllm.verify", "sllm.run", "sllm.deploy"}
ASKED_FOR_ATTRIBUTES = {"error", "owner", "base", "select", "self._poller", "value"}  # what those may ask for an attribute by its name: none is a node
NOT_OURS = {".venv", "build", "tests", "examples"}  # examples are files that a user would write
LINES_MAX, FUNCTION_LINES_MAX = 450, 60


def sources() -> Iterator[tuple[str, str]]:
    """Module name and text of everything but the tests."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in NOT_OURS:
            yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")


TEXTS = dict(sources())
MODULES = {name: ast.parse(text, name) for name, text in TEXTS.items()}
RUNTIME = {name: tree for name, tree in MODULES.items() if name.split(".")[0] not in ("experiments", "bench", "tools")}


def imports(tree: ast.AST) -> set[str]:
    """Modules that are imported, anywhere in the tree; of `from package import name` both package and package.name, for a name may be a module."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are written out in full"
            assert node.level == 0, "imports are written out in full"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def tops(tree: ast.AST) -> set[str]:
    """The outermost packages that are imported."""
    return {module.split(".")[0] for module in imports(tree)}


def room_of(module: str) -> str | None:
    """The room that a module is in; None if the module is not of this project."""
    parts = module.split(".")
    if parts[0] == "sllm":
        inner = ".".join(parts[:2])
        return inner if inner in FLOOR else "sllm" if len(parts) == 1 or inner in ("sllm.__version__", "sllm.COMPILED") else f"a new room {inner}"
    if parts[0].startswith("entrypoint_") or parts[0].endswith("_simulation"):
        return "commands"
    return parts[0] if parts[0] in FLOOR else None


def rooms_used(tree: ast.AST) -> set[str]:
    """The rooms that a module imports from. A name of a module counts with its module."""
    modules = {module for module in imports(tree) if module in MODULES or module.rpartition(".")[0] in MODULES}
    return {room for module in modules if (room := room_of(module))}


ROOMS_USED = {name: rooms_used(tree) for name, tree in MODULES.items()}


def is_pure(name: str) -> bool:
    return name in ROLES or room_of(name) in PURE_ROOMS


# --- what a module may not do: each rule says what it finds, and is tried on a cheat of its own -------------------------------------------


def find_io(name: str, tree: ast.AST) -> set[str]:
    """Ways out of the process, and clocks."""
    reads = name in READERS
    foreign = (tops(tree) & set(sys.stdlib_module_names)) - PURE_LIBRARY - (READERS_LIBRARY if reads else set())
    found = {module for module in foreign if module not in PURE_NAMES}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in PURE_NAMES and node.module in foreign:
            found.update(f"{node.module}.{alias.name}" for alias in node.names if alias.name not in PURE_NAMES[node.module])
        elif isinstance(node, ast.Import):
            found.update(f"{alias.name} as {alias.asname}" for alias in node.names if alias.asname and alias.name in PURE_NAMES)
        elif isinstance(node, ast.Attribute):
            base = node.value.id if isinstance(node.value, ast.Name) else ""
            tells_time = node.attr in CLOCKS and "datetime" in foreign
            if tells_time or (base in PURE_NAMES and base in foreign and node.attr not in PURE_NAMES[base]):
                found.add(f"{base}.{node.attr}")
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES - ({"open"} if reads else set()):
            found.add(node.id)
    return found


def find_randomness(name: str, tree: ast.AST) -> set[str]:
    """Randomness that nobody passed in: functions of the module `random`, which share one state, and generators that seed themselves."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            found.update(alias.name for alias in node.names if alias.name != "Random")
        elif isinstance(node, ast.Import):
            found.update(f"random as {alias.asname}" for alias in node.names if alias.name == "random" and alias.asname)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random" and node.attr != "Random":
            found.add(f"random.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("Random", "random.Random") and not node.args:
            found.add("a generator that seeds itself")
    return found if "random" in tops(tree) else set()


def find_environment(name: str, tree: ast.AST) -> set[str]:
    """The environment of the process, under whatever name `os` goes."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ENVIRONMENT and "os" in tops(tree))
    found = {ast.unparse(node) for node in attributes} - {"self.environ"}  # that was passed in
    return found | {module for module in imports(tree) if module.rpartition(".")[2] in ENVIRONMENT}


def find_unpicklers(name: str, tree: ast.AST) -> set[str]:
    """Modules that load pickles, some of them from another process."""
    return tops(tree) & UNPICKLERS


def find_dynamic_imports(name: str, tree: ast.AST) -> set[str]:
    """Imports that no rule here would see."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "__import__"}
    return found | tops(tree) & {"importlib", "pkgutil", "runpy", "imp"}


def find_guesses(name: str, tree: ast.AST) -> set[str]:
    """Attributes looked for by name on what may be a node: what a role can do is said by a Protocol (`sllm.protocol.capabilities`)."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"))
    literal = (node for node in calls if len(node.args) > 1 and isinstance(node.args[1], ast.Constant))
    return {ast.unparse(node.args[0]) for node in literal} - ASKED_FOR_ATTRIBUTES


def find_rounded_numbers(name: str, tree: ast.AST) -> set[str]:
    """`g` without a number of digits writes 1e+06 and rounds to six: nothing that people read."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and node.format_spec is not None and ast.unparse(node.format_spec) == "f'g'":
            found.add(ast.unparse(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "format" and ast.unparse(node.args[-1]) == "'g'":
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"%g|:g\}", node.value):
            found.add(node.value)
    return found


Rule = Callable[[str, ast.AST], set[str]]
CHEATS: list[tuple[Rule, str]] = [
    (find_io, "import time"), (find_io, "from os import path"), (find_io, "import socket as s"), (find_io, "import urllib.request"), (find_io, "f = open"),
    (find_io, "import io\nio.open('x')"), (find_io, "from io import open as o"), (find_io, "import sys\nsys.stdout.write('x')"),
    (find_io, "import sys as s\ns.stdin.read()"), (find_io, "from datetime import datetime\ndatetime.now()"), (find_io, "from pathlib import Path"),
    (find_io, "import gzip"), (find_io, "print('x')"), (find_io, "__builtins__['open']"), (find_io, "import glob"), (find_io, "def f():\n    import ctypes"),
    (find_randomness, "import random\nrandom.random()"), (find_randomness, "import random as r\nr.random()"), (find_randomness, "from random import choice"),
    (find_randomness, "from random import Random\nRandom()"), (find_randomness, "import random\nrandom.Random()"),
    (find_environment, "import os\nos.environ['X']"), (find_environment, "import os as o\no.getenv('X')"), (find_environment, "from os import environ as e"),
    (find_unpicklers, "import pickle as p"), (find_unpicklers, "from _pickle import loads"), (find_unpicklers, "from multiprocessing.connection import Client"),
    (find_dynamic_imports, "import importlib.util"), (find_dynamic_imports, "from importlib import import_module as i"),
    (find_dynamic_imports, "__import__('x')"),
    (find_guesses, "getattr(node, 'fleet', None)"), (find_guesses, "hasattr(host.node, 'drain')"),
    (find_rounded_numbers, "f'{x:g}'"), (find_rounded_numbers, "format(x, 'g')"), (find_rounded_numbers, "'%g s' % x"),
    (find_rounded_numbers, "'{:g}'.format(x)"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "cheat"), CHEATS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_rule_sees_who_breaks_it(rule: Rule, cheat: str) -> None:
    assert rule("coordinator", ast.parse(cheat))


def broken(rule: Rule, names: Iterable[str]) -> dict[str, set[str]]:
    """What a rule finds, by module."""
    names = list(names)
    assert names, "nothing was looked at"
    return {name: found for name in names if (found := rule(name, MODULES[name]))}


def test_roles_and_mechanisms_do_no_io() -> None:
    assert broken(find_io, filter(is_pure, MODULES)) == {}
    assert MODULES.keys() >= READERS, "a reader that is gone needs no leave"


def test_randomness_is_passed_in() -> None:
    assert broken(find_randomness, filter(is_pure, MODULES)) == {}
    assert broken(find_randomness, RUNTIME) == {}


def test_only_the_codec_of_pickles_unpickles_and_nothing_names_it() -> None:
    assert broken(find_unpicklers, RUNTIME) == {"sllm.wire.codecs.pickle": {"pickle"}}
    assert [name for name, tree in MODULES.items() if "sllm.wire.codecs.pickle" in imports(tree)] == []


def test_only_commands_read_the_environment() -> None:
    """`config` reads it for `from config import config`; nothing below does."""
    assert broken(find_environment, (name for name in RUNTIME if room_of(name) != "commands")).keys() == WITH_ENVIRONMENT


def test_imports_can_be_read() -> None:
    assert broken(find_dynamic_imports, RUNTIME).keys() == {"sllm.inputs.folder"}


def test_nobody_guesses_what_a_node_can_do() -> None:
    assert broken(find_guesses, (name for name in MODULES if name in ROLES or room_of(name) in MEET_NODES)) == {}


def test_numbers_that_people_read_are_written_out() -> None:
    assert broken(find_rounded_numbers, (name for name in MODULES if room_of(name) != "bench")) == {}


def test_it_runs_with_the_standard_library_alone() -> None:
    own = {name.split(".")[0] for name in MODULES}
    for_compilers = {"sllm.protocol.native": {"mypy_extensions"}}  # under TYPE_CHECKING
    assert broken(lambda name, tree: tops(tree) - own - set(sys.stdlib_module_names) - for_compilers.get(name, set()), RUNTIME) == {}


# --- who may import whom ------------------------------------------------------------------------------------------------------------------


def test_every_module_has_a_room() -> None:
    assert [name for name in MODULES if room_of(name) not in FLOOR] == []
    assert len(MODULES) > 150


@pytest.mark.parametrize("name", list(MODULES))
def test_imports_point_down(name: str) -> None:
    floor = FLOOR[str(room_of(name))]
    assert {room for room in ROOMS_USED[name] if FLOOR[room] > floor} == set()


@pytest.mark.parametrize(
    ("statement", "rooms"),
    [
        ("from sllm import live", {"sllm", "sllm.live"}), ("import sllm.live.udp as u", {"sllm.live"}),
        ("def f():\n    from sllm.live.udp import UdpDriver", {"sllm.live"}),
        ("import worker", {"worker"}), ("from worker import Worker", {"worker"}), ("import entrypoint_worker", {"commands"}), ("import socket", set()),
    ],
)  # fmt: skip
def test_an_import_is_seen_however_it_is_written(statement: str, rooms: set[str]) -> None:
    assert rooms_used(ast.parse(statement)) == rooms


def test_a_relative_import_is_an_error() -> None:
    for statement in ("from . import live", "from ..live import udp"):
        with pytest.raises(AssertionError, match="written out in full"):
            imports(ast.parse(statement))


def circle(ways: dict[str, set[str]]) -> set[str]:
    """What is on a way that leads back to where it began, or leads there."""
    left = dict(ways)
    while leaves := [one for one, used in left.items() if not used & left.keys()]:
        for one in leaves:
            del left[one]
    return set(left)


def at_run_time(tree: ast.Module) -> ast.AST:
    """Without what is imported for annotations only."""

    class Skip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else node

    return Skip().visit(ast.parse(ast.unparse(tree)))  # type: ignore[no-any-return]


def test_no_two_rooms_import_each_other() -> None:
    """Nor does a longer way of imports lead back to where it began."""
    ways: dict[str, set[str]] = {}
    for name, used in ROOMS_USED.items():
        room = str(room_of(name))
        ways.setdefault(room, set()).update(used - {room})
    assert circle(ways) == set()
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == {"a", "b", "c", "d"}


def test_no_two_files_import_each_other() -> None:
    """But for annotations, within one room."""
    ways = {name: {module for module in imports(at_run_time(tree)) if module in MODULES and module != name} for name, tree in MODULES.items()}
    packages = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    assert circle({name: used - packages if room_of(name) != "commands" else used for name, used in ways.items()}) == set()


def test_a_driver_knows_no_role_and_no_other_driver() -> None:
    found = {name: ROOMS_USED[name] & (DRIVERS | set(ROLES)) - {str(room_of(name))} for name in MODULES if room_of(name) in DRIVERS or name in ROLES}
    assert len(found) > 20
    assert {name: used for name, used in found.items() if used} == {}


def test_only_those_who_make_architectures_know_a_role() -> None:
    found = {str(room_of(name)) for name, used in ROOMS_USED.items() if used & set(ROLES) - {name}}
    assert found == KNOW_ROLES - {"experiments"}, "experiments build fleets as a command does"


def test_only_those_who_assemble_processes_know_the_configuration() -> None:
    assert [name for name, used in ROOMS_USED.items() if "config" in used and room_of(name) not in KNOW_CONFIG | {"config"}] == []
    assert any("config" in used for used in ROOMS_USED.values())


def test_the_configuration_knows_nothing_of_the_project() -> None:
    assert ROOMS_USED["config"] == set()


# --- sizes --------------------------------------------------------------------------------------------------------------------------------


def long_functions(name: str, text: str) -> Iterator[str]:
    """Functions that are longer than one can see whole, but for those that say why: `# long: reason` on the line above, decorators aside."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            says_why = re.fullmatch(r"\s*# long: \S.*", lines[first - 2]) if first > 1 else None
            if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES_MAX and not says_why:
                yield f"{name}.{node.name}"


def test_functions_and_files_can_be_seen_whole() -> None:
    found = {name for name, text in TEXTS.items() if text.count("\n") > LINES_MAX}
    found |= {function for name, text in TEXTS.items() for function in long_functions(name, text)}
    assert found == set()


def test_a_long_function_is_seen_and_may_say_why() -> None:
    body = "\n".join(["    pass"] * FUNCTION_LINES_MAX)
    assert list(long_functions("m", f"def f():\n{body}\n")) == ["m.f"]
    assert list(long_functions("m", f"# long: one table, read from top to bottom\n@cache\ndef f():\n{body}\n")) == []
    assert list(long_functions("m", f"# long:\ndef f():\n{body}\n")) == ["m.f"]
    assert list(long_functions("m", f"def f():\n{body}\n".replace("    pass\n", "", 1))) == []


# --- what is documented -------------------------------------------------------------------------------------------------------------------


def documented(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def test_every_flag_and_variable_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [field.metadata["env"] for field in dataclasses.fields(Config)] + [field.metadata["flag"] for field in flag_fields()]
    words += [word for flag, env, *_ in (*OUTPUTS, *SWITCHES) for word in (flag, env)]
    assert [word for word in words if not documented(text, word)] == []
