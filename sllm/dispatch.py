"""The ledger of work sent to a worker and not yet acknowledged by its reports.

A report tells what a worker had when it was sent; what was dispatched since must be added, once. Each dispatch has a number that grows per worker;
each report carries the highest number received and a bitmap of the 64 below it, so that the ledger knows exactly which entries the report
already includes. An entry that no report acknowledges in time is written off: its request never arrived.
"""

from __future__ import annotations

from typing import NamedTuple

SEEN_BITS = 64  # width of the bitmap below the highest number
_SEEN_MASK = (1 << SEEN_BITS) - 1


class Entry(NamedTuple):
    """One dispatch in flight."""

    request_id: str
    cost_s: float  # what it adds to the worker's wait
    model: str
    loads: bool  # it starts a cold start there
    at: float


class Ledger:
    """What was sent to one worker since its last word. `cost_s` is the sum over the entries, never negative."""

    __slots__ = ("cost_s", "entries", "next_number")

    def __init__(self) -> None:
        self.next_number = 1
        self.entries: dict[int, Entry] = {}  # by number, so in order of time
        self.cost_s = 0.0

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> int:
        """Note a dispatch; returns its number."""
        number = self.next_number
        self.next_number = number + 1
        self.entries[number] = entry
        self.cost_s += entry.cost_s
        return number

    def release(self, number: int) -> bool:
        """Take one entry out: acknowledged, refused or given up. False if it was not there."""
        entry = self.entries.pop(number, None)
        if entry is None:
            return False
        self.cost_s = self.cost_s - entry.cost_s if self.entries else 0.0
        return True

    def acknowledge(self, high: int, seen: int) -> bool:
        """Release every entry that a report with this highest number and bitmap has counted in. True if any was."""
        arrived = [n for n in self.entries if n == high or (n < high and seen >> (high - 1 - n) & 1)]
        for number in arrived:
            self.release(number)
        return bool(arrived)

    def expire(self, before: float) -> int:
        """Write off the entries sent before `before`; returns how many."""
        lost = 0
        while self.entries:
            number, entry = next(iter(self.entries.items()))
            if entry.at >= before:
                break
            self.release(number)
            lost += 1
        return lost

    def clear(self) -> None:
        """Forget every entry (the worker's life they were sent to is over); numbers go on growing."""
        self.entries.clear()
        self.cost_s = 0.0


class Receipts:
    """The worker's side: which dispatch numbers of the coordinator's present life have arrived."""

    __slots__ = ("epoch", "high", "seen")

    def __init__(self) -> None:
        self.epoch = 0
        self.high = 0
        self.seen = 0

    def note(self, epoch: int, number: int) -> None:
        """A dispatch arrived. One of an earlier life of the coordinator says nothing to the present one."""
        if epoch > self.epoch:
            self.epoch, self.high, self.seen = epoch, number, 0
        elif epoch == self.epoch:
            if number > self.high:
                shift = number - self.high
                self.seen = (self.seen << shift | 1 << (shift - 1)) & _SEEN_MASK if shift <= SEEN_BITS else 0
                self.high = number
            elif number < self.high and self.high - number <= SEEN_BITS:
                self.seen |= 1 << (self.high - 1 - number)
