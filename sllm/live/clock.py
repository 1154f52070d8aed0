"""The clock of a live run: monotonic seconds since its start, as fast as the wall clock or `speedup` times faster.

At speedup 1 the clock is the real clock. The clock of a sped-up run, in which every node lives in one process, advances by at most a bounded
step from one round of the event loop to the next: when the machine stalls, the run's time stalls with it, so that a stall does not look like
the silence of every peer at once. The time that the clock did not advance is summed up in `behind_s`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

STEP_MAX_S = 0.1  # a fifth of the shortest default timeout (RETRY_INITIAL): one step never turns a peer that answers into a silent one


class Clock:
    """`now` is the time of the current round; the driver moves it with `advance`. Times are in seconds of the run's clock unless a name says otherwise."""

    def __init__(
        self,
        speedup: float = 1.0,
        *,
        step_max_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`step_max_s` None: unbounded at speedup 1 (the real clock), `STEP_MAX_S` otherwise. `monotonic` and `wall` stand in for the
        system's clocks in tests."""
        if not speedup > 0:
            raise ValueError(f"speedup must be above 0, not {speedup!r}")
        self.speedup = speedup
        self.step_max_s = step_max_s if step_max_s is not None or speedup == 1.0 else STEP_MAX_S
        self.now = 0.0
        self.behind_s = 0.0
        self._monotonic = monotonic
        self._wall = wall
        self._start_wall_s = wall()
        self._start = self._last = monotonic()

    def advance(self, planned_s: float = 0.0) -> float:
        """Read the system's clock and return the new `now`. `planned_s` is time the caller meant to let pass (it waited for a deadline):
        it does not count as a stall."""
        reading = self._monotonic()
        if self.step_max_s is None:
            self.now = (reading - self._start) * self.speedup
        else:
            step = (reading - self._last) * self.speedup
            limit = self.step_max_s + planned_s
            if step > limit:
                self.behind_s += step - limit
                step = limit
            self.now += step
        self._last = reading
        return self.now

    @property
    def elapsed_wall_s(self) -> float:
        """Wall seconds since the start."""
        return self._monotonic() - self._start

    @property
    def wall_offset_s(self) -> float:
        """The difference between seconds since 1970 and `now`. The real clock follows the system's clock when that is set. A sped-up clock starts at the wall
        clock and then keeps its own time, because only nodes of the same process compare it."""
        if self.speedup == 1.0 and self.step_max_s is None:
            return self._wall() - (self._monotonic() - self._start)
        return self._start_wall_s

    @property
    def lag(self) -> float:
        """The part by which the machine fell behind the speed asked for: 0 means on time, 0.5 half as fast as asked for."""
        wanted = self.now + self.behind_s
        return self.behind_s / wanted if wanted > 0 else 0.0
