"""Any worker: the baseline that every other policy must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sllm.placement.base import FleetView, Placement, Policy, Query, placed_on


@dataclass
class Random(Policy):
    """Uniform over the workers that admit the request, wherever the model is."""

    name: ClassVar[str] = "random"

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        row = fleet.any_admitting(query)
        return placed_on(row, query, fleet, "random") if row else None
