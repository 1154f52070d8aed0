"""Closed-loop load: a fixed number of users, each of whom sends a request, waits until that request has ended, thinks, and sends the next one.

The number of requests of a run depends on the fleet, so the requests cannot be listed beforehand. The content of each request does not depend on the fleet:
the third request of user 7 is the same for every policy and every fleet, because each user has random number generators of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from sllm.protocol.seeds import rng_for
from sllm.workload.request import Request
from sllm.workload.sessions import Draws, Laws, Session

TICKS_PER_S = 1_000_000
"""A request that follows another arrives at a whole microsecond. So the replay of a recording of closed-loop load has each arrival at exactly the same time,
whatever the rounding errors of sums of times."""


class _User:
    __slots__ = ("count", "draws", "session", "think_rng")

    def __init__(self, laws: Laws, rng: Callable[[str], Random], thinks: bool) -> None:
        self.draws = Draws(laws, rng)
        self.think_rng = rng("think") if thinks else None
        self.session: Session | None = None
        self.count = 0  # of requests sent


class Users:
    """The users of a run. Times in seconds from the start of the run."""

    def __init__(self, laws: Laws, number: int, think_s: float, until_s: float, seed: int) -> None:
        self.number = number
        self.think_s = think_s
        self._users = [_User(laws, partial(_stream, seed, user), think_s > 0.0) for user in range(1, number + 1)]
        self._until_s = until_s
        self._waiting: dict[str, int] = {}  # request id -> index of the user who waits for the request

    def first(self) -> Iterator[Request]:
        """The first request of each user, in order of arrival. A think time precedes the first request too, so that the users do not all start at once."""
        requests = [self._next(user, 0.0) for user in range(self.number)]
        return iter(sorted(filter(None, requests), key=lambda request: request.arrival_s))

    def following(self, request_id: str, ended_s: float) -> Request | None:
        """The user's next request after `request_id` has ended, with or without success. None: no user waited for it, or the run ends before."""
        user = self._waiting.pop(request_id, None)
        return None if user is None else self._next(user, ended_s)

    def _next(self, index: int, now_s: float) -> Request | None:
        user = self._users[index]
        arrival_s = now_s + (user.think_rng.expovariate(1.0) * self.think_s if user.think_rng is not None else 0.0)
        if arrival_s:
            arrival_s = (math.floor(arrival_s * TICKS_PER_S) + 1) / TICKS_PER_S
        if arrival_s >= self._until_s:
            return None
        if user.session is None or not user.draws.goes_on():
            user.session = user.draws.begin()
        user.count += 1
        request = user.draws.turn(user.session, arrival_s, f"u{index + 1}-{user.count}")
        self._waiting[request.request_id] = index
        return request


def _stream(seed: int, user: int, aspect: str) -> Random:
    return rng_for(seed, f"workload/users/{user}/{aspect}")
