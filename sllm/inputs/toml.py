"""TOML files that people write: catalogues, fault schedules, model maps. Reading any such file gives tables of a bounded size or a UsageError."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sllm.protocol.errors import UsageError
from sllm.protocol.limits import NUMBER_MAX

NAME_SHOWN = 60  # characters of a name in an error
DEPTH_MAX = 50  # levels of nested tables and arrays; the files of this project need four at most


def read_text(path: str | Path, label: str) -> str:
    """The text of a UTF-8 file, without a byte order mark. UsageError, which begins with `label` and the path, if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        raise UsageError(f"{label} {path}: cannot be read: {reason}") from None


def read(path: str | Path, label: str) -> dict[str, Any]:
    """The tables in a file. UsageError, which begins with `label` and the path, as `read_text` and `parse`."""
    return parse(read_text(path, label), f"{label} {path}")


def read_pairs(path: str | Path, label: str, such_as: str) -> dict[str, Any]:
    """The pairs of name and value in a file without tables. UsageError as `read`, and for a table; `such_as` is an example for the error text."""
    pairs = read(path, label)
    for name, value in pairs.items():
        if isinstance(value, dict):
            raise UsageError(f"{label} {path}: {name[:NAME_SHOWN]!r} is a table; a name with a point in it needs quotes: {such_as}")
    return pairs


def parse(text: str, source: str) -> dict[str, Any]:
    """The tables in a text. UsageError, which begins with `source`, for bad TOML, for whole numbers beyond 64 bits and for deep nesting."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: {error}") from None
    except ValueError:  # Python reads no number of more than 4300 digits
        raise UsageError(f"{source}: {_TOO_LARGE}") from None
    except RecursionError:
        raise UsageError(f"{source}: {_TOO_DEEP}") from None
    _check_size(tables, source)
    return tables


_TOO_LARGE = "a whole number has too many digits: 64 bits must suffice"
_TOO_DEEP = f"tables or arrays are nested too deeply: at most {DEPTH_MAX} in each other"


def _check_size(tables: dict[str, Any], source: str) -> None:
    """UsageError for whole numbers beyond 64 bits and for deep nesting. Without recursion, because a key with 5,000 points makes 5,000 nested tables."""
    level: list[Any] = [tables]
    for _ in range(DEPTH_MAX):
        values = [value for one in level for value in (one.values() if isinstance(one, dict) else one)]
        if any(isinstance(value, int) and not -NUMBER_MAX <= value <= NUMBER_MAX for value in values):
            raise UsageError(f"{source}: {_TOO_LARGE}")
        level = [value for value in values if isinstance(value, dict | list)]
    if level:
        raise UsageError(f"{source}: {_TOO_DEEP}")
