"""How long a request that arrives now would wait for its prefill: the estimate in a load report."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from sllm.engine.batch import Batch
from sllm.engine.residency import ModelState


class Backlog:
    """What a request that arrives now finds before it: a batch, and behind the batch the requests that wait although their models are loaded.

    Made for one look at an engine. The estimates take the batch to keep its present pace and nobody to come after this request.
    """

    __slots__ = ("_batch", "_decode_round_s", "_ready", "kv_bytes", "prompt_tokens", "requests")

    def __init__(self, batch: Batch, ready: Iterable[ModelState], decode_round_s: float) -> None:
        """`ready`: the loaded models for which requests wait. `decode_round_s`: `Batch.decode_round_s`."""
        self._batch = batch
        self._decode_round_s = decode_round_s
        self._ready: list[tuple[int, ModelState]] = []  # (prompt tokens that wait, their model)
        self.requests = 0  # that wait; likewise their prompt tokens and KV cache
        self.prompt_tokens = 0
        self.kv_bytes = 0
        for state in ready:
            tokens = 0
            for request in state.queue:
                tokens += request.prompt_tokens
                self.kv_bytes += request.kv_bytes
            self.requests += len(state.queue)
            self.prompt_tokens += tokens
            self._ready.append((tokens, state))

    def until_turn(self, now: float, prefill_tokens_max: int) -> float:
        """Seconds until the present round has ended and every prompt that waits is prefilled, in rounds of at most `prefill_tokens_max` prompt tokens."""
        wait_s = self._batch.round_at(now)[1] - now if self._batch.rounds else 0.0
        for tokens, state in self._ready:
            wait_s += tokens * state.p_s
        if self.requests:
            wait_s += min(self.requests, ceil(self.prompt_tokens / prefill_tokens_max)) * self._decode_round_s
        return wait_s

    def until_freed(self, now: float, slots: int, memory_bytes: int) -> float:
        """Seconds until the running requests have given up this many slots and this much KV cache. There must be running requests.

        If all that run now do not have enough, others will follow them: slots and memory are then taken to come free at the mean rate of the present batch.
        """
        running = sorted(self._batch.running)
        freed_bytes = 0
        for freed, (last_round, _, request) in enumerate(running, start=1):
            freed_bytes += request.kv_bytes
            if freed >= slots and freed_bytes >= memory_bytes:
                return self._until_round(last_round - self._batch.round, now)
        return self._decode_round_s * max(self._rounds_until_slots(slots), self._rounds_until_memory(memory_bytes))

    def _until_round(self, n: int, now: float) -> float:
        """Seconds until the end of round n of the segment, from 1, if the batch stays as it is."""
        batch = self._batch
        if not batch.fresh:
            return batch.end_of_round(n) - now
        growth_s = batch.growth_s * (n * (n - 1) // 2)  # the round in progress prefills, the rounds after it do not
        return batch.boundary_at - now + (n - 1) * self._decode_round_s + growth_s

    def _rounds_until_slots(self, slots: int) -> float:
        """Rounds until this many slots come free, if each request of the batch gives up one in each span of its whole length."""
        slots_per_round = 0.0
        for _, _, request in self._batch.running:
            slots_per_round += 1 / request.output_tokens
        return slots / slots_per_round

    def _rounds_until_memory(self, memory_bytes: int) -> float:
        """Rounds until this much KV cache comes free, likewise."""
        bytes_per_round = 0.0
        for _, _, request in self._batch.running:
            bytes_per_round += request.kv_bytes / request.output_tokens
        return memory_bytes / bytes_per_round if memory_bytes > 0 and bytes_per_round > 0 else 0.0
