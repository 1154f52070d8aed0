"""Policies by name, found by listing this folder, and their parameters from text such as `power_of_two:choices=3`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from sllm import placement
from sllm.errors import UsageError
from sllm.placement.base import Policy


class _Folder(NamedTuple):
    policies: dict[str, type[Policy]]
    broken: dict[str, str]  # by the file's name without .py: file, line and what is wrong


def policies() -> dict[str, type[Policy]]:
    """Every policy in this folder, by name, in alphabetical order. A file that cannot be imported has none."""
    return _list_folder().policies


def broken_policies() -> list[str]:
    """What is wrong with the files of this folder that cannot be imported: file, line and reason of each. Runs with other policies go on."""
    return list(_list_folder().broken.values())


@cache
def _list_folder() -> _Folder:
    found: dict[str, type[Policy]] = {}
    broken: dict[str, str] = {}
    for module_info in pkgutil.iter_modules(placement.__path__, f"{placement.__name__}."):
        try:
            found |= _policies_of(importlib.import_module(module_info.name))
        except (Exception, SystemExit) as error:  # whatever a file does when it is imported
            stem = module_info.name.rpartition(".")[2]
            broken[stem] = _where_and_why(error, stem)
    return _Folder(dict(sorted(found.items())), broken)


def _policies_of(module: ModuleType) -> dict[str, type[Policy]]:
    kinds = (kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Policy) and kind.__module__ == module.__name__)
    return {kind.name: kind for kind in kinds if not inspect.isabstract(kind)}


def _where_and_why(error: BaseException, stem: str) -> str:
    """File, line and reason of a failed import, on one line."""
    name = f"{stem}.py"
    if isinstance(error, SyntaxError) and error.filename:
        name, line, reason = Path(error.filename).name, error.lineno, error.msg
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == name]
        line, reason = lines[-1] if lines else None, " ".join(str(error).split())
    place = f"{placement.__name__.replace('.', '/')}/{name}" + (f", line {line}" if line is not None else "")
    return f"{place}: {type(error).__name__}: {reason}"


def make_policy(text: str) -> Policy:
    """The policy that `NAME[:key=value,...]` describes. UsageError names an unknown policy or parameter, or a value that does not fit."""
    name, _, rest = text.partition(":")
    kind = policies().get(name)
    if kind is None:
        broken = _list_folder().broken
        if name in broken:
            raise UsageError(f"policy {name!r} cannot be read: {broken[name]}")
        others = f"; not readable: {'; '.join(broken.values())}" if broken else ""
        raise UsageError(f"policy {name!r} is not known; there are {', '.join(policies())}{others}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        field = fields.get(key)
        if field is None or not equals:
            raise UsageError(f"policy {name!r}: {part!r} is not one of its parameters ({', '.join(fields) or 'it has none'})")
        try:
            values[key] = int(value) if field.type == "int" else float(value)
        except ValueError:
            raise UsageError(f"policy {name!r}: {key}={value!r} must be {'a whole number' if field.type == 'int' else 'a number'}") from None
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(f"policy {name!r}: {error}") from None
