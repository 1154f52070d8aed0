"""The messages between coordinator, workers and clients.

A message travels as an object in virtual time and as bytes on a network, with the same meaning. The class of a message declares everything about that
message: its fields and the rule that each field keeps (`sllm.protocol.rules`), its code on the wire, who may send it, and who detects repeats. A new
message is a class here and a handler in each role that hears it; `sllm.wire` packs any class of message.

Units: seconds for every `_s`, bytes for every `_bytes`, tokens for every `_tokens`. Ages and waits are relative, so that no message
depends on the clocks of two machines agreeing.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from sllm.protocol import rules
from sllm.protocol.record import Record
from sllm.protocol.rules import Fields, OneOf, Rule

Address = tuple[str, int]
"""Host name or IP address, and UDP port."""

COORDINATOR_ID = "coordinator"  # of every life of the coordinator

# Actions of a placement.
SERVE = "serve"
COLD_START = "cold_start"
MIGRATE = "migrate"
ACTIONS = (SERVE, COLD_START, MIGRATE)

# Codes of a ScheduleError.
UNKNOWN_MODEL = "UNKNOWN_MODEL"
SATURATED = "SATURATED"
NO_WORKERS = "NO_WORKERS"
DEADLINE_UNMEETABLE = "DEADLINE_UNMEETABLE"
NOT_READY = "NOT_READY"
MODEL_TOO_LARGE = "MODEL_TOO_LARGE"
REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
ERROR_CODES = (UNKNOWN_MODEL, SATURATED, NO_WORKERS, DEADLINE_UNMEETABLE, NOT_READY, MODEL_TOO_LARGE, REQUEST_TOO_LARGE)

# States that a worker reports of itself.
STARTING = "STARTING"
READY = "READY"
DRAINING = "DRAINING"
STOPPED = "STOPPED"
REPORTED_STATES = (STARTING, READY, DRAINING, STOPPED)

# Priorities; under saturation the lowest is shed first.
LOW, NORMAL, HIGH = 0, 1, 2

# Outcomes of an InferenceResponse.
COMPLETED = "completed"
REFUSED_DRAINING = "draining"
REFUSED_TOO_LARGE = "too_large"
REFUSED_UNKNOWN_MODEL = "unknown_model"
REFUSED_FULL = "full"
REFUSED_MISDIRECTED = "misdirected"
REFUSED_INVALID = "invalid"
CANCELLED = "cancelled"  # the client had sent a CancelRequest
OUTCOMES = (
    COMPLETED, REFUSED_DRAINING, REFUSED_TOO_LARGE, REFUSED_UNKNOWN_MODEL, REFUSED_FULL, REFUSED_MISDIRECTED, REFUSED_INVALID, CANCELLED,
)  # fmt: skip


class Message(Record):
    """Base of every message."""

    __slots__ = ()
    CODE: ClassVar[int] = 0  # on the wire; a code is never used again for another message
    RULES: ClassVar[dict[str, Rule]] = {}  # of the fields, in their order
    ORDERED: ClassVar[bool] = False  # the role that hears the message checks its order (`Node.judge_order`), more strictly than the replay window
    REPEATED: ClassVar[bool] = False  # a sender with nothing new to say sends an equal message again
    OF_COORDINATOR: ClassVar[bool] = False  # accepted only from the coordinator that the node asked


class Dispatch(Record):
    """The coordinator's name for one placement: the life of the coordinator, and a number that counts that life's placements on the worker."""

    RULES: ClassVar[dict[str, Rule]] = {"epoch": rules.COUNT, "number": rules.COUNT}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, epoch: int, number: int) -> None:
        self.epoch = epoch  # the coordinator's incarnation, ns
        self.number = number  # 1, 2, 3, ... for each worker


class EngineSnapshot(Record):
    """The state of a worker's engine at one moment."""

    RULES: ClassVar[dict[str, Rule]] = {
        "slots": rules.SLOTS, "running": rules.RUNNING, "waiting": rules.REQUESTS, "blocked": rules.REQUESTS, "wait_s": rules.SECONDS,
        "load_queue_s": rules.SECONDS, "kv_used": rules.PART, "kv_bytes": rules.COUNT, "round_s": rules.SECONDS, "left_s": rules.SECONDS,
        "gpu_free_bytes": rules.COUNT, "gpu_models": rules.NAMES, "busy_models": rules.NAMES, "loading": rules.NAMED_SECONDS, "host_models": rules.NAMES,
        "disk_models": rules.NAMES, "disk_complete": rules.FLAG,
    }  # fmt: skip
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(
        self, slots: int, running: int, waiting: int, blocked: int, wait_s: float, load_queue_s: float, kv_used: float, kv_bytes: int, round_s: float,
        left_s: float, gpu_free_bytes: int, gpu_models: tuple[str, ...], busy_models: tuple[str, ...], loading: tuple[tuple[str, float], ...],
        host_models: tuple[str, ...], disk_models: tuple[str, ...], disk_complete: bool,
    ) -> None:  # fmt: skip
        self.slots = slots
        self.running = running
        self.waiting = waiting  # requests that wait for a slot, for memory, for the end of a round or for their model
        self.blocked = blocked  # waiting requests that wait for a slot or memory, which only requests that finish can free
        self.wait_s = wait_s  # estimate: until a request arriving now, for a model on the GPU, begins its prefill
        self.load_queue_s = load_queue_s  # until the load path is free
        self.kv_used = kv_used  # part, 0..1, of the memory that loaded and loading models leave
        self.kv_bytes = kv_bytes  # KV cache of the running requests
        self.round_s = round_s  # time in which each running request gets one token, at the present pace; 0: nothing runs
        self.left_s = left_s  # mean over the running requests: until the last token, at the present pace
        self.gpu_free_bytes = gpu_free_bytes  # neither in use by weights and KV cache nor wanted as KV cache by waiting requests
        self.gpu_models = gpu_models  # loaded, sorted
        self.busy_models = busy_models  # models of `gpu_models` that cannot be evicted now, sorted
        self.loading = loading  # (model, seconds until it is loaded), in the order of loading
        self.host_models = host_models  # sorted
        self.disk_models = disk_models  # sorted; empty if disk_complete
        self.disk_complete = disk_complete  # every model of the catalogue is on disk


