"""The better of two drawn at random (Mitzenmacher, IEEE TPDS 2001; Vvedenskaya, Dobrushin and Karpelevich 1996)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sllm.fleet.row import Row
from sllm.placement.base import FleetView, Placement, Policy, Query, placed_on


@dataclass
class PowerOfTwo(Policy):
    """Draw `choices` workers and take the one with the fewest requests running, waiting or in flight; the draw's order breaks ties.

    `corrected=0` believes the last reports as they are, without what was sent since: for the study of stale information only (docs/validation.md).
    """

    name: ClassVar[str] = "power_of_two"
    choices: int = 2
    corrected: int = 1

    def __post_init__(self) -> None:
        if self.choices < 1:
            raise ValueError(f"choices={self.choices} must be at least 1")
        if self.corrected not in (0, 1):
            raise ValueError(f"corrected={self.corrected} must be 0 or 1")

    def place(self, query: Query, fleet: FleetView) -> Placement | None:
        drawn = fleet.admitted(fleet.sample(self.choices, query), query)
        row = min(drawn, key=_depth if self.corrected else _reported) if drawn else fleet.any_admitting(query)
        return placed_on(row, query, fleet, f"shortest of {self.choices}") if row else None


def _depth(row: Row) -> int:
    return row.depth


def _reported(row: Row) -> int:
    return row.engine.running + row.engine.waiting
