"""Measures what a fleet has in use while requests come: how much in all, and how it went over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sllm.engine.base import NOTHING_USED, EngineUsage
from sllm.observe.results import total
from sllm.observe.series import BINS_MIN
from sllm.observe.timeline import LOOKS_MAX, Look, UsageTimeline
from sllm.protocol.driver import Driver

FEW_WORKERS = 200  # a fleet of at most this size is looked at often
LOOKS_BEGIN = LOOKS_MAX // 2  # looks at such a fleet, if the length of the run is known
FIRST_LOOK_S = 0.05  # the step between looks at such a fleet to begin with, if the length of the run is not known
LOOK_INTERVALS = 4.0  # the least step between looks at a larger fleet, in report intervals


def first_step_s(workers: int, duration_s: float | None, report_interval_s: float) -> float:
    """The step between looks to begin with, in seconds. A large fleet is looked at rarely, because each look costs time for every worker, as reports do."""
    if workers <= FEW_WORKERS:
        return duration_s / LOOKS_BEGIN if duration_s else FIRST_LOOK_S
    return max((duration_s or 0.0) / BINS_MIN, LOOK_INTERVALS * (report_interval_s or 1.0))


class Meter:
    """Measures the use of engines from `begin`, or the end of the warm-up, to `end`, and looks at the fleet at equal steps until `stop_looking`."""

    def __init__(self, driver: Driver[Any], usage: Callable[[], list[EngineUsage]], waiting: Callable[[], int]) -> None:
        """`usage()` gives what each worker had in use until now, `waiting()` how many requests wait at the workers."""
        self.timeline = UsageTimeline()
        self.began_s = 0.0  # of the run's clock: when requests began to come
        self.window_s = 0.0  # for how long they came
        self._driver = driver
        self._usage = usage
        self._waiting = waiting
        self._before: list[EngineUsage] = []  # when requests began to come, or the warm-up ended
        self._after: list[EngineUsage] = []
        self._looking = False

    @property
    def has_begun(self) -> bool:
        """Requests have begun to come."""
        return bool(self._before)

    @property
    def has_ended(self) -> bool:
        """The last request has come."""
        return bool(self._after)

    @property
    def now_s(self) -> float:
        """For how long requests have been coming, up to now; 0 before they do."""
        return self._driver.now - self.began_s if self.has_begun else 0.0

    def begin(self, step_s: float, warmup_s: float) -> None:
        """Requests come from now on. `step_s`: the step between the first looks. `warmup_s`: the time from now until the measurement begins."""
        self.began_s = self._driver.now
        self._mark()
        self.timeline.begin(self._look(), step_s)
        self._looking = True
        self._driver.call_at(self.timeline.next_at, self._look_again)
        if warmup_s:
            self._driver.call_at(self.began_s + warmup_s, self._mark)

    def _mark(self) -> None:
        """The measurement begins now, unless the last request has come."""
        if not self.has_ended:
            self._before = self._usage()

    def _look(self) -> Look:
        return Look(self._driver.now, total(self._usage()), self._waiting())

    def _look_again(self) -> None:
        if self._looking:
            self.timeline.add(self._look())
            self._driver.call_at(self.timeline.next_at, self._look_again)

    def end(self) -> None:
        """The last request has come, and the measurement ends."""
        self.window_s = self.now_s
        self._after = self._usage()

    def stop_looking(self) -> None:
        """Take the last look: the run ends, and nothing that is to be seen happens any more."""
        if self._looking:
            self._looking = False
            self.timeline.add(self._look())

    def used(self, warmup_s: float) -> list[EngineUsage]:
        """What each worker had in use while it was measured; nothing if requests came for no longer than the warm-up. An empty list before `end`."""
        counts = self.window_s > warmup_s
        return [after - before if counts else NOTHING_USED for after, before in zip(self._after, self._before, strict=True)]
