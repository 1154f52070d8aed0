"""One request of a workload."""

from __future__ import annotations

from typing import NamedTuple

from sllm.protocol.messages import NORMAL


class Repeat(NamedTuple):
    """The beginning of a prompt that repeats the whole of an earlier turn of its session, prompt and answer."""

    request_id: str  # of the earlier turn
    tokens: int  # of the earlier turn, prompt and answer; fewer than the tokens of the repeating prompt


class Request(NamedTuple):
    """A request that a client will send, and when."""

    arrival_s: float  # from the start of the run; never before the request that precedes it
    request_id: str  # unique in its workload; "r0", "r1", ... in order of arrival unless a recording or closed-loop load says otherwise
    model: str
    prompt_tokens: int  # at least 1
    output_tokens: int  # at least 1
    priority: int = NORMAL
    repeats: Repeat | None = None  # None: the prompt repeats no earlier turn
