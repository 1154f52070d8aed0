"""One request of a workload."""

from __future__ import annotations

from typing import NamedTuple

from sllm.messages import NORMAL


class Request(NamedTuple):
    """What a client will ask for, and when."""

    arrival_s: float  # from the start of the run; never before the request that precedes it
    request_id: str  # unique in its workload; "r0", "r1", ... in order of arrival unless a recording says otherwise
    model: str
    prompt_tokens: int  # at least 1
    output_tokens: int  # at least 1
    priority: int = NORMAL
