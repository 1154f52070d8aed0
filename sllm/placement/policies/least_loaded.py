"""Join the shortest queue: exact, by the buckets of load that the fleet keeps up to date."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sllm.placement.base import FleetView, Placement, Policy, Query, placed_on


@dataclass
class LeastLoaded(Policy):
    """A worker with the fewest requests running, waiting or in flight, drawn among equals. With stale reports it herds: see docs/validation.md."""

    name: ClassVar[str] = "least_loaded"

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        drawn = fleet.admitted(fleet.sample_least_loaded(1 + len(query.exclude), query), query)
        row = drawn[0] if drawn else fleet.any_admitting(query)
        return placed_on(row, query, fleet, "shortest queue") if row else None
