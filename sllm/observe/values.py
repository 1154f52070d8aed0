"""Checks of the values of figures in the results. Each check takes the figure's path and value, and returns a list of errors, one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from sllm.observe.statistics import STATISTICS

Check = Callable[[str, Any], list[str]]
"""check(path, value): `path` is section and key, such as `fleet.ready`."""


def check_keys(where: str, content: dict[str, Any], keys: Sequence[str]) -> list[str]:
    """Errors unless all `keys` are there, in this order. Unknown keys are ignored, because a later version may have added them."""
    wrong = [f"{where}: {key!r} is missing" for key in keys if key not in content]
    known = [key for key in content if key in keys]
    if not wrong and known != list(keys):
        wrong.append(f"{where}: the keys are out of order: {', '.join(content)}")
    return wrong


def _unless(right: bool, path: str, value: Any, what: str) -> list[str]:
    return [] if right else [f"{path}: {value!r} {what}"]


def is_count(value: Any) -> bool:
    """Whether the value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def text(path: str, value: Any) -> list[str]:
    return _unless(isinstance(value, str) and bool(value), path, value, "is not a text")


def text_or_empty(path: str, value: Any) -> list[str]:
    return _unless(isinstance(value, str), path, value, "is not a text")


def text_or_null(path: str, value: Any) -> list[str]:
    return [] if value is None else text(path, value)


def texts(path: str, value: Any) -> list[str]:
    return _unless(isinstance(value, list) and all(isinstance(item, str) for item in value), path, value, "is not a list of texts")


def flag(path: str, value: Any) -> list[str]:
    return _unless(isinstance(value, bool), path, value, "is neither true nor false")


def a_list(path: str, value: Any) -> list[str]:
    return _unless(isinstance(value, list), path, value, "is not a list")


def mapping(path: str, value: Any) -> list[str]:
    return _unless(isinstance(value, dict), path, value, "is not an object")


def counts_by_name(path: str, value: Any) -> list[str]:
    """A mapping from names to counts above 0; names with a count of 0 are left out."""
    if not isinstance(value, dict):
        return mapping(path, value)
    return [f"{path}: {value!r}: {number!r} is not a whole number above 0" for number in value.values() if not (is_count(number) and number)]


def distribution(path: str, value: Any) -> list[str]:
    return check_keys(path, value, STATISTICS) if isinstance(value, dict) else mapping(path, value)


def count(path: str, value: Any) -> list[str]:
    return _unless(is_count(value), path, value, "is not a whole number of at least 0")


def number(path: str, value: Any) -> list[str]:
    right = not isinstance(value, bool) and isinstance(value, int | float) and isfinite(value) and value >= 0
    return _unless(right, path, value, "is not a number of at least 0")


def number_or_null(path: str, value: Any) -> list[str]:
    return [] if value is None else number(path, value)


def part_or_null(path: str, value: Any) -> list[str]:
    """A number from 0 to 1, or null."""
    return number_or_null(path, value) or _unless(value is None or value <= 1, path, value, "is above 1")
