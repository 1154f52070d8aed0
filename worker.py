"""A worker: holds models, serves requests through its engine, and reports its load.

    InferenceRequest -> FirstToken, InferenceResponse; sent again, it is answered again, and the work is done once
    ... and if the first token takes longer than the client would wait in silence, InferenceAccepted before it
    CancelRequest    -> the work stops; InferenceResponse says so
    every interval   -> a LoadReport to the coordinator, and Progress to each client that is owed tokens
    drain()          -> DRAINING: nothing new is taken, what runs is finished, a last report says STOPPED
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from math import inf
from random import Random
from typing import Protocol

from sllm.engine import Engine, Evicted, Finished, FirstTokenOut, Loaded, ModelTooLarge, RequestTooLarge, Started
from sllm.fleet.ledger import Receipts
from sllm.models.catalogue import Catalog
from sllm.models.model import TIER_NAMES
from sllm.protocol.errors import UsageError
from sllm.protocol.events import (
    CoordinatorChanged,
    CoordinatorOverdue,
    CoordinatorSilent,
    DisplacedByNamesake,
    ModelEvicted,
    ModelLoaded,
    ModelLoadStarted,
    RequestAdmitted,
    RequestCancelled,
    RequestServed,
    RivalGone,
    RivalSeen,
    WorkerDrained,
)
from sllm.protocol.fitting import always_fits, fitted
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
    CancelRequest,
    EngineSnapshot,
    Envelope,
    FirstToken,
    InferenceAccepted,
    InferenceRequest,
    InferenceResponse,
    LoadReport,
    Progress,
    ReportAck,
    WorkerLost,
)
from sllm.protocol.node import Codec, Node
from sllm.protocol.recent import Recent
from sllm.protocol.rivals import Rivals

RIVALS_KEPT_ACKS = 10.0  # acknowledgements due, while two coordinators that were heard by turns count as two
HEARTBEAT_S = 1.0  # between reports when they are sent at every change
DONE_MAX = 20_000  # answers in each of two generations, 25 MB at the most: a usual worker gives fewer in `RESPONSE_KEEP`, and polls come within seconds
ACCEPT_AFTER = 0.25  # of a client's first wait for an answer: a first token that comes by then says as well that the request has arrived


class Job:
    """One request on this worker. Times are absolute seconds of the worker's clock."""

    __slots__ = ("accept_at", "answered", "arrived_at", "client", "first_at", "load_s", "model", "request_id", "started_at")

    def __init__(self, request_id: str, model: str, client: Address, now: float, accept_at: float) -> None:
        self.request_id = request_id
        self.model = model
        self.client = client
        self.arrived_at = now
        self.started_at = now
        self.first_at = now
        self.load_s = 0.0
        self.accept_at = accept_at  # when the client must be told that it is here, if it does not know by then
        self.answered = False  # the client knows


class WorkerSettings(Protocol):
    """What a worker reads of the configuration of its process."""

    @property
    def life_timeout_s(self) -> float: ...
    @property
    def report_interval_s(self) -> float: ...
    @property
    def reports_per_ack(self) -> int: ...
    @property
    def retry_initial_s(self) -> float: ...
    @property
    def coordinator_silent_s(self) -> float: ...
    @property
    def hardware(self) -> str: ...
    @property
    def queue_max(self) -> int: ...
    @property
    def demo_models(self) -> int: ...
    @property
    def response_keep_s(self) -> float: ...
    @property
    def drain_timeout_s(self) -> float: ...


