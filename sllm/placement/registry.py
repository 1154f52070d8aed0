"""Policies by name, found by listing this folder, and their parameters from text such as `power_of_two:choices=3`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sllm.inputs.folder import Folder, import_file, read_folder
from sllm.placement import policies as folder
from sllm.placement.base import Policy
from sllm.protocol.errors import UsageError

WHOLE = ("int", int)  # the type of a field, with and without postponed annotations
PARAMETER_MAX = 1e9  # of any parameter, either way: not what a policy can use, but what it can compute with


def policies() -> dict[str, type[Policy]]:
    """Every policy in this folder, by name, in alphabetical order. A file that cannot be imported has none."""
    return _list_folder().found


def broken_policies() -> list[str]:
    """What is wrong with the files of this folder that cannot be imported: file, line and reason of each. Runs with other policies go on."""
    return list(_list_folder().broken.values())


@cache
def _list_folder() -> Folder[type[Policy]]:
    return read_folder(folder, _policies_of)


def _policies_of(module: ModuleType) -> dict[str, type[Policy]]:
    kinds = (kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Policy) and kind.__module__ == module.__name__)
    return {kind.name: kind for kind in kinds if not inspect.isabstract(kind)}


def _read_number(label: str, text: str, *, whole: bool) -> float:
    """The value of a parameter. UsageError, which begins with `label`, for what is no number up to `PARAMETER_MAX`; what else must hold, the policy says."""
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"{label} must be {'a whole number' if whole else 'a number'}") from None
    if not -PARAMETER_MAX <= number <= PARAMETER_MAX:
        raise UsageError(f"{label} must be a number from {-PARAMETER_MAX:.0f} to {PARAMETER_MAX:.0f}")
    return number


def make_policy(text: str) -> Policy:
    """The policy that `NAME[:key=value,...]` describes, or `FILE.py[:NAME][:key=value,...]`, where it is in a file of the user's own. UsageError names an
    unknown policy or parameter, a value that does not fit, and a file that cannot be read."""
    file = _FILE.match(text)
    name, rest, kind = _of_file(file[1], file[2] or "") if file else _of_folder(text)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        field = fields.get(key)
        if field is None or not equals:
            raise UsageError(f"policy {name!r}: {part!r} is not one of its parameters ({', '.join(fields) or 'it has none'})")
        if key in values:
            raise UsageError(f"policy {name!r}: {key} is given twice")
        values[key] = _read_number(f"policy {name!r}: {key}={value!r}", value, whole=field.type in WHOLE)
    try:
        return kind(**values)
    except ValueError as error:
        raise UsageError(f"policy {name!r}: {error}") from None


_FILE = re.compile(r"(.*\.py)(?::(.*))?$", re.DOTALL)


def _of_folder(text: str) -> tuple[str, str, type[Policy]]:
    """Name, parameters and class of a policy of this folder."""
    name, _, rest = text.partition(":")
    kind = policies().get(name)
    if kind is None:
        broken = _list_folder().broken
        if name in broken:
            raise UsageError(f"policy {name!r} cannot be read: {broken[name]}")
        others = f"; not readable: {'; '.join(broken.values())}" if broken else ""
        raise UsageError(f"policy {name!r} is not known; there are {', '.join(policies())}{others}, or FILE.py of your own")
    return name, rest, kind


def _of_file(path: str, rest: str) -> tuple[str, str, type[Policy]]:
    """The same of a policy in a file: the one that is named, or the only one that is there."""
    name, _, parameters = ("", "", rest) if "=" in rest.partition(":")[0] else rest.partition(":")
    found = _read_file(Path(path))
    if not found:
        raise UsageError(f"policy {path}: has no policy: a class that derives from sllm.placement.base.Policy, with a name and a method place")
    if not name and len(found) > 1:
        raise UsageError(f"policy {path}: has several policies: say which: {', '.join(f'{path}:{one}' for one in found)}")
    kind = found.get(name or next(iter(found)))
    if kind is None:
        raise UsageError(f"policy {path}: has no policy {name!r}; there are {', '.join(found)}")
    return kind.name, parameters, kind


@cache
def _read_file(path: Path) -> dict[str, type[Policy]]:
    """The policies of a file, by name. The cache makes every coordinator of a run have the same class."""
    try:
        return _policies_of(import_file(path))
    except UsageError as error:
        raise UsageError(f"policy {path}: {error}") from None
