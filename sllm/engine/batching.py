"""The engine of a GPU server with continuous batching.

Time is cut into **rounds**. In a round every model that has work makes one step, one model after the other, and every running request gets one token. A
model's step takes

    max(weight_floor, a + p * new tokens) + k * (sum of context tokens) + overhead + (running requests) * sequence

where a request brings its whole prompt as new tokens in the round that prefills it (its first token comes at the end of that round) and one token in
each later round; its context in the round that yields token i, from 0, is prompt + i tokens. Prompts are not cut into chunks.

Requests are admitted between rounds, in the order of arrival over all models (a request whose model is still loading is passed over): while the batch
has a slot, while the KV cache for prompt and output, reserved in full, fits into the GPU memory that weights leave, and while the round's prompts
together stay within `PREFILL_TOKENS_MAX` (a longer prompt is prefilled alone). Whoever arrives during a round, or as it begins, waits for its end.
`sllm.engine.residency` has the rules of memory.

With a fixed batch the context grows by the same amount each round, so n rounds take n * A + B * n (n - 1) / 2 seconds: the engine goes from change to change
in closed form, and an arrival finds the end of the round it falls into by solving that for n.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from math import ceil, inf, sqrt

from sllm.engine.base import EngineUsage, Finished, FirstTokenOut, Notification, RequestTooLarge, Started
from sllm.engine.residency import ABSENT, LOADED, GpuResidency, ModelState, Request, head_seq
from sllm.models.catalogue import Catalog
from sllm.models.cost import load_s
from sllm.models.model import Hardware
from sllm.protocol.messages import EngineSnapshot

PREFILL_TOKENS_MAX = 2048
"""Prompt tokens prefilled in one round (vLLM's default max_num_batched_tokens, and the end of the range in which the step formula was measured)."""


class LlmEngine(GpuResidency):
    """Continuous batching over several models on one GPU server; see `sllm.engine.base.Engine`.

    `keep_alive_s`: an idle model leaves the GPU after so long; None, 0 or infinity: only under memory pressure. `slots`: sequences in the batch, over all
    models; None: the hardware's.

    A request of a model that is not loaded waits until it is. `submit` and `preload` take effect at `now`; requests submitted at one instant, with no
    `advance` in between, may share their first round.
    """

    __slots__ = (
        "_active", "_begin", "_boundary_at", "_busy_s", "_busy_since", "_first_s", "_fresh", "_fresh_tokens", "_growth_s",
        "_idle_snapshot", "_kv_byte_s", "_last_rounds", "_prefill_tokens_max", "_round", "_rounds", "_running", "_slot_s", "_submitted_at",
        "_waiting_kv_bytes", "next_at", "slots", "waiting",
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
        self._prefill_tokens_max = prefill_tokens_max
        self._submitted_at = -inf  # the last time
        self.next_at = inf  # when the next thing will happen by itself, absolute; infinite: nothing will
        self.waiting = 0
        self._waiting_kv_bytes = 0
        self._last_rounds = 0  # sum over the running requests of the numbers of their last rounds
        self._running: list[tuple[int, int, Request]] = []  # heap of (number of the last round, seq, request)
        self._active: list[ModelState] = []  # with a batch
        self._fresh: list[Request] = []  # being prefilled in this round
        self._fresh_tokens = 0
        self._round = 0  # rounds completed before the current segment
        self._rounds = 0  # of the current segment; 0: no round is in progress
        self._begin = 0.0  # of the segment
        self._first_s = 0.0  # A: its first round
        self._growth_s = 0.0  # B: each further round takes so much longer
        self._boundary_at = inf  # its end; without a segment: when to look for work
        self._busy_s = 0.0
        self._busy_since = inf
        self._slot_s = 0.0  # of the segments that are over
        self._kv_byte_s = 0.0  # likewise
        self._idle_snapshot: EngineSnapshot | None = None

    # --- in -------------------------------------------------------------------------------------------------------------------------

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        """Take a request. Raises RequestTooLarge, ModelTooLarge, KeyError, ValueError and is unchanged then; see `Engine.submit`."""
        if now > self._submitted_at:
            self._submitted_at = now
            self._run(now)
        state = self._states.get(model) or self._state(model)
        if prompt_tokens < 0 or output_tokens < 1:
            raise ValueError(f"{request_id}: {prompt_tokens} prompt and {output_tokens} output tokens")
        if 0 < state.model.context_tokens < prompt_tokens + output_tokens:
            raise RequestTooLarge(f"{request_id}: {prompt_tokens} and {output_tokens} tokens, {model} has a context of {state.model.context_tokens}")
        kv_bytes = (prompt_tokens + output_tokens) * state.kv_bytes_per_token
        others_bytes = self._pinned_bytes - state.size_bytes if state.pinned else self._pinned_bytes
        if state.size_bytes + kv_bytes + others_bytes > self._capacity_bytes:
            self._check_size(state)
            room_bytes = self._capacity_bytes - state.size_bytes - others_bytes
            raise RequestTooLarge(f"{request_id}: {kv_bytes} bytes of KV cache, {room_bytes} bytes of GPU memory beside {model}")
        self._seq += 1
        self.waiting += 1
        self._waiting_kv_bytes += kv_bytes
        self._idle_snapshot = None
        state.queue.append(Request(request_id, state, prompt_tokens, output_tokens, kv_bytes, self._seq))
        if state.stage == LOADED:
            self._no_longer_idle(model)
            self._ready[model] = state
            nobody_older_waits_for_memory = self._hold_seq == self._blocked_seq  # both infinite
            if not self._rounds or (nobody_older_waits_for_memory and len(self._running) < self.slots):
                self._cut(now)
        elif state.stage == ABSENT:
            self._queue_load(state)
            self._start_load(now)
        self._schedule()

    def cancel(self, now: float, request_id: str) -> bool:
        """Give a request up; see `Engine.cancel`. One that runs leaves the batch at the end of the present round."""
        self._run(now)
        waiting = next((r for state in self._states.values() for r in state.queue if r.request_id == request_id), None)
        if waiting is not None:
            self._withdraw(waiting, now)
            return True
        place = next((i for i, (_, _, r) in enumerate(self._running) if r.request_id == request_id and not r.cancelled), None)
        if place is None:
            return False
        last_round, seq, request = self._running[place]
        ends = self._round + min(self._round_at(now)[0], self._rounds)
        request.cancelled = True
        request.output_tokens -= last_round - ends  # what it will have yielded by then
        self._running[place] = ends, seq, request
        self._last_rounds -= last_round - ends
        heapify(self._running)
        self._cut(now)
        self._touched()
        return True

    def _withdraw(self, request: Request, now: float) -> None:
        """Take a request that waits out of its queue."""
        state = request.state
        state.queue.remove(request)
        self.waiting -= 1
        self._waiting_kv_bytes -= request.kv_bytes
        if request.seq == self._blocked_seq:
            self._blocked_seq = inf
        if not state.queue and self._ready.pop(state.name, None) is not None and not state.batch:
            self._becomes_idle(state, now)
        self._start_load(now)
        self._memory_changed(now)
        self._touched()

    def preload(self, now: float, model: str) -> None:
        """Load a model nobody has asked for yet."""
        self._run(now)
        state = self._state(model)
        self._check_size(state)
        if state.stage == ABSENT:
            self._queue_load(state)
            self._start_load(now)
        self._touched()

    def unload(self, now: float, model: str) -> bool:
        """Evict the model if it is loaded and idle; says whether it did."""
        self._run(now)
        state = self._idle.get(model)
        if state is None:
            return False
        self._evict(state, now)
        self._start_load(now)
        self._memory_changed(now)
        self._touched()
        return True

    def pin(self, now: float, model: str) -> bool:
        """Keep a loaded model on the GPU whatever happens. False, and nothing done, if it is not loaded or what waits here could then never fit."""
        self._run(now)
        state = self._states.get(model)
        if state is None or state.stage != LOADED:
            return False
        if state.pinned:
            return True
        if not self._may_pin(state):
            return False
        state.pinned = True
        self._pinned_bytes += state.size_bytes
        self._no_longer_idle(model)
        self._touched()
        return True

    def unpin(self, now: float, model: str) -> None:
        """Undo `pin`; the model counts as used just now."""
        self._run(now)
        state = self._states.get(model)
        if state is None or not state.pinned:
            return
        state.pinned = False
        self._pinned_bytes -= state.size_bytes
        if not state.batch and not state.queue:
            self._becomes_idle(state, now)
        self._start_load(now)
        self._memory_changed(now)
        self._touched()

    # --- out ------------------------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> list[Notification]:
        """Everything that happened up to and including `now` and was not told yet, in order."""
        if self.next_at <= now:
            self._run(now)
        notes = self._notes
        if notes:
            self._notes = []
        return notes

    def busy_s(self, now: float) -> float:
        """Seconds since the start with at least one request running; see `Engine.busy_s`."""
        if not self._running:
            return self._busy_s
        return self._busy_s + min(now, self._boundary_at) - self._busy_since

    def usage(self, now: float) -> EngineUsage:
        """See `Engine.usage`. Batch and KV cache change at the ends of segments only."""
        segment_s = max(0.0, min(now, self._boundary_at) - self._begin) if self._rounds else 0.0
        return EngineUsage(
            self.busy_s(now),
            self._slot_s + len(self._running) * segment_s,
            self._kv_byte_s + self._kv_bytes * segment_s,
            self._weights_byte_s + self._weights_bytes * max(0.0, now - self._weighed_at),
        )

    def snapshot(self, now: float) -> EngineSnapshot:
        """What a load report needs; cheap, and cached while the engine is idle."""
        if self.next_at <= now:
            self._run(now)
        if self._idle_snapshot is not None:
            return self._idle_snapshot
        loading, load_queue_s = self._loading(now) if self._load is not None or self._load_queue else ((), 0.0)
        room_bytes = self._capacity_bytes - self._weights_bytes
        kv_used = self._kv_bytes / room_bytes if room_bytes > 0 else 1.0
        round_s, left_s = self._pace(now)
        free_bytes = room_bytes - self._kv_bytes - self._waiting_kv_bytes
        gpu, busy = self.gpu_names()
        host, disk, disk_complete = self._tiers.names()
        snapshot = EngineSnapshot(
            slots=self.slots, running=len(self._running), waiting=self.waiting, blocked=self._blocked(), wait_s=self._wait_s(now), load_queue_s=load_queue_s,
            kv_used=kv_used, kv_bytes=self._kv_bytes, round_s=round_s, left_s=left_s, gpu_free_bytes=max(0, free_bytes), gpu_models=gpu, busy_models=busy,
            loading=loading, host_models=host, disk_models=disk, disk_complete=disk_complete,
        )  # fmt: skip
        if not self._running and not self.waiting and not loading:
            self._idle_snapshot = snapshot
        return snapshot

    def _pace(self, now: float) -> tuple[float, float]:
        """(seconds in which each running request gets a token; mean seconds until their last tokens), as if nobody came any more."""
        running = len(self._running)
        if not running:
            return 0.0, 0.0
        round_s = self._decode_round_s()
        done = self._round + (self._round_at(now)[0] - 1 if self._rounds else 0)
        return round_s, max(0.0, self._last_rounds / running - done) * round_s

    def _blocked(self) -> int:
        """Requests of loaded models that the end of this round alone will not let in: slots or memory are wanting, or an older load waits for memory."""
        if self._hold_seq == self._blocked_seq and len(self._running) < self.slots:  # both infinite: nobody waits for memory
            return 0
        return sum(len(state.queue) for state in self._ready.values())

    def _loading(self, now: float) -> tuple[tuple[tuple[str, float], ...], float]:
        """(what is being loaded and what waits for it, with the seconds until it is there; seconds until the last of them is)."""
        loading = []
        left_s = 0.0
        if self._load is not None:
            left_s = self._load_end - now
            loading.append((self._load.name, left_s))
        for state in self._load_queue:
            left_s += load_s(state.model, self._hardware, self._tiers.tier_of(state.name))
            loading.append((state.name, left_s))
        return tuple(loading), left_s

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def _run(self, now: float) -> None:
        """Do everything that is due by `now`. At one instant rounds come first, then the end of a load, then of keep-alive."""
        while (at := self.next_at) <= now:
            self._idle_snapshot = None
            if self._boundary_at <= at:
                self._end_segment(at)
            elif self._load_end <= at:
                self._finish_load(at)
            else:
                self._expire_idle(at)
            self._schedule()

    def _schedule(self) -> None:
        at = self._boundary_at
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
            self._cut(now)

    # --- rounds ---------------------------------------------------------------------------------------------------------------------

    def _end_of_round(self, n: int) -> float:
        """When round n of the segment, from 1, ends."""
        return self._begin + (n * self._first_s + self._growth_s * (n * (n - 1) // 2))

    def _round_at(self, now: float) -> tuple[int, float]:
        """The round of the segment that is in progress at `now`, from 1, and when it ends: the first that ends after it. By the quadratic formula, then
        exactly."""
        elapsed_s, first_s, growth_s, begin = now - self._begin, self._first_s, self._growth_s, self._begin
        half = first_s - growth_s / 2
        n = 1 + int(2 * elapsed_s / (half + sqrt(half * half + 2 * growth_s * elapsed_s)))
        while n > 1 and begin + ((n - 1) * first_s + growth_s * ((n - 1) * (n - 2) // 2)) > now:
            n -= 1
        while (end_at := begin + (n * first_s + growth_s * (n * (n - 1) // 2))) <= now:
            n += 1
        return n, end_at

    def _cut(self, now: float) -> None:
        """End the segment at the next end of a round, so that those who wait are looked at."""
        if not self._rounds:
            self._boundary_at = min(self._boundary_at, now)
        elif self._rounds > 1:
            n, end_at = self._round_at(now)
            if n < self._rounds:
                self._rounds = n
                self._boundary_at = end_at

    def _end_segment(self, now: float) -> None:
        """The rounds of the segment are over: tell what they yielded, admit who fits, begin the next segment."""
        rounds = self._rounds
        if rounds:
            segment_s = now - self._begin
            self._slot_s += len(self._running) * segment_s
            self._kv_byte_s += self._kv_bytes * segment_s
            self._round = round_ = self._round + rounds
            for state in self._active:
                state.context_tokens += rounds * state.batch
            if self._fresh:
                for request in self._fresh:
                    request.state.prefill_extra = 0
                    if not request.cancelled:
                        self._notes.append(FirstTokenOut(now, request.request_id))
                self._fresh = []
                self._fresh_tokens = 0
            running = self._running
            while running and running[0][0] == round_:
                self._finish(heappop(running)[2], now)
        if self._ready or self._load_queue:
            self._blocked_seq = inf
            self._admit(now)
            while self._start_load(now):
                self._admit(now)
        self._begin_segment(now)

    def _finish(self, request: Request, now: float) -> None:
        state = request.state
        self._last_rounds -= self._round
        state.batch -= 1
        state.context_tokens -= request.prompt_tokens + request.output_tokens
        self._kv_bytes -= request.kv_bytes
        if not request.cancelled:
            self._notes.append(Finished(now, request.request_id, request.output_tokens))
        if not state.batch:
            self._active.remove(state)
            if not state.queue:
                self._becomes_idle(state, now)
        if not self._running:
            self._busy_s += now - self._busy_since

    def _admit(self, now: float) -> None:
        """Move requests from the queues into the batch, oldest first, until one does not fit."""
        ready = self._ready
        running = self._running
        while ready:
            state = next(iter(ready.values())) if len(ready) == 1 else min(ready.values(), key=head_seq)
            request = state.queue[0]
            if request.seq > self._hold_seq or len(running) >= self.slots:
                return
            if self._fresh and self._fresh_tokens + request.prompt_tokens > self._prefill_tokens_max:
                return
            if not self._fits(request, now):
                self._blocked_seq = request.seq
                return
            state.queue.popleft()
            if not state.queue:
                del ready[state.name]
            if not state.batch:
                self._active.append(state)
            if not running:
                self._busy_since = now
            self.waiting -= 1
            self._waiting_kv_bytes -= request.kv_bytes
            self._kv_bytes += request.kv_bytes
            self._fresh.append(request)
            self._fresh_tokens += request.prompt_tokens
            state.batch += 1
            state.context_tokens += request.prompt_tokens
            state.prefill_extra += request.prompt_tokens - 1
            last_round = self._round + request.output_tokens
            self._last_rounds += last_round
            heappush(running, (last_round, request.seq, request))
            self._notes.append(Started(now, request.request_id))

    def _fits(self, request: Request, now: float) -> bool:
        """Is there KV cache for the request, be it by evicting models where waiting could not help?"""
        missing_bytes = request.kv_bytes - (self._capacity_bytes - self._weights_bytes)
        if missing_bytes > 0 and not self._make_room(missing_bytes, request.seq, now):
            return False
        return self._kv_bytes + request.kv_bytes <= self._capacity_bytes - self._weights_bytes

    def _begin_segment(self, now: float) -> None:
        if not self._running:
            self._rounds = 0
            self._boundary_at = inf
            return
        first_s = growth_s = 0.0
        for state in self._active:
            batch, k_s, floor_s = state.batch, state.k_s, state.weight_floor_s
            work_s = state.a_s + state.p_s * (batch + state.prefill_extra)
            if work_s < floor_s:
                work_s = floor_s
            first_s += work_s + k_s * state.context_tokens + state.overhead_s + state.sequence_s * batch
            growth_s += k_s * batch
        rounds = 1 if self._fresh else self._running[0][0] - self._round
        self._begin = now
        self._first_s = first_s
        self._growth_s = growth_s
        self._rounds = rounds
        self._boundary_at = now + (rounds * first_s + growth_s * (rounds * (rounds - 1) // 2))

    # --- estimates ------------------------------------------------------------------------------------------------------------------

    def _wait_s(self, now: float) -> float:
        """Estimated seconds until a request arriving now, for a loaded model, begins its prefill.

        To the end of the round; then a round for each batch of prompts that waits already. When slots or memory run out first: until enough running
        requests have finished, at today's pace. The newcomer is taken to need as much KV cache as the running requests do on average.
        """
        if not self._running and not self._ready:
            return 0.0
        wait_s = self._round_at(now)[1] - now if self._rounds else 0.0
        queued = queued_kv_bytes = queued_tokens = 0
        for state in self._ready.values():
            tokens = sum(request.prompt_tokens for request in state.queue)
            queued += len(state.queue)
            queued_kv_bytes += sum(request.kv_bytes for request in state.queue)
            queued_tokens += tokens
            wait_s += tokens * state.p_s
        if queued:
            rounds = min(queued, ceil(queued_tokens / self._prefill_tokens_max))
            wait_s += rounds * self._decode_round_s()
        running = len(self._running)
        missing_slots = running + queued + 1 - self.slots
        missing_bytes = self._kv_bytes + queued_kv_bytes - (self._capacity_bytes - self._weights_bytes)
        missing_bytes += self._kv_bytes // running if running else 0
        if self._hold_seq < inf:
            missing_bytes += self._load_queue[0].size_bytes
        if running and (missing_slots > 0 or missing_bytes > 0):
            wait_s = max(wait_s, self._until_freed_s(now, missing_slots, missing_bytes))
        return wait_s

    def _until_freed_s(self, now: float, missing_slots: int, missing_bytes: int) -> float:
        """Seconds until so many running requests and their KV cache are gone at today's pace.

        If all that run now are not enough, others will follow them: slots and memory are then taken to come free at the mean rate of today's batch, in which
        each request gives up its own once per its whole length.
        """
        freed_bytes = 0
        for freed, (last_round, _, request) in enumerate(sorted(self._running), start=1):
            freed_bytes += request.kv_bytes
            if freed >= missing_slots and freed_bytes >= missing_bytes:
                rounds = last_round - self._round
                if not self._fresh:
                    return self._end_of_round(rounds) - now
                growth_s = self._growth_s * (rounds * (rounds - 1) // 2)  # the round in progress prefills, those after it do not
                return self._boundary_at - now + (rounds - 1) * self._decode_round_s() + growth_s
        slots_per_round = sum(1 / request.output_tokens for _, _, request in self._running)
        bytes_per_round = sum(request.kv_bytes / request.output_tokens for _, _, request in self._running)
        rounds_for_memory = missing_bytes / bytes_per_round if missing_bytes > 0 and bytes_per_round > 0 else 0.0
        return self._decode_round_s() * max(missing_slots / slots_per_round, rounds_for_memory)

    def _decode_round_s(self) -> float:
        """Seconds of a round without prefills, with the batch and the context of the start of the segment."""
        return sum(max(s.weight_floor_s, s.a_s + s.p_s * s.batch) + s.k_s * s.context_tokens + s.overhead_s + s.sequence_s * s.batch for s in self._active)
