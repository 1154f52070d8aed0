"""The ledger of work sent to a worker and not yet acknowledged by its reports.

A report tells what a worker had when the report was sent; what was dispatched since must be added, once. Each dispatch has a number that grows per worker.
Each report carries the highest number received and the numbers below it that have not arrived, so the ledger knows which entries the report already
includes, however many dispatches lie between two reports. An entry that no report acknowledges in time is written off: its request never arrived.
"""

from __future__ import annotations

from typing import NamedTuple

from sllm.limits import MISSING_MAX


class Entry(NamedTuple):
    """One dispatch in flight."""

    request_id: str
    model: str
    prefill_s: float  # what the request adds to the worker's wait
    load_s: float  # of its own cold start, without the loads before it; 0.0: the model is there or on its way
    kv_bytes: int  # KV cache that the request may need in all
    at: float  # when it was sent


class Ledger:
    """What was sent to one worker since its last word. `prefill_s` and `kv_bytes` are the sums over the entries, never negative."""

    __slots__ = ("entries", "kv_bytes", "loads", "next_number", "prefill_s")

    def __init__(self) -> None:
        self.next_number = 1
        self.entries: dict[int, Entry] = {}  # by number, so in order of time
        self.loads: dict[int, Entry] | None = None  # those entries that start a cold start; None: there are none
        self.prefill_s = 0.0
        self.kv_bytes = 0

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> int:
        """Note a dispatch; returns its number."""
        number = self.next_number
        self.next_number = number + 1
        self.entries[number] = entry
        self.prefill_s += entry.prefill_s
        self.kv_bytes += entry.kv_bytes
        if entry.load_s > 0.0:
            if self.loads is None:
                self.loads = {}
            self.loads[number] = entry
        return number

    def release(self, number: int) -> bool:
        """Take one entry out: acknowledged, refused or given up. False if it was not there."""
        entry = self.entries.pop(number, None)
        if entry is None:
            return False
        if not self.entries:
            self.clear()
            return True
        self.prefill_s = max(0.0, self.prefill_s - entry.prefill_s)
        self.kv_bytes -= entry.kv_bytes
        if self.loads is not None:
            self.loads.pop(number, None)
        return True

    def acknowledge(self, high: int, missing: tuple[int, ...]) -> bool:
        """Release every entry that a report with this highest number has counted in: all up to it but the missing ones. True if any was released. A number
        that was never given out is a lie, and acknowledges nothing."""
        if high >= self.next_number:
            return False
        arrived = []
        for number in self.entries:  # in order: the cost does not grow with what was sent after `high`
            if number > high:
                break
            if number not in missing:
                arrived.append(number)
        for number in arrived:
            self.release(number)
        return bool(arrived)

    def expire(self, before: float, most: int) -> int:
        """Write off the entries sent before `before`, at most `most` of them; returns how many."""
        lost = 0
        while self.entries and lost < most:
            number, entry = next(iter(self.entries.items()))
            if entry.at >= before:
                break
            self.release(number)
            lost += 1
        return lost

    def clear(self) -> None:
        """Forget every entry (the worker's life they were sent to is over); numbers go on growing."""
        self.entries.clear()
        self.loads = None
        self.prefill_s = 0.0
        self.kv_bytes = 0

    def loads_from(self, begin_at: float) -> list[tuple[str, float]]:
        """(model, when its load ends) of each cold start in flight, in order; the load path is taken until `begin_at`. Absolute seconds."""
        ends = []
        for entry in (self.loads or {}).values():
            begin_at = max(begin_at, entry.at) + entry.load_s
            ends.append((entry.model, begin_at))
        return ends


class Receipts:
    """The worker's side: which dispatch numbers of the coordinator's present life have arrived."""

    __slots__ = ("epoch", "high", "missing")

    def __init__(self) -> None:
        self.epoch = 0
        self.high = 0
        self.missing: tuple[int, ...] = ()  # below `high`, rising, at most MISSING_MAX

    def note(self, epoch: int, number: int) -> None:
        """A dispatch arrived. One of an earlier life of the coordinator says nothing to the present one."""
        if epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch, self.high, self.missing = epoch, 0, ()
        if number > self.high:
            if number > self.high + 1:
                gap = range(max(self.high + 1, number - MISSING_MAX), number)
                self.missing = (*self.missing, *gap)[-MISSING_MAX:]
            self.high = number
        elif number in self.missing:
            self.missing = tuple(n for n in self.missing if n != number)
