"""One worker after another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from sllm.placement.base import FleetView, Placement, Policy, Query, placed_on

TRIES = 64  # workers looked at before giving up on the order


@dataclass
class RoundRobin(Policy):
    """The next worker of the table that admits the request."""

    name: ClassVar[str] = "round_robin"
    _next: int = field(default=0, init=False)

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        count = fleet.count(query)
        for step in range(min(count, TRIES)):
            row = fleet.row_at((self._next + step) % count, query)
            if fleet.admits(row, query):
                self._next = (self._next + step + 1) % count
                return placed_on(row, query, fleet, "next in turn")
        other = fleet.any_admitting(query)
        return placed_on(other, query, fleet, "those next in turn are full") if other else None
