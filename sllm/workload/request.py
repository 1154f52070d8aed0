"""One request of a workload."""

from __future__ import annotations

from typing import NamedTuple

from sllm.protocol.messages import NORMAL


class Repeat(NamedTuple):
    """What a prompt begins with: all of an earlier turn of its session, prompt and answer."""

    request_id: str  # of that turn
    tokens: int  # of that turn, prompt and answer; fewer than the prompt that repeats them has


class Request(NamedTuple):
    """What a client will ask for, and when."""

    arrival_s: float  # from the start of the run; never before the request that precedes it
    request_id: str  # unique in its workload; "r0", "r1", ... in order of arrival unless a recording or closed-loop load says otherwise
    model: str
    prompt_tokens: int  # at least 1
    output_tokens: int  # at least 1
    priority: int = NORMAL
    repeats: Repeat | None = None  # None: nothing that was there before
