"""The time that a request arriving now would wait for its prefill: the estimate `wait_s` in a load report."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from sllm.engine.batch import Batch
from sllm.engine.residency import ModelState


class Backlog:
    """The work that a request arriving now finds before it: the batch, and the waiting requests whose models are loaded.

    A backlog is made for one snapshot of an engine. The estimates assume that the batch keeps its present pace and that no further request arrives.
    """

    __slots__ = ("_batch", "_decode_round_s", "_ready", "kv_bytes", "prompt_tokens", "requests")

    def __init__(self, batch: Batch, ready: Iterable[ModelState], decode_round_s: float) -> None:
        """`ready`: the loaded models for which requests wait. `decode_round_s`: `Batch.decode_round_s`."""
        self._batch = batch
        self._decode_round_s = decode_round_s
        self._ready: list[tuple[int, ModelState]] = []  # (prompt tokens of the waiting requests, their model)
        self.requests = 0  # waiting requests
        self.prompt_tokens = 0  # of the waiting requests
        self.kv_bytes = 0  # KV cache of the waiting requests
        for state in ready:
            tokens = 0
            for request in state.queue:
                tokens += request.prompt_tokens
                self.kv_bytes += request.kv_bytes
            self.requests += len(state.queue)
            self.prompt_tokens += tokens
            self._ready.append((tokens, state))

    def until_turn(self, now: float, prefill_tokens_max: int) -> float:
        """Seconds until the present round has ended and every waiting prompt is prefilled, in rounds of at most `prefill_tokens_max` prompt tokens."""
        wait_s = self._batch.round_at(now)[1] - now if self._batch.rounds else 0.0
        for tokens, state in self._ready:
            wait_s += tokens * state.p_s
        if self.requests:
            wait_s += min(self.requests, ceil(self.prompt_tokens / prefill_tokens_max)) * self._decode_round_s
        return wait_s

    def until_freed(self, now: float, slots: int, memory_bytes: int) -> float:
        """Seconds until the running requests have freed `slots` slots and `memory_bytes` of KV cache. There must be running requests.

        If all running requests together hold less than that, the requests after them have to free the rest: slots and memory are then assumed to come free at
        the mean rate of the present batch.
        """
        running = sorted(self._batch.running)
        freed_bytes = 0
        for freed, (last_round, _, request) in enumerate(running, start=1):
            freed_bytes += request.kv_bytes
            if freed >= slots and freed_bytes >= memory_bytes:
                return self._until_round(last_round - self._batch.round, now)
        return self._decode_round_s * max(self._rounds_until_slots(slots), self._rounds_until_memory(memory_bytes))

    def _until_round(self, n: int, now: float) -> float:
        """Seconds until the end of round n (from 1) of the segment, if the batch does not change."""
        batch = self._batch
        if not batch.fresh:
            return batch.end_of_round(n) - now
        growth_s = batch.growth_s * (n * (n - 1) // 2)  # the round in progress prefills, the rounds after it do not
        return batch.boundary_at - now + (n - 1) * self._decode_round_s + growth_s

    def _rounds_until_slots(self, slots: int) -> float:
        """Rounds until `slots` slots come free, if each running request is replaced by an equal one whenever it ends: one slot per `output_tokens` rounds."""
        slots_per_round = 0.0
        for _, _, request in self._batch.running:
            slots_per_round += 1 / request.output_tokens
        return slots / slots_per_round

    def _rounds_until_memory(self, memory_bytes: int) -> float:
        """Rounds until `memory_bytes` of KV cache come free, under the same assumption as for slots."""
        bytes_per_round = 0.0
        for _, _, request in self._batch.running:
            bytes_per_round += request.kv_bytes / request.output_tokens
        return memory_bytes / bytes_per_round if memory_bytes > 0 and bytes_per_round > 0 else 0.0