class Worker(Node):
    """One worker. `advertise` is where clients reach it ("" and 0: where its reports come from). A host that may change is found anew for each report:
    `own_host` is given the coordinator's address and returns what the report says."""

    __slots__ = (
        "_accept_after_s", "_accept_at", "_always_fits", "_changed", "_done", "_drain_until", "_heard_at", "_heard_epoch", "_initiators", "_interval_s",
        "_jobs", "_jobs_max", "_last_report", "_next_drop", "_next_report", "_overdue_at", "_owed", "_own_host", "_patience_min_s", "_patience_s", "_present",
        "_receipts", "_report_always", "_rivals", "_rng", "_silent_s", "_snapshot", "_starting", "_state_changed", "_unanswered", "advertise", "catalog",
        "config", "displaced", "drained", "engine", "refused", "reports_sent", "rival", "served", "state",
    )  # fmt: skip

    def __init__(
        self,
        config: WorkerSettings,
        catalog: Catalog,
        engine: Engine,
        coordinator: Address,
        rng: Random,
        incarnation: int,
        *,
        node_id: str,
        codec: Codec | None = None,
        wall_offset_s: float = 0.0,
        advertise: Address = ("", 0),
        own_host: Callable[[Address], str] | None = None,
        now: float = 0.0,
    ) -> None:
        super().__init__(node_id, incarnation, codec=codec, wall_offset_s=wall_offset_s, life_timeout_s=config.life_timeout_s)
        self.config = config
        self.catalog = catalog
        self.engine = engine
        self.coordinator = coordinator
        self.advertise = advertise
        self._own_host = own_host
        self.state = STARTING
        self.drained = False
        self.reports_sent = 0
        self.served = 0
        self.refused = 0
        self._rng = rng
        self._receipts = Receipts()
        self._jobs: dict[str, Job] = {}
        self._unanswered: deque[Job] = deque()  # in order of time; those answered meanwhile go when they come to the front
        self._accept_at = inf  # of the first
        self._accept_after_s = ACCEPT_AFTER * config.retry_initial_s
        self._done: Recent[str, InferenceResponse] = Recent()
        self._interval_s = config.report_interval_s or HEARTBEAT_S
        self._always_fits = always_fits(catalog.names)  # a report with all of the catalogue in it would fit a datagram
        self._report_always = config.report_interval_s == 0.0
        self._changed = False
        self._last_report: LoadReport | None = None  # None: something in it has changed beside the engine
        self._snapshot: EngineSnapshot | None = None  # that it was made from
        self._next_report = now
        self._next_drop = now + config.response_keep_s
        self._drain_until = inf
        self._heard_at = now  # when the coordinator was last heard, or last complained about
        self._silent_s = max(config.coordinator_silent_s, 3.0 * self._interval_s)
        self._heard_epoch = 0
        self.displaced = False  # a newer life has this worker's name
        self.rival = False  # two lives of the coordinator acknowledge reports by turns
        self._rivals = Rivals(RIVALS_KEPT_ACKS * config.reports_per_ack * self._interval_s)
        self._owed = config.reports_per_ack  # the number of the report by which the next acknowledgement is owed,
        self._overdue_at = inf  # and when that has been waited for long enough; inf: it is not owed yet
        self._patience_s = self._patience_min_s = max(self._interval_s, config.retry_initial_s)
        self._initiators: dict[str, Job] = {}  # the request for whose sake a model is being loaded
        first = engine.snapshot(now)
        self._jobs_max = config.queue_max + first.slots
        self._present = set(first.gpu_models)  # models loaded or on their way
        self._starting: set[str] = set()  # demo models still to come
        self.handlers = {
            InferenceRequest: self._on_inference_request, CancelRequest: self._on_cancel, ReportAck: self._on_report_ack, WorkerLost: self._on_worker_lost,
        }  # fmt: skip
        for name in catalog.names[: config.demo_models]:
            if name not in self._present:
                self._starting.add(name)
                self._present.add(name)
                try:
                    engine.load(now, name)
                except ModelTooLarge as error:
                    raise UsageError(f"DEMO_MODELS={config.demo_models}: {error}") from None
                self.events.append(ModelLoadStarted(now, node_id, name))
        self._update_state()
        self._state_changed = False  # since the last report, and the first is sent at once
        self._plan()

    @property
    def acknowledged(self) -> bool:
        """A coordinator has answered a report of ours."""
        return self._heard_epoch != 0

    def suspects_rival(self, now: float) -> bool:
        """An older life of the coordinator has spoken lately: over new sockets each of two would be heard soon."""
        return self._rivals.suspected(now)

    # --- requests -------------------------------------------------------------------------------------------------------------------

    def _on_inference_request(self, envelope: Envelope[InferenceRequest], addr: Address, now: float) -> None:
        sender_id, request = envelope.sender_id, envelope.message
        if self.engine.next_at <= now and not self.drained:
            self._advance(now)
        outcome = self._take(f"{sender_id}/{request.request_id}", request, addr, now)
        if outcome:
            self._refuse(request, outcome, addr, now)
        else:
            self._after_change(now)
        self._plan()

    def _take(self, key: str, request: InferenceRequest, addr: Address, now: float) -> str:
        """Begin a request, or answer as it stands; returns why it is refused, or ""."""
        if request.worker_id != self.node_id:
            return REFUSED_MISDIRECTED
        self._receipts.note(request.dispatch.epoch, request.dispatch.number)
        self._last_report = None
        done = self._done.get(key)
        if done is not None:
            self.send(done, addr, now)
            return ""
        job = self._jobs.get(key)
        if job is not None:
            job.client = addr
            self._accept(job, now)
            return ""
        return self._submit(key, request, addr, now)

    def _submit(self, key: str, request: InferenceRequest, addr: Address, now: float) -> str:
        """Hand a new request to the engine; returns why it is refused, or ""."""
        request_id, model = request.request_id, request.model
        if self._drain_until < inf:
            return REFUSED_DRAINING
        if model not in self.catalog.models:
            return REFUSED_UNKNOWN_MODEL
        if len(self._jobs) >= self._jobs_max:
            return REFUSED_FULL
        try:
            self.engine.submit(now, key, model, request.prompt_tokens, request.max_tokens)
        except (RequestTooLarge, ModelTooLarge):
            return REFUSED_TOO_LARGE
        except KeyError:
            return REFUSED_UNKNOWN_MODEL
        except ValueError:
            return REFUSED_INVALID
        job = self._jobs[key] = Job(request_id, model, addr, now, now + self._accept_after_s)
        if not self._unanswered:
            self._accept_at = job.accept_at
        self._unanswered.append(job)
        self._changed = True
        self.events.append(RequestAdmitted(now, self.node_id, request_id, model))
        if model not in self._present:
            self._present.add(model)
            self._initiators[model] = job
            self.events.append(ModelLoadStarted(now, self.node_id, model))
        self._advance(now)
        return ""

    def _on_cancel(self, envelope: Envelope[CancelRequest], addr: Address, now: float) -> None:
        """Give a request up. What is not here, or is done, is answered alike, so that the client need not ask again."""
        sender_id, cancel = envelope.sender_id, envelope.message
        key = f"{sender_id}/{cancel.request_id}"
        if not self.drained:
            self._advance(now)
        job = self._jobs.pop(key, None)
        if job is not None:
            self.engine.cancel(now, key)
            self._answered(job)
            self._changed = True
            self.events.append(RequestCancelled(now, self.node_id, job.request_id, job.model))
            self._advance(now)
            self._after_change(now)
        self.send(InferenceResponse(cancel.request_id, CANCELLED, 0, 0.0, 0.0, 0.0, 0.0), addr, now)
        self._plan()

    def _accept(self, job: Job, now: float) -> None:
        """Tell the client that its request is here."""
        self.send(InferenceAccepted(job.request_id, len(self._jobs)), job.client, now)
        self._answered(job)

    def _answered(self, job: Job) -> None:
        """The client knows that its request is here: find the next one that does not."""
        job.answered = True
        unanswered = self._unanswered
        while unanswered and unanswered[0].answered:
            unanswered.popleft()
        self._accept_at = unanswered[0].accept_at if unanswered else inf

    def _refuse(self, request: InferenceRequest, outcome: str, addr: Address, now: float) -> None:
        self.refused += 1
        self.send(InferenceResponse(request.request_id, outcome, 0, 0.0, 0.0, 0.0, 0.0), addr, now)

    def _advance(self, now: float) -> None:
        """Let the engine run up to `now` and tell the clients what came of it."""
        for note in self.engine.advance(now):
            if type(note) is Started:  # most are one of the first three
                self._jobs[note.request_id].started_at = note.at
            elif type(note) is FirstTokenOut:
                job = self._jobs[note.request_id]
                job.first_at = note.at
                self.send(FirstToken(job.request_id, job.started_at - job.arrived_at), job.client, now)
                if not job.answered:
                    self._answered(job)
            elif type(note) is Finished:
                self._finish(note, now)
            elif type(note) is Loaded:
                self._on_loaded(note)
            elif type(note) is Evicted:
                self._on_evicted(note)
            self._changed = True

    def _finish(self, note: Finished, now: float) -> None:
        """The last token of a request: answer, and keep the answer for a while."""
        at, key, tokens = note.at, note.request_id, note.output_tokens
        job = self._jobs.pop(key)
        request_id, arrived_at = job.request_id, job.arrived_at
        if len(self._done.new) >= DONE_MAX:
            self._done.turn()
        response = InferenceResponse(request_id, COMPLETED, tokens, job.started_at - arrived_at, job.first_at - arrived_at, at - arrived_at, job.load_s)
        self._done.new[key] = response
        self.served += 1
        self.send(response, job.client, now)
        self.events.append(
            RequestServed(at, self.node_id, request_id, job.model, tokens, job.started_at - arrived_at, job.first_at - arrived_at, at - arrived_at)
        )

    def _on_loaded(self, note: Loaded) -> None:
        initiator = self._initiators.pop(note.model, None)
        if initiator is not None:
            initiator.load_s = note.load_s
        if note.model in self._starting:
            self._starting.remove(note.model)
            self._update_state()
        self.events.append(ModelLoaded(note.at, self.node_id, note.model, TIER_NAMES[note.tier_from], note.load_s))

    def _on_evicted(self, note: Evicted) -> None:
        """A model left the GPU; if requests still wait for it, the engine loads it again by itself."""
        self.events.append(ModelEvicted(note.at, self.node_id, note.model))
        if any(job.model == note.model for job in self._jobs.values()):
            self.events.append(ModelLoadStarted(note.at, self.node_id, note.model))
        else:
            self._present.discard(note.model)

    def snapshot(self, now: float) -> EngineSnapshot:
        """What its engine is at. To be asked here and not of the engine itself: what the engine did until `now` must be told, and be waited for."""
        if not self.drained:
            self._advance(now)
            self._plan()
        return self.engine.snapshot(now)

    # --- reports --------------------------------------------------------------------------------------------------------------------

    def _on_report_ack(self, envelope: Envelope[ReportAck], addr: Address, now: float) -> None:
        ack = envelope.message
        epoch = ack.epoch
        self._heard_at = now
        self._rivals.hear_newest(now)
        self._set_displaced(False, now)
        self._owed = max(self._owed, min(ack.sequence, self.reports_sent) + self.config.reports_per_ack)
        self._overdue_at, self._patience_s = inf, self._patience_min_s
        if epoch != self._heard_epoch:  # a lower one is heard only when the known life has been silent: its clock was set back
            if self._heard_epoch:
                self.events.append(CoordinatorChanged(now, self.node_id, epoch))
            self._heard_epoch = epoch
        if epoch < self._receipts.epoch:  # dispatches of a life that the coordinator does not have: it would be told of none of its own
            self._receipts = Receipts()
            self._last_report = None

    def _on_worker_lost(self, envelope: Envelope[WorkerLost], addr: Address, now: float) -> None:
        """This life's reports are refused because a newer life has its name."""
        lost = envelope.message
        if (lost.worker_id, lost.incarnation) == (self.node_id, self.incarnation):
            self._heard_at = now
            self._set_displaced(True, now)

    def _set_displaced(self, displaced: bool, now: float) -> None:
        if displaced and not self.displaced:
            self.events.append(DisplacedByNamesake(now, self.node_id))
        self.displaced = displaced

    def refuse(self, kind: type, reason: str, now: float) -> str:
        if kind is ReportAck and reason == "old_incarnation":
            self._rivals.hear_older(now)
        return super().refuse(kind, reason, now)

    def _look_for_rivals(self, now: float) -> None:
        """Tell when two coordinators are first seen, and when they are no longer."""
        seen = self._rivals.seen(now)
        if seen != self.rival:
            self.rival = seen
            self._last_report = None
            self.events.append(RivalSeen(now, self.node_id) if seen else RivalGone(now, self.node_id))

    def relocate(self, address: Address) -> None:
        self.advertise = address
        self._last_report = None

    def _tell_progress(self, now: float) -> None:
        """Tell each client that is owed tokens, once, that this worker lives."""
        owed = Counter([job.client for job in self._jobs.values()])
        for client, requests in owed.items():
            self.send(Progress(self._interval_s, requests), client, now)

    def _report(self, now: float) -> None:
        if self._own_host is not None:
            host, port = self._own_host(self.coordinator), self.advertise[1]
            if host != self.advertise[0]:
                self.relocate((host, port))
        snapshot = self.engine.snapshot(now)
        report = self._last_report
        if report is None or snapshot is not self._snapshot:  # an idle engine gives the same snapshot again: then the last report is still right
            self._snapshot = snapshot
            receipts, (host, port) = self._receipts, self.advertise
            report = LoadReport(
                self.state, host, port, self.config.hardware, self.config.queue_max, snapshot,
                receipts.epoch, receipts.high, receipts.missing, self._interval_s, self.rival,
            )  # fmt: skip
            self._last_report = report = report if self._always_fits else fitted(report)
        self.send(report, self.coordinator, now)
        self.reports_sent += 1
        if self.reports_sent >= self._owed and self._overdue_at == inf:
            self._overdue_at = now + self._patience_s
        self._changed = self._state_changed = False

    def _update_state(self) -> None:
        """STARTING until the demo models are there, DRAINING once told to stop."""
        state = DRAINING if self._drain_until < inf else STARTING if self._starting else READY
        if state != self.state:
            self.state = state
            self._state_changed = True
            self._last_report = None

    def _after_change(self, now: float) -> None:
        """A change of state is reported at once; others too when reports have no interval."""
        if self._state_changed or (self._report_always and self._changed):
            self._report(now)

    # --- time -----------------------------------------------------------------------------------------------------------------------

    def handle_timer(self, now: float) -> None:
        if self.drained:
            return
        if self.engine.next_at <= now:
            self._advance(now)
        while self._accept_at <= now:  # the first token is not out yet, and the client would soon ask again
            self._accept(self._unanswered[0], now)
        if now >= self._next_report:
            self._look_for_rivals(now)
            self._report(now)
            if self._jobs:
                self._tell_progress(now)
            self._plan_report(now)
            if now - self._heard_at >= self._silent_s:
                self._complain(now)
            if now >= self._next_drop:
                self._drop_old_responses(now)
        elif self._state_changed or (self._report_always and self._changed):
            self._report(now)
        if now >= self._overdue_at:
            self._report_anew(now)
        if self._drain_until < inf and (not self._jobs or now >= self._drain_until):
            self._stop(now)
        self._plan()

    def _plan(self) -> None:
        """When to wake next."""
        at, engine_at = self._next_report, self.engine.next_at
        if engine_at < at:
            at = engine_at
        if self._accept_at < at:
            at = self._accept_at
        if self._overdue_at < at:
            at = self._overdue_at
        if self._drain_until < at:
            at = self._drain_until
        self.wake_at = inf if self.drained else at

    def _plan_report(self, now: float) -> None:
        """The next report: at a random phase after the first, so that a fleet started together does not report together; then evenly."""
        if self.reports_sent <= 1:
            self._next_report = now + self._rng.random() * self._interval_s
        else:
            self._next_report += self._interval_s
            if self._next_report <= now:  # we were held up: do not send those missed
                self._next_report = now + self._interval_s

    def _complain(self, now: float) -> None:
        """The coordinator has been silent for too long."""
        self.events.append(CoordinatorSilent(now, self.node_id, now - self._heard_at))
        self._heard_at = now

    def _report_anew(self, now: float) -> None:
        """An acknowledgement is owed and has not come. The coordinator may have moved, and what keeps track of our socket's datagrams on the way may still
        send them to where it was: a report over a new socket finds it at once."""
        self.events.append(CoordinatorOverdue(now, self.node_id, now - self._heard_at))
        self._patience_s = min(2.0 * self._patience_s, self._silent_s)
        self._overdue_at = now + self._patience_s
        self._report(now)

    def _drop_old_responses(self, now: float) -> None:
        self._next_drop = now + self.config.response_keep_s
        self._done.turn()

    # --- leaving --------------------------------------------------------------------------------------------------------------------

    def drain(self, now: float) -> None:
        """Take nothing new, finish what runs within the drain timeout, then send a last report."""
        if self._drain_until == inf:
            self._drain_until = now + self.config.drain_timeout_s
            self._update_state()
            self._after_change(now)
            if not self._jobs:
                self._stop(now)
            self._plan()

    def _stop(self, now: float) -> None:
        """Send the last report; tell the clients of what is not finished to go elsewhere."""
        for job in self._jobs.values():
            self.send(InferenceResponse(job.request_id, REFUSED_DRAINING, 0, 0.0, 0.0, 0.0, 0.0), job.client, now)
        self._jobs.clear()
        self._unanswered.clear()
        self._accept_at = inf
        self.state = STOPPED
        self._last_report = None
        self._report(now)
        self.drained = True
        self.events.append(WorkerDrained(now, self.node_id))
