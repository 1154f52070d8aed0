"""What is said between coordinator, workers and clients.

Every message is an immutable tuple of atoms and tuples, so that it can travel as an object in virtual time and as bytes on a
network with the same meaning. `sllm.wire.frame` knows how it is packed, `sllm.wire.fields` which values a
field may have.

Units: seconds for every `_s`, bytes for every `_bytes`, tokens for every `_tokens`. Ages and waits are relative, so that no message
depends on the clocks of two machines agreeing.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

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

# What a worker says of itself in a report.
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
CANCELLED = "cancelled"  # its client had asked for that
OUTCOMES = (
    COMPLETED, REFUSED_DRAINING, REFUSED_TOO_LARGE, REFUSED_UNKNOWN_MODEL, REFUSED_FULL, REFUSED_MISDIRECTED, REFUSED_INVALID, CANCELLED,
)  # fmt: skip


class Dispatch(NamedTuple):
    """The coordinator's name for one placement: which life of the coordinator, and a number that grows per worker."""

    epoch: int  # the coordinator's incarnation, ns
    number: int  # 1, 2, 3, ... for each worker


class LoadReport(NamedTuple):
    """A worker's state, sent every report interval. Ordered by the envelope's (incarnation, sequence)."""

    state: str
    host: str  # where requests are to be sent; "" means: where this datagram came from
    port: int
    hardware: str  # preset name
    queue_max: int  # requests it lets wait before it refuses
    slots: int  # sequences the engine can run at once
    running: int
    waiting: int  # for a slot, memory, the end of a round or their model
    blocked: int  # of those: for a slot or memory, which only others that finish can give
    wait_s: float  # until a request arriving now, for a model on the GPU, would begin its prefill
    load_queue_s: float  # until the load path is free
    kv_used: float  # 0..1 of the KV cache
    kv_bytes: int  # of it: in use by those that run
    round_s: float  # in which each of those that run gets a token, at today's pace; 0: nothing runs
    left_s: float  # mean over those that run: until the last token, at that pace
    gpu_free_bytes: int  # neither in use nor wanted as KV cache by requests that wait
    gpu_models: tuple[str, ...]
    busy_models: tuple[str, ...]  # of gpu_models: those that cannot be evicted now
    loading: tuple[tuple[str, float], ...]  # (model, seconds left)
    host_models: tuple[str, ...]
    disk_models: tuple[str, ...]
    disk_complete: bool  # every model of the catalogue is on disk, disk_models is empty
    epoch: int  # of the coordinator life the next two fields speak of; 0: none yet
    dispatch_high: int  # highest dispatch number received in that epoch
    dispatch_missing: tuple[int, ...]  # those below it that have not arrived, rising; of very many only the latest
    interval_s: float  # the next report comes after this
    rival: bool = False  # two lives of the coordinator acknowledge its reports by turns
    partial: bool = False  # its lists did not fit a datagram: models that it does not name may be there all the same


class ReportAck(NamedTuple):
    """The coordinator has heard a worker. Sent now and then, so that a worker can tell silence from loss."""

    epoch: int
    sequence: int  # of the newest report applied


class ScheduleRequest(NamedTuple):
    """Where shall this request go?"""

    request_id: str
    model: str
    prompt_tokens: int
    max_tokens: int
    priority: int
    deadline_s: float  # first token wanted within this many seconds from now; 0: no deadline
    exclude: tuple[str, ...]  # worker ids that stayed silent or refused
    attempt: int = 0  # placements that came to nothing so far: another attempt is another question


class ScheduleResponse(NamedTuple):
    """Send it there."""

    request_id: str
    worker_id: str
    host: str
    port: int
    action: str
    eta_s: float  # estimated time to first token
    dispatch: Dispatch
    reason: str


class ScheduleError(NamedTuple):
    """It cannot be placed now."""

    request_id: str
    code: str
    retry_after_s: float  # 0: asking again will not help
    detail: str


class InferenceRequest(NamedTuple):
    """Client to worker. Sent again while unanswered; the worker does the work once per request_id."""

    request_id: str
    model: str
    prompt_tokens: int
    max_tokens: int
    dispatch: Dispatch
    worker_id: str  # whom the coordinator meant: another one at a reused address refuses to guess


class InferenceAccepted(NamedTuple):
    """Worker to client: queued or running. Sent when no first token has said so soon enough, and in answer to a request that comes again."""

    request_id: str
    queue_depth: int


class FirstToken(NamedTuple):
    """Worker to client: the prefill is done."""

    request_id: str
    queue_wait_s: float  # from arrival at the worker to the start of the prefill, model load included


class Progress(NamedTuple):
    """Worker to client, once a report interval while the client is owed tokens: one for all its requests there. Silence means that the worker is gone."""

    interval_s: float  # the next one comes after this, while anything is owed
    requests: int  # of the client, here


class WorkerLost(NamedTuple):
    """Coordinator to the clients whose requests it placed on a worker: that life of it is suspected or dead. To a worker: another life has its name."""

    worker_id: str
    incarnation: int  # of the life that is lost


class CancelRequest(NamedTuple):
    """Client to worker: nobody waits for this request here any more. Answered with an InferenceResponse `cancelled`, whether it was there or not."""

    request_id: str


class InferenceResponse(NamedTuple):
    """Worker to client: the end of a request. Kept by the worker for a while and sent again on a poll."""

    request_id: str
    outcome: str
    output_tokens: int
    queue_wait_s: float
    first_token_s: float  # from arrival at the worker to the first token
    total_s: float  # from arrival at the worker to the last token
    load_s: float  # time of a model load begun for this request; 0: the model was there


class MigrateRequest(NamedTuple):
    """Coordinator to worker: move a running request away (reserved for the migration policy)."""

    request_id: str
    target_worker_id: str
    host: str
    port: int
    dispatch: Dispatch


Message = (
    LoadReport
    | ReportAck
    | ScheduleRequest
    | ScheduleResponse
    | ScheduleError
    | InferenceRequest
    | InferenceAccepted
    | FirstToken
    | InferenceResponse
    | MigrateRequest
    | Progress
    | WorkerLost
    | CancelRequest
)


M = TypeVar("M", bound=Message)


class Envelope(NamedTuple):
    """A message and who says it: the authenticated header that goes with every datagram."""

    sender_id: str
    incarnation: int  # the sender's start time, ns since 1970
    sequence: int  # 1, 2, 3, ... for each type of message this sender sends
    wall_s: float  # the sender's wall clock, seconds since 1970
    message: Message


Enveloped = tuple[str, int, int, float, M]
"""An envelope as a plain tuple: how messages go about inside a process, being made and taken apart in half the time."""
