"""Policies by name, found by listing this folder, and their parameters from text such as `power_of_two:choices=3`."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from sllm import placement
from sllm.errors import UsageError
from sllm.placement.base import Policy


@cache
def policies() -> dict[str, type[Policy]]:
    """Every policy in this folder, by name, in alphabetical order."""
    found: dict[str, type[Policy]] = {}
    for module_info in pkgutil.iter_modules(placement.__path__, f"{placement.__name__}."):
        module = importlib.import_module(module_info.name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, Policy) and kind.__module__ == module.__name__ and not inspect.isabstract(kind):
                found[kind.name] = kind
    return dict(sorted(found.items()))


def make_policy(text: str) -> Policy:
    """The policy that `NAME[:key=value,...]` describes. UsageError names an unknown policy or parameter, or a value that does not fit."""
    name, _, rest = text.partition(":")
    kind = policies().get(name)
    if kind is None:
        raise UsageError(f"policy {name!r} is not known; there are {', '.join(policies())}")
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
