"""Named random streams of one seed.

Each part of a run draws from a stream of its own, so that a change in one part (another policy, another arrival process) leaves the
draws of all others as they were, and two runs can be compared request by request.
"""

from __future__ import annotations

import random


def rng_for(seed: int, name: str) -> random.Random:
    """The stream `name` of `seed`: always the same draws, in any process.

    Seeding from text goes through SHA-512 (CPython's `random.seed`, version 2), so the streams of neighbouring seeds and names are
    unrelated and do not depend on PYTHONHASHSEED.
    """
    return random.Random(f"{seed}/{name}")
