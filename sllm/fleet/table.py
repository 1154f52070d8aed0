"""The table of workers, with the indexes that placement reads.

A report updates its row and only those indexes whose content changed; no operation looks at every worker. An index holds READY workers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator

from sllm.fleet.index import Bag
from sllm.fleet.ledger import Entry
from sllm.fleet.row import Kind, Row
from sllm.fleet.states import GONE, NEW, TRANSITIONS
from sllm.models.model import Hardware
from sllm.protocol.fitting import same_models, within
from sllm.protocol.messages import READY, Dispatch, LoadReport

EXPIRED_MAX = 3  # dispatches in a row that came to nothing with no acknowledgement between them: then a worker is proven no longer
WRITTEN_OFF_MAX = 1000  # dispatches at one report


class Fleet:
    """Every worker heard of, and the indexes over those that can be given work.

    `models`: the catalogue; names outside it are left out of the rows. `epoch`: the incarnation of the node that dispatches by this table; reports that
    acknowledge dispatches of another epoch acknowledge nothing.
    """

    __slots__ = ("_models", "epoch", "gone", "hosted", "kinds", "rows", "states", "warm")

    def __init__(self, models: Container[str], epoch: int) -> None:
        self._models = models
        self.epoch = epoch
        self.rows: dict[str, Row] = {}
        self.kinds: dict[str, Kind] = {}  # hardware name -> the workers that have it; no kind is empty
        self.warm: dict[str, Bag[Row]] = {}  # model -> READY workers that have it on the GPU or soon will
        self.hosted: dict[str, Bag[Row]] = {}  # model -> READY workers that have it in host memory
        self.states: Counter[str] = Counter()
        self.gone: dict[str, Row] = {}  # workers that are DEAD or LEFT, in the order in which they went

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    # --- membership -----------------------------------------------------------------------------------------------------------------

    def admit(self, worker_id: str, hardware: Hardware, report: LoadReport) -> Row:
        """A row for a worker never heard of, or forgotten since. A forgotten worker's dispatches are numbered on from those that it reports."""
        row = self.rows[worker_id] = Row(worker_id, self._kind(hardware), report)
        row.kind.members += 1
        if report.epoch == self.epoch:
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
        """Apply what happened to a member (`TRANSITIONS`); returns (old, new) when the state changed."""
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

    def apply(self, row: Row, incarnation: int, sequence: int, report: LoadReport, now: float) -> None:
        """Put a newer report into its row; (incarnation, sequence) are those of the report."""
        before: LoadReport | None = row.report
        changed = report is not before  # an unchanged report is the same object: a codec recognises it
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
        if row.ledger.entries and report.epoch == self.epoch and row.ledger.acknowledge(report.dispatch_high, report.dispatch_missing):
            row.proven, row.expired = True, 0
            changed = True
        if row.ledger.entries:
            row.ledger.rebase(now + report.engine.wait_s)
            changed = True  # some dispatches may be over by now
        if (changed or row.aged) and row.state == READY:
            row.aged = False
            self.reindex(row)

    # --- dispatches -----------------------------------------------------------------------------------------------------------------

    def dispatch(self, row: Row, entry: Entry) -> Dispatch:
        """Note work sent to a worker."""
        number = row.ledger.add(entry)
        row.age(entry.at)
        self._place(row, row.count_depth(), row.count_queued())
        if entry.load_s > 0.0 and entry.model not in row.warm:
            self._index(row, self.warm, row.warm, (*row.warm, entry.model))
            row.warm = (*row.warm, entry.model)
        return Dispatch(self.epoch, number)

    def give_up(self, row: Row, number: int) -> bool:
        """A client waits no longer for the answer to dispatch `number`. True if the worker had not acknowledged the dispatch."""
        given_up = row.ledger.release(number)
        if given_up:
            self._distrust(row, 1)
        return given_up

    def _distrust(self, row: Row, lost: int) -> None:
        """`lost` dispatches came to nothing without a word of the worker."""
        row.expired += lost
        row.proven = row.proven and row.expired < EXPIRED_MAX
        if row.state == READY:
            self.reindex(row)

    def expire_dispatches(self, row: Row, before: float) -> int:
        """Write off dispatches sent before `before` and never acknowledged; returns how many. At most `WRITTEN_OFF_MAX` at once, so that no report costs a
        pause: the next report goes on."""
        lost = row.ledger.expire(before, WRITTEN_OFF_MAX)
        if lost:
            self._distrust(row, lost)
        return lost

    # --- indexes --------------------------------------------------------------------------------------------------------------------

    def refresh(self, row: Row, now: float) -> None:
        """The work that a READY worker reported has gone on since: bring `depth` and `queued` up to `now`."""
        row.age(now)
        self._place(row, row.count_depth(), row.count_queued())

    def reindex(self, row: Row) -> None:
        """Bring the indexes in line with the report and the ledger of a READY row."""
        row.ledger.count_out(row.as_of)
        engine, loads = row.engine, row.ledger.loads
        warm, hosted = engine.gpu_models, engine.host_models
        if engine.loading or loads:
            names = dict.fromkeys(warm)
            names.update(dict.fromkeys([name for name, _ in engine.loading]))
            if loads:
                names.update(dict.fromkeys([entry.model for entry in loads.values()]))
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
        """Put a row at these levels of the indexes by load; -1 takes the row out of both."""
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
        """Count a row among those of this trust; -1 takes the row out of the count."""
        trusted = row.kind.trusted
        if row.counted_as >= 0:
            trusted[row.counted_as] -= 1
        if trust >= 0:
            trusted[trust] += 1
        row.counted_as = trust
