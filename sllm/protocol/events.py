"""The events that a role tells its driver: facts in the past tense, one fact each. Metrics, logs, progress, results and checkers derive from events.

Facts that occur thousands of times a second (reports applied, datagrams rejected) are counters of the node instead (`Node.rejected`), so that hearing a
report does not cost an object. A new event is a class here and, to appear in the log, a line in `sllm.observe.logs`.
"""

from __future__ import annotations

from sllm.protocol.record import Record


class Event(Record):
    """Base of every event."""

    __slots__ = ()
    at: float  # when it happened, by the clock of the node that tells it


# --- client ---------------------------------------------------------------------------------------------------------------------------


class RequestSent(Event):
    """A request entered the system."""

    FIELDS = ("at", "request_id", "model")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, model: str) -> None:
        self.at = at
        self.request_id = request_id
        self.model = model


class FirstTokenReceived(Event):
    """A client has received the first token that a worker produced for a request."""

    FIELDS = ("at", "request_id", "ttft_s", "worker_id")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, ttft_s: float, worker_id: str) -> None:
        self.at = at
        self.request_id = request_id
        self.ttft_s = ttft_s  # the time to first token of the request, if this worker completes it
        self.worker_id = worker_id


class RequestCompleted(Event):
    """A client has every token of a request. All times are as the client saw them, unless a field says otherwise."""

    FIELDS = (
        "at", "request_id", "model", "worker_id", "action", "arrival_s", "ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "load_s", "prompt_tokens",
        "output_tokens", "placements", "retries", "stalled_s",
    )  # fmt: skip
    __slots__ = FIELDS

    def __init__(
        self, at: float, request_id: str, model: str, worker_id: str, action: str, arrival_s: float, ttft_s: float, e2e_s: float, tpot_s: float,
        queue_wait_s: float, load_s: float, prompt_tokens: int, output_tokens: int, placements: int, retries: int, stalled_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.at = at
        self.request_id = request_id
        self.model = model
        self.worker_id = worker_id
        self.action = action
        self.arrival_s = arrival_s  # clock time at which the client took the request
        self.ttft_s = ttft_s
        self.e2e_s = e2e_s
        self.tpot_s = tpot_s  # (e2e - ttft) / (output_tokens - 1); 0 for one token
        self.queue_wait_s = queue_wait_s  # the worker's figure: from the arrival there to the start of the prefill
        self.load_s = load_s  # the worker's figure: the model load that was begun for this request
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.placements = placements  # how many workers the request was given to
        self.retries = retries  # datagrams sent again
        self.stalled_s = stalled_s  # from the first token of an answer that was given up to the first token of the answer that counts


class RequestFailed(Event):
    """A client gave a request up: its placements were used up or its timeout had passed."""

    FIELDS = ("at", "request_id", "model", "arrival_s", "reason")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, model: str, arrival_s: float, reason: str) -> None:
        self.at = at
        self.request_id = request_id
        self.model = model
        self.arrival_s = arrival_s
        self.reason = reason


class RequestRejected(Event):
    """The control plane refused a request for good."""

    FIELDS = ("at", "request_id", "model", "arrival_s", "code")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, model: str, arrival_s: float, code: str) -> None:
        self.at = at
        self.request_id = request_id
        self.model = model
        self.arrival_s = arrival_s
        self.code = code


class RequestRetried(Event):
    """A worker stayed silent or refused a request, and the client asks the coordinator again."""

    FIELDS = ("at", "request_id", "worker_id", "reason")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, worker_id: str, reason: str) -> None:
        self.at = at
        self.request_id = request_id
        self.worker_id = worker_id
        self.reason = reason


class DuplicateResponse(Event):
    """A response came to a request that was over already: work was done twice."""

    FIELDS = ("at", "request_id", "sender_id")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, sender_id: str) -> None:
        self.at = at
        self.request_id = request_id
        self.sender_id = sender_id


# --- coordinator ----------------------------------------------------------------------------------------------------------------------


class RequestRouted(Event):
    """A request was given a worker, and its client is told."""

    FIELDS = ("at", "request_id", "model", "worker_id", "action", "eta_s", "decision_s")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, model: str, worker_id: str, action: str, eta_s: float, decision_s: float) -> None:
        self.at = at
        self.request_id = request_id
        self.model = model
        self.worker_id = worker_id
        self.action = action
        self.eta_s = eta_s  # the estimated time to first token
        self.decision_s = decision_s  # wall seconds the placement took; 0 where nothing measures it


class RequestRefused(Event):
    """The coordinator answered a request with a ScheduleError."""

    FIELDS = ("at", "request_id", "model", "code")
    __slots__ = FIELDS

    def __init__(self, at: float, request_id: str, model: str, code: str) -> None:
        self.at = at
        self.request_id = request_id
        self.model = model
        self.code = code


class WorkerStateChanged(Event):
    """The state of a worker changed in the coordinator's table."""

    FIELDS = ("at", "worker_id", "incarnation", "old", "new", "reason")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, incarnation: int, old: str, new: str, reason: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.incarnation = incarnation
        self.old = old  # "": the worker was not in the table
        self.new = new
        self.reason = reason


class WorkerDisplaced(Event):
    """Two lives report under one name: the reports of the older life are refused while the newer one lives. Told once for each older life."""

    FIELDS = ("at", "worker_id", "incarnation", "address")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, incarnation: int, address: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.incarnation = incarnation  # of the life that is refused
        self.address = address


class RivalSeen(Event):
    """Two lives of the coordinator acknowledge reports in turn, so two coordinators run. Told by a worker that hears both and by each coordinator."""

    FIELDS = ("at", "node_id")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str) -> None:
        self.at = at
        self.node_id = node_id


