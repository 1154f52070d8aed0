"""A mark for the compiler (`make fast`); the interpreter passes over it. This module itself is not compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

T = TypeVar("T", bound=type)

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**attributes: Any) -> Callable[[T], T]:
        """Say something of a class to the compiler, such as allow_interpreted_subclasses=True."""
        return lambda kind: kind
