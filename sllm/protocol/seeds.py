"""Named random number generators of one seed.

Each part of a run draws from a generator of its own, so that a change in one part (another policy, another arrival process) does not change the draws of the
other parts, and two runs can be compared request by request.
"""

from __future__ import annotations

import random


def rng_for(seed: int, name: str) -> random.Random:
    """The generator called `name` of the seed `seed`: the same draws in every process.

    Seeding from text goes through SHA-512 (CPython's `random.seed`, version 2), so generators of neighbouring seeds and names are unrelated and do not
    depend on PYTHONHASHSEED.
    """
    return random.Random(f"{seed}/{name}")
