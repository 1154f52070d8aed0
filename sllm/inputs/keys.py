"""Rules for the values of keys in TOML tables. Each rule describes what is wrong with a value that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

from sllm.protocol.errors import UsageError

T = TypeVar("T")


class Rule(Protocol):
    """The values that a key takes."""

    def problem(self, value: Any) -> str:
        """What is wrong with the value, as `must be ...`; "" if the value fits."""

    def read(self, value: Any) -> Any:
        """A value that fits, converted to the type that the program uses."""


class Number(NamedTuple):
    """A number. `low` and `high` are inclusive bounds; `above`, an exclusive lower bound, replaces `low`."""

    low: float = 0.0
    above: float | None = None
    high: float = 1e9

    def problem(self, value: Any) -> str:
        inside = is_number(value) and (value >= self.low if self.above is None else value > self.above) and value <= self.high
        return "" if inside else f"must be a number, {self._range()}"

    def read(self, value: Any) -> float:
        return float(value)

    def _range(self) -> str:
        least = f"at least {self.low:.12g}" if self.above is None else f"above {self.above:.12g}"
        return f"{least} and at most {self.high:.12g}"


class Whole(NamedTuple):
    """A whole number between two bounds, which are inclusive. 2.0 counts as 2."""

    low: int = 0
    high: int = 1_000_000_000

    def problem(self, value: Any) -> str:
        inside = is_number(value) and self.low <= value <= self.high and value == int(value)
        return "" if inside else f"must be a whole number, at least {self.low} and at most {self.high}"

    def read(self, value: Any) -> int:
        return int(value)


class Flag:
    """true or false."""

    def problem(self, value: Any) -> str:
        return "" if isinstance(value, bool) else "must be true or false"

    def read(self, value: Any) -> bool:
        return bool(value)


class Names:
    """A list of names that is not empty; `such_as` is an example for the error text."""

    def __init__(self, what: str, such_as: str) -> None:
        self._wanted = f"must be a list of {what}, such as {such_as}"

    def problem(self, value: Any) -> str:
        fits = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
        return "" if fits else self._wanted

    def read(self, value: Any) -> list[str]:
        return list(value)


class Key(NamedTuple):
    """One key of a table."""

    rule: Rule
    meaning: str
    required: bool = False
    default: Any = None


def is_number(value: Any) -> bool:
    """Whether the value is a number. TOML's nan is not accepted, nor are true and false, which Python counts as numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def find(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The value of `known` under `name`. UsageError, which names the `kind` of thing and lists the known names, if there is none."""
    try:
        return known[name]
    except KeyError:
        raise UsageError(f"unknown {kind} {name!r}: must be one of {', '.join(known)}") from None
