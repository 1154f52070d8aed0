"""The base of every placement policy. Policies are files that anybody adds, so this module and they are never compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from sllm.placement.base import FleetView, Placement, Query


class Policy(ABC):
    """Chooses a worker. State, if any, is its own; randomness comes with the query."""

    name: ClassVar[str]

    @abstractmethod
    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        """The placement, or None when no worker admits the request."""
