"""Folders whose files are found by listing them: each file adds something under its name, and one that cannot be imported takes nothing from the others."""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Folder(NamedTuple, Generic[T]):
    """What the files of a package add, by name in alphabetical order, and what is wrong with those that cannot be imported, by the file's name without
    its ending: file, line and reason, on one line."""

    found: dict[str, T]
    broken: dict[str, str]


def read_folder(package: ModuleType, take: Callable[[ModuleType], dict[str, T]]) -> Folder[T]:
    """Import every file of the package; `take` says what a module adds."""
    found: dict[str, T] = {}
    broken: dict[str, str] = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        try:
            found |= take(importlib.import_module(info.name))
        except (Exception, SystemExit) as error:  # whatever a file does when it is imported
            broken[info.name.rpartition(".")[2]] = _where_and_why(error, info.name)
    return Folder(dict(sorted(found.items())), broken)


def _where_and_why(error: BaseException, module: str) -> str:
    folder, _, stem = module.replace(".", "/").rpartition("/")
    name = f"{stem}.py"
    if isinstance(error, SyntaxError) and error.filename:
        name, line, reason = Path(error.filename).name, error.lineno, error.msg
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == name]
        line, reason = lines[-1] if lines else None, " ".join(str(error).split())
    return f"{folder}/{name}{f', line {line}' if line is not None else ''}: {type(error).__name__}: {reason}"
