"""A textbook queue with the interface of an engine, so that anyone can compare the simulator with queueing theory.

`slots` servers, one line, first come first served, no batching: M/M/c, M/D/1, M/G/1 with Poisson arrivals. A request's "prefill" takes no time, so the first
token comes at the start of service and the time to the first token is the wait. With a load time, one slot and a keep-alive, it is the queue of a server that
drops a model after a time of idleness and then pays to load it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from math import inf, sqrt
from random import Random
from typing import Any

from sllm.engine.base import EngineUsage, Evicted, Finished, FirstTokenOut, Loaded, Notification, Started, nobody_to_wake
from sllm.models.model import DISK
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import EngineSnapshot

SERVICES = ("deterministic", "exponential", "hyperexponential")
GPU_FREE_BYTES = 1 << 40  # memory has no bound here: every model fits


class Service:
    """Service times in seconds: their law, mean and coefficient of variation. `text`: exponential, deterministic or hyperexponential:CV."""

    __slots__ = ("_first_rate", "_first_share", "_second_rate", "cv", "kind", "mean_s")

    def __init__(self, text: str, mean_s: float) -> None:
        self.kind, _, cv_text = text.partition(":")
        self.mean_s = mean_s
        self.cv = {"deterministic": 0.0, "exponential": 1.0}.get(self.kind, 0.0)
        if self.kind == "hyperexponential":
            try:
                self.cv = float(cv_text)
            except ValueError:
                raise UsageError(f"service {text!r}: hyperexponential needs a coefficient of variation above 1, as in hyperexponential:4") from None
            if not 1.0 < self.cv < inf:
                raise UsageError(f"service {text!r}: the coefficient of variation must be above 1")
        elif self.kind not in SERVICES or cv_text:
            raise UsageError(f"service {text!r}: must be exponential, deterministic or hyperexponential:CV")
        if not 0.0 < mean_s < inf:
            raise UsageError(f"service mean {mean_s!r}: must be above 0 s")
        squared = max(1.0, self.cv**2)
        # Two exponentials with balanced means (each brings half of the mean), a standard choice that leaves mean and CV as the only parameters.
        self._first_share = (1 + sqrt((squared - 1) / (squared + 1))) / 2
        self._first_rate = 2 * self._first_share / mean_s
        self._second_rate = 2 * (1 - self._first_share) / mean_s

    def draw_s(self, rng: Random) -> float:
        if self.kind == "exponential":
            return rng.expovariate(1 / self.mean_s)
        if self.kind == "deterministic":
            return self.mean_s
        return rng.expovariate(self._first_rate if rng.random() < self._first_share else self._second_rate)


class _Request:
    __slots__ = ("model", "output_tokens", "request_id", "seq", "service_s")

    def __init__(self, seq: int, request_id: str, model: str, output_tokens: int, service_s: float) -> None:
        self.seq = seq
        self.request_id = request_id
        self.model = model
        self.output_tokens = output_tokens
        self.service_s = service_s


class QueueEngine:
    """`slots` servers and one line; see `sllm.engine.base.Engine`.

    `service` and `mean_s`: the law of service times (`Service`). They are drawn from `rng` when requests arrive and do not depend on token counts.
    `load_s`: 0: every model is loaded at all times, and snapshots list `models` as loaded. Otherwise a model is loaded when a request first asks for it,
    one model at a time; its requests wait meanwhile, and the model is dropped after `keep_alive_s` of idleness (None or infinity: never). Memory has no
    bound. By definition a load comes from disk.
    """

    def __init__(
        self,
        slots: int,
        service: str,
        mean_s: float,
        rng: Random,
        *,
        models: tuple[str, ...] = (),
        keep_alive_s: float | None = None,
        load_s: float = 0.0,
    ) -> None:
        self.service = Service(service, mean_s)
        self.slots = slots
        self._rng = rng
        self._load_s = load_s
        self._keep_alive_s = inf if keep_alive_s is None else keep_alive_s
        self._always: tuple[str, ...] | None = None if load_s > 0 else tuple(sorted(models))
        self._seq = 0
        self._waiting: list[tuple[int, _Request]] = []  # heap by age, of requests that wait for a slot; their models are loaded
        self._running: list[tuple[float, int, _Request]] = []  # heap by end of service
        self._held: dict[str, deque[_Request]] = {}  # model being loaded or queued for loading -> its requests, in the order of loading
        self._held_count = 0
        self._uses: dict[str, int] = {}  # loaded model -> its requests in the engine
        self._idle: dict[str, float] = {}  # loaded and unused model -> time since when it is unused, the longest first
        self._load_end = inf
        self._notes: list[Notification] = []
        self.wake: Callable[[], None] = nobody_to_wake
        self._busy_slot_s = 0.0
        self._busy_until = 0.0  # up to when _busy_slot_s is summed

    # --- in -------------------------------------------------------------------------------------------------------------------------

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        """Take a request; its service time is drawn here. Raises ValueError for token counts below 0 (prompt) or 1 (output)."""
        if prompt_tokens < 0 or output_tokens < 1:
            raise ValueError(f"{request_id}: {prompt_tokens} prompt and {output_tokens} output tokens")
        self._run(now)
        self._seq += 1
        request = _Request(self._seq, request_id, model, output_tokens, self.service.draw_s(self._rng))
        if self._always is None and model not in self._uses:
            self._want(now, model)
            self._held[model].append(request)
            self._held_count += 1
            return
        self._take(request, now)

    def cancel(self, now: float, request_id: str) -> bool:
        """Give a request up; see `Engine.cancel`. Its slot is free at once."""
        self._run(now)
        for requests in self._held.values():
            for request in requests:
                if request.request_id == request_id:
                    requests.remove(request)
                    self._held_count -= 1
                    return True
        lines: tuple[list[Any], ...] = (self._waiting, self._running)
        for line in lines:
            for entry in line:
                if entry[-1].request_id == request_id:
                    self._count_busy(now)
                    line.remove(entry)
                    heapify(line)
                    self._leave(entry[-1], now)
                    return True
        return False

    def load(self, now: float, model: str) -> None:
        """Load a model that no request has asked for; see `Engine.load`."""
        self._run(now)
        if self._always is None and model not in self._uses:
            self._want(now, model)

    def unload(self, now: float, model: str) -> bool:
        """Drop the model if it is loaded and unused; returns whether it was dropped."""
        self._run(now)
        if model not in self._idle:
            return False
        self._evict(model, now)
        return True

    # --- out ------------------------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> list[Notification]:
        """Everything that happened up to and including `now` and was not told yet, in order."""
        self._run(now)
        notes = self._notes
        if notes:
            self._notes = []
        return notes

    def snapshot(self, now: float) -> EngineSnapshot:
        """The state of the engine for a load report. The wait is estimated from the requests ahead and the mean service time, not from the times drawn."""
        self._run(now)
        running, waiting = len(self._running), len(self._waiting)
        gpu = self._always if self._always is not None else tuple(sorted(self._uses))
        left_s = max(0.0, self._load_end - now)
        loading = tuple((name, left_s + i * self._load_s) for i, name in enumerate(self._held))
        return EngineSnapshot(
            running=running,
            waiting=waiting + self._held_count,
            blocked=waiting,
            wait_s=0.0 if running < self.slots else (waiting + 1) * self.service.mean_s / self.slots,
            load_queue_s=loading[-1][1] if loading else 0.0,
            kv_used=running / self.slots,
            kv_bytes=0,
            round_s=0.0,
            left_s=self.service.mean_s if running else 0.0,
            gpu_free_bytes=GPU_FREE_BYTES,
            slots=self.slots,
            gpu_models=gpu,
            busy_models=tuple(name for name in gpu if self._uses.get(name)),
            loading=loading,
            host_models=(),
            disk_models=(),
            disk_complete=True,
        )

    def usage(self, now: float) -> EngineUsage:
        """See `Engine.usage`; the integrals of memory stay 0."""
        slot_s = self._busy_slot_s
        if self._running:
            slot_s += len(self._running) * (min(now, self._running[0][0]) - self._busy_until)
        busy_s = slot_s / self.slots
        return EngineUsage(busy_s, busy_s * self.slots)

    @property
    def memory_bytes(self) -> int:
        return 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._held_count

    # --- time -----------------------------------------------------------------------------------------------------------------------

    @property
    def next_at(self) -> float:
        """When the next thing will happen by itself, absolute seconds; infinite: nothing will happen."""
        at = self._load_end
        if self._running and self._running[0][0] < at:
            at = self._running[0][0]
        for since in self._idle.values():
            return min(at, since + self._keep_alive_s)
        return at

    def _run(self, now: float) -> None:
        """Do everything that is due by `now`. At one instant the end of a load comes first, then the ends of services, then the ends of keep-alive times."""
        while (at := self.next_at) <= now:
            if self._load_end <= at:
                self._finish_load(at)
            elif self._running and self._running[0][0] <= at:
                self._finish(at)
            else:
                self._evict(next(iter(self._idle)), at)

    # --- service --------------------------------------------------------------------------------------------------------------------

    def _take(self, request: _Request, now: float) -> None:
        """Serve the request at once if a slot is free, otherwise put the request into the line by age."""
        model = request.model
        self._uses[model] = self._uses.get(model, 0) + 1
        self._idle.pop(model, None)
        if len(self._running) < self.slots:
            self._start(request, now)
        else:
            heappush(self._waiting, (request.seq, request))

    def _start(self, request: _Request, now: float) -> None:
        self._count_busy(now)
        heappush(self._running, (now + request.service_s, request.seq, request))
        self._notes += (Started(now, request.request_id), FirstTokenOut(now, request.request_id))

    def _finish(self, now: float) -> None:
        self._count_busy(now)
        request = heappop(self._running)[2]
        self._notes.append(Finished(now, request.request_id, request.output_tokens))
        self._leave(request, now)

    def _count_busy(self, now: float) -> None:
        """Add the slot seconds since the last call to the sum."""
        self._busy_slot_s += len(self._running) * (now - self._busy_until)
        self._busy_until = now

    def _leave(self, request: _Request, now: float) -> None:
        """Account for a request that is finished or cancelled; the oldest waiting request takes the slot, if one is free."""
        if self._waiting and len(self._running) < self.slots:
            self._start(heappop(self._waiting)[1], now)
        self._uses[request.model] -= 1
        if self._always is None and not self._uses[request.model]:
            self._idle[request.model] = now

    # --- models ---------------------------------------------------------------------------------------------------------------------

    def _want(self, now: float, model: str) -> None:
        """Load the model, or put it in line for loading, unless it is there already."""
        if model not in self._held:
            self._held[model] = deque()
            if self._load_end == inf:
                self._start_load(now)

    def _start_load(self, now: float) -> None:
        self._load_end = now + self._load_s

    def _finish_load(self, now: float) -> None:
        self._load_end = inf
        model = next(iter(self._held))
        requests = self._held.pop(model)
        self._notes.append(Loaded(now, model, DISK, self._load_s))
        self._uses[model] = 0
        self._idle[model] = now
        for request in requests:
            self._held_count -= 1
            self._take(request, now)
        if self._held:
            self._start_load(now)

    def _evict(self, model: str, now: float) -> None:
        del self._idle[model]
        del self._uses[model]
        self._notes.append(Evicted(now, model, DISK))
