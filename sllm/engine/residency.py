"""Residency: which tier (GPU, host memory, disk, remote store) has which model; loads, one at a time; evictions.

Memory on the GPU is claimed by loads (weights) and by requests (KV cache), and granted **in the order of arrival**: a claim that does not fit yet
holds back younger claims, so no claim starves. A request claims memory only once its model is loaded; before that it holds no other claim back.

Models leave the GPU when a claim needs their room or after `keep_alive_s` of idleness, the least recently used first. A load may take the room of
idle models only; KV cache takes the room of idle models only if waiting for running requests to finish could not make it fit. A model is idle while none of
its requests runs or waits. To an older claim a model with only younger waiting requests counts as idle too, after the truly idle models: the claim holds
those requests back anyway, and their model would otherwise block the claim for ever. That model is then loaded again behind the claim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from math import inf

from sllm.engine.base import Evicted, Loaded, ModelTooLarge, Notification, nobody_to_wake
from sllm.models.catalogue import Catalog
from sllm.models.cost import load_s, step_cost
from sllm.models.model import DISK, HOST, REMOTE, Hardware, Model

ABSENT, QUEUED, LOADING, LOADED = range(4)  # of a model, seen from the GPU
NO_CLAIM = 1 << 60  # in place of an order of arrival: younger than every claim


class Request:
    """A request inside the engine."""

    __slots__ = ("cancelled", "kv_bytes", "output_tokens", "prompt_tokens", "request_id", "seq", "state")

    def __init__(self, request_id: str, state: ModelState, prompt_tokens: int, output_tokens: int, kv_bytes: int, seq: int) -> None:
        self.request_id = request_id
        self.state = state
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.kv_bytes = kv_bytes  # for prompt and output, reserved from admission to the end
        self.seq = seq  # order of arrival, in one numbering with loads
        self.cancelled = False  # no further notification names the request


class ModelState:
    """One model on one worker: its stage, and the sums over its batch that the step time needs."""

    __slots__ = (
        "a_s", "batch", "context_tokens", "idle_since", "k_s", "kv_bytes_per_token", "load_seq", "model", "name", "overhead_s", "p_s", "prefill_extra", "queue",
        "sequence_s", "size_bytes", "stage", "tokens_max", "weight_floor_s",
    )  # fmt: skip

    def __init__(self, model: Model, hardware: Hardware) -> None:
        self.model = model
        self.name = model.name
        self.size_bytes = model.size_bytes
        self.kv_bytes_per_token = model.kv_bytes_per_token
        self.weight_floor_s, self.a_s, self.p_s, self.k_s, self.overhead_s, self.sequence_s = step_cost(model, hardware)
        self.tokens_max = _request_tokens_max(model, hardware)
        self.stage = ABSENT
        self.batch = 0  # running requests
        self.context_tokens = 0  # of the running requests, at the start of the current segment
        self.prefill_extra = 0  # new tokens in a step that prefills, beyond one for each running request
        self.queue: deque[Request] = deque()  # waiting requests, the oldest first
        self.idle_since = 0.0
        self.load_seq = 0  # order of arrival of the model's load, in one numbering with requests


def _request_tokens_max(model: Model, hardware: Hardware) -> float:
    """Tokens, prompt and output, of the largest request that can ever be served: bounded by the model's context and by the GPU memory beside the weights.
    Below 0 if the weights alone do not fit."""
    room_bytes = hardware.usable_gpu_bytes - model.size_bytes
    if room_bytes < 0:
        return -1
    in_memory = room_bytes // model.kv_bytes_per_token if model.kv_bytes_per_token else inf
    return min(model.context_tokens or inf, in_memory)


class MemoryClaims:
    """The claims that wait for GPU memory: at most one load, the one at the head of the load queue, and at most one request, the oldest of loaded models.

    Memory is granted in the order of arrival, so the older of the two holds back every younger claim of the other kind. A claim is known by its order of
    arrival, which no two claims share.
    """

    __slots__ = ("load_seq", "request_seq")

    def __init__(self) -> None:
        self.load_seq = NO_CLAIM  # of the load that waits for memory; requests younger than that load are held back
        self.request_seq = NO_CLAIM  # of the request that waits for KV cache; loads younger than that request are held back

    def is_empty(self) -> bool:
        """Whether no claim waits for memory."""
        return self.load_seq == self.request_seq  # both are NO_CLAIM

    def withdraw_request(self, seq: int) -> None:
        """Drop the claim of the request with this order of arrival, if that request waits for KV cache."""
        if self.request_seq == seq:
            self.request_seq = NO_CLAIM


class LocalTiers:
    """Host memory (least recently used goes first) and disk (likewise; filled in the catalogue's order at the start), both bounded."""

    __slots__ = ("_disk", "_disk_room", "_host", "_host_room", "_names", "disk_complete")

    def __init__(self, catalog: Catalog, hardware: Hardware) -> None:
        self._host: dict[str, int] = {}  # name -> bytes, least recently used first
        self._host_room = hardware.host_memory_bytes
        self._names: tuple[tuple[str, ...], tuple[str, ...], bool] | None = None
        self._disk: dict[str, int] = {}
        self._disk_room = hardware.disk_bytes
        self.disk_complete = catalog.size_bytes <= hardware.disk_bytes
        if not self.disk_complete:
            for model in catalog.models.values():
                if model.size_bytes <= self._disk_room:
                    self._disk[model.name] = model.size_bytes
                    self._disk_room -= model.size_bytes

    def tier_of(self, name: str) -> int:
        """The nearest tier below the GPU that has the model."""
        if name in self._host:
            return HOST
        return DISK if self.disk_complete or name in self._disk else REMOTE

    def fetched(self, model: Model) -> None:
        """Keep the model in host memory and on disk, where they are large enough, after a load has brought it to the GPU."""
        self._host_room = _keep(self._host, self._host_room, model)
        self._names = None
        if not self.disk_complete:
            self._disk_room = _keep(self._disk, self._disk_room, model)

    def names(self) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
        """(models in host memory, models on disk, whether the disk has every model of the catalogue; the second is then empty). Names are sorted."""
        if self._names is None:
            self._names = tuple(sorted(self._host)), tuple(sorted(self._disk)), self.disk_complete
        return self._names


def _keep(kept: dict[str, int], room: int, model: Model) -> int:
    """Make the model the most recently used one of `kept`, and drop the least recently used models to make room. Returns the bytes of room left."""
    size = kept.pop(model.name, None)
    if size is not None:
        room += size
    if model.size_bytes > room + sum(kept.values()):
        return room
    while model.size_bytes > room:
        room += kept.pop(next(iter(kept)))
    kept[model.name] = model.size_bytes
    return room - model.size_bytes


class GpuResidency(ABC):
    """GPU memory, the load path and the tiers below the GPU: the part of an engine that does not depend on steps."""

    __slots__ = (
        "_capacity_bytes", "_catalog", "_claims", "_gpu_names", "_hardware", "_idle", "_keep_alive_s", "_kv_bytes", "_load", "_load_end", "_load_queue",
        "_load_s", "_load_tier", "_notes", "_ready", "_seq", "_states", "_tiers", "_weighed_at", "_weights_byte_s", "_weights_bytes", "wake",
    )  # fmt: skip

    def __init__(self, catalog: Catalog, hardware: Hardware, keep_alive_s: float | None) -> None:
        self._catalog = catalog
        self._hardware = hardware
        self._keep_alive_s = keep_alive_s or inf
        self._capacity_bytes = hardware.usable_gpu_bytes
        self._weights_bytes = 0  # of loaded and loading models
        self._weights_byte_s = 0.0  # integral of `_weights_bytes` over time, up to `_weighed_at`
        self._weighed_at = 0.0
        self._kv_bytes = 0  # reserved by running requests
        self._tiers = LocalTiers(catalog, hardware)
        self._states: dict[str, ModelState] = {}  # models touched so far
        self._idle: dict[str, ModelState] = {}  # loaded and idle, least recently used first
        self._ready: dict[str, ModelState] = {}  # loaded, with requests waiting
        self._load_queue: deque[ModelState] = deque()
        self._load: ModelState | None = None  # in progress
        self._load_end = inf
        self._load_tier = REMOTE
        self._load_s = 0.0
        self._seq = 0  # of the last claim
        self._claims = MemoryClaims()
        self._notes: list[Notification] = []
        self._gpu_names: tuple[tuple[str, ...], tuple[str, ...]] | None = None
        self.wake: Callable[[], None] = nobody_to_wake

    # --- for the engine that builds on this -----------------------------------------------------------------------------------------

    @abstractmethod
    def _memory_changed(self, now: float) -> None:
        """Called when memory has changed, so that claims may fit that did not fit before."""

    # --- loads ----------------------------------------------------------------------------------------------------------------------

    def _state(self, name: str) -> ModelState:
        state = self._states.get(name)
        if state is None:
            model = self._catalog[name]
            state = ModelState(model, self._hardware)
            self._states[name] = state
        return state

    def _check_size(self, state: ModelState) -> None:
        if state.size_bytes > self._capacity_bytes:
            raise ModelTooLarge(f"{state.name}: {state.size_bytes} bytes of weights, {self._capacity_bytes} bytes of GPU memory")

    def _queue_load(self, state: ModelState) -> None:
        self._seq += 1
        state.load_seq = self._seq
        state.stage = QUEUED
        self._load_queue.append(state)

    def _start_load(self, now: float) -> bool:
        """Begin the load at the head of the queue if the load path is free and memory suffices; returns whether a load began."""
        if self._load is not None or not self._load_queue:
            return False
        state = self._load_queue[0]
        if self._claims.request_seq < state.load_seq:
            return False
        free_bytes = self._capacity_bytes - self._weights_bytes - self._kv_bytes
        if state.size_bytes > free_bytes and not self._make_room(state.size_bytes - free_bytes, state.load_seq, now):
            self._claims.load_seq = state.load_seq
            return False
        self._load_queue.popleft()
        self._claims.load_seq = NO_CLAIM
        state.stage = LOADING
        self._weigh(state.size_bytes, now)
        self._load = state
        self._load_tier = self._tiers.tier_of(state.name)
        self._load_s = load_s(state.model, self._hardware, self._load_tier)
        self._load_end = now + self._load_s
        return True

    def _finish_load(self, now: float) -> None:
        state = self._load
        assert state is not None
        self._load = None
        self._load_end = inf
        self._tiers.fetched(state.model)
        state.stage = LOADED
        self._gpu_names = None
        self._notes.append(Loaded(now, state.name, self._load_tier, self._load_s))
        if state.queue:
            self._ready[state.name] = state
        else:
            self._becomes_idle(state, now)
        self._start_load(now)
        self._memory_changed(now)

    def _weigh(self, more_bytes: int, now: float) -> None:
        """Change the bytes of weights on the GPU by `more_bytes`, and bring their integral over time up to `now`."""
        self._weights_byte_s += self._weights_bytes * (now - self._weighed_at)
        self._weighed_at = now
        self._weights_bytes += more_bytes

    def _loading(self, now: float) -> tuple[tuple[tuple[str, float], ...], float]:
        """((model, seconds until it is loaded) for each model that is being loaded or waits for the load path, seconds until the last one is loaded)."""
        loading = []
        left_s = 0.0
        if self._load is not None:
            left_s = self._load_end - now
            loading.append((self._load.name, left_s))
        for state in self._load_queue:
            left_s += load_s(state.model, self._hardware, self._tiers.tier_of(state.name))
            loading.append((state.name, left_s))
        return tuple(loading), left_s

    @property
    def memory_bytes(self) -> int:
        """GPU memory for weights and KV cache."""
        return self._capacity_bytes

    # --- evictions ------------------------------------------------------------------------------------------------------------------

    def _becomes_idle(self, state: ModelState, now: float) -> None:
        state.idle_since = now
        self._idle[state.name] = state
        self._gpu_names = None

    def _no_longer_idle(self, name: str) -> None:
        if self._idle.pop(name, None) is not None:
            self._gpu_names = None

    def gpu_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(models on the GPU, models on the GPU that cannot be evicted now). Names are sorted."""
        if self._gpu_names is None:
            loaded = tuple(sorted(state.name for state in self._states.values() if state.stage == LOADED))
            self._gpu_names = loaded, tuple(name for name in loaded if name not in self._idle)
        return self._gpu_names

    def _make_room(self, missing_bytes: int, claim_seq: int, now: float) -> bool:
        """Evict models until `missing_bytes` more are free, for the claim with that order of arrival. False, and nothing is evicted, if that cannot be done
        now."""
        victims = list(self._idle.values())
        found_bytes = sum(state.size_bytes for state in victims)
        if found_bytes < missing_bytes:
            held = [s for s in self._ready.values() if not s.batch and s.queue[0].seq > claim_seq]
            held.sort(key=head_seq, reverse=True)
            victims += held
            found_bytes += sum(state.size_bytes for state in held)
            if found_bytes < missing_bytes:
                return False
        for state in victims:
            if missing_bytes <= 0:
                break
            missing_bytes -= state.size_bytes
            self._evict(state, now)
        return True

    def _evict(self, state: ModelState, now: float) -> None:
        self._idle.pop(state.name, None)
        self._ready.pop(state.name, None)
        self._weigh(-state.size_bytes, now)
        self._gpu_names = None
        state.stage = ABSENT
        self._notes.append(Evicted(now, state.name, self._tiers.tier_of(state.name)))
        if state.queue:
            self._claims.withdraw_request(state.queue[0].seq)
            self._queue_load(state)

    def _expire_idle(self, now: float) -> None:
        """Evict the models that have been idle for `keep_alive_s`."""
        while self._idle:
            state = next(iter(self._idle.values()))
            if state.idle_since + self._keep_alive_s > now:
                break
            self._evict(state, now)
        self._start_load(now)
        self._memory_changed(now)

    def _keep_alive_end(self) -> float:
        for state in self._idle.values():
            return state.idle_since + self._keep_alive_s
        return inf


def head_seq(state: ModelState) -> int:
    """The order of arrival of the oldest request that waits for the model."""
    return state.queue[0].seq
