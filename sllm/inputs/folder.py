"""Folders whose Python files are found by listing: each file adds something under its name, and a file that cannot be imported does not affect the others."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

from sllm.protocol.errors import UsageError

T = TypeVar("T")


class Folder(NamedTuple, Generic[T]):
    """`found`: the things that the files of a package add, by name in alphabetical order. `broken`: for each file that cannot be imported, under its name
    without the ending, one line with file, line and reason."""

    found: dict[str, T]
    broken: dict[str, str]


def read_folder(package: ModuleType, take: Callable[[ModuleType], dict[str, T]]) -> Folder[T]:
    """Import every file of the package; take(module) returns the things that a module adds, by name."""
    found: dict[str, T] = {}
    broken: dict[str, str] = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        try:
            found |= take(importlib.import_module(info.name))
        except (Exception, SystemExit) as error:  # a file can raise anything when it is imported
            folder, _, stem = info.name.replace(".", "/").rpartition("/")
            broken[stem] = _where_and_why(error, Path(folder, f"{stem}.py"))
    return Folder(dict(sorted(found.items())), broken)


def import_file(path: Path) -> ModuleType:
    """Import a file that is in no package; each call imports the file anew. UsageError, with line and reason, if the file cannot be imported."""
    name = f"{path.stem} of {path.resolve()}"
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        why = error.strerror if isinstance(error, OSError) and error.filename == str(path) else _where_and_why(error, path)
        raise UsageError(f"cannot be read: {why}") from None
    return module


def _where_and_why(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        path, line, reason = path.with_name(Path(error.filename).name), error.lineno, error.msg
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
        line, reason = lines[-1] if lines else None, " ".join(str(error).split())
    return f"{path}{f', line {line}' if line is not None else ''}: {type(error).__name__}: {reason}"
