"""The client: asks for a placement, sends the request there, and sees it through without doing work twice.

    ASKING  --ScheduleResponse-->  SENDING  --InferenceAccepted or FirstToken-->  SERVING  --InferenceResponse-->  completed
       ^--- ScheduleError with a retry-after: BACKING_OFF ---'  |                    |
       '------ the worker stays silent or refuses: it is excluded, the coordinator asked again ------'

Every datagram is sent again with backoff and jitter until it is answered. A request ends exactly once: completed, failed or rejected.
"""

from __future__ import annotations

from math import inf
from random import Random
from typing import Protocol

from config import Config
from sllm.events import (
    CoordinatorOverdue,
    CoordinatorSilent,
    DuplicateResponse,
    FirstTokenReceived,
    RequestCompleted,
    RequestFailed,
    RequestRejected,
    RequestRetried,
    RequestSent,
)
from sllm.messages import (
    COMPLETED,
    Address,
    Enveloped,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
)
from sllm.node import Codec, Node, new_tuple
from sllm.recent import Recent
from sllm.timers import Timers

ASKING, SENDING, SERVING, BACKING_OFF = "asking", "sending", "serving", "backing_off"
OVERDUE_AFTER = 2.0  # first waits for an answer without a word from the coordinator, until its answer is overdue
FINISHED_MAX = 100_000  # requests remembered after their end, to tell work done twice from a datagram sent twice


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
        "action", "arrival_s", "asked_for", "due_at", "entry_at", "exclude", "first_token_at", "given_up", "last_error", "last_s", "model", "placement",
        "placements", "priority", "prompt_tokens", "request_id", "retries", "state", "tries", "worker_id",
    )  # fmt: skip

    def __init__(self, asked: Asked, now: float, last_s: float) -> None:
        self.request_id = asked.request_id
        self.model = asked.model
        self.prompt_tokens = asked.prompt_tokens
        self.priority = asked.priority
        self.asked_for = self.request_id, self.model, self.prompt_tokens, asked.output_tokens  # as both kinds of requests begin
        self.arrival_s = now
        self.last_s = last_s  # when it has failed, if it is not finished by then
        self.due_at = self.entry_at = inf  # of its timer
        self.state = ASKING
        self.placement: ScheduleResponse | None = None
        self.worker_id = self.action = ""  # of the placement
        self.placements = 0
        self.given_up: tuple[ScheduleResponse, ...] = ()  # placements that came to nothing
        self.exclude: tuple[str, ...] = ()  # their workers
        self.tries = 0  # datagrams unanswered in this state
        self.retries = 0  # datagrams sent again, in all
        self.first_token_at: float | None = None
        self.last_error = ""


