"""The client: asks for a placement, sends the request there, and sees it through without doing work twice.

    ASKING  --ScheduleResponse-->  SENDING  --InferenceAccepted or FirstToken-->  SERVING  --InferenceResponse-->  completed
       ^--- ScheduleError with a retry-after: BACKING_OFF ---'  |                    |
       '------ the worker stays silent, is lost or refuses: it is excluded, the coordinator asked again ------'

A worker that owes tokens says every report interval that it lives (Progress), and the coordinator says which workers it has lost (WorkerLost). A request given
up on such a sign is cancelled at its old worker as soon as that speaks after all (CancelRequest), so that nothing is done twice for long.

Every datagram is sent again with backoff and jitter until it is answered. A request ends exactly once: completed, failed or rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from random import Random
from typing import Protocol

from config import Config
from sllm.protocol.contacts import STALL_S, Contact, Contacts
from sllm.protocol.events import (
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
from sllm.protocol.messages import (
    CANCELLED,
    COMPLETED,
    NO_WORKERS,
    Address,
    CancelRequest,
    Enveloped,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    Progress,
    ScheduleError,
    ScheduleRequest,
    ScheduleResponse,
    WorkerLost,
)
from sllm.protocol.node import Codec, Node, new_tuple
from sllm.protocol.recent import Recent
from sllm.protocol.timers import Timers

UNHEARD = ("silent", "lost")  # why a placement is given up although its worker refused nothing
ASSUMED_INTERVAL_S = 1.0  # between the words of workers that report at every change
ASKING, SENDING, SERVING, BACKING_OFF = "asking", "sending", "serving", "backing_off"
OVERDUE_AFTER = 2.0  # first waits for an answer without a word from the coordinator, until its answer is overdue
DOUBLINGS_MAX = 64  # of the first wait; any bound has long been met by then
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
        "action", "arrival_s", "asked_for", "due_at", "entry_at", "exclude", "first_tokens", "given_up", "last_error", "last_s", "model", "placement",
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
        self.first_tokens: dict[str, float] = {}  # when each worker's came; more than one if a placement was given up after it
        self.last_error = ""

    @property
    def is_placed(self) -> bool:
        """A worker has it, or is being told of it."""
        return self.state in (SENDING, SERVING)

    def was_sent_to(self, worker_id: str) -> bool:
        """The worker was given this request, now or in a placement that was given up."""
        return self.worker_id == worker_id or any(placement.worker_id == worker_id for placement in self.given_up)


class Client(Node):
    """A client of the fleet; one can carry many requests at a time."""

    __slots__ = (
        "_contacts", "_finished", "_heard_at", "_overdue_at", "_pending", "_poll_s", "_retry_initial_s", "_rng", "_timeout_s", "_timers", "acknowledged",
        "config", "finds_nobody",
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
        super().__init__(node_id, incarnation, codec=codec, wall_offset_s=wall_offset_s, life_timeout_s=config.life_timeout_s)
        self.config = config
        self.coordinator = coordinator
        self._rng = rng
        self._retry_initial_s = min(config.retry_initial_s, config.retry_max_s)  # these three are wanted several times for every request
        self._timeout_s = config.request_timeout_s
        self._poll_s = config.poll_s
        self._pending: dict[str, Pending] = {}
        self._timers: Timers[Pending] = Timers()
        self._contacts: Contacts[Pending] = Contacts(config.report_interval_s or ASSUMED_INTERVAL_S)
        self._finished: Recent[str, str] = Recent()  # request_id -> worker that completed it, "" if none did
        self._heard_at = now  # when the coordinator last answered, or was last complained about
        self.acknowledged = False  # it has answered at all
        self.finds_nobody = False  # its last answer was that no worker is ready
        self._overdue_at = now  # when its answer was last said to be overdue
        self.handlers = {
            ScheduleResponse: self._on_schedule_response,
            ScheduleError: self._on_schedule_error,
            InferenceAccepted: self._on_accepted,
            FirstToken: self._on_first_token,
            InferenceResponse: self._on_response,
            Progress: self._on_progress,
            WorkerLost: self._on_worker_lost,
        }

    @property
    def in_flight(self) -> int:
        """Requests submitted and not yet ended."""
        return len(self._pending)

    def unfinished(self) -> Iterator[Pending]:
        """The requests submitted and not yet ended, in order of arrival."""
        return iter(self._pending.values())

    def submit(self, asked: Asked, now: float) -> None:
        """Take a request. Its id must be new to this client."""
        pending = Pending(asked, now, now + self._timeout_s)
        request_id, carried = pending.request_id, self._pending
        if request_id in carried or request_id in self._finished:
            raise ValueError(f"request id {request_id!r} was used before")
        if not carried:
            self._heard_at = now  # nobody was asked while there was nothing to ask
        carried[request_id] = pending
        self.events.append(RequestSent(now, request_id, pending.model))
        self._send_ask(pending, now)

    # --- what is sent ---------------------------------------------------------------------------------------------------------------

    def _ask(self, pending: Pending, now: float) -> None:
        """Begin to ask the coordinator for a place, again."""
        pending.state = ASKING
        pending.tries = 0
        self._send_ask(pending, now)

    def _send_ask(self, pending: Pending, now: float) -> None:
        fields = pending.asked_for + (pending.priority, 0.0, pending.exclude, pending.placements)  # noqa: RUF005  (quicker than unpacking)
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
            wait_s = min(wait_s * 2.0 ** min(pending.tries, DOUBLINGS_MAX), self.config.retry_max_s)
        pending.tries += 1
        self._set_timer(pending, now + wait_s * (0.75 + 0.5 * self._rng.random()))

    def _set_timer(self, pending: Pending, at: float) -> None:
        timers = self._timers
        timers.set(pending, at if at < pending.last_s else pending.last_s)
        self._plan()

    # --- what is heard --------------------------------------------------------------------------------------------------------------

    def _on_schedule_response(self, envelope: Enveloped[ScheduleResponse], addr: Address, now: float) -> None:
        _, _, _, _, response = envelope
        self._hear_coordinator(now)
        pending = self._pending.get(response.request_id)
        if pending is None or pending.state not in (ASKING, BACKING_OFF) or response in pending.given_up:
            return  # a late answer to a question asked twice
        self.finds_nobody = False
        pending.placement = response
        _, pending.worker_id, _, _, pending.action, _, _, _ = response
        pending.placements += 1
        pending.state = SENDING
        pending.tries = 0
        self._contacts.expect(pending.worker_id, pending.request_id, pending, now)
        self._send_inference(pending, now)

    def _on_schedule_error(self, envelope: Enveloped[ScheduleError], addr: Address, now: float) -> None:
        _, _, _, _, error = envelope
        self._hear_coordinator(now)
        pending = self._pending.get(error.request_id)
        if pending is None or pending.state != ASKING:
            return
        pending.last_error = error.code
        self.finds_nobody = error.code == NO_WORKERS
        if error.retry_after_s <= 0.0:
            self._end(pending)
            self.events.append(RequestRejected(now, error.request_id, pending.model, pending.arrival_s, error.code))
            return
        pending.state = BACKING_OFF
        self._set_timer(pending, now + error.retry_after_s)

    def _hear_coordinator(self, now: float) -> None:
        self._heard_at = now
        self.acknowledged = True

    def _on_accepted(self, envelope: Enveloped[InferenceAccepted], addr: Address, now: float) -> None:
        sender_id, _, _, _, accepted = envelope
        self._hear_worker(sender_id, addr, now)
        self._alive(accepted.request_id, sender_id, addr, now)

    def _on_first_token(self, envelope: Enveloped[FirstToken], addr: Address, now: float) -> None:
        sender_id, _, _, _, first = envelope
        request_id = first.request_id
        self._hear_worker(sender_id, addr, now)
        pending = self._alive(request_id, sender_id, addr, now)
        if pending is not None and sender_id not in pending.first_tokens:
            pending.first_tokens[sender_id] = now
            self.events.append(FirstTokenReceived(now, request_id, now - pending.arrival_s, sender_id))

    def _on_progress(self, envelope: Enveloped[Progress], addr: Address, now: float) -> None:
        sender_id, _, _, _, progress = envelope
        self._hear_worker(sender_id, addr, now, progress.interval_s)

    def _hear_worker(self, worker_id: str, addr: Address, now: float, interval_s: float | None = None) -> None:
        """A worker lives. If it may be at work on what was given up there, it is told to stop."""
        self._contacts.hear(worker_id, now, interval_s)
        for request_id in self._contacts.to_cancel(worker_id, now, self._retry_initial_s):
            self.send(CancelRequest(request_id), addr, now)

    def _alive(self, request_id: str, worker_id: str, addr: Address, now: float) -> Pending | None:
        """The worker has the request. If it is the one we wait for, it need not be asked for a while; another one works for nobody. The request, if the
        worker was ever given it."""
        pending = self._pending.get(request_id)
        if pending is None or not pending.was_sent_to(worker_id):
            return None
        if pending.worker_id == worker_id and pending.is_placed:
            pending.state = SERVING
            pending.tries = 0
            self._set_timer(pending, now + self._poll_s)
        return pending

    def _on_response(self, envelope: Enveloped[InferenceResponse], addr: Address, now: float) -> None:
        sender_id, _, _, _, response = envelope
        request_id, outcome = response.request_id, response.outcome
        self._contacts.forget_cancel(sender_id, request_id)
        self._hear_worker(sender_id, addr, now)
        pending = self._pending.get(request_id)
        if pending is None:
            completed_by = self._finished.get(request_id)
            if outcome == COMPLETED and completed_by and completed_by != sender_id:
                self.events.append(DuplicateResponse(now, request_id, sender_id))
        elif not pending.was_sent_to(sender_id):
            self.rejected["not_asked"] += 1
        elif outcome == COMPLETED:
            self._complete(pending, response, sender_id, now)
        elif outcome != CANCELLED and pending.worker_id == sender_id and pending.is_placed:  # what was cancelled there before is no refusal now
            self._go_elsewhere(pending, outcome, now)

    def _on_worker_lost(self, envelope: Enveloped[WorkerLost], addr: Address, now: float) -> None:
        """The coordinator has not heard a worker for some time. If we have, it lives all the same."""
        _, _, _, _, lost = envelope
        self._hear_coordinator(now)
        contact = self._contacts.find(lost.worker_id)
        if contact is not None and not contact.was_heard_lately(now):
            self._leave_worker(contact, "lost", now)
            self._plan()

    def _leave_worker(self, contact: Contact[Pending], reason: str, now: float) -> None:
        """Every request at a worker goes elsewhere."""
        for pending in list(contact.requests.values()):
            self._go_elsewhere(pending, reason, now)

    def _complete(self, pending: Pending, response: InferenceResponse, worker_id: str, now: float) -> None:
        """Every token is here. A worker given up as silent may still be the first to answer: its work counts, and that of the other is stopped.

        The time to first token is that of the answer that counts: when this worker's first token came, or, if that datagram was lost, when it must have
        come by what the worker says of its own times. Tokens of an answer that was given up are no part of it; from the first of them on the stream stalled.
        """
        request_id, _, tokens, queue_wait_s, first_token_s, total_s, load_s = response
        arrival_s, e2e_s = pending.arrival_s, now - pending.arrival_s
        first_token_at = pending.first_tokens.get(worker_id)
        ttft_s = max(0.0, e2e_s - (total_s - first_token_s)) if first_token_at is None else first_token_at - arrival_s
        stalled_s = max(0.0, ttft_s - (min(pending.first_tokens.values()) - arrival_s)) if pending.given_up and pending.first_tokens else 0.0
        if pending.worker_id != worker_id and pending.is_placed:
            self._cancel(pending, now)
        self._end(pending, worker_id)
        tpot_s = (e2e_s - ttft_s) / (tokens - 1) if tokens > 1 else 0.0
        self.events.append(RequestCompleted(
            now, request_id, pending.model, worker_id, pending.action, arrival_s, ttft_s, e2e_s, tpot_s, queue_wait_s, load_s, pending.prompt_tokens, tokens,
            pending.placements, pending.retries, stalled_s,
        ))  # fmt: skip

    def _cancel(self, pending: Pending, now: float) -> None:
        """Tell the worker of a request that nobody waits for it any more; again whenever it speaks, until it answers."""
        assert pending.placement is not None
        self._contacts.give_up(pending.worker_id, pending.request_id, now)
        self.send(CancelRequest(pending.request_id), (pending.placement.host, pending.placement.port), now)

    def _end(self, pending: Pending, worker_id: str = "") -> None:
        """Forget a request, but for who completed it."""
        request_id, timers, finished = pending.request_id, self._timers, self._finished
        del self._pending[request_id]
        timers.cancel(pending)
        if pending.is_placed:
            self._contacts.release(pending.worker_id, request_id)
        self._plan()
        if len(finished.new) >= FINISHED_MAX // 2:
            finished.turn()
        finished.new[request_id] = worker_id

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        if now - self.wake_at >= STALL_S:
            self._contacts.excuse(now)
        for contact in self._contacts.pop_due(now):
            if now >= contact.silent_at:
                self._leave_worker(contact, "silent", now)
            else:
                self._ask_worker(contact, now)
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
        self._plan()

    def _plan(self) -> None:
        """When to wake next."""
        self.wake_at = min(self._timers.earliest, self._contacts.earliest)

    def _ask_worker(self, contact: Contact[Pending], now: float) -> None:
        """A worker is quiet: ask after one of its requests, which it answers whether it still has it or not."""
        served = next((pending for pending in contact.requests.values() if pending.state == SERVING), None)
        if served is not None:
            self._send_inference(served, now)
        self._contacts.wait_until_silent(contact)

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
        if reason in UNHEARD:  # it may be at work on it all the same
            self._contacts.give_up(worker_id, request_id)
        if pending.placements >= self.config.placements_max:
            self._end(pending)
            failure = f"{pending.placements} workers failed it, the last: {reason}"
            self.events.append(RequestFailed(now, request_id, pending.model, pending.arrival_s, failure))
            return
        self.events.append(RequestRetried(now, request_id, worker_id, reason))
        self._contacts.release(worker_id, request_id)
        pending.given_up = (*pending.given_up, pending.placement)
        pending.exclude = tuple(dict.fromkeys((*pending.exclude, worker_id)))
        self._ask(pending, now)

    def _give_up(self, pending: Pending, now: float) -> None:
        """The time is over: rejected if the control plane had been turning it away, else failed."""
        if pending.is_placed:
            self._cancel(pending, now)
        self._end(pending)
        request_id, model, arrival_s = pending.request_id, pending.model, pending.arrival_s
        if pending.last_error and pending.placement is None:
            self.events.append(RequestRejected(now, request_id, model, arrival_s, pending.last_error))
        else:
            self.events.append(RequestFailed(now, request_id, model, arrival_s, f"not finished within {self.config.request_timeout_s:.12g} s"))
