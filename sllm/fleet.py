"""The coordinator's table of workers, with the indexes that placement reads.

A report updates its row and only those indexes whose content changed; no operation looks at every worker. An index holds READY workers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from random import Random

from sllm.catalog import Hardware
from sllm.dispatch import Entry, Ledger
from sllm.messages import DRAINING, READY, STARTING, STOPPED, Address, Dispatch, LoadReport
from sllm.node import new_tuple
from sllm.timers import NEVER

SUSPECT = "SUSPECT"
DEAD = "DEAD"
LEFT = "LEFT"  # it said that it stopped: nobody is missing
GONE = (DEAD, LEFT)  # listed for a while, and no part of the fleet any more
NEW = ""
DEPTH_MAX = 20_000  # workers with more requests than this are all alike: one report with a huge number in it must not cost as many buckets
STATES = (STARTING, READY, DRAINING, SUSPECT, DEAD, LEFT)

# What can happen to a member: a report with a state in it, too many missed reports, or the timeout.
SILENT = "silent"
EXPIRED = "expired"
TRANSITIONS: dict[tuple[str, str], str] = {
    **{(old, reported): reported for old in (NEW, *STATES) for reported in (STARTING, READY, DRAINING)},
    **{(old, STOPPED): LEFT for old in (NEW, *STATES)},
    **{(old, SILENT): SUSPECT for old in (STARTING, READY, DRAINING)},
    (SUSPECT, EXPIRED): DEAD,
}


class Bag:
    """A set of workers with O(1) add, remove and uniform sampling; its order depends only on what was done to it."""

    __slots__ = ("_place", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._place: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, row: Row) -> bool:
        return row.worker_id in self._place

    def add(self, row: Row) -> None:
        if row.worker_id not in self._place:
            self._place[row.worker_id] = len(self.rows)
            self.rows.append(row)

    def remove(self, row: Row) -> None:
        place = self._place.pop(row.worker_id, None)
        if place is None:
            return
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
            self._place[last.worker_id] = place

    def sample(self, count: int, rng: Random) -> list[Row]:
        """`count` different workers in random order; all of them, in random order, when there are no more."""
        rows = self.rows
        size = len(rows)
        if size <= 1:
            return rows[:]
        if count == 1:
            return [rows[int(rng.random() * size)]]
        if size <= count:
            picked = rows[:]
            rng.shuffle(picked)
            return picked
        random = rng.random
        chosen = {int(random() * size): None for _ in range(count)}
        while len(chosen) < count:
            chosen[int(random() * size)] = None
        return [rows[place] for place in chosen]


class Row:
    """One worker as the coordinator knows it. Times are absolute seconds of the coordinator's clock."""

    __slots__ = (
        "address", "depth", "due", "hardware", "heard_at", "hosted", "incarnation", "ledger", "lost", "report", "sequence", "state", "warm", "worker_id",
    )  # fmt: skip

    def __init__(self, worker_id: str, hardware: Hardware, report: LoadReport) -> None:
        self.worker_id = worker_id
        self.hardware = hardware
        self.report = report
        self.address: Address = ("", 0)
        self.state = NEW
        self.incarnation = 0
        self.sequence = 0
        self.heard_at = 0.0
        self.due = NEVER  # when to look whether it is silent: the coordinator's wheel
        self.lost = 0  # reports whose numbers were skipped
        self.ledger = Ledger()
        self.depth = -1  # running + waiting + in flight; the bucket it stands in, -1: none
        self.warm: tuple[str, ...] = ()  # models it is indexed under: on the GPU, loading, or about to load
        self.hosted: tuple[str, ...] = ()  # likewise in host memory

    @property
    def pending(self) -> int:
        """Dispatches in flight to it."""
        return len(self.ledger.entries)

    def waiting(self) -> int:
        """Requests that wait there, and of those on their way the ones that will have to."""
        report, sent = self.report, len(self.ledger.entries)
        if report.waiting:
            return report.waiting + sent
        over = report.running + sent - report.slots
        return over if over > 0 else 0

    def wait_s(self, now: float) -> float:
        """Seconds until a request placed now, for a model on its GPU, would begin: what it said, less the time since, plus what was sent since."""
        reported = self.report.wait_s - (now - self.heard_at)
        return (reported if reported > 0.0 else 0.0) + self.ledger.cost_s

    def load_left_s(self, model: str, now: float) -> float | None:
        """Seconds until `model` is on the GPU: 0.0 if it is, None if nobody is loading it."""
        report = self.report
        if model in report.gpu_models:
            return 0.0
        for name, left_s in report.loading:
            if name == model:
                left_s -= now - self.heard_at
                return left_s if left_s > 0.0 else 0.0
        for entry in self.ledger.entries.values():
            if entry.loads and entry.model == model:
                left_s = entry.cost_s - (now - entry.at)
                return left_s if left_s > 0.0 else 0.0
        return None


