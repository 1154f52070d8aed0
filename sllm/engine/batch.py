"""The requests that run together, and the time that their rounds take, in closed form.

A **segment** is a number of rounds in which the batch stays the same. With a fixed batch the context grows by the same amount each round, so the first n rounds
of a segment take

    n * first_s + growth_s * n (n - 1) / 2

seconds: the end of each round is known without computing the rounds before it, and solving for n finds the round that is in progress at a given time.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import inf, sqrt

from sllm.engine.residency import ModelState, Request

Running = tuple[int, int, Request]
"""(number of the request's last round, order of arrival, request): in a heap the request that finishes first is at the front."""


class Batch:
    """The running requests of all models on one GPU, and the segment that they are in."""

    __slots__ = (
        "_last_rounds", "active", "begin_at", "boundary_at", "first_s", "fresh", "fresh_tokens", "growth_s", "round", "rounds", "running",
    )  # fmt: skip

    def __init__(self) -> None:
        self.running: list[Running] = []  # a heap
        self.active: list[ModelState] = []  # models with running requests
        self.fresh: list[Request] = []  # requests that are prefilled in the present round
        self.fresh_tokens = 0  # prompt tokens of the fresh requests
        self.round = 0  # the number of rounds completed before the segment
        self.rounds = 0  # of the segment; 0: no round is in progress
        self.begin_at = 0.0  # of the segment
        self.boundary_at = inf  # the end of the segment; without a segment: when to look for waiting requests
        self.first_s = 0.0  # seconds of the first round of the segment
        self.growth_s = 0.0  # seconds by which each further round is longer than the round before
        self._last_rounds = 0  # sum over the running requests of the numbers of their last rounds

    # --- requests -------------------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take in a request between two segments; the next round prefills it."""
        state = request.state
        if not state.batch:
            self.active.append(state)
        state.batch += 1
        state.context_tokens += request.prompt_tokens
        state.prefill_extra += request.prompt_tokens - 1
        self.fresh.append(request)
        self.fresh_tokens += request.prompt_tokens
        last_round = self.round + request.output_tokens
        self._last_rounds += last_round
        heappush(self.running, (last_round, request.seq, request))

    def cancel(self, request_id: str, now: float) -> bool:
        """Let a request leave at the end of the present round, marked as cancelled. False if the request does not run or has been cancelled already."""
        place = next((i for i, (_, _, r) in enumerate(self.running) if r.request_id == request_id and not r.cancelled), None)
        if place is None:
            return False
        last_round, seq, request = self.running[place]
        ends = self.round + min(self.round_at(now)[0], self.rounds)
        request.cancelled = True
        request.output_tokens -= last_round - ends  # to the tokens yielded by the end of the present round
        self.running[place] = ends, seq, request
        self._last_rounds -= last_round - ends
        heapify(self.running)
        self.cut(now)
        return True

    def pop_finished(self) -> Request | None:
        """Take out a request whose last round is completed; None if there is none (any more)."""
        running = self.running
        if not running or running[0][0] != self.round:
            return None
        request = heappop(running)[2]
        state = request.state
        self._last_rounds -= self.round
        state.batch -= 1
        state.context_tokens -= request.prompt_tokens + request.output_tokens
        if not state.batch:
            self.active.remove(state)
        return request

    # --- the segment ----------------------------------------------------------------------------------------------------------------

    def begin_segment(self, now: float) -> None:
        """Begin a segment: the rounds until the first request finishes, or a single round if that round prefills. Without running requests there is none."""
        running = self.running
        if not running:
            self.rounds = 0
            self.boundary_at = inf
            return
        first_s = growth_s = 0.0
        for state in self.active:
            batch, k_s, floor_s = state.batch, state.k_s, state.weight_floor_s
            work_s = state.a_s + state.p_s * (batch + state.prefill_extra)
            if work_s < floor_s:
                work_s = floor_s
            first_s += work_s + k_s * state.context_tokens + state.overhead_s + state.sequence_s * batch
            growth_s += k_s * batch
        rounds = 1 if self.fresh else running[0][0] - self.round
        self.begin_at = now
        self.first_s = first_s
        self.growth_s = growth_s
        self.rounds = rounds
        self.boundary_at = now + (rounds * first_s + growth_s * (rounds * (rounds - 1) // 2))

    def end_segment(self) -> list[Request]:
        """Count the segment's rounds: each running request got one token in each round. Returns the requests that got their first token."""
        rounds = self.rounds
        self.round += rounds
        for state in self.active:
            state.context_tokens += rounds * state.batch
        prefilled = self.fresh
        if prefilled:
            for request in prefilled:
                request.state.prefill_extra = 0
            self.fresh = []
            self.fresh_tokens = 0
        return prefilled

    def cut(self, now: float) -> None:
        """End the segment at the next end of a round, so that waiting requests can be admitted there."""
        if not self.rounds:
            self.boundary_at = min(self.boundary_at, now)
        elif self.rounds > 1:
            n, end_at = self.round_at(now)
            if n < self.rounds:
                self.rounds = n
                self.boundary_at = end_at

    def end_of_round(self, n: int) -> float:
        """When round n of the segment, from 1, ends."""
        return self.begin_at + (n * self.first_s + self.growth_s * (n * (n - 1) // 2))

    def round_at(self, now: float) -> tuple[int, float]:
        """(number, end) of the round of the segment that is in progress at `now`, numbered from 1: the first round that ends after `now`. The solution of
        the quadratic formula is rounded, so it is corrected by comparing the ends of the rounds around it."""
        elapsed_s, first_s, growth_s, begin_at = now - self.begin_at, self.first_s, self.growth_s, self.begin_at
        half = first_s - growth_s / 2
        n = 1 + int(2 * elapsed_s / (half + sqrt(half * half + 2 * growth_s * elapsed_s)))
        while n > 1 and begin_at + ((n - 1) * first_s + growth_s * ((n - 1) * (n - 2) // 2)) > now:
            n -= 1
        while (end_at := begin_at + (n * first_s + growth_s * (n * (n - 1) // 2))) <= now:
            n += 1
        return n, end_at

    # --- the pace -------------------------------------------------------------------------------------------------------------------

    def decode_round_s(self) -> float:
        """Seconds of a round without prefills, with the batch and the context of the start of the segment."""
        round_s = 0.0
        for state in self.active:
            work_s = max(state.weight_floor_s, state.a_s + state.p_s * state.batch)
            round_s += work_s + state.k_s * state.context_tokens + state.overhead_s + state.sequence_s * state.batch
        return round_s

    def rounds_left(self, now: float) -> float:
        """The mean number of rounds until the running requests have their last tokens, the present round among them; 0 if nothing runs."""
        if not self.running:
            return 0.0
        done = self.round + (self.round_at(now)[0] - 1 if self.rounds else 0)
        return max(0.0, self._last_rounds / len(self.running) - done)
