"""One request as its client sees it through: its states, and what moves it from one to the next.

    ASKING, BACKING_OFF                    -- placed --> SENDING
    ASKING                                 -- turned away --> BACKING_OFF
    BACKING_OFF                            -- waited --> ASKING
    SENDING, SERVING                       -- held --> SERVING
    SENDING, SERVING                       -- left --> ASKING
    ASKING, BACKING_OFF, SENDING, SERVING  -- answered --> COMPLETED
    ASKING, BACKING_OFF                    -- refused --> REJECTED
    ASKING, BACKING_OFF, SENDING, SERVING  -- abandoned --> FAILED

A request that has no place asks the coordinator, or backs off for the time that the coordinator said. One that is placed is sent to its worker until that
says that it holds the request, and is served then. Each request ends once, in one of the three last states.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

from sllm.protocol.events import RequestCompleted
from sllm.protocol.messages import InferenceResponse, ScheduleResponse

ASKING, BACKING_OFF, SENDING, SERVING = "ASKING", "BACKING_OFF", "SENDING", "SERVING"
COMPLETED, REJECTED, FAILED = "COMPLETED", "REJECTED", "FAILED"
UNFINISHED = (ASKING, BACKING_OFF, SENDING, SERVING)

# What can happen to a request.
PLACED = "placed"  # the coordinator names a worker
TURNED_AWAY = "turned away"  # the coordinator says after what time to ask again
WAITED = "waited"  # that time is over
HELD = "held"  # its worker says that it has the request
LEFT = "left"  # its worker is silent, lost or refuses, and another may do
ANSWERED = "answered"  # a worker that was given it has sent every token
REFUSED = "refused"  # the coordinator says that asking again will not help, or has said nothing but to wait until the time was over
ABANDONED = "abandoned"  # the time is over, or no other worker may be tried
TRANSITIONS: dict[tuple[str, str], str] = {
    **{(old, PLACED): SENDING for old in (ASKING, BACKING_OFF)},
    (ASKING, TURNED_AWAY): BACKING_OFF,
    (BACKING_OFF, WAITED): ASKING,
    **{(old, HELD): SERVING for old in (SENDING, SERVING)},
    **{(old, LEFT): ASKING for old in (SENDING, SERVING)},
    **{(old, ANSWERED): COMPLETED for old in UNFINISHED},
    **{(old, REFUSED): REJECTED for old in (ASKING, BACKING_OFF)},
    **{(old, ABANDONED): FAILED for old in UNFINISHED},
}


class Asked(Protocol):
    """What a workload asks for."""

    @property
    def request_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def priority(self) -> int: ...


class Pending:
    """A request on its way. Times are absolute seconds of the client's clock."""

    __slots__ = (
        "action", "arrival_s", "due_at", "entry_at", "exclude", "first_tokens", "given_up", "last_error", "last_s", "max_tokens", "model",
        "placement", "placements", "priority", "prompt_tokens", "request_id", "retries", "state", "tries", "worker_id",
    )  # fmt: skip

    def __init__(self, asked: Asked, now: float, last_s: float) -> None:
        self.request_id = asked.request_id
        self.model = asked.model
        self.prompt_tokens = asked.prompt_tokens
        self.priority = asked.priority
        self.max_tokens = asked.output_tokens
        self.arrival_s = now
        self.last_s = last_s  # when the request ends at the latest, completed or not
        self.due_at = self.entry_at = inf  # of its timer; `sllm.protocol.timers.Timers` sets both
        self.state = ASKING  # moved by `step` only
        self.placement: ScheduleResponse | None = None  # the latest
        self.worker_id = self.action = ""  # of the latest placement
        self.placements = 0
        self.given_up: tuple[ScheduleResponse, ...] = ()  # placements that came to nothing
        self.exclude: tuple[str, ...] = ()  # the workers of those, which the coordinator shall not name again
        self.tries = 0  # datagrams sent and not answered since the last step
        self.retries = 0  # datagrams sent again, in all
        self.first_tokens: dict[str, float] = {}  # worker -> when its first token came; more than one if a placement was given up after its first token
        self.last_error = ""  # the code of the coordinator's latest refusal

    def can(self, what: str) -> bool:
        """Whether that can happen to a request in this state."""
        return (self.state, what) in TRANSITIONS

    def step(self, what: str) -> None:
        """Apply a transition. KeyError if the table has none."""
        self.state = TRANSITIONS[self.state, what]
        self.tries = 0

    @property
    def is_placed(self) -> bool:
        """A worker has the request, or is being sent it."""
        return self.state == SERVING or self.state == SENDING

    def place(self, placement: ScheduleResponse) -> None:
        """The coordinator has named a worker."""
        self.placement = placement
        self.worker_id, self.action = placement.worker_id, placement.action
        self.placements += 1
        self.step(PLACED)

    def leave(self) -> None:
        """The placement came to nothing: ask for another worker."""
        assert self.placement is not None
        self.given_up = (*self.given_up, self.placement)
        self.exclude = tuple(dict.fromkeys((*self.exclude, self.worker_id)))
        self.step(LEFT)

    def was_sent_to(self, worker_id: str) -> bool:
        """The worker was given this request, in the latest placement or in one that was given up."""
        return self.worker_id == worker_id or any(placement.worker_id == worker_id for placement in self.given_up)

    def completed(self, response: InferenceResponse, worker_id: str, now: float) -> RequestCompleted:
        """What is told when the answer of a worker has come.

        The time to first token is that of the answer that counts: when this worker's first token came, or, if that datagram was lost, when it must have
        come by what the worker says of its own times. Tokens of an answer that was given up are no part of it; from the first of them on the stream stalled.
        """
        arrival_s, e2e_s, tokens = self.arrival_s, now - self.arrival_s, response.output_tokens
        first_token_at = self.first_tokens.get(worker_id)
        ttft_s = max(0.0, e2e_s - (response.total_s - response.first_token_s)) if first_token_at is None else first_token_at - arrival_s
        stalled_s = max(0.0, ttft_s - (min(self.first_tokens.values()) - arrival_s)) if self.given_up and self.first_tokens else 0.0
        tpot_s = (e2e_s - ttft_s) / (tokens - 1) if tokens > 1 else 0.0
        return RequestCompleted(
            now, self.request_id, self.model, worker_id, self.action, arrival_s, ttft_s, e2e_s, tpot_s, response.queue_wait_s, response.load_s,
            self.prompt_tokens, tokens, self.placements, self.retries, stalled_s,
        )  # fmt: skip
