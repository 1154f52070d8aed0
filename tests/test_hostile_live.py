"""The live drill of experiments/hostile.py: real processes, a flood signed with their key, an honest client beside it. HOSTILE_S sets its length in seconds."""

from __future__ import annotations

import os

import pytest

from experiments.hostile import TIMEOUT_S, drill

DURATION_S = float(os.environ.get("HOSTILE_S", "20"))


@pytest.mark.parametrize("stolen", [pytest.param(False, id="own ids"), pytest.param(True, id="stolen ids")])
def test_a_live_fleet_outlives_a_flood_of_its_own_key(stolen: bool) -> None:
    """Nobody ends and nobody's exceptions are caught. Under ids of its own the client completes 99 % meanwhile; under stolen ones the fleet is whole again
    within two timeouts of the flood's end, and serves everything."""
    outcome = drill(DURATION_S, stolen=stolen)
    assert outcome.problems == []
    assert outcome.said > 50.0 * DURATION_S
    assert outcome.whole_after_s <= 2.0 * TIMEOUT_S
