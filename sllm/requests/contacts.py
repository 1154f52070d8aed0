"""What a client knows of the workers that it waits for: which of its requests each has, when each was last heard, and what is to be cancelled at each.

A worker that owes tokens says so once a report interval (`Progress`). After `QUIET_INTERVALS` intervals without a word the worker is asked; after
`SILENT_INTERVALS` the worker is taken to be gone, at the time when the coordinator takes a worker to be suspect.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Generic, TypeVar

from sllm.protocol.recent import Recent
from sllm.protocol.timers import Timers

QUIET_INTERVALS = 2.0
SILENT_INTERVALS = 3.0
SILENT_LEAST_S = 2.0  # the least, however short the interval is, so that a lost datagram can be sent again
STALL_S = 1.0  # a client that is woken so late was held up, and nobody was silent in that time
CANCELS_MAX = 10_000  # for all workers together; of more, the oldest are forgotten

P = TypeVar("P")


class Contact(Generic[P]):
    """One worker that has requests of the client. Times are absolute seconds of the client's clock."""

    __slots__ = ("due_at", "entry_at", "heard_at", "interval_s", "requests", "since", "worker_id")

    def __init__(self, worker_id: str, interval_s: float, now: float) -> None:
        self.worker_id = worker_id
        self.interval_s = interval_s
        self.since = now  # when the client began to wait for a word of the worker
        self.heard_at = -inf
        self.requests: dict[str, P] = {}
        self.due_at = self.entry_at = inf  # of its timer

    def _limit_s(self, intervals: float) -> float:
        return max(intervals * self.interval_s, SILENT_LEAST_S * intervals / SILENT_INTERVALS)

    @property
    def quiet_at(self) -> float:
        """When the worker is to be asked whether it lives."""
        return max(self.heard_at, self.since) + self._limit_s(QUIET_INTERVALS)

    @property
    def silent_at(self) -> float:
        """When the worker counts as gone."""
        return max(self.heard_at, self.since) + self._limit_s(SILENT_INTERVALS)

    def was_heard_lately(self, now: float) -> bool:
        """The worker spoke not long ago, whatever others say of it."""
        return now < self.heard_at + self._limit_s(QUIET_INTERVALS)


class Contacts(Generic[P]):
    """The workers that hold requests of one client, and the requests given up at workers that may still be at work on them."""

    __slots__ = ("_cancels", "_contacts", "_interval_s", "_timers")

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s  # between two Progress of a worker that has not said after how long the next comes
        self._contacts: dict[str, Contact[P]] = {}
        self._timers: Timers[Contact[P]] = Timers()
        self._cancels: Recent[str, dict[str, float]] = Recent()  # worker -> request -> when its cancellation was last sent

    @property
    def earliest(self) -> float:
        """When `pop_due` has something, absolute; infinite: nothing is expected."""
        return self._timers.earliest

    # --- requests at workers ----------------------------------------------------------------------------------------------------------

    def expect(self, worker_id: str, request_id: str, request: P, now: float) -> None:
        """A request goes to a worker."""
        contact = self._contacts.get(worker_id)
        if contact is None:
            contact = self._contacts[worker_id] = Contact(worker_id, self._interval_s, now)
            self._timers.set(contact, contact.quiet_at)
        contact.requests[request_id] = request
        self.forget_cancel(worker_id, request_id)

    def release(self, worker_id: str, request_id: str) -> None:
        """Nothing more is expected of that worker for that request."""
        contact = self._contacts.get(worker_id)
        if contact is not None and contact.requests.pop(request_id, None) is not None and not contact.requests:
            del self._contacts[worker_id]
            self._timers.cancel(contact)

    def find(self, worker_id: str) -> Contact[P] | None:
        return self._contacts.get(worker_id)

    def hear(self, worker_id: str, now: float, interval_s: float | None = None) -> None:
        """A worker has spoken. `interval_s`: after how long the worker speaks again at the latest, if it has said so."""
        contact = self._contacts.get(worker_id)
        if contact is not None:
            contact.heard_at = now
            if interval_s is not None:
                contact.interval_s = interval_s
            self._timers.set(contact, contact.quiet_at)

    def excuse(self, now: float) -> None:
        """The client was held up: what it did not hear meanwhile is no sign of anything."""
        for contact in self._contacts.values():
            contact.since = now
            self._timers.set(contact, contact.quiet_at)

    def pop_due(self, now: float) -> Iterator[Contact[P]]:
        """Take out each worker that is quiet or silent by now."""
        while (contact := self._timers.pop_due(now)) is not None:
            yield contact

    def wait_until_silent(self, contact: Contact[P]) -> None:
        """The worker has been asked: it is due again when it counts as gone."""
        self._timers.set(contact, contact.silent_at)

    # --- what is to be cancelled --------------------------------------------------------------------------------------------------------

    def give_up(self, worker_id: str, request_id: str, sent_at: float = -inf) -> None:
        """A request is no longer waited for at a worker, which may still be at work on it."""
        if len(self._cancels.new) >= CANCELS_MAX // 2:
            self._cancels.turn()
        waiting = self._cancels.get(worker_id)
        if waiting is None:
            waiting = self._cancels.new[worker_id] = {}
        waiting[request_id] = sent_at

    def forget_cancel(self, worker_id: str, request_id: str) -> None:
        """The worker has answered, or was given the request again."""
        waiting = self._cancels.get(worker_id)
        if waiting is not None and waiting.pop(request_id, None) is not None and not waiting:
            self._cancels.discard(worker_id)

    def to_cancel(self, worker_id: str, now: float, again_after_s: float) -> list[str]:
        """The requests to be cancelled at a worker that has just spoken; each again after a while, until the worker answers."""
        waiting = self._cancels.get(worker_id)
        if waiting is None:
            return []
        due = [request_id for request_id, sent_at in waiting.items() if now - sent_at >= again_after_s]
        for request_id in due:
            waiting[request_id] = now
        return due
