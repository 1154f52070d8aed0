"""The form of every event and message: a plain class whose fields are the parameters of its `__init__`, and which nobody changes once it is made."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeGuard

import pytest

from sllm.protocol import events
from sllm.protocol.record import Record

ROOT = Path(__file__).parent.parent
HOLDERS: tuple[ModuleType, ...] = (events,)  # modules whose records are looked at
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("sllm/**/*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("bench/*.py")])
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def records_of(module: ModuleType) -> list[type[Record]]:
    """The records that a module defines, without their bases, which have no fields."""
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Record)]
    return [kind for kind in kinds if kind.__module__ == module.__name__ and kind.FIELDS]


RECORDS = [kind for module in HOLDERS for kind in records_of(module)]
NAMES = {kind.__name__ for module in HOLDERS for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Record)}
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def names_in(tree: ast.AST | None) -> set[str]:
    """Every name in an annotation or a call, also behind a dot."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree is not None else set()
    return found | ({node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} if tree is not None else set())


def variables_of_records(function: Function) -> set[str]:
    """The variables of a function that hold a record: `event`, those annotated with one, and those that one is made for."""
    arguments = function.args
    held = {"event"}
    held |= {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if names_in(one.annotation) & NAMES}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and names_in(node.annotation) & NAMES:
            held.add(node.target.id)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and names_in(node.value.func) & NAMES:
            held |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return held


def is_changed(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """An attribute that is assigned or deleted."""
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)


def changes_of_records(tree: ast.AST) -> Iterator[int]:
    """The lines on which a record is changed: an attribute of such a variable is assigned or deleted, or `setattr` is called with it; and where a method of
    a record assigns an attribute, `__init__` aside."""
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        held = variables_of_records(function)
        for node in ast.walk(function):
            if is_changed(node) and isinstance(node.value, ast.Name) and node.value.id in held:
                yield node.lineno
            if isinstance(node, ast.Call) and names_in(node.func) & {"setattr", "__setattr__"} and node.args and names_in(node.args[0]) & held:
                yield node.lineno
    for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and {name for base in node.bases for name in names_in(base)} & NAMES):
        for method in (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"):
            yield from (node.lineno for node in ast.walk(method) if is_changed(node))


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_has_the_form_of_records(kind: type[Record]) -> None:
    assert tuple(inspect.signature(kind).parameters) == kind.FIELDS
    assert kind.__slots__ == kind.FIELDS
    assert (kind.__doc__ or "").endswith(".")
    assert kind.__doc__ != Record.__doc__
    values = tuple(range(len(kind.FIELDS)))
    assert kind(*values).values() == values, "each parameter goes to the field of its name"


def test_there_are_records_and_every_event_says_when_it_happened() -> None:
    assert len(RECORDS) >= 30
    assert [kind for kind in records_of(events) if not issubclass(kind, events.Event) or kind.FIELDS[0] != "at"] == []


@pytest.mark.parametrize("name", list(TREES))
def test_nobody_changes_a_record(name: str) -> None:
    assert list(changes_of_records(TREES[name])) == []


@pytest.mark.parametrize("code", [
    "def hear(node, event):\n    event.at = 1.0",
    "def hear(node, told: RequestSent):\n    told.at += 1.0",
    "def hear(node, told: events.RequestSent | None):\n    (told.at, x) = 1.0, 2.0",
    "def tell(now):\n    told = RequestSent(now, 'r', 'm')\n    del told.at",
    "def hear(node, what):\n    told: RequestSent = what\n    for told.at in range(3): pass",
    "def hear(node, event):\n    object.__setattr__(event, 'at', 1.0)",
    "class RequestSeen(Event):\n    def __init__(self, at):\n        self.at = at\n    def move(self):\n        self.at = 0.0",
])  # fmt: skip
def test_a_change_of_a_record_would_be_seen(code: str) -> None:
    assert len(list(changes_of_records(ast.parse(code)))) == 1
