"""The client: asks for a placement, sends the request there, and sees it through without doing work twice.

    submit            -> ScheduleRequest to the coordinator
    ScheduleResponse  -> InferenceRequest to the worker that the coordinator names
    ScheduleError     -> the question again after the time that the coordinator says, or the end of the request
    InferenceResponse -> the end of the request, or, if the worker refuses, the question again without that worker

The states of a request and what moves it are one table: `sllm.requests.pending`. A worker that owes tokens says every report interval that it lives
(Progress), and the coordinator says which workers it has lost (WorkerLost). A request that is given up on such a sign is cancelled at its old worker as soon as
that worker speaks after all (CancelRequest), so nothing is done twice for long.

Every datagram is sent again with backoff and jitter until it is answered. A request ends exactly once: completed, failed or rejected.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Protocol

from sllm.protocol.events import (
    CoordinatorOverdue,
    CoordinatorSilent,
    DuplicateResponse,
    FirstTokenReceived,
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
    Envelope,
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
from sllm.protocol.node import Codec, Node
from sllm.protocol.recent import Recent
from sllm.protocol.timers import Timers
from sllm.requests.contacts import STALL_S, Contact, Contacts
from sllm.requests.pending import ABANDONED, ANSWERED, ASKING, HELD, PLACED, REFUSED, SERVING, TURNED_AWAY, WAITED, Asked, Pending

UNHEARD = ("silent", "lost")  # why a placement is given up although its worker refused nothing, and so may be at work on the request all the same
ASSUMED_INTERVAL_S = 1.0  # between two Progress of a worker that reports at every change
OVERDUE_AFTER = 2.0  # times `retry_initial_s`: an answer that the coordinator owes for as long is overdue
DOUBLINGS_MAX = 64  # of `retry_initial_s`, so that no power overflows; `retry_max_s` bounds the wait long before
FINISHED_MAX = 100_000  # requests remembered after their end, to tell work done twice from a datagram sent twice


class ClientSettings(Protocol):
    """What a client reads of the configuration of its process."""

    @property
    def life_timeout_s(self) -> float: ...
    @property
    def report_interval_s(self) -> float: ...
    @property
    def retry_initial_s(self) -> float: ...
    @property
    def retry_max_s(self) -> float: ...
    @property
    def worker_tries(self) -> int: ...
    @property
    def poll_s(self) -> float: ...
    @property
    def placements_max(self) -> int: ...
    @property
    def request_timeout_s(self) -> float: ...
    @property
    def coordinator_silent_s(self) -> float: ...


class Client(Node):
    """A client of the fleet; one can carry many requests at a time."""

    __slots__ = (
        "_contacts", "_finished", "_heard_at", "_overdue_at", "_pending", "_poll_s", "_retry_initial_s", "_rng", "_timeout_s", "_timers", "acknowledged",
        "config", "finds_nobody",
    )  # fmt: skip

    def __init__(
        self,
        config: ClientSettings,
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
        self._retry_initial_s = min(config.retry_initial_s, config.retry_max_s)  # kept here, as the next two: each request reads them several times
        self._timeout_s = config.request_timeout_s
        self._poll_s = config.poll_s
        self._pending: dict[str, Pending] = {}
        self._timers: Timers[Pending] = Timers()
        self._contacts: Contacts[Pending] = Contacts(config.report_interval_s or ASSUMED_INTERVAL_S)
        self._finished: Recent[str, str] = Recent()  # request_id -> worker that completed it, "" if none did
        self._heard_at = now  # when the coordinator last answered, or was last called silent
        self.acknowledged = False  # the coordinator has answered something
        self.finds_nobody = False  # the coordinator's last answer was that no worker is ready
        self._overdue_at = now  # when an answer of the coordinator was last called overdue
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
            self._heard_at = now  # while there was nothing to ask, the coordinator was not silent
        carried[request_id] = pending
        self.events.append(RequestSent(now, request_id, pending.model))
        self._send_ask(pending, now)

    # --- what is sent ---------------------------------------------------------------------------------------------------------------

    def _send_ask(self, pending: Pending, now: float) -> None:
        message = ScheduleRequest(
            pending.request_id, pending.model, pending.prompt_tokens, pending.max_tokens, pending.priority, 0.0, pending.exclude, pending.placements
        )
        self.send(message, self.coordinator, now)
        self._wait_for_answer(pending, now)

    def _send_inference(self, pending: Pending, now: float) -> None:
        placement = pending.placement
        assert placement is not None
        message = InferenceRequest(
            pending.request_id, pending.model, pending.prompt_tokens, pending.max_tokens, placement.dispatch, placement.worker_id
        )  # fmt: skip
        self.send(message, (placement.host, placement.port), now)
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

    def _on_schedule_response(self, envelope: Envelope[ScheduleResponse], addr: Address, now: float) -> None:
        response = envelope.message
        self._hear_coordinator(now)
        pending = self._pending.get(response.request_id)
        if pending is None or not pending.can(PLACED) or response in pending.given_up:
            return  # a late answer to a question asked twice
        self.finds_nobody = False
        pending.place(response)
        self._contacts.expect(pending.worker_id, pending.request_id, pending, now)
        self._send_inference(pending, now)

    def _on_schedule_error(self, envelope: Envelope[ScheduleError], addr: Address, now: float) -> None:
        error = envelope.message
        self._hear_coordinator(now)
        pending = self._pending.get(error.request_id)
        if pending is None or not pending.can(TURNED_AWAY):
            return  # a late answer to an earlier question
        pending.last_error = error.code
        self.finds_nobody = error.code == NO_WORKERS
        if error.retry_after_s <= 0.0:
            self._end(pending, REFUSED)
            self.events.append(RequestRejected(now, error.request_id, pending.model, pending.arrival_s, error.code))
            return
        pending.step(TURNED_AWAY)
        self._set_timer(pending, now + error.retry_after_s)

    def _hear_coordinator(self, now: float) -> None:
        self._heard_at = now
        self.acknowledged = True

    def _on_accepted(self, envelope: Envelope[InferenceAccepted], addr: Address, now: float) -> None:
        sender_id, accepted = envelope.sender_id, envelope.message
        self._hear_worker(sender_id, addr, now)
        self._alive(accepted.request_id, sender_id, addr, now)

    def _on_first_token(self, envelope: Envelope[FirstToken], addr: Address, now: float) -> None:
        sender_id, first = envelope.sender_id, envelope.message
        request_id = first.request_id
        self._hear_worker(sender_id, addr, now)
        pending = self._alive(request_id, sender_id, addr, now)
        if pending is not None and sender_id not in pending.first_tokens:
            pending.first_tokens[sender_id] = now
            self.events.append(FirstTokenReceived(now, request_id, now - pending.arrival_s, sender_id))

    def _on_progress(self, envelope: Envelope[Progress], addr: Address, now: float) -> None:
        sender_id, progress = envelope.sender_id, envelope.message
        self._hear_worker(sender_id, addr, now, progress.interval_s)

    def _hear_worker(self, worker_id: str, addr: Address, now: float, interval_s: float | None = None) -> None:
        """A worker has spoken. If the worker may still be at work on requests that were given up there, tell it to stop."""
        self._contacts.hear(worker_id, now, interval_s)
        for request_id in self._contacts.to_cancel(worker_id, now, self._retry_initial_s):
            self.send(CancelRequest(request_id), addr, now)

    def _alive(self, request_id: str, worker_id: str, addr: Address, now: float) -> Pending | None:
        """A worker says that it holds a request. If the client waits for that worker, it need not be asked for a while. Returns the request; None if the
        worker was never given it."""
        pending = self._pending.get(request_id)
        if pending is None or not pending.was_sent_to(worker_id):
            return None
        if pending.worker_id == worker_id and pending.can(HELD):
            pending.step(HELD)
            self._set_timer(pending, now + self._poll_s)
        return pending

    def _on_response(self, envelope: Envelope[InferenceResponse], addr: Address, now: float) -> None:
        sender_id, response = envelope.sender_id, envelope.message
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
        elif outcome != CANCELLED and pending.worker_id == sender_id and pending.is_placed:
            self._go_elsewhere(pending, outcome, now)

    def _on_worker_lost(self, envelope: Envelope[WorkerLost], addr: Address, now: float) -> None:
        """The coordinator has not heard a worker for some time. A worker that this client has heard lately lives all the same."""
        lost = envelope.message
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
        """Every token is here. A worker given up as silent may be the first to answer: then its work counts, and the work of the other is stopped."""
        completed = pending.completed(response, worker_id, now)
        if pending.worker_id != worker_id and pending.is_placed:
            self._cancel(pending, now)
        self._end(pending, ANSWERED, worker_id)
        self.events.append(completed)

    def _cancel(self, pending: Pending, now: float) -> None:
        """Tell the worker of a request that nobody waits for the request any more; again whenever the worker speaks, until it answers."""
        assert pending.placement is not None
        self._contacts.give_up(pending.worker_id, pending.request_id, now)
        self.send(CancelRequest(pending.request_id), (pending.placement.host, pending.placement.port), now)

    def _end(self, pending: Pending, what: str, worker_id: str = "") -> None:
        """Forget a request, but for the worker that completed it."""
        request_id, timers, finished = pending.request_id, self._timers, self._finished
        del self._pending[request_id]
        timers.cancel(pending)
        if pending.is_placed:
            self._contacts.release(pending.worker_id, request_id)
        pending.step(what)
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
            elif pending.can(WAITED):
                pending.step(WAITED)
                self._send_ask(pending, now)
            elif pending.tries >= self.config.worker_tries:
                self._go_elsewhere(pending, "silent", now)
            else:
                self._send_inference(pending, now)
        self._plan()

    def _plan(self) -> None:
        """When to wake next."""
        self.wake_at = min(self._timers.earliest, self._contacts.earliest)

    def _ask_worker(self, contact: Contact[Pending], now: float) -> None:
        """A worker is quiet: ask after one of its requests. A worker that lives answers, whether it still has the request or not."""
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
        request_id, worker_id = pending.request_id, pending.worker_id
        if reason in UNHEARD:
            self._contacts.give_up(worker_id, request_id)
        if pending.placements >= self.config.placements_max:
            self._end(pending, ABANDONED)
            failure = f"{pending.placements} workers failed it, the last: {reason}"
            self.events.append(RequestFailed(now, request_id, pending.model, pending.arrival_s, failure))
            return
        self.events.append(RequestRetried(now, request_id, worker_id, reason))
        self._contacts.release(worker_id, request_id)
        pending.leave()
        self._send_ask(pending, now)

    def _give_up(self, pending: Pending, now: float) -> None:
        """The time is over: rejected if the coordinator has never done anything but turn the request away, else failed."""
        request_id, model, arrival_s = pending.request_id, pending.model, pending.arrival_s
        if pending.is_placed:
            self._cancel(pending, now)
        if pending.last_error and pending.placement is None:
            self._end(pending, REFUSED)
            self.events.append(RequestRejected(now, request_id, model, arrival_s, pending.last_error))
        else:
            self._end(pending, ABANDONED)
            self.events.append(RequestFailed(now, request_id, model, arrival_s, f"not finished within {self.config.request_timeout_s:.12g} s"))
