"""The engine of a GPU server with continuous batching.

Time is cut into **rounds**. In a round every model that has work makes one step, one model after the other, and every running request gets one token. A
model's step takes

    max(weight_floor, a + p * new tokens) + k * (sum of context tokens) + overhead + (running requests) * sequence

where a request brings its whole prompt as new tokens in the round that prefills it (its first token comes at the end of that round) and one token in
each later round; its context in the round that yields token i, from 0, is prompt + i tokens. Prompts are not cut into chunks.

Requests are admitted between rounds, in the order of arrival over all models (a request whose model is still loading is passed over): while the batch
has a slot, while the KV cache for prompt and output, reserved in full, fits into the GPU memory that weights leave, and while the round's prompts
together stay within `PREFILL_TOKENS_MAX` (a longer prompt is prefilled alone). A request that arrives during a round, or when the round begins, waits for
the end of that round. `sllm.engine.residency` has the rules of memory.

The engine computes the time from one change of the batch to the next in closed form (`sllm.engine.batch`) and spends no event per token.
"""

from __future__ import annotations

from math import inf
from typing import NoReturn

from sllm.engine.backlog import Backlog
from sllm.engine.base import EngineUsage, Finished, FirstTokenOut, Notification, RequestTooLarge, Started
from sllm.engine.batch import Batch
from sllm.engine.residency import ABSENT, LOADED, NO_CLAIM, GpuResidency, ModelState, Request, head_seq
from sllm.models.catalogue import Catalog
from sllm.models.model import Hardware
from sllm.protocol.messages import EngineSnapshot

PREFILL_TOKENS_MAX = 2048
"""Prompt tokens prefilled in one round (vLLM's default max_num_batched_tokens, and the end of the range in which the step formula was measured)."""


