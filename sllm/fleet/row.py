"""One worker in the table of workers: what it reported, what was sent to it since, and the estimates that follow from both.

A worker is proven once it has acknowledged a dispatch in its present life. A worker that has acknowledged none may be anybody with a key: while others are
proven, it gets few dispatches at a time, and only one at a time once a dispatch to it came to nothing and there are others of whom nothing bad is known.
"""

from __future__ import annotations

from math import ceil

from sllm.fleet.index import Bag, Levels
from sllm.fleet.ledger import Ledger
from sllm.fleet.states import NEW
from sllm.models.model import Hardware
from sllm.protocol.messages import Address, LoadReport
from sllm.protocol.timers import NEVER

# How far a worker is trusted. DOUBTFUL: dispatches came to nothing and none was acknowledged. NEWCOMER: nothing is known. PROVEN: it has acknowledged one.
DOUBTFUL, NEWCOMER, PROVEN = 0, 1, 2
ALLOWANCES = (1, 4)  # dispatches in flight to a doubtful worker, and to a newcomer, while there are more trusted ones
BAND = 1 << 40  # levels of `Kind.by_queued`, more than any queue: each trust has two bands, for workers below their allowance and for the others

REFRESH_S = 1.5  # estimates older than this are made anew before they are used; more than a second, so that a report a second keeps them young enough
CLIENTS_MAX = 64  # clients of one worker that are told when the worker is lost
NO_CLIENTS: dict[str, tuple[Address, float]] = {}  # of a worker that was given nothing yet: one for all such workers, never filled


class Kind:
    """The workers of one hardware, and the indexes over those of them that can be given work."""

    __slots__ = ("by_depth", "by_queued", "hardware", "members", "ready", "trusted")

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.members = 0  # rows of the table, whatever their state
        self.ready: Bag[Row] = Bag()
        self.by_depth: Levels[Row] = Levels()  # requests running, waiting or in flight
        self.by_queued: Levels[Row] = Levels()  # requests that wait for a place; workers not proven come after the others: `Row.level`
        self.trusted = [0, 0, 0]  # READY workers by how far they are trusted