class LoadReport(Message):
    """A worker's state, sent every report interval. Ordered by the envelope's (incarnation, sequence)."""

    CODE = 1
    ORDERED = True
    REPEATED = True
    RULES = {
        "state": OneOf(REPORTED_STATES), "host": rules.HOST_OR_NONE, "port": rules.PORT, "hardware": rules.NAME, "queue_max": rules.REQUESTS,
        "engine": Fields(EngineSnapshot, EngineSnapshot.RULES), "epoch": rules.COUNT, "dispatch_high": rules.COUNT, "dispatch_missing": rules.MISSING,
        "interval_s": rules.INTERVAL, "rival": rules.FLAG, "partial": rules.FLAG,
    }  # fmt: skip
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(
        self, state: str, host: str, port: int, hardware: str, queue_max: int, engine: EngineSnapshot, epoch: int, dispatch_high: int,
        dispatch_missing: tuple[int, ...], interval_s: float, rival: bool = False, partial: bool = False,
    ) -> None:  # fmt: skip
        self.state = state
        self.host = host  # network address to which requests are to be sent; "" means the address that this datagram came from
        self.port = port
        self.hardware = hardware  # preset name
        self.queue_max = queue_max  # requests that may wait at the worker before it refuses
        self.engine = engine
        self.epoch = epoch  # of the coordinator's life whose dispatches the next two fields name; 0: none yet
        self.dispatch_high = dispatch_high  # highest dispatch number received in that epoch
        self.dispatch_missing = dispatch_missing  # numbers below it that have not arrived, rising; at most the latest `MISSING_MAX`
        self.interval_s = interval_s  # until the next report
        self.rival = rival  # two lives of the coordinator acknowledge the worker's reports in turn
        self.partial = partial  # the lists did not fit a datagram: the worker may have models that the report does not name


