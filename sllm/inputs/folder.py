"""Folders whose files are found by listing them: each file adds something under its name, and one that cannot be imported takes nothing from the others."""

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
            folder, _, stem = info.name.replace(".", "/").rpartition("/")
            broken[stem] = _where_and_why(error, Path(folder, f"{stem}.py"))
    return Folder(dict(sorted(found.items())), broken)


def import_file(path: Path) -> ModuleType:
    """Import a file that is in no package, anew each time. UsageError, with line and reason, if it cannot be imported."""
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