class Row:
    """One worker as the coordinator knows it. Times are absolute seconds of the coordinator's clock."""

    __slots__ = (
        "address", "aged", "as_of", "clients", "counted_as", "depth", "displaced", "due", "engine", "expired", "heard_at", "hosted", "incarnation", "kind",
        "ledger", "left", "level", "lost", "proven", "queued", "report", "sequence", "state", "strangers", "warm", "worker_id",
    )  # fmt: skip

    def __init__(self, worker_id: str, kind: Kind, report: LoadReport) -> None:
        self.worker_id = worker_id
        self.kind = kind
        self.report = report  # with names of the fleet's models only
        self.engine = report.engine
        self.strangers = 0  # idle models on the GPU that the fleet does not know: each could leave for another model
        self.address: Address = ("", 0)
        self.state = NEW
        self.incarnation = -1  # of no life yet: a report is of another life, whatever incarnation it has
        self.sequence = 0
        self.heard_at = 0.0
        self.as_of = 0.0  # the time for which `depth` and `queued` hold
        self.aged = False  # `depth` and `queued` were made anew since the last report
        self.left = 1.0  # part of the requests running at the last report that still runs: their ends lie evenly around the mean that the report gives
        self.due = NEVER  # when the worker's silence is looked at next: a slot of the wheel of `sllm.fleet.membership`
        self.lost = 0  # reports whose numbers were skipped
        self.ledger = Ledger()
        self.clients: dict[str, tuple[Address, float]] = NO_CLIENTS  # clients sent here, by id: the address, and when the last request was placed
        self.displaced = 0  # incarnation of an older life under the same name that was told that its reports are refused
        self.depth = -1  # `count_depth` as of `as_of`, and where the row stands in `Kind.by_depth`; -1: nowhere
        self.queued = -1  # `count_queued` as of `as_of`; -1: the row is in no index
        self.level = -1  # where the row stands in `Kind.by_queued`; -1: nowhere
        self.proven = False  # the worker has acknowledged a dispatch in this life
        self.expired = 0  # dispatches that came to nothing since the last acknowledgement
        self.counted_as = -1  # the trust under which `Kind.trusted` counts the row; -1: under none
        self.warm: tuple[str, ...] = ()  # models under which `Fleet.warm` has the row: on the GPU, loading, or about to load
        self.hosted: tuple[str, ...] = ()  # models under which `Fleet.hosted` has the row: in host memory

    @property
    def hardware(self) -> Hardware:
        return self.kind.hardware

    @property
    def pending(self) -> int:
        """Dispatches in flight to the worker."""
        return len(self.ledger.entries)

    def is_stale(self, now: float) -> bool:
        """`depth` and `queued` should be made anew before they are used."""
        return now - self.as_of >= REFRESH_S and self.depth > 0

    def age(self, now: float) -> None:
        """Bring what is known of the worker's work up to `now`; the counts below then hold for that time."""
        self.as_of = now
        self.aged = True
        self.ledger.count_out(now)
        left_s = self.engine.left_s
        if left_s > 0.0:
            self.left = max(0.0, 1.0 - (now - self.heard_at) / (2.0 * left_s))

    def count_depth(self) -> int:
        """Requests that run or wait at the worker or are on their way there, less those that are over by estimate."""
        return ceil(self.engine.running * self.left) + self._count_waiting() + self.ledger.live

    def _count_waiting(self) -> int:
        """The requests that waited at the last report, less those that are over: they begin when the report said, and run as long as others do."""
        engine = self.engine
        begun_s = self.as_of - self.heard_at - engine.wait_s
        if begun_s <= 0.0 or engine.left_s <= 0.0 or not engine.waiting:
            return engine.waiting
        return ceil(engine.waiting * max(0.0, 1.0 - begun_s / (2.0 * engine.left_s)))

    def count_queued(self) -> int:
        """Requests that wait at the worker for a slot or memory, and those on their way there that will have to wait for one.

        A request that waits for the end of a round, or for its model, does not count: a slot is kept for it.
        """
        engine, ledger = self.engine, self.ledger
        if engine.blocked and self.as_of < self.heard_at + engine.wait_s:
            return engine.blocked + ledger.live  # a request on its way overtakes none that waits
        over = self.count_depth() - engine.slots
        short_bytes = ledger.kv_bytes - self._free_bytes()
        if short_bytes > 0:
            over = max(over, ceil(ledger.live * short_bytes / ledger.kv_bytes))
        return over if over > 0 else 0

    def _free_bytes(self) -> int:
        """Bytes of KV cache that are free at the worker: those of the report, and those of requests that are over since. Requests on their way are not in."""
        free_bytes = self.engine.gpu_free_bytes
        return free_bytes + int(self.engine.kv_bytes * (1.0 - self.left)) if self.left < 1.0 else free_bytes

    @property
    def trust(self) -> int:
        """How far the worker is trusted: DOUBTFUL, NEWCOMER or PROVEN."""
        return PROVEN if self.proven else DOUBTFUL if self.expired else NEWCOMER

    @property
    def has_allowance(self) -> bool:
        """The worker may get another dispatch even while others are trusted more."""
        return self.proven or len(self.ledger.entries) < ALLOWANCES[self.trust]

    def find_level(self) -> int:
        """The row's level in `Kind.by_queued`, given `queued`; -1, nowhere, when the worker's own limit is met and no request can be placed there."""
        queued = self.queued
        if queued >= self.report.queue_max:
            return -1
        if self.proven or queued < 0:
            return queued
        return queued + band_of(self.trust, self.has_allowance)

    def fits_now(self, kv_bytes: int) -> bool:
        """`kv_bytes` of KV cache are free at the worker, by estimate."""
        return kv_bytes <= self._free_bytes() - self.ledger.kv_bytes

    def kv_used(self) -> float:
        """Used part of the worker's KV cache, by estimate."""
        return self.engine.kv_used * self.left

    @property
    def has_idle_model(self) -> bool:
        """A model on the GPU could leave for another one. As many as there are cold starts on their way do not count: those will take their room."""
        idle = len(self.engine.gpu_models) - len(self.engine.busy_models) + self.strangers
        return idle > len(self.ledger.loads or ())

    def wait_s(self, now: float) -> float:
        """Seconds until a request placed now, for a model on the GPU, would begin: after all that the worker reported, and all that was sent since."""
        at = max(self.heard_at + self.engine.wait_s, self.ledger.begins_at)
        return at - now if at > now else 0.0

    def load_queue_s(self, now: float) -> float:
        """Seconds until the load path is free: what the worker reported, less the time since, and the cold starts sent since, one after the other."""
        free_at = self.heard_at + self.engine.load_queue_s
        loads = self.ledger.loads_from(free_at)
        if loads:
            free_at = loads[-1][1]
        return free_at - now if free_at > now else 0.0

    def load_left_s(self, model: str, now: float) -> float | None:
        """Seconds until `model` is on the GPU: 0.0 if it is, None if nobody is loading it."""
        engine = self.engine
        if model in engine.gpu_models:
            return 0.0
        for name, left_s in engine.loading:
            if name == model:
                return max(0.0, self.heard_at + left_s - now)
        if self.ledger.loads:
            for name, end_at in self.ledger.loads_from(self.heard_at + engine.load_queue_s):
                if name == model:
                    return max(0.0, end_at - now)
        return None

    def starts_in_s(self, model: str, now: float) -> float | None:
        """Seconds until a request placed now would begin where `model` is on the GPU or on its way there; None if nobody is loading the model."""
        wait_s = self.wait_s(now)
        if model in self.engine.gpu_models:
            return wait_s
        left_s = self.load_left_s(model, now)
        return left_s if left_s is None or left_s > wait_s else wait_s

    def starts_cold_in_s(self, load_s: float, now: float) -> float:
        """Seconds until a request placed now would begin that must load its model first, which takes `load_s`."""
        return max(self.load_queue_s(now) + load_s, self.wait_s(now))

    def note_client(self, client_id: str, addr: Address, now: float) -> None:
        """A client's request was placed here: the client is to be told when the worker is lost. Of more than `CLIENTS_MAX` clients the latest are told."""
        clients = self.clients
        if not clients:  # `NO_CLIENTS`, which is never filled, or one of the row's own
            clients = self.clients = {}
        elif client_id in clients:
            del clients[client_id]
        elif len(clients) >= CLIENTS_MAX:
            del clients[next(iter(clients))]
        clients[client_id] = addr, now


def band_of(trust: int, has_allowance: bool) -> int:
    """Where a band of `Kind.by_queued` begins: the most trusted first."""
    return (2 * (PROVEN - trust) + (0 if has_allowance or trust == PROVEN else 1)) * BAND
