"""The usage and the states of a fleet over time, in a bounded number of points for runs of any length."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import NamedTuple

from sllm.engine.base import EngineUsage

TIMELINE_MAX = 1024  # points of the fleet's states kept over time
LOOKS_MAX = 120  # looks at the usage of the fleet


class Look(NamedTuple):
    """A reading of the whole fleet: its usage up to a moment, and the number of requests waiting then."""

    at: float  # of the run's clock
    usage: EngineUsage  # the sum over the workers
    waiting: int


class UsageTimeline:
    """Looks at the fleet at equal steps from `begin`. When there are more than `LOOKS_MAX`, every other one is dropped and the step doubles.

    Looks contain integrals over time, so the difference of two looks gives an exact mean for any step; `waiting` is a sample.
    """

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self.step_s = 0.0

    def begin(self, look: Look, step_s: float) -> None:
        """Start with the first look and the first step."""
        self.looks, self.step_s = [look], step_s

    @property
    def next_at(self) -> float:
        """The time of the next look."""
        return self.looks[0].at + len(self.looks) * self.step_s

    def add(self, look: Look) -> None:
        self.looks.append(look)
        if len(self.looks) > LOOKS_MAX:
            del self.looks[1::2]
            self.step_s *= 2.0

    def at(self, when: float) -> EngineUsage:
        """The usage up to a moment, interpolated linearly between two looks, and constant after the last look."""
        looks = self.looks
        index = bisect_right(looks, when, key=lambda look: look.at)
        if index == 0 or index == len(looks):
            return looks[min(index, len(looks)) - 1 if index else 0].usage
        before, after = looks[index - 1], looks[index]
        return before.usage.plus(after.usage - before.usage, (when - before.at) / (after.at - before.at))

    def waiting(self, when: float) -> int:
        """The requests waiting at the last look up to `when`."""
        index = bisect_right(self.looks, when, key=lambda look: look.at)
        return self.looks[max(0, index - 1)].waiting


class StateTimeline:
    """The number of workers in each state over time, in at most `TIMELINE_MAX` points: when there are more, the time step doubles."""

    def __init__(self) -> None:
        self.points: list[tuple[float, dict[str, int]]] = []  # (since, workers by state)
        self.counts: Counter[str] = Counter()
        self._states: dict[str, str] = {}
        self._step_s = 0.01
        self._ended = False

    def end(self) -> None:
        """Ignore further changes: the workers stop because the run is over."""
        self._ended = True

    def move(self, at: float, worker_id: str, state: str) -> None:
        """A worker is in `state` from `at` on. The worker's state before is kept here, because a restarted coordinator has forgotten it."""
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
        """Double the step, keeping the last point of each step, until at most half of the points are left."""
        while len(self.points) > TIMELINE_MAX // 2:
            self._step_s *= 2.0
            last = {int(point[0] / self._step_s): point for point in self.points}
            self.points = list(last.values())
