"""Arrivals in real time: each request is handed in when its time has come, some at a time, so that whatever else a process does has its turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Generic, TypeVar

BATCH = 1000  # requests handed in at most before others have their turn: some 20 ms

T = TypeVar("T")


class Pump(Generic[T]):
    """Hands in what comes at a time of its own.

    `arrivals` are pairs of a time, absolute on the clock that `read_clock` reads and never before that of the pair before it, and what comes then; they are
    drawn one ahead and never all at once. `submit(what, now)` is given each. The clock is read anew for each, because a batch takes time. Nothing is drawn or
    handed in while `is_stopped()` is true. A signal may come in the middle of a batch, and while a trace is searched for its next request, so it is asked
    before each is drawn and before each is handed in.
    """

    __slots__ = ("_ahead", "_arrivals", "_batch", "_is_stopped", "_read_clock", "_submit", "exhausted")

    def __init__(
        self,
        arrivals: Iterable[tuple[float, T]],
        submit: Callable[[T, float], object],
        read_clock: Callable[[], float],
        is_stopped: Callable[[], bool],
        batch: int = BATCH,
    ) -> None:
        self.exhausted = False  # the last arrival has been handed in
        self._arrivals = iter(arrivals)
        self._submit = submit
        self._read_clock = read_clock
        self._is_stopped = is_stopped
        self._batch = batch
        self._ahead: tuple[float, T] | None = None  # drawn, and its time had not come

    def hand_in(self) -> float:
        """Hand in what is due, at most a batch. Returns when to call again: not later than now if more may be due; infinite if nothing more comes, because the
        last has come or the pump is stopped."""
        for _ in range(self._batch):
            if self._is_stopped():
                return inf
            upcoming = self._ahead or next(self._arrivals, None)
            if upcoming is None:
                self.exhausted = True
                return inf
            at, what = upcoming
            now = self._read_clock()
            if at > now:
                self._ahead = upcoming
                return at
            self._ahead = None
            if self._is_stopped():
                return inf
            self._submit(what, now)
        return self._read_clock()
