"""A policy of one's own: the warm worker with the fewest requests, else the least loaded one. `--policy examples/policy.py`"""

from dataclasses import dataclass

from sllm.placement.base import FleetView, Placement, Policy, Query, placed_on


@dataclass
class WarmFirst(Policy):
    name = "warm_first"
    most: int = 4  # requests on a warm worker beyond which another one loads the model too

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        warm = [row for row in fleet.admitted(fleet.warm(query.model).rows, query) if row.depth < self.most]
        row = min(warm or fleet.admitted(fleet.sample_least_loaded(2, query), query), key=lambda row: row.depth, default=None)
        row = row or fleet.any_admitting(query)
        return placed_on(row, query, fleet, "warm" if warm else "least loaded") if row else None
