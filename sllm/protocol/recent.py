"""A dictionary that forgets old entries, for answers that may be asked for again.

A whole generation of entries is forgotten at a time, by one assignment. Deleting the oldest keys one by one would cost a deletion for each entry, and each
search for the oldest key would walk past the places of keys deleted before.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Two generations of entries. `recent.new[key] = value` puts an entry in; the entry stays until the owner has called `turn` twice."""

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
        """Forget one entry now, if there is one under `key`."""
        self.new.pop(key, None)
        self.old.pop(key, None)

    def turn(self) -> None:
        """Forget the old generation; the new generation becomes the old one."""
        self.old, self.new = self.new, {}
