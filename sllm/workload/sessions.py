"""Draws requests: independent ones, or turns of sessions whose prompts grow.

A session is one conversation with one model: the prompt of each further turn repeats the whole turn before, prompt and answer, and adds new tokens.
The number of turns is geometric: after each turn the session goes on with the same probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from random import Random
from typing import NamedTuple

from sllm.protocol.errors import UsageError
from sllm.protocol.limits import TOKENS_MAX
from sllm.protocol.messages import NORMAL
from sllm.workload.lengths import LengthSampler
from sllm.workload.popularity import Shares
from sllm.workload.request import Repeat, Request


@dataclass(frozen=True)
class SessionLaw:
    """The law of sessions."""

    turns: float = 5.0  # mean number of turns, at least 1
    gap: float = 10.0  # mean seconds from the arrival of a turn to the arrival of the next, exponential; closed-loop load has its think time instead
    longest: int = 14_000  # tokens of prompt and output together; a turn that would be longer begins a new conversation

    @classmethod
    def parse(cls, text: str) -> SessionLaw:
        """The law of `turns=5,gap=10,longest=14000`, each part optional. UsageError names the part that does not fit."""
        known = {field.name: field for field in fields(cls)}
        values: dict[str, float] = {}
        for part in text.split(","):
            name, _, number = (piece.strip() for piece in part.partition("="))
            try:
                value = float(number) if name in known else math.nan
            except ValueError:
                value = math.nan
            least = 1.0 if name in ("turns", "longest") else 0.0
            if not least <= value <= TOKENS_MAX or (name == "longest" and not value.is_integer()):
                raise UsageError(f"sessions {text!r}: {part.strip()!r} does not fit: turns (at least 1), gap (s) and longest (tokens), as in {cls.example()}")
            values[name] = value
        return cls(values.get("turns", cls.turns), values.get("gap", cls.gap), int(values.get("longest", cls.longest)))

    @classmethod
    def example(cls) -> str:
        """The defaults, as a user writes them."""
        return ",".join(f"{field.name}={field.default:.12g}" for field in fields(cls))


class Session:
    """One conversation, or, without a law of sessions, one request."""

    __slots__ = ("held", "model", "priority")

    def __init__(self, model: str, priority: int, held: Repeat | None = None) -> None:
        self.model = model
        self.priority = priority
        self.held = held  # the turn before, which the next prompt repeats; None: the next turn is the first


class Laws(NamedTuple):
    """The laws that requests are drawn from."""

    popularity: Shares[str]
    lengths: LengthSampler
    priorities: Shares[int] | None = None  # None: all normal
    sessions: SessionLaw | None = None  # None: requests are independent


class Draws:
    """Draws requests. Each aspect has a random number generator of its own, rng(name), so that changing one law does not change the other draws."""

    __slots__ = ("_laws", "_length_rng", "_model_rng", "_priority_rng", "_session_rng")

    def __init__(self, laws: Laws, rng: Callable[[str], Random]) -> None:
        self._laws = laws
        self._length_rng, self._model_rng = rng("lengths"), rng("models")
        self._priority_rng = rng("priorities") if laws.priorities is not None else None
        self._session_rng = rng("sessions") if laws.sessions is not None else None

    def begin(self) -> Session:
        """A new session."""
        priorities, rng = self._laws.priorities, self._priority_rng
        return Session(self._laws.popularity.draw(self._model_rng), priorities.draw(rng) if priorities is not None and rng is not None else NORMAL)

    def turn(self, session: Session, arrival_s: float, request_id: str) -> Request:
        """The next turn of the session."""
        law, held = self._laws.sessions, session.held
        prompt, output = self._laws.lengths(self._length_rng)
        if held is not None and law is not None and held.tokens + prompt + output > law.longest:
            held = None
        if held is not None:
            prompt += held.tokens
        session.held = Repeat(request_id, prompt + output) if law is not None else None
        return Request(arrival_s, request_id, session.model, prompt, output, session.priority, held)

    def goes_on(self) -> bool:
        """Whether a session has another turn."""
        law, rng = self._laws.sessions, self._session_rng
        return law is not None and rng is not None and rng.random() >= 1.0 / law.turns

    def _under_way(self, number: int) -> Session:
        """A session that had turns before the run began. Their number is geometric, with the mean of a session that has just begun."""
        session = self.begin()
        while True:
            self.turn(session, 0.0, f"before-{number}")
            if not self.goes_on():
                return session

    def in_sessions(self, begins: Iterator[float], rate_per_s: float, until_s: float) -> Iterator[Request]:
        """Turns of sessions that begin at the times of `begins`, in order of arrival, before `until_s`.

        `rate_per_s`: turns a second just before the run. Sessions are under way when the run starts: their number is that of sessions waiting for their next
        turn at a random moment (Little's law), and the rest of an exponential gap is distributed like a whole gap.
        """
        law, rng = self._laws.sessions, self._session_rng
        assert law is not None
        assert rng is not None
        waiting: list[tuple[float, int, Session]] = []  # heap of (time of the next turn, number, session); the number orders sessions of the same time
        mean_under_way, passed = rate_per_s * (1.0 - 1.0 / law.turns) * law.gap, rng.expovariate(1.0)
        while passed < mean_under_way:  # a Poisson number
            heappush(waiting, (_gap_s(law, rng), len(waiting), self._under_way(len(waiting))))
            passed += rng.expovariate(1.0)
        order, number = len(waiting), 0
        begin_s = next(begins, math.inf)
        while True:
            if waiting and waiting[0][0] <= begin_s:
                arrival_s, _, session = heappop(waiting)
            else:
                arrival_s, begin_s = begin_s, next(begins, math.inf)
                session = self.begin()
            if arrival_s >= until_s:
                return
            yield self.turn(session, arrival_s, f"r{number}")
            number += 1
            if self.goes_on():
                order += 1
                heappush(waiting, (arrival_s + _gap_s(law, rng), order, session))


def _gap_s(law: SessionLaw, rng: Random) -> float:
    return rng.expovariate(1.0) * law.gap
