"""The contract of every engine: an engine serves requests, loads models, and tells what happened and when.

Simulated engines and real servers keep the same contract. Neither reads a clock: time is an argument. A role hands work in with `submit` and `load`, comes back
at `next_at` or when `wake` was called, and takes the notifications out with `advance`. Each notification carries the exact time of what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sllm.protocol.messages import EngineSnapshot
from sllm.protocol.record import Record


class RequestTooLarge(Exception):
    """The request's KV cache (prompt and output) can never fit beside its model on this GPU."""


class ModelTooLarge(Exception):
    """The model's weights can never fit on this GPU."""


# --- notifications ----------------------------------------------------------------------------------------------------------------------


class Started(Record):
    """A request left the queue; its prefill (or service) begins."""

    FIELDS = ("at", "request_id")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str) -> None:
        self.at = at
        self.request_id = request_id


class FirstTokenOut(Record):
    """The first token of a request is out."""

    FIELDS = ("at", "request_id")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str) -> None:
        self.at = at
        self.request_id = request_id


class Finished(Record):
    """The last token of a request is out."""

    FIELDS = ("at", "request_id", "output_tokens")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, output_tokens: int) -> None:
        self.at = at
        self.request_id = request_id
        self.output_tokens = output_tokens  # tokens produced, at most the number asked for


class Loaded(Record):
    """A model is on the GPU now."""

    FIELDS = ("at", "model", "tier_from", "load_s")
    __slots__ = FIELDS

    def __init__(self, at: float, model: str, tier_from: int, load_s: float) -> None:
        self.at = at
        self.model = model
        self.tier_from = tier_from  # `sllm.models.catalogue.TIER_NAMES`
        self.load_s = load_s


class Evicted(Record):
    """A model left the GPU."""

    FIELDS = ("at", "model", "to_tier")
    __slots__ = FIELDS

    def __init__(self, at: float, model: str, to_tier: int) -> None:
        self.at = at
        self.model = model
        self.to_tier = to_tier  # the nearest tier that still has the model


Notification = Started | FirstTokenOut | Finished | Loaded | Evicted


# --- state ------------------------------------------------------------------------------------------------------------------------------


class EngineUsage(Record):
    """How much of an engine was in use since its start, as integrals over time: the difference of two usages, divided by the time between them, is a mean."""

    FIELDS = ("busy_s", "slot_s", "kv_byte_s", "weights_byte_s")
    __slots__ = FIELDS

    def __init__(self, busy_s: float = 0.0, slot_s: float = 0.0, kv_byte_s: float = 0.0, weights_byte_s: float = 0.0) -> None:
        self.busy_s = busy_s  # seconds with requests running; where each slot serves on its own, the sum over the slots divided by their number
        self.slot_s = slot_s  # slots taken, times seconds
        self.kv_byte_s = kv_byte_s  # bytes reserved as KV cache, times seconds
        self.weights_byte_s = weights_byte_s  # bytes of loaded and loading models, times seconds

    def __sub__(self, other: EngineUsage) -> EngineUsage:
        return EngineUsage(
            self.busy_s - other.busy_s, self.slot_s - other.slot_s, self.kv_byte_s - other.kv_byte_s, self.weights_byte_s - other.weights_byte_s
        )

    def plus(self, other: EngineUsage, factor: float = 1.0) -> EngineUsage:
        """The sum of this usage and `factor` times the other."""
        return EngineUsage(
            self.busy_s + factor * other.busy_s,
            self.slot_s + factor * other.slot_s,
            self.kv_byte_s + factor * other.kv_byte_s,
            self.weights_byte_s + factor * other.weights_byte_s,
        )


NOTHING_USED = EngineUsage()


# --- engines ----------------------------------------------------------------------------------------------------------------------------


def nobody_to_wake() -> None:
    """`Engine.wake` of an engine that no driver has taken over yet."""


class Engine(Protocol):
    """The interface that a worker needs of an engine. Times are absolute, in seconds, and never go back.

    A simulated engine knows its future: `next_at` is the time of the next thing to happen. A real server does not know its future: its `next_at` is infinite
    while it has nothing to tell; when something has happened, the engine sets `next_at` to the time of that and calls `wake`. All calls, `wake` included, are
    made in the driver's thread: another thread first has to hand its results over to that thread (`sllm.live.bridge`).
    """

    wake: Callable[[], None]
    """Calls the worker's `handle_timer`; set by the driver of the worker. An engine that knows its future never calls `wake`."""

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        """Take a request that may produce `output_tokens`; begin to load its model unless the model is loaded or being loaded. One load serves all waiting
        requests.

        Raises RequestTooLarge, ModelTooLarge, KeyError for a model that is not in the catalogue, ValueError for token counts below 0 (prompt) or 1
        (output); the request is not taken then.
        """

    def cancel(self, now: float, request_id: str) -> bool:
        """Give a request up: no further notification names the request, and its slot and memory come free, at the latest at the end of the present round. A
        load begun for the request goes on. False if the engine does not have the request (any more)."""
        ...

    def load(self, now: float, model: str) -> None:
        """Load a model that no request has asked for; does nothing if the model is loaded or being loaded. Raises ModelTooLarge, KeyError."""

    def unload(self, now: float, model: str) -> bool:
        """Evict the model if it is loaded and may be evicted; returns whether it was evicted."""
        ...

    def advance(self, now: float) -> list[Notification]:
        """Everything that happened up to and including `now` and was not told yet, in order. To be called after each of the calls above as well: the
        immediate effects of a call are told here and do not show in `next_at`."""
        ...

    @property
    def next_at(self) -> float:
        """When the next thing will happen by itself, absolute seconds. Not later than now: it has happened and waits to be told. Infinite: nothing will
        happen, or the engine cannot know and calls `wake` later."""
        ...

    def snapshot(self, now: float) -> EngineSnapshot:
        """The state of the engine for a load report. An engine without changes may return the same object again, which saves readers the comparison."""
        ...

    def usage(self, now: float) -> EngineUsage:
        """How much was in use since the start. Changes nothing.

        Running requests count up to `now`, but not beyond the next end of a segment: the engine knows what follows only when it is advanced.
        """
        ...

    @property
    def slots(self) -> int:
        """The largest number of requests served at once."""
        ...

    @property
    def memory_bytes(self) -> int:
        """GPU memory that weights and KV cache share; 0 where memory has no bound."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, memory, the end of a round or their model."""
        ...