class Client(Node):
    """A client of the fleet; one can carry many requests at a time."""

    __slots__ = (
        "_finished", "_heard_at", "_overdue_at", "_pending", "_poll_s", "_retry_initial_s", "_rng", "_timeout_s", "_timers", "config", "coordinator",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        coordinator: Address,
        rng: Random,
        incarnation: int,
        *,
        node_id: str = "client",
        codec: Codec | None = None,
        wall_offset_s: float = 0.0,
        now: float = 0.0,
    ) -> None:
        super().__init__(node_id, incarnation, codec=codec, wall_offset_s=wall_offset_s)
        self.config = config
        self.coordinator = coordinator
        self._rng = rng
        self._retry_initial_s = min(config.retry_initial_s, config.retry_max_s)  # these three are wanted several times for every request
        self._timeout_s = config.request_timeout_s
        self._poll_s = config.poll_s
        self._pending: dict[str, Pending] = {}
        self._timers: Timers[Pending] = Timers()
        self._finished: Recent[str, str] = Recent()  # request_id -> worker that completed it, "" if none did
        self._heard_at = now  # when the coordinator last answered, or was last complained about
        self._overdue_at = now  # when its answer was last said to be overdue
        self.handlers = {
            ScheduleResponse: self._on_schedule_response,
            ScheduleError: self._on_schedule_error,
            InferenceAccepted: self._on_accepted,
            FirstToken: self._on_first_token,
            InferenceResponse: self._on_response,
        }

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet ended."""
        return len(self._pending)

    def submit(self, asked: Asked, now: float) -> None:
        """Take a request. Its id must be new to this client."""
        pending = Pending(asked, now, now + self._timeout_s)
        request_id, carried = pending.request_id, self._pending
        if request_id in carried or request_id in self._finished:
            raise ValueError(f"request id {request_id!r} was used before")
        if not carried:
            self._heard_at = now  # nobody was asked while there was nothing to ask
        carried[request_id] = pending
        self.events.append(new_tuple(RequestSent, (now, request_id, pending.model)))
        self._send_ask(pending, now)

    # --- what is sent ---------------------------------------------------------------------------------------------------------------

    def _ask(self, pending: Pending, now: float) -> None:
        """Begin to ask the coordinator for a place, again."""
        pending.state = ASKING
        pending.tries = 0
        self._send_ask(pending, now)

    def _send_ask(self, pending: Pending, now: float) -> None:
        fields = pending.asked_for + (pending.priority, 0.0, pending.exclude)  # noqa: RUF005  (quicker than unpacking)
        self.send(new_tuple(ScheduleRequest, fields), self.coordinator, now)
        self._wait_for_answer(pending, now)

    def _send_inference(self, pending: Pending, now: float) -> None:
        assert pending.placement is not None
        _, worker_id, host, port, _, _, dispatch, _ = pending.placement
        self.send(new_tuple(InferenceRequest, pending.asked_for + (dispatch, worker_id)), (host, port), now)  # noqa: RUF005
        self._wait_for_answer(pending, now)

    def _wait_for_answer(self, pending: Pending, now: float) -> None:
        """Come back after a wait that doubles with every datagram that stays unanswered, jittered by a quarter either way."""
        wait_s = self._retry_initial_s
        if pending.tries:
            pending.retries += 1
            wait_s = min(wait_s * 2.0**pending.tries, self.config.retry_max_s)
        pending.tries += 1
        self._set_timer(pending, now + wait_s * (0.75 + 0.5 * self._rng.random()))

    def _set_timer(self, pending: Pending, at: float) -> None:
        timers = self._timers
        timers.set(pending, at if at < pending.last_s else pending.last_s)
        self.wake_at = timers.earliest

    # --- what is heard --------------------------------------------------------------------------------------------------------------

    def _on_schedule_response(self, envelope: Enveloped[ScheduleResponse], addr: Address, now: float) -> None:
        _, _, _, _, response = envelope
        self._heard_at = now
        pending = self._pending.get(response.request_id)
        if pending is None or pending.state not in (ASKING, BACKING_OFF) or response in pending.given_up:
            return  # a late answer to a question asked twice
        pending.placement = response
        _, pending.worker_id, _, _, pending.action, _, _, _ = response
        pending.placements += 1
        pending.state = SENDING
        pending.tries = 0
        self._send_inference(pending, now)

    def _on_schedule_error(self, envelope: Enveloped[ScheduleError], addr: Address, now: float) -> None:
        _, _, _, _, error = envelope
        self._heard_at = now
        pending = self._pending.get(error.request_id)
        if pending is None or pending.state != ASKING:
            return
        pending.last_error = error.code
        if error.retry_after_s <= 0.0:
            self._end(pending)
            self.events.append(RequestRejected(now, error.request_id, pending.model, pending.arrival_s, error.code))
            return
        pending.state = BACKING_OFF
        self._set_timer(pending, now + error.retry_after_s)

    def _on_accepted(self, envelope: Enveloped[InferenceAccepted], addr: Address, now: float) -> None:
        sender_id, _, _, _, accepted = envelope
        self._alive(accepted.request_id, sender_id, now)

    def _on_first_token(self, envelope: Enveloped[FirstToken], addr: Address, now: float) -> None:
        sender_id, _, _, _, first = envelope
        request_id = first.request_id
        pending = self._alive(request_id, sender_id, now)
        if pending is not None and pending.first_token_at is None:
            pending.first_token_at = now
            self.events.append(new_tuple(FirstTokenReceived, (now, request_id, now - pending.arrival_s)))

    def _alive(self, request_id: str, sender_id: str, now: float) -> Pending | None:
        """The worker we wait for has spoken: it has the request, and need not be asked for a while."""
        pending = self._pending.get(request_id)
        if pending is None or pending.worker_id != sender_id or pending.state not in (SENDING, SERVING):
            return None
        pending.state = SERVING
        pending.tries = 0
        self._set_timer(pending, now + self._poll_s)
        return pending

    def _on_response(self, envelope: Enveloped[InferenceResponse], addr: Address, now: float) -> None:
        sender_id, _, _, _, response = envelope
        request_id, outcome = response.request_id, response.outcome
        pending = self._pending.get(request_id)
        if pending is None:
            worker_id = self._finished.get(request_id)
            if outcome == COMPLETED and worker_id not in (sender_id, None):
                self.events.append(DuplicateResponse(now, request_id, sender_id))
        elif outcome == COMPLETED:
            self._complete(pending, response, sender_id, now)
        elif pending.worker_id == sender_id and pending.state in (SENDING, SERVING):
            self._go_elsewhere(pending, outcome, now)

    def _complete(self, pending: Pending, response: InferenceResponse, worker_id: str, now: float) -> None:
        """Every token is here. A worker given up as silent may still be the first to answer: its work counts."""
        request_id, _, tokens, queue_wait_s, first_token_s, total_s, load_s = response
        arrival_s, first_token_at = pending.arrival_s, pending.first_token_at
        e2e_s = now - arrival_s
        if first_token_at is None or pending.worker_id != worker_id:  # its FirstToken was lost, or another worker's came first
            ttft_s = max(0.0, e2e_s - (total_s - first_token_s))
        else:
            ttft_s = first_token_at - arrival_s
        self._end(pending, worker_id)
        facts = (
            now, request_id, pending.model, worker_id, pending.action, arrival_s, ttft_s, e2e_s, (e2e_s - ttft_s) / (tokens - 1) if tokens > 1 else 0.0,
            queue_wait_s, load_s, pending.prompt_tokens, tokens, pending.placements, pending.retries,
        )  # fmt: skip
        self.events.append(new_tuple(RequestCompleted, facts))

    def _end(self, pending: Pending, worker_id: str = "") -> None:
        """Forget a request, but for who completed it."""
        request_id, timers, finished = pending.request_id, self._timers, self._finished
        del self._pending[request_id]
        timers.cancel(pending)
        self.wake_at = timers.earliest
        if len(finished.new) >= FINISHED_MAX // 2:
            finished.turn()
        finished.new[request_id] = worker_id

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        while (pending := self._timers.pop_due(now)) is not None:
            if now >= pending.last_s:
                self._give_up(pending, now)
            elif pending.state == ASKING:
                self._check_coordinator(now)
                self._send_ask(pending, now)
            elif pending.state == BACKING_OFF:
                self._ask(pending, now)
            elif pending.tries >= self.config.worker_tries:
                self._go_elsewhere(pending, "silent", now)
            else:
                self._send_inference(pending, now)
        self.wake_at = self._timers.earliest

    def _check_coordinator(self, now: float) -> None:
        silent_s = now - self._heard_at
        if silent_s >= self.config.coordinator_silent_s:
            self.events.append(CoordinatorSilent(now, self.node_id, silent_s))
            self._heard_at = now
        elif silent_s >= max(OVERDUE_AFTER * self._retry_initial_s, 2.0 * (self._overdue_at - self._heard_at)):
            self.events.append(CoordinatorOverdue(now, self.node_id, silent_s))
            self._overdue_at = now

    def _go_elsewhere(self, pending: Pending, reason: str, now: float) -> None:
        """Exclude the worker and ask again, if there is a placement left to try."""
        assert pending.placement is not None
        request_id, worker_id = pending.request_id, pending.worker_id
        if pending.placements >= self.config.placements_max:
            self._end(pending)
            failure = f"{pending.placements} workers failed it, the last: {reason}"
            self.events.append(RequestFailed(now, request_id, pending.model, pending.arrival_s, failure))
            return
        self.events.append(RequestRetried(now, request_id, worker_id, reason))
        pending.given_up = (*pending.given_up, pending.placement)
        pending.exclude = tuple(dict.fromkeys((*pending.exclude, worker_id)))
        self._ask(pending, now)

    def _give_up(self, pending: Pending, now: float) -> None:
        """The time is over: rejected if the control plane had been turning it away, else failed."""
        self._end(pending)
        request_id, model, arrival_s = pending.request_id, pending.model, pending.arrival_s
        if pending.last_error and pending.placement is None:
            self.events.append(RequestRejected(now, request_id, model, arrival_s, pending.last_error))
        else:
            self.events.append(RequestFailed(now, request_id, model, arrival_s, f"not finished within {self.config.request_timeout_s:g} s"))
