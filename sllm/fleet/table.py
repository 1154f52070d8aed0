"""The coordinator's table of workers, with the indexes that placement reads.

A report updates its row and only those indexes whose content changed; no operation looks at every worker. An index holds READY workers only.

A worker is proven once it has acknowledged a dispatch in its present life. One that has not may be anybody with a key: while others are proven it gets few
dispatches at a time, and one at a time while there are others of whom nothing bad is known when a dispatch to it came to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from math import ceil

from sllm.fleet.index import Bag, Levels
from sllm.fleet.ledger import Entry, Ledger
from sllm.models.model import Hardware
from sllm.protocol.fitting import same_models, within
from sllm.protocol.messages import DRAINING, READY, STARTING, STOPPED, Address, Dispatch, LoadReport
from sllm.protocol.timers import NEVER

SUSPECT = "SUSPECT"
DEAD = "DEAD"
LEFT = "LEFT"  # it said that it stopped: nobody is missing
GONE = (DEAD, LEFT)  # listed for a while, and no part of the fleet any more
NEW = ""
STATES = (STARTING, READY, DRAINING, SUSPECT, DEAD, LEFT)

DOUBTFUL, NEWCOMER, PROVEN = 0, 1, 2  # how far a worker is trusted: dispatches came to nothing and none was acknowledged; nothing is known; it works
ALLOWANCES = (1, 4)  # dispatches in flight to a doubtful worker, and to a newcomer, while there are more trusted ones
EXPIRED_MAX = 3  # dispatches in a row that came to nothing with no acknowledgement between them: then a worker is proven no longer
WRITTEN_OFF_MAX = 1000  # dispatches at one report
BAND = 1 << 40  # levels of `Kind.by_queued`, more than any queue: each trust has two bands, for those below their allowance and for the others

REFRESH_S = 1.5  # figures of a row that is looked at are no older: with a report a second they are those of the report, and what was sent since
CLIENTS_MAX = 64  # of one worker that are told when it is lost
NO_CLIENTS: dict[str, tuple[Address, float]] = {}  # of a worker that was given nothing yet; shared, never filled

# What can happen to a member: a report with a state in it, too many missed reports, or the timeout.
SILENT = "silent"
EXPIRED = "expired"
TRANSITIONS: dict[tuple[str, str], str] = {
    **{(old, reported): reported for old in (NEW, *STATES) for reported in (STARTING, READY, DRAINING)},
    **{(old, STOPPED): LEFT for old in (NEW, *STATES)},
    **{(old, SILENT): SUSPECT for old in (STARTING, READY, DRAINING)},
    (SUSPECT, EXPIRED): DEAD,
}


class Kind:
    """The workers of one hardware, and the indexes over those of them that can be given work."""

    __slots__ = ("by_depth", "by_queued", "hardware", "members", "ready", "trusted")

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.members = 0  # rows of the table, whatever their state
        self.ready: Bag[Row] = Bag()
        self.by_depth: Levels[Row] = Levels()  # requests running, waiting or in flight
        self.by_queued: Levels[Row] = Levels()  # those of them that wait for a place; workers not proven come after the others: `Row.level`
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
        self.strangers = 0  # idle models on its GPU that the fleet does not know: they could leave for another one
        self.address: Address = ("", 0)
        self.state = NEW
        self.incarnation = -1  # of no life: every report that can come is of another one
        self.sequence = 0
        self.heard_at = 0.0
        self.as_of = 0.0  # the time for which `depth` and `queued` hold
        self.aged = False  # they were worked out since the last report
        self.left = 1.0  # part of those that ran at the last report that still runs: their ends lie evenly around the mean that the report gives
        self.due = NEVER  # when to look whether it is silent: the coordinator's wheel
        self.lost = 0  # reports whose numbers were skipped
        self.ledger = Ledger()
        self.clients: dict[str, tuple[Address, float]] = NO_CLIENTS  # those sent here: where they are, and when the last request of each was
        self.displaced = 0  # the incarnation of an older life that reports under the same name and was told that it is refused
        self.depth = -1  # running + waiting + in flight, and where the row stands in `Kind.by_depth`; -1: nowhere
        self.queued = -1  # `count_queued`; -1: it is in no index
        self.level = -1  # where the row stands in `Kind.by_queued`; -1: nowhere
        self.proven = False  # it has acknowledged a dispatch in this life
        self.expired = 0  # dispatches that came to nothing since its last acknowledgement
        self.counted_as = -1  # in `Kind.trusted`; -1: nowhere
        self.warm: tuple[str, ...] = ()  # models it is indexed under: on the GPU, loading, or about to load
        self.hosted: tuple[str, ...] = ()  # likewise in host memory

    @property
    def hardware(self) -> Hardware:
        return self.kind.hardware

    @property
    def pending(self) -> int:
        """Dispatches in flight to it."""
        return len(self.ledger.entries)

    def is_stale(self, now: float) -> bool:
        """Its figures should be worked out anew before they are used."""
        return now - self.as_of >= REFRESH_S and self.depth > 0

    def age(self, now: float) -> None:
        """Bring what is known of the worker's work up to `now`; the counts below then hold for that time."""
        self.as_of = now
        self.aged = True
        self.ledger.settle(now)
        left_s = self.engine.left_s
        if left_s > 0.0:
            self.left = max(0.0, 1.0 - (now - self.heard_at) / (2.0 * left_s))

    def count_depth(self) -> int:
        """Requests that run or wait there, and those on their way, as far as they are not over by estimate."""
        return ceil(self.engine.running * self.left) + self._count_waiting() + self.ledger.live

    def _count_waiting(self) -> int:
        """Those that waited at the last report: they begin when the report said, and then run as long as others do."""
        engine = self.engine
        begun_s = self.as_of - self.heard_at - engine.wait_s
        if begun_s <= 0.0 or engine.left_s <= 0.0 or not engine.waiting:
            return engine.waiting
        return ceil(engine.waiting * max(0.0, 1.0 - begun_s / (2.0 * engine.left_s)))

    def count_queued(self) -> int:
        """Requests that wait there for a slot or memory, and of those on their way the ones that will have to.

        A request that waits for the end of a round, or for its model, does not count: it has a slot to go to.
        """
        engine, ledger = self.engine, self.ledger
        if engine.blocked and self.as_of < self.heard_at + engine.wait_s:
            return engine.blocked + ledger.live  # nobody overtakes those who wait
        over = self.count_depth() - engine.slots
        short_bytes = ledger.kv_bytes - self._free_bytes()
        if short_bytes > 0:
            over = max(over, ceil(ledger.live * short_bytes / ledger.kv_bytes))
        return over if over > 0 else 0

    def _free_bytes(self) -> int:
        """KV cache that is free there but for what is on its way: what the report said, and what those gave up that are over by now."""
        free_bytes = self.engine.gpu_free_bytes
        return free_bytes + int(self.engine.kv_bytes * (1.0 - self.left)) if self.left < 1.0 else free_bytes

    @property
    def trust(self) -> int:
        """How far it is trusted."""
        return PROVEN if self.proven else DOUBTFUL if self.expired else NEWCOMER

    @property
    def has_allowance(self) -> bool:
        """It may get another dispatch even while others are trusted more."""
        return self.proven or len(self.ledger.entries) < ALLOWANCES[self.trust]

    def find_level(self) -> int:
        """Its place in `Kind.by_queued`, given `queued`. One whose own limit is met stands nowhere: nobody can be placed there."""
        queued = self.queued
        if queued >= self.report.queue_max:
            return -1
        if self.proven or queued < 0:
            return queued
        return queued + band_of(self.trust, self.has_allowance)

    def fits_now(self, kv_bytes: int) -> bool:
        """So much KV cache is free, as far as the coordinator knows."""
        return kv_bytes <= self._free_bytes() - self.ledger.kv_bytes

    def kv_used(self) -> float:
        """Used part of its KV cache, as far as the coordinator knows."""
        return self.engine.kv_used * self.left

    @property
    def has_idle_model(self) -> bool:
        """A model on its GPU could leave for another one; those that loads on their way will take the room of do not count."""
        idle = len(self.engine.gpu_models) - len(self.engine.busy_models) + self.strangers
        return idle > len(self.ledger.loads or ())

    def wait_s(self, now: float) -> float:
        """Seconds until a request placed now, for a model on its GPU, would begin: after what the worker said, and what was sent since."""
        at = max(self.heard_at + self.engine.wait_s, self.ledger.begins_at)
        return at - now if at > now else 0.0

    def load_queue_s(self, now: float) -> float:
        """Seconds until the load path is free: what it said, less the time since, and the cold starts sent since, one after the other."""
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


