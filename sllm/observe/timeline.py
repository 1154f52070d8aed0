"""What a fleet was like over time, in a bounded number of points however long the run is."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

from sllm.engine.base import EngineUsage

TIMELINE_MAX = 1024  # points of the fleet's states kept over time
LOOKS_MAX = 120  # looks at what is in use


class Look(NamedTuple):
    """What the whole fleet had in use up to a moment, and how many requests waited then."""

    at: float  # of the run's clock
    usage: EngineUsage  # the sum over the workers
    waiting: int


class UsageTimeline:
    """Looks at the fleet at equal steps from `begin`. When there are more than `LOOKS_MAX`, every other one is dropped and the step doubles.

    The looks are of integrals over time, so what lies between two of them is an exact mean whatever the step is; `waiting` is a sample.
    """

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self.step_s = 0.0

    def begin(self, look: Look, step_s: float) -> None:
        """The first look, and the step to begin with."""
        self.looks, self.step_s = [look], step_s

    @property
    def next_at(self) -> float:
        """When to look again."""
        return self.looks[0].at + len(self.looks) * self.step_s

    def add(self, look: Look) -> None:
        self.looks.append(look)
        if len(self.looks) > LOOKS_MAX:
            del self.looks[1::2]
            self.step_s *= 2.0

    def at(self, when: float) -> EngineUsage:
        """The integrals up to a moment, taken to grow evenly between two looks, and no more after the last."""
        looks = self.looks
        index = bisect_right(looks, when, key=lambda look: look.at)
        if index == 0 or index == len(looks):
            return looks[min(index, len(looks)) - 1 if index else 0].usage
        before, after = looks[index - 1], looks[index]
        return before.usage.plus(after.usage - before.usage, (when - before.at) / (after.at - before.at))

    def waiting(self, when: float) -> int:
        """Requests that waited at the last look before that."""
        index = bisect_right(self.looks, when, key=lambda look: look.at)
        return self.looks[max(0, index - 1)].waiting


class StateTimeline:
    """How many workers were in each state over time, in at most `TIMELINE_MAX` points: when there are more, the time step doubles."""

    def __init__(self) -> None:
        self.points: list[tuple[float, dict[str, int]]] = []  # (since, workers by state)
        self.counts: Counter[str] = Counter()
        self._states: dict[str, str] = {}
        self._step_s = 0.01
        self._ended = False

    def end(self) -> None:
        """What happens from now on is the end of the run itself, in which all workers go home: no part of what it was about."""
        self._ended = True

    def move(self, at: float, worker_id: str, state: str) -> None:
        """A worker is in a state now. What it was in before is remembered here: a coordinator that restarts has forgotten it."""
        old = self._states.get(worker_id)
        if old == state or self._ended:
            return
        self._states[worker_id] = state
        self.counts[state] += 1
        if old is not None:
            self.counts[old] -= 1
        points = self.points
        if points and int(points[-1][0] / self._step_s) == int(at / self._step_s):
            points.pop()
        points.append((at, {name: count for name, count in self.counts.items() if count}))
        if len(points) > TIMELINE_MAX:
            self._thin()

    def _thin(self) -> None:
        """Keep the last point of each step, twice as long as before until half are gone."""
        while len(self.points) > TIMELINE_MAX // 2:
            self._step_s *= 2.0
            last = {int(point[0] / self._step_s): point for point in self.points}
            self.points = list(last.values())