class LlmEngine(GpuResidency):
    """Continuous batching over several models on one GPU server; see `sllm.engine.base.Engine`.

    `keep_alive_s`: an idle model leaves the GPU after this time; None, 0 or infinity: only under memory pressure. `slots`: sequences in the batch, over all
    models; None: the hardware's.

    A request waits until its model is loaded. `submit` and `load` take effect at `now`; requests submitted at one instant, with no `advance` in between, may
    share their first round.
    """

    __slots__ = (
        "_batch", "_busy_s", "_busy_since", "_idle_snapshot", "_kv_byte_s", "_prefill_tokens_max", "_slot_s", "_submitted_at", "_waiting_kv_bytes",
        "next_at", "slots", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        catalog: Catalog,
        hardware: Hardware,
        *,
        keep_alive_s: float | None = None,
        slots: int | None = None,
        prefill_tokens_max: int = PREFILL_TOKENS_MAX,
    ) -> None:
        super().__init__(catalog, hardware, keep_alive_s)
        self.slots = slots or hardware.slots
        self.next_at = inf  # see `Engine.next_at`
        self.waiting = 0
        self._prefill_tokens_max = prefill_tokens_max
        self._submitted_at = -inf  # time of the last `submit`
        self._waiting_kv_bytes = 0
        self._batch = Batch()
        self._busy_s = 0.0  # seconds with requests running, up to the last time that no request ran
        self._busy_since = inf  # when requests began to run again
        self._slot_s = 0.0  # of the segments that are over
        self._kv_byte_s = 0.0  # of the segments that are over
        self._idle_snapshot: EngineSnapshot | None = None

    # --- in -------------------------------------------------------------------------------------------------------------------------

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        """Take a request; see `Engine.submit`. Raises RequestTooLarge, ModelTooLarge, KeyError, ValueError, and leaves the engine unchanged then."""
        if now > self._submitted_at:
            self._submitted_at = now
            if self.next_at <= now:
                self._run(now)
        state = self._states.get(model) or self._state(model)
        if prompt_tokens < 0 or output_tokens < 1:
            raise ValueError(f"{request_id}: {prompt_tokens} prompt and {output_tokens} output tokens")
        kv_bytes = (prompt_tokens + output_tokens) * state.kv_bytes_per_token
        if prompt_tokens + output_tokens > state.tokens_max:
            self._refuse(request_id, state, prompt_tokens, output_tokens, kv_bytes)
        self._seq += 1
        self.waiting += 1
        self._waiting_kv_bytes += kv_bytes
        self._idle_snapshot = None
        state.queue.append(Request(request_id, state, prompt_tokens, output_tokens, kv_bytes, self._seq))
        if state.stage == LOADED:
            self._no_longer_idle(model)
            self._ready[model] = state
            batch = self._batch
            if not batch.rounds or (len(batch.running) < self.slots and self._claims.is_empty()):
                batch.cut(now)
        elif state.stage == ABSENT:
            self._queue_load(state)
            self._start_load(now)
        self._schedule()

    def _refuse(self, request_id: str, state: ModelState, prompt_tokens: int, output_tokens: int, kv_bytes: int) -> NoReturn:
        """Raise RequestTooLarge or ModelTooLarge, with the limit that the request exceeds."""
        context_tokens = state.model.context_tokens
        if 0 < context_tokens < prompt_tokens + output_tokens:
            raise RequestTooLarge(f"{request_id}: {prompt_tokens} and {output_tokens} tokens, {state.name} has a context of {context_tokens}")
        self._check_size(state)
        room_bytes = self._capacity_bytes - state.size_bytes
        raise RequestTooLarge(f"{request_id}: {kv_bytes} bytes of KV cache, {room_bytes} bytes of GPU memory beside {state.name}")

    def cancel(self, now: float, request_id: str) -> bool:
        """Give a request up; see `Engine.cancel`. A running request leaves the batch at the end of the present round."""
        self._run(now)
        waiting = next((r for state in self._states.values() for r in state.queue if r.request_id == request_id), None)
        if waiting is not None:
            self._withdraw(waiting, now)
        elif not self._batch.cancel(request_id, now):
            return False
        self._touched()
        return True

    def _withdraw(self, request: Request, now: float) -> None:
        """Take a waiting request out of its queue."""
        state = request.state
        state.queue.remove(request)
        self.waiting -= 1
        self._waiting_kv_bytes -= request.kv_bytes
        self._claims.withdraw_request(request.seq)
        if not state.queue and self._ready.pop(state.name, None) is not None and not state.batch:
            self._becomes_idle(state, now)
        self._start_load(now)
        self._memory_changed(now)

    def load(self, now: float, model: str) -> None:
        """Load a model that no request has asked for; see `Engine.load`."""
        self._run(now)
        state = self._state(model)
        self._check_size(state)
        if state.stage == ABSENT:
            self._queue_load(state)
            self._start_load(now)
        self._touched()

    def unload(self, now: float, model: str) -> bool:
        """Evict the model if it is loaded and idle; returns whether it was evicted."""
        self._run(now)
        state = self._idle.get(model)
        if state is None:
            return False
        self._evict(state, now)
        self._start_load(now)
        self._memory_changed(now)
        self._touched()
        return True

    # --- out ------------------------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> list[Notification]:
        """Everything that happened up to and including `now` and was not told yet, in order."""
        if self.next_at <= now:
            self._run(now)
        notes = self._notes
        if notes:
            self._notes = []
        return notes

    def usage(self, now: float) -> EngineUsage:
        """See `Engine.usage`. Batch and KV cache change at the ends of segments only."""
        batch = self._batch
        until = min(now, batch.boundary_at)
        segment_s = max(0.0, until - batch.begin_at) if batch.rounds else 0.0
        return EngineUsage(
            self._busy_s + until - self._busy_since if batch.running else self._busy_s,
            self._slot_s + len(batch.running) * segment_s,
            self._kv_byte_s + self._kv_bytes * segment_s,
            self._weights_byte_s + self._weights_bytes * max(0.0, now - self._weighed_at),
        )

    def snapshot(self, now: float) -> EngineSnapshot:
        """The state of the engine for a load report; cached while the engine is idle."""
        if self.next_at <= now:
            self._run(now)
        if self._idle_snapshot is not None:
            return self._idle_snapshot
        running = len(self._batch.running)
        round_s = self._batch.decode_round_s()
        room_bytes = self._capacity_bytes - self._weights_bytes
        loading, load_queue_s = self._loading(now) if self._load is not None or self._load_queue else ((), 0.0)
        gpu, busy = self.gpu_names()
        host, disk, disk_complete = self._tiers.names()
        snapshot = EngineSnapshot(
            slots=self.slots,
            running=running,
            waiting=self.waiting,
            blocked=self._blocked(),
            wait_s=self._wait_s(now, round_s) if running or self._ready else 0.0,
            load_queue_s=load_queue_s,
            kv_used=self._kv_bytes / room_bytes if room_bytes > 0 else 1.0,
            kv_bytes=self._kv_bytes,
            round_s=round_s,
            left_s=self._batch.rounds_left(now) * round_s,
            gpu_free_bytes=max(0, room_bytes - self._kv_bytes - self._waiting_kv_bytes),
            gpu_models=gpu,
            busy_models=busy,
            loading=loading,
            host_models=host,
            disk_models=disk,
            disk_complete=disk_complete,
        )
        if not running and not self.waiting and not loading:
            self._idle_snapshot = snapshot
        return snapshot

    def _blocked(self) -> int:
        """Waiting requests of loaded models that will not be admitted at the end of this round: slots or memory are lacking, or an older load waits for memory.
        """
        if len(self._batch.running) < self.slots and self._claims.is_empty():
            return 0
        return sum(len(state.queue) for state in self._ready.values())

    def _wait_s(self, now: float, decode_round_s: float) -> float:
        """Estimated seconds until a request arriving now, for a loaded model, begins its prefill.

        The wait is the time to the end of the round and a round for each batch of waiting prompts; or, if slots or memory run out before, the time until
        enough running requests have finished. The new request is assumed to need the mean KV cache of the running requests.
        """
        running = len(self._batch.running)
        backlog = Backlog(self._batch, self._ready.values(), decode_round_s)
        wait_s = backlog.until_turn(now, self._prefill_tokens_max)
        missing_slots = running + backlog.requests + 1 - self.slots
        missing_bytes = self._kv_bytes + backlog.kv_bytes - (self._capacity_bytes - self._weights_bytes)
        missing_bytes += self._kv_bytes // running if running else 0
        if self._claims.load_seq < NO_CLAIM:
            missing_bytes += self._load_queue[0].size_bytes
        if running and (missing_slots > 0 or missing_bytes > 0):
            wait_s = max(wait_s, backlog.until_freed(now, missing_slots, missing_bytes))
        return wait_s

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def _run(self, now: float) -> None:
        """Do everything that is due by `now`. At one instant the ends of rounds come first, then the end of a load, then the ends of keep-alive times."""
        while (at := self.next_at) <= now:
            self._idle_snapshot = None
            if self._batch.boundary_at <= at:
                self._end_segment(at)
            elif self._load_end <= at:
                self._finish_load(at)
            else:
                self._expire_idle(at)
            self._schedule()

    def _schedule(self) -> None:
        at = self._batch.boundary_at
        if self._load_end < at:
            at = self._load_end
        if self._keep_alive_s < inf and (expiry := self._keep_alive_end()) < at:
            at = expiry
        self.next_at = at

    def _touched(self) -> None:
        self._idle_snapshot = None
        self._schedule()

    def _memory_changed(self, now: float) -> None:
        if self._ready:
            self._batch.cut(now)

    # --- rounds ---------------------------------------------------------------------------------------------------------------------

    def _end_segment(self, now: float) -> None:
        """The rounds of the segment are over: tell the tokens that they yielded, admit the requests that fit, begin the next segment."""
        batch = self._batch
        if batch.rounds:
            segment_s = now - batch.begin_at
            self._slot_s += len(batch.running) * segment_s
            self._kv_byte_s += self._kv_bytes * segment_s
            for request in batch.end_segment():
                if not request.cancelled:
                    self._notes.append(FirstTokenOut(now, request.request_id))
            while (finished := batch.pop_finished()) is not None:
                self._finish(finished, now)
        if self._ready or self._load_queue:
            self._claims.request_seq = NO_CLAIM  # `_admit` lets the oldest request claim memory again
            self._admit(now)
            while self._start_load(now):
                self._admit(now)
        batch.begin_segment(now)

    def _finish(self, request: Request, now: float) -> None:
        """Free the memory of a request that has left the batch, and tell that the request is finished."""
        state = request.state
        self._kv_bytes -= request.kv_bytes
        if not request.cancelled:
            self._notes.append(Finished(now, request.request_id, request.output_tokens))
        if not state.batch and not state.queue:
            self._becomes_idle(state, now)
        if not self._batch.running:
            self._busy_s += now - self._busy_since

    def _admit(self, now: float) -> None:
        """Move requests from the queues into the batch, oldest first, until one does not fit."""
        ready = self._ready
        batch = self._batch
        while ready:
            state = next(iter(ready.values())) if len(ready) == 1 else min(ready.values(), key=head_seq)
            request = state.queue[0]
            if request.seq > self._claims.load_seq or len(batch.running) >= self.slots:
                return
            if batch.fresh and batch.fresh_tokens + request.prompt_tokens > self._prefill_tokens_max:
                return
            if not self._fits(request, now):
                self._claims.request_seq = request.seq
                return
            state.queue.popleft()
            if not state.queue:
                del ready[state.name]
            if not batch.running:
                self._busy_since = now
            self.waiting -= 1
            self._waiting_kv_bytes -= request.kv_bytes
            self._kv_bytes += request.kv_bytes
            batch.add(request)
            self._notes.append(Started(now, request.request_id))

    def _fits(self, request: Request, now: float) -> bool:
        """Whether there is KV cache for the request. Evicts models if waiting for running requests could never free enough memory."""
        room_bytes = self._capacity_bytes - self._weights_bytes
        if request.kv_bytes > room_bytes:
            if not self._make_room(request.kv_bytes - room_bytes, request.seq, now):
                return False
            room_bytes = self._capacity_bytes - self._weights_bytes
        return self._kv_bytes + request.kv_bytes <= room_bytes