def band_of(trust: int, has_allowance: bool) -> int:
    """Where a band of `Kind.by_queued` begins: the most trusted first."""
    return (2 * (PROVEN - trust) + (0 if has_allowance or trust == PROVEN else 1)) * BAND


def note_client(row: Row, client_id: str, addr: Address, now: float) -> None:
    """A client's request was placed on a worker: the client is to be told when the worker is lost. Of very many clients the latest are."""
    clients = row.clients
    if clients is NO_CLIENTS:
        clients = row.clients = {}
    elif client_id in clients:
        del clients[client_id]
    elif len(clients) >= CLIENTS_MAX:
        del clients[next(iter(clients))]
    clients[client_id] = addr, now


class Fleet:
    """Every worker heard of, and the indexes over those that can be given work. `models`: the names that are kept; of others only their worker knows."""

    __slots__ = ("_models", "gone", "hosted", "kinds", "rows", "states", "warm")

    def __init__(self, models: Container[str]) -> None:
        self._models = models
        self.rows: dict[str, Row] = {}
        self.kinds: dict[str, Kind] = {}  # by hardware name: those that a row has
        self.warm: dict[str, Bag[Row]] = {}  # model -> READY workers that have it on the GPU or soon will
        self.hosted: dict[str, Bag[Row]] = {}  # model -> READY workers that have it in host memory
        self.states: Counter[str] = Counter()
        self.gone: dict[str, Row] = {}  # rows that are no part of the fleet any more, in the order in which they went

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    # --- membership -----------------------------------------------------------------------------------------------------------------

    def admit(self, worker_id: str, hardware: Hardware, report: LoadReport, epoch: int = 0) -> Row:
        """A row for a worker never heard of, or forgotten since: then its dispatches are numbered on from those of this `epoch` that it has received."""
        row = self.rows[worker_id] = Row(worker_id, self._kind(hardware), report)
        row.kind.members += 1
        if report.epoch == epoch:
            row.ledger.number_from(report.dispatch_high + 1)
        return row

    def _kind(self, hardware: Hardware) -> Kind:
        kind = self.kinds.get(hardware.name)
        if kind is None:
            kind = self.kinds[hardware.name] = Kind(hardware)
        return kind

    def _leave_kind(self, kind: Kind) -> None:
        kind.members -= 1
        if not kind.members:
            del self.kinds[kind.hardware.name]

    def refit(self, row: Row, hardware: Hardware) -> None:
        """The worker of this name has other hardware now."""
        if row.state == READY:
            self._withdraw(row)
        self._leave_kind(row.kind)
        row.kind = self._kind(hardware)
        row.kind.members += 1
        if row.state == READY:
            self.reindex(row)

    def step(self, row: Row, what: str) -> tuple[str, str] | None:
        """Apply a transition; returns (old, new) when the state changed."""
        old = row.state
        new = TRANSITIONS.get((old, what), old)
        if new == old:
            return None
        row.state = new
        self.states[new] += 1
        if old != NEW:
            self.states[old] -= 1
        if new == READY:
            self.reindex(row)
        elif old == READY:
            self._withdraw(row)
        self.gone.pop(row.worker_id, None)
        if new in GONE:
            row.ledger.clear()
            self.gone[row.worker_id] = row
        return old, new

    def forget(self, row: Row) -> None:
        """Drop a dead worker, or one that left, from the table."""
        self.states[row.state] -= 1
        self._leave_kind(row.kind)
        self.gone.pop(row.worker_id, None)
        del self.rows[row.worker_id]

    # --- reports --------------------------------------------------------------------------------------------------------------------

    def apply(self, row: Row, incarnation: int, sequence: int, report: LoadReport, epoch: int, now: float) -> None:
        """Put a newer report into its row; (incarnation, sequence) are the worker's, `epoch` is the coordinator's own life."""
        before: LoadReport | None = row.report
        changed = report is not before  # a worker that has nothing new to say says the same object again, and a codec may know it again
        if incarnation != row.incarnation:
            before = None
            row.incarnation = incarnation
            row.ledger.renew()
            row.proven, row.expired = False, 0
            changed = True
        elif sequence != row.sequence + 1:
            row.lost += sequence - row.sequence - 1
        row.sequence = sequence
        row.heard_at = row.as_of = now
        row.left = 1.0
        if before is None or (changed and not same_models(report.engine, before.engine)):
            row.report, row.strangers = within(report, self._models)
        elif changed:
            row.report, row.strangers = report, 0
        row.engine = row.report.engine
        if row.ledger.entries and report.epoch == epoch and row.ledger.acknowledge(report.dispatch_high, report.dispatch_missing):
            row.proven, row.expired = True, 0
            changed = True
        if row.ledger.entries:
            row.ledger.rebase(now + report.engine.wait_s)
            changed = True  # some of them may be over by now
        if (changed or row.aged) and row.state == READY:
            row.aged = False
            self.reindex(row)

    # --- dispatches -----------------------------------------------------------------------------------------------------------------

    def dispatch(self, row: Row, entry: Entry, epoch: int) -> Dispatch:
        """Note work sent to a worker."""
        number = row.ledger.add(entry)
        row.age(entry.at)
        self._place(row, row.count_depth(), row.count_queued())
        if entry.load_s > 0.0 and entry.model not in row.warm:
            self._index(row, self.warm, row.warm, (*row.warm, entry.model))
            row.warm = (*row.warm, entry.model)
        return Dispatch(epoch, number)

    def give_up(self, row: Row, number: int) -> bool:
        """A client waits no longer for work that it sent to a worker. True if the worker had not acknowledged that yet."""
        given_up = row.ledger.release(number)
        if given_up:
            self._distrust(row, 1)
        return given_up

    def _distrust(self, row: Row, lost: int) -> None:
        """So many dispatches came to nothing without a word of the worker."""
        row.expired += lost
        row.proven = row.proven and row.expired < EXPIRED_MAX
        if row.state == READY:
            self.reindex(row)

    def expire_dispatches(self, row: Row, before: float) -> int:
        """Write off what was sent before `before` and never acknowledged. Of very much, some: the next report goes on, so that none costs a pause."""
        lost = row.ledger.expire(before, WRITTEN_OFF_MAX)
        if lost:
            self._distrust(row, lost)
        return lost

    # --- indexes --------------------------------------------------------------------------------------------------------------------

    def refresh(self, row: Row, now: float) -> None:
        """What a READY row was said to have at its last report has gone on since: bring its figures up to date."""
        row.age(now)
        self._place(row, row.count_depth(), row.count_queued())

    def reindex(self, row: Row) -> None:
        """Bring the indexes in line with the report and the ledger of a READY row."""
        row.ledger.settle(row.as_of)
        engine, loads = row.engine, row.ledger.loads
        warm, hosted = engine.gpu_models, engine.host_models
        if engine.loading or loads:
            names = dict.fromkeys(warm)
            names.update(dict.fromkeys(name for name, _ in engine.loading))
            if loads:
                names.update(dict.fromkeys(entry.model for entry in loads.values()))
            warm = tuple(names)
        row.kind.ready.add(row)
        if row.trust != row.counted_as:
            self._count(row, row.trust)
        self._index_models(row, warm, hosted)
        self._place(row, row.count_depth(), row.count_queued())

    def _withdraw(self, row: Row) -> None:
        """Take a row out of every index."""
        row.kind.ready.remove(row)
        self._count(row, -1)
        self._index_models(row, (), ())
        self._place(row, -1, -1)

    def _index_models(self, row: Row, warm: tuple[str, ...], hosted: tuple[str, ...]) -> None:
        if warm != row.warm:
            self._index(row, self.warm, row.warm, warm)
            row.warm = warm
        if hosted != row.hosted:
            self._index(row, self.hosted, row.hosted, hosted)
            row.hosted = hosted

    def _index(self, row: Row, index: dict[str, Bag[Row]], old: tuple[str, ...], new: tuple[str, ...]) -> None:
        """Move a row from the bags of its old models to those of its new ones; linear in the number of names."""
        before, after = dict.fromkeys(old), dict.fromkeys(new)
        for name in before:
            if name not in after and (bag := index.get(name)) is not None:
                bag.remove(row)
                if not bag.rows:
                    del index[name]
        for name in after:
            if name not in before:
                found = index.get(name)
                if found is None:
                    found = index[name] = Bag()
                found.add(row)

    def _place(self, row: Row, depth: int, queued: int) -> None:
        """Put a row where its numbers belong; -1 takes it out."""
        if depth != row.depth:
            row.kind.by_depth.move(row, row.depth, depth)
            row.depth = depth
        row.queued = queued
        level = row.find_level()
        if level != row.level:
            row.kind.by_queued.move(row, row.level, level)
            row.level = level

    @staticmethod
    def _count(row: Row, trust: int) -> None:
        """Count a row among those trusted so far; -1: nowhere."""
        trusted = row.kind.trusted
        if row.counted_as >= 0:
            trusted[row.counted_as] -= 1
        if trust >= 0:
            trusted[trust] += 1
        row.counted_as = trust
