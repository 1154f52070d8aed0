"""A worker's jobs over its engine: which requests are taken, what their clients are told, and what is remembered of them.

    take      a new request goes to the engine; one that is here already is accepted again; one that is done is answered again
    cancel    the work for a request stops
    advance   the engine runs up to `now`: first tokens and answers go to the clients, loads and evictions are told
    drain     nothing new is taken; `stop` ends it, and sends what is not finished elsewhere

A request is known by its client's id and its own: two clients may use the same request id.

The states of a worker, which its reports say:

    STARTING            -- first models loaded --> READY
    STARTING, READY     -- drain --> DRAINING
    DRAINING            -- stop --> STOPPED
"""

from __future__ import annotations

from collections import Counter, deque
from math import inf
from typing import Protocol

from sllm.engine import Engine, Evicted, Finished, FirstTokenOut, Loaded, ModelTooLarge, RequestTooLarge, Started
from sllm.models.catalogue import Catalog
from sllm.models.model import TIER_NAMES
from sllm.protocol.errors import UsageError
from sllm.protocol.events import Event, ModelEvicted, ModelLoaded, ModelLoadStarted, RequestAdmitted, RequestCancelled, RequestServed
from sllm.protocol.messages import (
    CANCELLED,
    COMPLETED,
    DRAINING,
    READY,
    REFUSED_DRAINING,
    REFUSED_FULL,
    REFUSED_INVALID,
    REFUSED_MISDIRECTED,
    REFUSED_TOO_LARGE,
    REFUSED_UNKNOWN_MODEL,
    STARTING,
    STOPPED,
    Address,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    Message,
    Progress,
)
from sllm.protocol.recent import Recent

DONE_MAX = 20_000  # answers in each of two generations, 25 MB at most: a usual worker gives fewer within `RESPONSE_KEEP`, and clients ask again within seconds
ACCEPT_AFTER = 0.25  # fraction of `retry_initial_s`, the client's first wait for an answer: a first token sent sooner doubles as the acceptance

# What moves a worker from one state to the next.
FIRST_MODELS_LOADED = "first models loaded"
DRAIN = "drain"
STOP = "stop"
TRANSITIONS: dict[tuple[str, str], str] = {
    (STARTING, FIRST_MODELS_LOADED): READY,
    **{(old, DRAIN): DRAINING for old in (STARTING, READY)},
    (DRAINING, STOP): STOPPED,
}


class Job:
    """One request on this worker. Times are absolute seconds of the worker's clock."""

    __slots__ = ("accept_at", "arrived_at", "client", "confirmed", "first_at", "load_s", "model", "request_id", "started_at")

    def __init__(self, request_id: str, model: str, client: Address, now: float, accept_at: float) -> None:
        self.request_id = request_id
        self.model = model
        self.client = client  # the address of its latest datagram
        self.arrived_at = now
        self.started_at = now  # of the prefill
        self.first_at = now  # of the first token
        self.load_s = 0.0  # of the model load begun for this request; 0: the model was there or on its way
        self.accept_at = accept_at  # when the client is to be told that the request has arrived, unless the client knows by then
        self.confirmed = False  # the client has been told that the request has arrived


class ServiceSettings(Protocol):
    """What a service reads of the configuration of its process."""

    @property
    def queue_max(self) -> int: ...
    @property
    def demo_models(self) -> int: ...
    @property
    def retry_initial_s(self) -> float: ...
    @property
    def response_keep_s(self) -> float: ...
    @property
    def drain_timeout_s(self) -> float: ...


