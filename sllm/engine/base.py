"""What every engine is: a state machine without a clock that serves requests, loads models and says what happened and when.

A role hands work in with `submit`, asks `next_at` when to come back, and takes what happened out with `advance`. However much time a call to
`advance` covers, each notification carries its own exact time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from sllm.protocol.messages import EngineSnapshot


class RequestTooLarge(Exception):
    """The request's KV cache (prompt and output) can never fit beside its model on this GPU."""


class ModelTooLarge(Exception):
    """The model's weights can never fit on this GPU."""


class Started(NamedTuple):
    """A request left the queue; its prefill (or service) begins."""

    at: float
    request_id: str


class FirstTokenOut(NamedTuple):
    at: float
    request_id: str


class Finished(NamedTuple):
    """Its last token is out."""

    at: float
    request_id: str
    output_tokens: int


class Loaded(NamedTuple):
    """A model is on the GPU now."""

    at: float
    model: str
    tier_from: int
    load_s: float


class Evicted(NamedTuple):
    """A model left the GPU; `to_tier` is the nearest tier that still has it."""

    at: float
    model: str
    to_tier: int


Notification = Started | FirstTokenOut | Finished | Loaded | Evicted


class EngineCounts(NamedTuple):
    """Since the start."""

    loads_started: int
    loads_finished: int
    evictions: int
    cold_starts: tuple[int, int, int, int]  # loads finished, by the tier they came from


class EngineUsage(NamedTuple):
    """How much of an engine was in use since its start: integrals over time, so that the difference of two divided by the time between them is a mean."""

    busy_s: float = 0.0  # `Engine.busy_s`
    slot_s: float = 0.0  # slots taken, times seconds
    kv_byte_s: float = 0.0  # bytes reserved as KV cache, times seconds
    weights_byte_s: float = 0.0  # bytes of loaded and loading models, times seconds

    def __sub__(self, other: EngineUsage) -> EngineUsage:
        busy_s, slot_s, kv_byte_s, weights_byte_s = other
        return EngineUsage(self[0] - busy_s, self[1] - slot_s, self[2] - kv_byte_s, self[3] - weights_byte_s)

    def plus(self, other: EngineUsage, factor: float = 1.0) -> EngineUsage:
        """The sum of this and `factor` times the other."""
        busy_s, slot_s, kv_byte_s, weights_byte_s = other
        return EngineUsage(self[0] + factor * busy_s, self[1] + factor * slot_s, self[2] + factor * kv_byte_s, self[3] + factor * weights_byte_s)


NOTHING_USED = EngineUsage()


class Engine(Protocol):
    """What a worker needs of an engine. Times are absolute, in seconds, and never go back."""

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        """Take a request; if its model is neither loaded nor on its way, begin to load it. One load serves all who wait for it.

        Raises RequestTooLarge, ModelTooLarge, KeyError for a model that is not in the catalogue, ValueError for token counts below 0 (prompt) or 1
        (output); the request is not taken then.
        """

    def cancel(self, now: float, request_id: str) -> bool:
        """Give a request up: nothing is told of it any more, and its slot and memory come free, at the latest at the end of the present round. A load begun
        for it goes on. False if the request is not here (any more)."""
        ...

    def preload(self, now: float, model: str) -> None:
        """Load a model nobody has asked for yet. Raises ModelTooLarge, KeyError."""

    def unload(self, now: float, model: str) -> bool:
        """Evict the model if it is loaded and may be; says whether it did."""
        ...

    def advance(self, now: float) -> list[Notification]:
        """Everything that happened up to and including `now` and was not told yet, in order."""
        ...

    @property
    def next_at(self) -> float:
        """When the next thing will happen by itself, absolute; infinite: nothing will."""
        ...

    def snapshot(self, now: float) -> EngineSnapshot: ...

    def busy_s(self, now: float) -> float:
        """Seconds since the start with work running; for c slots, the sum over the slots divided by c. A question: it changes nothing.

        What runs is taken to run on to `now`, but no further than to its next end: what comes then is known only when the engine is let run.
        """
        ...

    def usage(self, now: float) -> EngineUsage:
        """What was in use since the start. A question like `busy_s`: it changes nothing, and what runs is taken to run on."""
        ...

    @property
    def slots(self) -> int:
        """Requests it serves at once, at most."""
        ...

    @property
    def memory_bytes(self) -> int:
        """What weights and KV cache share; 0 where memory has no bound."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, memory, the end of a round or their model."""
        ...

    def counts(self) -> EngineCounts: ...
