"""A rate that changes in stages, written as in k6: `30s:5,60s:20,30s:0`.

Each stage is a length and the rate at its end. The rate changes linearly from the rate of the stage before, which is 0 before the first stage; a stage of
length 0 (`0s:20`) is a jump. Any arrival process can follow such a rate: the process runs at one arrival per unit of its own time, and that time passes as
fast as the rate says. A Poisson process stays a Poisson process, and the gaps of the other processes scale with the rate of the moment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sllm.protocol.errors import UsageError

UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION_MAX_S = 1e9
_STAGE = re.compile(r"\s*(\d+(?:\.\d+)?)(ms|s|m|h)\s*:\s*(\d+(?:\.\d+)?)\s*", re.ASCII)


class Stage(NamedTuple):
    """A stretch of time with a rate that changes linearly."""

    length_s: float
    rate_before: float  # requests a second at the begin of the stage
    rate_after: float  # requests a second at the end of the stage

    @property
    def requests(self) -> float:
        """Expected arrivals."""
        return self.length_s * (self.rate_before + self.rate_after) / 2.0


class Stages:
    """All stages, one after the other."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.stages = tuple(stages)
        self.duration_s = math.fsum(stage.length_s for stage in self.stages)
        self.requests = math.fsum(stage.requests for stage in self.stages)

    @classmethod
    def parse(cls, text: str) -> Stages:
        """The stages in `text`. UsageError for a part that is not LENGTH:RATE, and for stages in which no request arrives."""
        stages = []
        before = 0.0
        for part in text.split(","):
            match = _STAGE.fullmatch(part)
            if match is None:
                raise UsageError(f"stages {text!r}: {part.strip()!r} is not LENGTH:RATE such as 30s:5 (ms, s, m or h; requests a second)")
            stages.append(Stage(float(match[1]) * UNITS_S[match[2]], before, float(match[3])))
            before = float(match[3])
        made = cls(stages)
        if not 0.0 < made.requests < math.inf or made.duration_s > DURATION_MAX_S:
            raise UsageError(f"stages {text!r}: no request ever arrives" if not made.requests else f"stages {text!r}: too long, or too many requests")
        return made

    def stretch(self, times: Iterable[float]) -> Iterator[float]:
        """For each of `times`, the time in seconds at which the expected number of arrivals reaches it. `times` do not decrease and stay below `requests`."""
        stages = iter(self.stages)
        begin_s = begin_count = 0.0
        stage = next(stages)
        for count in times:
            while count - begin_count >= stage.requests:
                following = next(stages, None)
                if following is None:
                    return  # `count` exceeds the last stage by a rounding error
                begin_s, begin_count, stage = begin_s + stage.length_s, begin_count + stage.requests, following
            yield begin_s + _time_of(stage, count - begin_count)


def _time_of(stage: Stage, count: float) -> float:
    """Seconds of a stage until `count` arrivals are expected: the root of rate_before t + slope t^2 / 2 = count, in the form without cancellation."""
    slope = (stage.rate_after - stage.rate_before) / stage.length_s
    root = math.sqrt(max(0.0, stage.rate_before**2 + 2.0 * slope * count))
    return min(stage.length_s, 2.0 * count / (stage.rate_before + root)) if count else 0.0
