"""A dictionary of what happened lately, for answers that may be asked for again.

Entries are forgotten a generation at a time. To take out old keys one by one costs each entry a deletion, and every look for the oldest one a walk past
those deleted before it; here forgetting is one assignment, however many entries there are.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Two generations of entries. Put in with `recent.new[key] = value`; it stays until its owner has called `turn` twice."""

    __slots__ = ("new", "old")

    def __init__(self) -> None:
        self.new: dict[K, V] = {}
        self.old: dict[K, V] = {}

    def __len__(self) -> int:
        return len(self.new) + len(self.old)

    def __contains__(self, key: object) -> bool:
        return key in self.new or key in self.old

    def get(self, key: K) -> V | None:
        """The entry, or None."""
        value = self.new.get(key)
        return value if value is not None else self.old.get(key)

    def discard(self, key: K) -> None:
        """Forget one entry now, if it is there."""
        self.new.pop(key, None)
        self.old.pop(key, None)

    def turn(self) -> None:
        """Forget the older generation; what is new becomes old."""
        self.old, self.new = self.new, {}
