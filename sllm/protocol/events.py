"""What a role tells its driver: facts, in the past tense, one each. Metrics, logs, progress and results derive from them.

Facts that come thousands a second (reports applied, datagrams rejected) are counted on the node instead (`Node.counters`), so that hearing
a report does not cost an object.
"""

from __future__ import annotations

from typing import NamedTuple

# --- client -------------------------------------------------------------------------------------------------------------------------


class RequestSent(NamedTuple):
    """A request entered the system."""

    at: float
    request_id: str
    model: str


class FirstTokenReceived(NamedTuple):
    """A client has the first token that this worker made of a request. `ttft_s` is the request's time to first token if this worker completes it."""

    at: float
    request_id: str
    ttft_s: float
    worker_id: str


class RequestCompleted(NamedTuple):
    """Every token arrived. All `_s` as the client saw them, unless said otherwise."""

    at: float
    request_id: str
    model: str
    worker_id: str
    action: str
    arrival_s: float  # clock time at which the client took it
    ttft_s: float
    e2e_s: float
    tpot_s: float  # (e2e - ttft) / (output_tokens - 1); 0 for one token
    queue_wait_s: float  # worker's figure: arrival there to start of prefill
    load_s: float  # worker's figure: model load begun for this request
    prompt_tokens: int
    output_tokens: int
    placements: int  # how many placements it took
    retries: int  # datagrams sent again
    stalled_s: float = 0.0  # from another worker's first token, whose answer was given up, to the first token of the answer that counts


class RequestFailed(NamedTuple):
    """It was given up: tries exhausted or time over."""

    at: float
    request_id: str
    model: str
    arrival_s: float
    reason: str


class RequestRejected(NamedTuple):
    """The control plane refused it for good."""

    at: float
    request_id: str
    model: str
    arrival_s: float
    code: str


class RequestRetried(NamedTuple):
    """A worker stayed silent or refused; the coordinator is asked again."""

    at: float
    request_id: str
    worker_id: str
    reason: str


class DuplicateResponse(NamedTuple):
    """A response to a request that was over already: work done twice."""

    at: float
    request_id: str
    sender_id: str


# --- coordinator --------------------------------------------------------------------------------------------------------------------


class RequestRouted(NamedTuple):
    at: float
    request_id: str
    model: str
    worker_id: str
    action: str
    eta_s: float
    decision_s: float  # wall seconds the placement took; 0 where nothing measures it


class RequestRefused(NamedTuple):
    """A ScheduleError was sent."""

    at: float
    request_id: str
    model: str
    code: str


class WorkerStateChanged(NamedTuple):
    """A member's state moved; `old` is "" when it was first heard of."""

    at: float
    worker_id: str
    incarnation: int
    old: str
    new: str
    reason: str


class WorkerDisplaced(NamedTuple):
    """Two lives report under one name: the older one's reports are refused while the newer one lives. Told once for each of them."""

    at: float
    worker_id: str
    incarnation: int  # of the one that is refused
    address: str


class RivalSeen(NamedTuple):
    """Two lives of the coordinator acknowledge reports by turns, so two of them run: told by a worker that saw it and by a coordinator that was told."""

    at: float
    node_id: str


class RivalGone(NamedTuple):
    """For some time nobody has told of a second coordinator any more."""

    at: float
    node_id: str


class DisplacedByNamesake(NamedTuple):
    """A worker was told that a newer life has its name."""

    at: float
    worker_id: str


class TableFull(NamedTuple):
    """A worker never heard of was refused: the coordinator has as many rows as it may have. Told once a minute."""

    at: float
    node_id: str
    limit: int


class HardwareUnknown(NamedTuple):
    """A worker reports hardware that the coordinator's catalogue does not have, so nothing can be placed on it. Told once for each name."""

    at: float
    worker_id: str
    hardware: str


class CoordinatorReady(NamedTuple):
    """The listening time after a start is over."""

    at: float
    workers: int


class ExpiryHeld(NamedTuple):
    """Too much of the fleet fell silent at once, or our own loop stalled: nobody is declared dead."""

    at: float
    silent: int
    known: int
    reason: str


class ExpiryResumed(NamedTuple):
    at: float


# --- worker -------------------------------------------------------------------------------------------------------------------------


class RequestAdmitted(NamedTuple):
    """A worker took a request."""

    at: float
    worker_id: str
    request_id: str
    model: str


class RequestCancelled(NamedTuple):
    """A worker gave up a request because its client does not wait for it any more."""

    at: float
    worker_id: str
    request_id: str
    model: str


class RequestServed(NamedTuple):
    """A worker produced the last token."""

    at: float
    worker_id: str
    request_id: str
    model: str
    output_tokens: int


class ModelLoadStarted(NamedTuple):
    at: float
    worker_id: str
    model: str


class ModelLoaded(NamedTuple):
    at: float
    worker_id: str
    model: str
    tier_from: str
    load_s: float


class ModelEvicted(NamedTuple):
    at: float
    worker_id: str
    model: str


class WorkerDrained(NamedTuple):
    """Nothing is running any more and the last report has been sent."""

    at: float
    worker_id: str


class CoordinatorSilent(NamedTuple):
    """No answer from the coordinator for `silent_s`: resolve its name again and open a new socket towards it."""

    at: float
    node_id: str
    silent_s: float


class CoordinatorOverdue(NamedTuple):
    """An answer that the coordinator owes has not come: open a new socket towards it, and resolve its name again. Said ever more rarely."""

    at: float
    node_id: str
    silent_s: float


class CoordinatorChanged(NamedTuple):
    """Another life of the coordinator answered."""

    at: float
    node_id: str
    epoch: int


# --- the live driver ----------------------------------------------------------------------------------------------------------------


class InternalErrorCaught(NamedTuple):
    """An exception of our own while a live process handled one datagram, timer or question. It is counted each time and told once for each place."""

    at: float
    node_id: str
    place: str  # file and line that raised it
    what: str  # what was being done, and was dropped with it
    problem: str  # the exception
    trace: str  # its stack, several lines


Event = (
    RequestSent
    | FirstTokenReceived
    | RequestCompleted
    | RequestFailed
    | RequestRejected
    | RequestRetried
    | DuplicateResponse
    | RequestRouted
    | RequestRefused
    | WorkerStateChanged
    | WorkerDisplaced
    | RivalSeen
    | RivalGone
    | DisplacedByNamesake
    | HardwareUnknown
    | TableFull
    | CoordinatorReady
    | ExpiryHeld
    | ExpiryResumed
    | RequestAdmitted
    | RequestCancelled
    | RequestServed
    | ModelLoadStarted
    | ModelLoaded
    | ModelEvicted
    | WorkerDrained
    | CoordinatorSilent
    | CoordinatorOverdue
    | CoordinatorChanged
    | InternalErrorCaught
)