class ReportAck(Message):
    """Coordinator to worker: a report was heard. Sent for one report in `ACK_EVERY`, so that a worker notices when the coordinator does not hear it."""

    CODE = 2
    OF_COORDINATOR = True
    RULES = {"epoch": rules.COUNT, "sequence": rules.COUNT}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, epoch: int, sequence: int) -> None:
        self.epoch = epoch
        self.sequence = sequence  # of the newest report applied


class ScheduleRequest(Message):
    """Client to coordinator: where shall this request go?"""

    CODE = 3
    RULES = {
        "request_id": rules.NAME, "model": rules.NAME, "prompt_tokens": rules.TOKENS, "max_tokens": rules.TOKENS_LEAST_ONE, "priority": rules.PRIORITY,
        "deadline_s": rules.SECONDS, "exclude": rules.EXCLUDED, "attempt": rules.ATTEMPT,
    }  # fmt: skip
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(
        self, request_id: str, model: str, prompt_tokens: int, max_tokens: int, priority: int, deadline_s: float, exclude: tuple[str, ...], attempt: int = 0,
    ) -> None:  # fmt: skip
        self.request_id = request_id
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.priority = priority
        self.deadline_s = deadline_s  # first token wanted within this many seconds from now; 0: no deadline
        self.exclude = exclude  # ids of workers that stayed silent or refused
        self.attempt = attempt  # placements of this request that failed so far; a new attempt is answered anew


class ScheduleResponse(Message):
    """Coordinator to client: the worker to which the request is to be sent."""

    CODE = 4
    OF_COORDINATOR = True
    RULES = {
        "request_id": rules.NAME, "worker_id": rules.ID, "host": rules.HOST, "port": rules.PORT, "action": OneOf(ACTIONS), "eta_s": rules.SECONDS,
        "dispatch": Fields(Dispatch, Dispatch.RULES), "reason": rules.PROSE,
    }  # fmt: skip
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str, worker_id: str, host: str, port: int, action: str, eta_s: float, dispatch: Dispatch, reason: str) -> None:
        self.request_id = request_id
        self.worker_id = worker_id
        self.host = host
        self.port = port
        self.action = action
        self.eta_s = eta_s  # estimated time to first token
        self.dispatch = dispatch
        self.reason = reason


class ScheduleError(Message):
    """Coordinator to client: the request cannot be placed now."""

    CODE = 5
    OF_COORDINATOR = True
    RULES = {"request_id": rules.NAME, "code": OneOf(ERROR_CODES), "retry_after_s": rules.SECONDS, "detail": rules.PROSE}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str, code: str, retry_after_s: float, detail: str) -> None:
        self.request_id = request_id
        self.code = code
        self.retry_after_s = retry_after_s  # 0: asking again will not help
        self.detail = detail


class InferenceRequest(Message):
    """Client to worker: serve this request. Sent again while unanswered; the worker does the work once per request_id."""

    CODE = 6
    RULES = {
        "request_id": rules.NAME, "model": rules.NAME, "prompt_tokens": rules.TOKENS, "max_tokens": rules.TOKENS_LEAST_ONE,
        "dispatch": Fields(Dispatch, Dispatch.RULES), "worker_id": rules.ID,
    }  # fmt: skip
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str, model: str, prompt_tokens: int, max_tokens: int, dispatch: Dispatch, worker_id: str) -> None:
        self.request_id = request_id
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.dispatch = dispatch
        self.worker_id = worker_id  # the worker that the coordinator chose: another worker at a reused address refuses the request