class Service:
    """The jobs of one worker.

    `outgoing` and `events` are lists of the role that owns the service. The service appends what is to be sent and what has happened, in order; the role
    takes it out after each call. Raises UsageError if one of the models to be loaded first can never fit.
    """

    __slots__ = (
        "_accept_after_s", "_accept_at", "_catalog", "_done", "_drain_until", "_events", "_first_models", "_initiators", "_jobs_max", "_next_drop",
        "_outgoing", "_present", "_settings", "_unconfirmed", "changed", "engine", "jobs", "refused", "served", "state", "worker_id",
    )  # fmt: skip

    def __init__(
        self,
        worker_id: str,
        settings: ServiceSettings,
        catalog: Catalog,
        engine: Engine,
        outgoing: list[tuple[Message, Address]],
        events: list[Event],
        now: float,
    ) -> None:
        self.worker_id = worker_id
        self.engine = engine
        self.state = STARTING  # moved by `TRANSITIONS` only
        self.jobs: dict[str, Job] = {}  # by client id and request id
        self.changed = False  # something that a load report says, since whoever reports has last set this to False
        self.served = 0  # requests completed
        self.refused = 0
        self._settings = settings
        self._catalog = catalog
        self._outgoing = outgoing
        self._events = events
        self._unconfirmed: deque[Job] = deque()  # in order of arrival, the first never confirmed; later ones that are confirmed go when they come to the front
        self._accept_at = inf  # `accept_at` of the first of them
        self._accept_after_s = ACCEPT_AFTER * settings.retry_initial_s
        self._done: Recent[str, InferenceResponse] = Recent()  # answers, kept for clients that ask again
        self._next_drop = now + settings.response_keep_s
        self._drain_until = inf
        first = engine.snapshot(now)
        self._jobs_max = settings.queue_max + first.slots
        self._present = set(first.gpu_models)  # models on the GPU or on their way to it
        self._initiators: dict[str, Job] = {}  # model on its way -> the request that it is loaded for
        self._first_models: set[str] = set()  # still to be loaded before the worker is READY
        self._load_first_models(now)

    def _load_first_models(self, now: float) -> None:
        for name in self._catalog.names[: self._settings.demo_models]:
            if name not in self._present:
                self._first_models.add(name)
                try:
                    self.engine.load(now, name)
                except ModelTooLarge as error:
                    raise UsageError(f"DEMO_MODELS={self._settings.demo_models}: {error}") from None
                self._begin_load(name, now)
        if not self._first_models:
            self._step(FIRST_MODELS_LOADED)

    def _step(self, what: str) -> None:
        """Apply a transition; nothing changes where the table has none."""
        self.state = TRANSITIONS.get((self.state, what), self.state)

    # --- requests -------------------------------------------------------------------------------------------------------------------

    def take(self, client_id: str, request: InferenceRequest, addr: Address, now: float) -> bool:
        """Begin a request, or say again how it stands. False if the request is refused; its client is told why."""
        if self.engine.next_at <= now and self.state != STOPPED:
            self.advance(now)
        refusal = REFUSED_MISDIRECTED if request.worker_id != self.worker_id else self._take(f"{client_id}/{request.request_id}", request, addr, now)
        if refusal:
            self.refused += 1
            self._end_unserved(request.request_id, refusal, addr)
        return not refusal

    def _take(self, key: str, request: InferenceRequest, addr: Address, now: float) -> str:
        """Why the request is refused; "" if it is not."""
        answer = self._done.get(key)
        if answer is not None:
            self._outgoing.append((answer, addr))
            return ""
        job = self.jobs.get(key)
        if job is not None:
            job.client = addr
            self._accept(job)
            return ""
        return self._submit(key, request, addr, now)

    def _submit(self, key: str, request: InferenceRequest, addr: Address, now: float) -> str:
        """Hand a new request to the engine. Why the request is refused; "" if it is not."""
        request_id, model = request.request_id, request.model
        if self.state == DRAINING or self.state == STOPPED:
            return REFUSED_DRAINING
        if model not in self._catalog.models:
            return REFUSED_UNKNOWN_MODEL
        if len(self.jobs) >= self._jobs_max:
            return REFUSED_FULL
        try:
            self.engine.submit(now, key, model, request.prompt_tokens, request.max_tokens)
        except (RequestTooLarge, ModelTooLarge):
            return REFUSED_TOO_LARGE
        except KeyError:
            return REFUSED_UNKNOWN_MODEL
        except ValueError:
            return REFUSED_INVALID
        job = self.jobs[key] = Job(request_id, model, addr, now, now + self._accept_after_s)
        if not self._unconfirmed:
            self._accept_at = job.accept_at
        self._unconfirmed.append(job)
        self.changed = True
        self._events.append(RequestAdmitted(now, self.worker_id, request_id, model))
        if model not in self._present:
            self._initiators[model] = job
            self._begin_load(model, now)
        self.advance(now)
        return ""

    def cancel(self, client_id: str, request_id: str, now: float) -> bool:
        """Stop the work for a request; False if the request is not here. `tell_cancelled` is due either way."""
        key = f"{client_id}/{request_id}"
        if self.state != STOPPED:
            self.advance(now)
        job = self.jobs.pop(key, None)
        if job is not None:
            self.engine.cancel(now, key)
            self._confirm(job)
            self.changed = True
            self._events.append(RequestCancelled(now, self.worker_id, job.request_id, job.model))
            self.advance(now)
        return job is not None

    def tell_cancelled(self, request_id: str, addr: Address) -> None:
        """Answer a cancellation: the same whether the request was here or not, so that the client need not ask again."""
        self._end_unserved(request_id, CANCELLED, addr)

    def _end_unserved(self, request_id: str, outcome: str, addr: Address) -> None:
        """Tell a client that a request of it ends here without a token."""
        self._outgoing.append((InferenceResponse(request_id, outcome, 0, 0.0, 0.0, 0.0, 0.0), addr))

    def _accept(self, job: Job) -> None:
        """Tell a client that its request has arrived."""
        self._outgoing.append((InferenceAccepted(job.request_id, len(self.jobs)), job.client))
        self._confirm(job)

    def _confirm(self, job: Job) -> None:
        """The client of this job has been told that the request has arrived, or need not be: find the next one that is to be told."""
        job.confirmed = True
        unconfirmed = self._unconfirmed
        while unconfirmed and unconfirmed[0].confirmed:
            unconfirmed.popleft()
        self._accept_at = unconfirmed[0].accept_at if unconfirmed else inf

    def tell_progress(self, interval_s: float) -> None:
        """Tell each client that is owed tokens, once for all its requests, that this worker lives and will say so again after `interval_s`."""
        owed = Counter([job.client for job in self.jobs.values()])
        for client, requests in owed.items():
            self._outgoing.append((Progress(interval_s, requests), client))

    # --- the engine -----------------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Let the engine run up to `now`, and tell clients and role what came of it."""
        for note in self.engine.advance(now):
            if type(note) is Started:  # most notifications are of the first three kinds
                self.jobs[note.request_id].started_at = note.at
            elif type(note) is FirstTokenOut:
                job = self.jobs[note.request_id]
                job.first_at = note.at
                self._outgoing.append((FirstToken(job.request_id, job.started_at - job.arrived_at), job.client))
                if not job.confirmed:
                    self._confirm(job)
            elif type(note) is Finished:
                self._finish(note)
            elif type(note) is Loaded:
                self._on_loaded(note)
            elif type(note) is Evicted:
                self._on_evicted(note)
            self.changed = True

    def _finish(self, note: Finished) -> None:
        """The last token of a request is out: answer, and keep the answer for a while."""
        at, key, tokens = note.at, note.request_id, note.output_tokens
        job = self.jobs.pop(key)
        request_id, arrived_at = job.request_id, job.arrived_at
        if len(self._done.new) >= DONE_MAX:
            self._done.turn()
        queue_wait_s, first_token_s, total_s = job.started_at - arrived_at, job.first_at - arrived_at, at - arrived_at
        response = InferenceResponse(request_id, COMPLETED, tokens, queue_wait_s, first_token_s, total_s, job.load_s)
        self._done.new[key] = response
        self.served += 1
        self._outgoing.append((response, job.client))
        self._events.append(RequestServed(at, self.worker_id, request_id, job.model, tokens, queue_wait_s, first_token_s, total_s))

    def _begin_load(self, model: str, now: float) -> None:
        self._present.add(model)
        self._events.append(ModelLoadStarted(now, self.worker_id, model))

    def _on_loaded(self, note: Loaded) -> None:
        initiator = self._initiators.pop(note.model, None)
        if initiator is not None:
            initiator.load_s = note.load_s
        if note.model in self._first_models:
            self._first_models.remove(note.model)
            if not self._first_models:
                self._step(FIRST_MODELS_LOADED)
        self._events.append(ModelLoaded(note.at, self.worker_id, note.model, TIER_NAMES[note.tier_from], note.load_s))

    def _on_evicted(self, note: Evicted) -> None:
        """A model left the GPU. If requests still wait for the model, the engine loads it again without being told."""
        self._events.append(ModelEvicted(note.at, self.worker_id, note.model))
        self._present.discard(note.model)
        if any(job.model == note.model for job in self.jobs.values()):
            self._begin_load(note.model, note.at)

    # --- time -----------------------------------------------------------------------------------------------------------------------

    @property
    def next_at(self) -> float:
        """When `run` has something to do, or the time to drain is over, absolute; infinite: not before the next call. Of no meaning once STOPPED."""
        at = self.engine.next_at
        if self._accept_at < at:
            at = self._accept_at
        if self._drain_until < at:
            at = self._drain_until
        return at

    def run(self, now: float) -> None:
        """Let the engine do what is due, and accept the requests whose clients would soon ask again."""
        if self.engine.next_at <= now:
            self.advance(now)
        while self._accept_at <= now:
            self._accept(self._unconfirmed[0])

    def forget_old(self, now: float) -> None:
        """Forget answers that have been kept for `response_keep_s` to twice as long; to be called now and then."""
        if now >= self._next_drop:
            self._next_drop = now + self._settings.response_keep_s
            self._done.turn()

    # --- leaving --------------------------------------------------------------------------------------------------------------------

    def drain(self, now: float) -> bool:
        """Take nothing new from now on. False if that was said before."""
        if self.state == DRAINING or self.state == STOPPED:
            return False
        self._drain_until = now + self._settings.drain_timeout_s
        self._step(DRAIN)
        return True

    def has_drained(self, now: float) -> bool:
        """It drains and either nothing is left to run or the time to drain is over: `stop` is due."""
        return self.state == DRAINING and (not self.jobs or now >= self._drain_until)

    def stop(self) -> None:
        """Tell the clients of what is not finished to go elsewhere. The engine is advanced no more."""
        for job in self.jobs.values():
            self._end_unserved(job.request_id, REFUSED_DRAINING, job.client)
        self.jobs.clear()
        self._unconfirmed.clear()
        self._accept_at = inf
        self._step(STOP)