class Fleet:
    """Every worker heard of, and the indexes over those that can be given work."""

    __slots__ = (
        "_buckets", "_lowest", "hosted", "ready", "rows", "states", "warm",
    )  # fmt: skip

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.ready = Bag()
        self.warm: dict[str, Bag] = {}  # model -> READY workers that have it on the GPU or soon will
        self.hosted: dict[str, Bag] = {}  # model -> READY workers that have it in host memory
        self._buckets: list[Bag] = [Bag()]  # READY workers by depth
        self._lowest = 0  # no bucket below it holds anybody
        self.states: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    # --- membership -----------------------------------------------------------------------------------------------------------------

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
            self.ready.add(row)
            self.reindex(row)
        elif old == READY:
            self.ready.remove(row)
            self.reindex(row)
        if new in GONE:
            row.ledger.clear()
        return old, new

    def forget(self, row: Row) -> None:
        """Drop a dead worker, or one that left, from the table."""
        self.states[row.state] -= 1
        del self.rows[row.worker_id]

    # --- reports --------------------------------------------------------------------------------------------------------------------

    def apply(self, row: Row, incarnation: int, sequence: int, report: LoadReport, epoch: int, now: float) -> None:
        """Put a newer report into its row; (incarnation, sequence) are the worker's, `epoch` is the coordinator's own life."""
        changed = report is not row.report  # a worker that has nothing new to say says the same object again, and a codec may know it again
        if incarnation != row.incarnation:
            row.incarnation = incarnation
            row.ledger.clear()
            changed = True
        elif sequence != row.sequence + 1:
            row.lost += sequence - row.sequence - 1
        row.sequence = sequence
        row.heard_at = now
        row.report = report
        if row.ledger.entries and report.epoch == epoch:
            changed |= row.ledger.acknowledge(report.dispatch_high, report.dispatch_seen)
        if changed and row.state == READY:
            self.reindex(row)

    # --- dispatches -----------------------------------------------------------------------------------------------------------------

    def dispatch(self, row: Row, entry: Entry, epoch: int) -> Dispatch:
        """Note work sent to a worker."""
        number = row.ledger.add(entry)
        self._move(row, row.depth + 1)
        if entry.loads and entry.model not in row.warm:
            self._index(row, self.warm, row.warm, (*row.warm, entry.model))
            row.warm = (*row.warm, entry.model)
        made: Dispatch = new_tuple(Dispatch, (epoch, number))
        return made

    def release(self, row: Row, number: int) -> bool:
        """Work sent to a worker was given up."""
        released = row.ledger.release(number)
        if released and row.state == READY:
            self.reindex(row)
        return released

    def expire_dispatches(self, row: Row, before: float) -> int:
        """Write off what was sent before `before` and never acknowledged."""
        lost = row.ledger.expire(before)
        if lost and row.state == READY:
            self.reindex(row)
        return lost

    # --- indexes --------------------------------------------------------------------------------------------------------------------

    def reindex(self, row: Row) -> None:
        """Bring the indexes in line with the row's state, report and ledger."""
        warm: tuple[str, ...]
        if row.state != READY:
            warm, depth = (), -1
            hosted: tuple[str, ...] = ()
        else:
            report, entries = row.report, row.ledger.entries
            warm, hosted = report.gpu_models, report.host_models
            depth = report.running + report.waiting + len(entries)
            if report.loading or entries:
                names = dict.fromkeys(warm)
                names.update(dict.fromkeys(name for name, _ in report.loading))
                names.update(dict.fromkeys(entry.model for entry in entries.values() if entry.loads))
                warm = tuple(names)
        if warm != row.warm:
            self._index(row, self.warm, row.warm, warm)
            row.warm = warm
        if hosted != row.hosted:
            self._index(row, self.hosted, row.hosted, hosted)
            row.hosted = hosted
        if depth != row.depth:
            self._move(row, depth)

    @staticmethod
    def _index(row: Row, index: dict[str, Bag], old: tuple[str, ...], new: tuple[str, ...]) -> None:
        for name in old:
            if name not in new:
                bag = index[name]
                bag.remove(row)
                if not bag.rows:
                    del index[name]
        for name in new:
            if name not in old:
                found = index.get(name)
                if found is None:
                    found = index[name] = Bag()
                found.add(row)

    def _move(self, row: Row, depth: int) -> None:
        """Put a worker into the bucket of its depth; -1 takes it out."""
        buckets = self._buckets
        if row.depth >= 0:
            buckets[min(row.depth, DEPTH_MAX)].remove(row)
        row.depth = depth
        if depth >= 0:
            depth = min(depth, DEPTH_MAX)
            while len(buckets) <= depth:
                buckets.append(Bag())
            buckets[depth].add(row)
            if depth < self._lowest:
                self._lowest = depth

    def least_loaded(self) -> Bag:
        """The READY workers with the fewest requests running, waiting or in flight; empty when no worker is READY."""
        buckets, low = self._buckets, self._lowest
        while low < len(buckets) - 1 and not buckets[low].rows:
            low += 1
        self._lowest = low
        return buckets[low]
