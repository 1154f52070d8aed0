"""The contract of every engine: it serves requests, loads models, and tells what happened and when.

A simulated engine and a real server are peers. Neither has a clock: time is an argument. A role hands work in with `submit` and `load`, comes back at `next_at`
or when `wake` was called, and takes what happened out with `advance`. Each notification carries its own exact time, whatever span of time a call to `advance`
covers.
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
        self.output_tokens = output_tokens  # made, at most those asked for


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
    """How much of an engine was in use since its start: integrals over time, so that the difference of two divided by the time between them is a mean."""

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
        """The sum of this and `factor` times the other."""
        return EngineUsage(
            self.busy_s + factor * other.busy_s,
            self.slot_s + factor * other.slot_s,
            self.kv_byte_s + factor * other.kv_byte_s,
            self.weights_byte_s + factor * other.weights_byte_s,
        )


NOTHING_USED = EngineUsage()


# --- engines ----------------------------------------------------------------------------------------------------------------------------


def nobody_to_wake() -> None:
    """`Engine.wake` of an engine that nobody drives yet."""


class Engine(Protocol):
    """What a worker needs of an engine. Times are absolute, in seconds, and never go back.

    A simulated engine knows its future: `next_at` says when something will happen. A real server does not: `next_at` is infinite while there is nothing to
    tell, and when something has happened the engine sets `next_at` to its time and calls `wake`. All calls, `wake` among them, are made in the thread of
    whoever drives the engine: what another thread finds out has to be handed over to that thread first (`sllm.live.bridge`).
    """

    wake: Callable[[], None]
    """Set by whoever drives the engine's worker; calls the worker's `handle_timer`. An engine that knows its future never calls it."""

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        """Take a request that may make `output_tokens`; if its model is neither loaded nor on its way, begin to load it. One load serves all who wait for it.

        Raises RequestTooLarge, ModelTooLarge, KeyError for a model that is not in the catalogue, ValueError for token counts below 0 (prompt) or 1
        (output); the request is not taken then.
        """

    def cancel(self, now: float, request_id: str) -> bool:
        """Give a request up: nothing is told of it any more, and its slot and memory come free, at the latest at the end of the present round. A load begun
        for it goes on. False if the request is not here (any more)."""
        ...

    def load(self, now: float, model: str) -> None:
        """Load a model that nobody has asked for yet; nothing to do if it is loaded or on its way. Raises ModelTooLarge, KeyError."""

    def unload(self, now: float, model: str) -> bool:
        """Evict the model if it is loaded and may be evicted; says whether it was."""
        ...

    def advance(self, now: float) -> list[Notification]:
        """Everything that happened up to and including `now` and was not told yet, in order. To be called after each of the calls above as well: what a call
        brings about at once is told here and does not show in `next_at`."""
        ...

    @property
    def next_at(self) -> float:
        """When something will happen by itself, as far as the engine knows, absolute. Not later than now: it has happened and waits to be told. Infinite:
        nothing will, or the engine cannot know; it calls `wake` then."""
        ...

    def snapshot(self, now: float) -> EngineSnapshot:
        """What a load report says of the engine. An engine in which nothing changes may give the same object again, and nobody looks at it twice then."""
        ...

    def usage(self, now: float) -> EngineUsage:
        """What was in use since the start. A question: it changes nothing.

        What runs is taken to run on to `now`, but no further than to its next end: what comes then is known only when the engine is let run.
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
