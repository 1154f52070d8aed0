"""The base of messages and events: immutable records with named fields, compared, shown and copied field by field.

A record is a plain class with `__slots__`, its fields in order, and an `__init__` with the same order of parameters. This form is the fastest to make and to
read, both interpreted and compiled (bench/README.md has the figures). No code assigns to a field after `__init__`; tests hold that.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

R = TypeVar("R", bound="Record")


class Record:
    """Base of every message and event. `FIELDS` names the parameters of `__init__` in their order."""

    __slots__ = ()
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def values(self) -> tuple[Any, ...]:
        """The values of the fields, in order."""
        return tuple([getattr(self, name) for name in self.FIELDS])

    def replace(self: R, **changes: Any) -> R:
        """A copy with other values for some fields. TypeError for a name that is no field."""
        return type(self)(**(dict(zip(self.FIELDS, self.values(), strict=True)) | changes))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.values() == other.values()

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in zip(self.FIELDS, self.values(), strict=True))
        return f"{type(self).__name__}({fields})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.values()
