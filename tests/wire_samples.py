"""One valid message of each type, and strategies for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hypothesis import strategies as st

from sllm.protocol import limits, messages
from sllm.protocol.messages import MESSAGES, AnyEnvelope, Dispatch, Envelope, Message
from sllm.protocol.rules import Fields, Rule
from sllm.wire.frame import FrameCodec
from sllm.wire.keys import Keyring

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
CODEC = FrameCodec(Keyring(1, {1: KEY}))

SAMPLES: dict[type, Message] = {
    messages.LoadReport: messages.LoadReport(
        messages.READY, "10.0.0.7", 8000, "h100-80g", 1000,
        messages.EngineSnapshot(
            256, 3, 1, 1, 0.25, 0.0, 0.5, 4_000_000_000, 0.02, 1.5, 5_000_000_000, ("llama-3.1-8b", "opt-6.7b"), ("opt-6.7b",), (("mistral-7b", 0.4),),
            ("llama-3.1-8b",), (), True,
        ),
        1_764_000_000_000_000_000, 77, (70, 75), 1.0,
    ),
    messages.ReportAck: messages.ReportAck(1_764_000_000_000_000_000, 12),
    messages.ScheduleRequest: messages.ScheduleRequest("r0", "llama-3.1-8b", 1155, 211, 1, 0.0, ("worker-1",)),
    messages.ScheduleResponse: messages.ScheduleResponse("r0", "worker-2", "10.0.0.8", 8000, messages.SERVE, 0.04, Dispatch(5, 9), "warm"),
    messages.ScheduleError: messages.ScheduleError("r0", messages.SATURATED, 1.5, "every worker's queue is full"),
    messages.InferenceRequest: messages.InferenceRequest("r0", "llama-3.1-8b", 1155, 211, Dispatch(5, 9), "worker-2"),
    messages.InferenceAccepted: messages.InferenceAccepted("r0", 3),
    messages.FirstToken: messages.FirstToken("r0", 0.01),
    messages.InferenceResponse: messages.InferenceResponse("r0", messages.COMPLETED, 211, 0.01, 0.04, 3.2, 0.0),
    messages.Progress: messages.Progress(1.0, 12),
    messages.WorkerLost: messages.WorkerLost("worker-2", 1_764_000_000_000_000_000),
    messages.CancelRequest: messages.CancelRequest("r0"),
}  # fmt: skip

TEXTS = st.text(st.characters(codec="utf-8"), max_size=60)
PRINTABLE = st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp", "Zs"), include_characters=" ")
NAMES = st.text(PRINTABLE, min_size=1, max_size=32)
IDS = st.text(PRINTABLE, min_size=1, max_size=15)
HOSTS = st.text("aZ09._~:%-", min_size=1, max_size=limits.HOST_MAX_BYTES)
COUNTS = st.integers(0, limits.NUMBER_MAX)
SECONDS = st.floats(0.0, 1e9)
BY_FIELD: dict[str, st.SearchStrategy[Any]] = {
    "state": st.sampled_from(messages.REPORTED_STATES), "action": st.sampled_from(messages.ACTIONS), "code": st.sampled_from(messages.ERROR_CODES),
    "outcome": st.sampled_from(messages.OUTCOMES), "port": st.integers(0, 65535), "priority": st.integers(0, 9), "kv_used": st.floats(0.0, 1.0),
    "interval_s": st.floats(0.001, limits.REPORT_INTERVAL_MAX_S), "disk_complete": st.booleans(),
    "dispatch_missing": st.lists(COUNTS, max_size=4, unique=True).map(tuple),
    "loading": st.dictionaries(NAMES, SECONDS, max_size=3).map(lambda made: tuple(made.items())),
    "reason": TEXTS, "detail": TEXTS,
    **dict.fromkeys(("gpu_models", "busy_models", "host_models", "disk_models"), st.lists(NAMES, max_size=4, unique=True).map(tuple)),
    "rival": st.booleans(), "attempt": st.integers(0, limits.PLACEMENTS_MAX),
    "exclude": st.lists(IDS, max_size=4, unique=True).map(tuple), "host": HOSTS, "partial": st.booleans(),
    **dict.fromkeys(("request_id", "model", "hardware"), NAMES), **dict.fromkeys(("worker_id", "target_worker_id"), IDS),
    **dict.fromkeys(("prompt_tokens", "output_tokens"), st.integers(0, limits.TOKENS_MAX)), "max_tokens": st.integers(1, limits.TOKENS_MAX),
    "slots": st.integers(1, limits.SLOTS_MAX),
    **dict.fromkeys(("queue_max", "running", "waiting", "blocked", "queue_depth", "requests"), st.integers(0, limits.SLOTS_MAX)),
    **dict.fromkeys(("kv_bytes", "gpu_free_bytes", "epoch", "dispatch_high", "sequence", "incarnation", "number"), COUNTS),
}  # fmt: skip


def any_message(kind: Callable[..., Any], rules: Mapping[str, Rule]) -> st.SearchStrategy[Any]:
    fields = {
        name: any_message(rule.kind, dict(zip(rule.names, rule.rules, strict=True))) if isinstance(rule, Fields) else BY_FIELD.get(name, SECONDS)
        for name, rule in rules.items()
    }  # fmt: skip
    return st.builds(kind, **fields)


ENVELOPES = st.builds(
    Envelope, st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=63), COUNTS, COUNTS, st.floats(0, 4e9),
    st.one_of([any_message(kind, kind.RULES) for kind in MESSAGES]),
)  # fmt: skip


def envelope(message: Message, sequence: int = 1, wall_s: float = 100.0, incarnation: int = 1) -> AnyEnvelope:
    return Envelope("worker-2", incarnation, sequence, wall_s, message)


M = TypeVar("M", bound=Message)


def sample(kind: type[M]) -> M:
    """The sample of a message, known by its type."""
    found = SAMPLES[kind]
    assert isinstance(found, kind)
    return found