class InferenceAccepted(Message):
    """Worker to client: the request waits or runs. Sent if no first token came soon, and in answer to a request that is sent again."""

    CODE = 7
    RULES = {"request_id": rules.NAME, "queue_depth": rules.REQUESTS}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str, queue_depth: int) -> None:
        self.request_id = request_id
        self.queue_depth = queue_depth


class FirstToken(Message):
    """Worker to client: the prefill is done."""

    CODE = 8
    RULES = {"request_id": rules.NAME, "queue_wait_s": rules.SECONDS}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str, queue_wait_s: float) -> None:
        self.request_id = request_id
        self.queue_wait_s = queue_wait_s  # from arrival at the worker to the start of the prefill, model load included


class Progress(Message):
    """Worker to client, once a report interval while the client is owed tokens; one message for all its requests. Silence means that the worker is gone."""

    CODE = 11
    RULES = {"interval_s": rules.INTERVAL, "requests": rules.REQUESTS}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, interval_s: float, requests: int) -> None:
        self.interval_s = interval_s  # until the next Progress, while the client is owed tokens
        self.requests = requests  # unfinished requests of the client at this worker


class WorkerLost(Message):
    """Coordinator to the clients whose requests it placed on a worker: this life of the worker is SUSPECT or DEAD. Coordinator to a worker: a newer life
    has the worker's name."""

    CODE = 12
    OF_COORDINATOR = True
    RULES = {"worker_id": rules.ID, "incarnation": rules.COUNT}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, worker_id: str, incarnation: int) -> None:
        self.worker_id = worker_id
        self.incarnation = incarnation  # of the life that is lost


class CancelRequest(Message):
    """Client to worker: nobody waits for this request at this worker any more. Answered with an InferenceResponse `cancelled`, even if the request is
    unknown."""

    CODE = 13
    RULES = {"request_id": rules.NAME}
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


class InferenceResponse(Message):
    """Worker to client: the end of a request. The worker keeps the message for `RESPONSE_KEEP` and sends it again on a poll."""

    CODE = 9
    RULES = {
        "request_id": rules.NAME, "outcome": OneOf(OUTCOMES), "output_tokens": rules.TOKENS, "queue_wait_s": rules.SECONDS, "first_token_s": rules.SECONDS,
        "total_s": rules.SECONDS, "load_s": rules.SECONDS,
    }  # fmt: skip
    FIELDS = tuple(RULES)
    __slots__ = FIELDS

    def __init__(self, request_id: str, outcome: str, output_tokens: int, queue_wait_s: float, first_token_s: float, total_s: float, load_s: float) -> None:
        self.request_id = request_id
        self.outcome = outcome
        self.output_tokens = output_tokens
        self.queue_wait_s = queue_wait_s
        self.first_token_s = first_token_s  # from arrival at the worker to the first token
        self.total_s = total_s  # from arrival at the worker to the last token
        self.load_s = load_s  # time of a model load begun for this request; 0: no load was needed


MESSAGES: tuple[type[Message], ...] = tuple(sorted(Message.__subclasses__(), key=lambda kind: kind.CODE))
"""Every message, in the order of the codes."""

M = TypeVar("M", bound=Message)


class Envelope(Record, Generic[M]):
    """A message and its sender: the authenticated header of every datagram."""

    FIELDS = ("sender_id", "incarnation", "sequence", "wall_s", "message")
    __slots__ = FIELDS

    def __init__(self, sender_id: str, incarnation: int, sequence: int, wall_s: float, message: M) -> None:
        self.sender_id = sender_id
        self.incarnation = incarnation  # the sender's start time, ns since 1970
        self.sequence = sequence  # 1, 2, 3, ... for each type of message this sender sends
        self.wall_s = wall_s  # the sender's wall clock, seconds since 1970
        self.message = message


AnyEnvelope = Envelope[Any]
"""An envelope whose message may be of any type."""