class RivalGone(Event):
    """No worker has reported a second coordinator for some time."""

    FIELDS = ("at", "node_id")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str) -> None:
        self.at = at
        self.node_id = node_id


class DisplacedByNamesake(Event):
    """A worker was told that a newer life has the same name."""

    FIELDS = ("at", "worker_id")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str) -> None:
        self.at = at
        self.worker_id = worker_id


class TableFull(Event):
    """A new worker was refused, because the coordinator's table has its largest number of rows. Told at most once a minute."""

    FIELDS = ("at", "node_id", "limit")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str, limit: int) -> None:
        self.at = at
        self.node_id = node_id
        self.limit = limit  # rows


class HardwareUnknown(Event):
    """A worker reports hardware that the coordinator's catalogue does not have, so nothing can be placed on that worker. Told once for each hardware."""

    FIELDS = ("at", "worker_id", "hardware")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, hardware: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.hardware = hardware


class CoordinatorReady(Event):
    """The coordinator has listened for reports long enough after its start, and answers from now on."""

    FIELDS = ("at", "workers")
    __slots__ = FIELDS

    def __init__(self, at: float, workers: int) -> None:
        self.at = at
        self.workers = workers


class ExpiryHeld(Event):
    """Too much of the fleet fell silent at once, or the coordinator's own loop stalled: no worker is declared DEAD until ExpiryResumed."""

    FIELDS = ("at", "silent", "known", "reason")
    __slots__ = FIELDS

    def __init__(self, at: float, silent: int, known: int, reason: str) -> None:
        self.at = at
        self.silent = silent  # workers
        self.known = known  # workers that ought to report
        self.reason = reason


class ExpiryResumed(Event):
    """The hold is over: silent workers are declared DEAD again."""

    FIELDS = ("at",)
    __slots__ = FIELDS

    def __init__(self, at: float) -> None:
        self.at = at


# --- worker ---------------------------------------------------------------------------------------------------------------------------


class RequestAdmitted(Event):
    """A worker took a request."""

    FIELDS = ("at", "worker_id", "request_id", "model")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, request_id: str, model: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.request_id = request_id
        self.model = model


class RequestCancelled(Event):
    """A worker gave up a request, because the client of that request does not wait any more."""

    FIELDS = ("at", "worker_id", "request_id", "model")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, request_id: str, model: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.request_id = request_id
        self.model = model


class RequestServed(Event):
    """A worker produced the last token of a request. Its times run from the arrival at the worker, as in the InferenceResponse."""

    FIELDS = ("at", "worker_id", "request_id", "model", "output_tokens", "queue_wait_s", "first_token_s", "total_s")
    __slots__ = FIELDS

    def __init__(
        self, at: float, worker_id: str, request_id: str, model: str, output_tokens: int, queue_wait_s: float, first_token_s: float, total_s: float,
    ) -> None:  # fmt: skip
        self.at = at
        self.worker_id = worker_id
        self.request_id = request_id
        self.model = model
        self.output_tokens = output_tokens
        self.queue_wait_s = queue_wait_s  # to the start of the prefill
        self.first_token_s = first_token_s  # to the first token
        self.total_s = total_s  # to the last token


class ModelLoadStarted(Event):
    """A worker began to load a model."""

    FIELDS = ("at", "worker_id", "model")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, model: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.model = model


class ModelLoaded(Event):
    """A worker has a model on its GPU."""

    FIELDS = ("at", "worker_id", "model", "tier_from", "load_s")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, model: str, tier_from: str, load_s: float) -> None:
        self.at = at
        self.worker_id = worker_id
        self.model = model
        self.tier_from = tier_from
        self.load_s = load_s


class ModelEvicted(Event):
    """A model left the GPU of a worker."""

    FIELDS = ("at", "worker_id", "model")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str, model: str) -> None:
        self.at = at
        self.worker_id = worker_id
        self.model = model


class WorkerDrained(Event):
    """A worker has nothing left to run and has sent its last report."""

    FIELDS = ("at", "worker_id")
    __slots__ = FIELDS

    def __init__(self, at: float, worker_id: str) -> None:
        self.at = at
        self.worker_id = worker_id


class CoordinatorSilent(Event):
    """The coordinator has not answered for `COORDINATOR_SILENT`: its name is to be looked up again, and a new socket to be opened."""

    FIELDS = ("at", "node_id", "silent_s")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str, silent_s: float) -> None:
        self.at = at
        self.node_id = node_id
        self.silent_s = silent_s  # since the last answer, or since a silence was told before


class CoordinatorOverdue(Event):
    """An answer that the coordinator owes has not come: its name is to be looked up again, and a new socket to be opened. Told at growing intervals."""

    FIELDS = ("at", "node_id", "silent_s")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str, silent_s: float) -> None:
        self.at = at
        self.node_id = node_id
        self.silent_s = silent_s  # since the last answer, or since a silence was told before


class CoordinatorChanged(Event):
    """Another life of the coordinator answered a worker."""

    FIELDS = ("at", "node_id", "epoch")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str, epoch: int) -> None:
        self.at = at
        self.node_id = node_id
        self.epoch = epoch  # the incarnation of that life


# --- the live driver ------------------------------------------------------------------------------------------------------------------


class InternalErrorCaught(Event):
    """A live process raised an exception while it handled one datagram, timer or question. Every exception is counted; the first of each place is told."""

    FIELDS = ("at", "node_id", "place", "what", "problem", "trace")
    __slots__ = FIELDS

    def __init__(self, at: float, node_id: str, place: str, what: str, problem: str, trace: str) -> None:
        self.at = at
        self.node_id = node_id
        self.place = place  # file and line that raised the exception
        self.what = what  # the work that was dropped with the exception
        self.problem = problem  # the exception
        self.trace = trace  # the stack, several lines
