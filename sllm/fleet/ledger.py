"""The ledger of work sent to a worker and not yet acknowledged by its reports.

A report tells what a worker had when the report was sent; what was dispatched since must be added, once. Each dispatch has a number that grows per worker.
Each report carries the highest number received and the numbers below it that have not arrived, so the ledger knows which entries the report already
includes, however many dispatches lie between two reports. An entry that no report acknowledges in time is written off: its request never arrived.
"""

from __future__ import annotations

from heapq import heappop, heappush

from sllm.protocol.limits import MISSING_MAX, NUMBER_MAX
from sllm.protocol.record import Record

JUMP_MAX = 1 << 32  # dispatches lost in a row; a number further ahead is none that the coordinator has given


class Entry(Record):
    """One dispatch in flight."""

    FIELDS = ("request_id", "model", "prefill_s", "load_s", "kv_bytes", "at", "service_s")
    __slots__ = FIELDS

    def __init__(self, request_id: str, model: str, prefill_s: float, load_s: float, kv_bytes: int, at: float, service_s: float) -> None:
        self.request_id = request_id
        self.model = model
        self.prefill_s = prefill_s  # what the request adds to the worker's wait
        self.load_s = load_s  # of the request's own cold start, without the loads before it; 0.0: the model is there or on its way
        self.kv_bytes = kv_bytes  # most KV cache that the request may need
        self.at = at  # when the dispatch was sent, absolute seconds
        self.service_s = service_s  # estimate of the time from the start of the prefill to the last token


NO_ENTRIES: dict[int, Entry] = {}  # of an empty ledger, as most ledgers are most of the time: one for all of them, never filled


class Ledger:
    """What was sent to one worker since its last word.

    The worker works on between two reports, which may be a minute apart. So entries end by estimate: those that are over hold no slot and no memory any more
    (`live`, `kv_bytes`), and `begins_at`, when a request sent now would begin, is the end of a queue that time takes from.
    """

    __slots__ = ("_ended", "_ends", "_first", "begins_at", "entries", "kv_bytes", "live", "loads", "next_number")

    def __init__(self) -> None:
        self.next_number = 1
        self._first = 1  # entries with lower numbers are acknowledged by no report: they end by time
        self.entries: dict[int, Entry] = NO_ENTRIES  # by number, so in order of time
        self.loads: dict[int, Entry] | None = None  # those entries that start a cold start; None: there are none
        self.live = 0  # entries that are not over yet
        self.kv_bytes = 0  # of the entries that are not over yet
        self.begins_at = 0.0  # when a request sent now would begin, absolute seconds
        self._ends: list[tuple[float, int]] | None = None  # heap of (when an entry is over, number), with those of released entries; None: empty
        self._ended: set[int] | None = None  # numbers of entries that are over and not released; None: empty

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> int:
        """Note a dispatch; returns its number."""
        number = self.next_number
        self.next_number = number + 1
        if not self.entries:  # `NO_ENTRIES`, which is never filled
            self.entries = {}
        self.entries[number] = entry
        self.live += 1
        self.kv_bytes += entry.kv_bytes
        if entry.load_s > 0.0:
            if self.loads is None:
                self.loads = {}
            self.loads[number] = entry
        begins_at = max(self.begins_at, entry.at)
        if self._ends is None:
            self._ends = []
        heappush(self._ends, (begins_at + entry.load_s + entry.service_s, number))
        self.begins_at = begins_at + entry.prefill_s
        return number

    def number_from(self, number: int) -> None:
        """Give this number to the next dispatch, unless the number is too high to go on from."""
        if number <= NUMBER_MAX // 2:
            self.next_number = self._first = number

    def count_out(self, now: float) -> None:
        """Count the entries out that are over by now."""
        ends = self._ends
        while ends and ends[0][0] <= now:
            number = heappop(ends)[1]
            entry = self.entries.get(number)
            if entry is not None:
                if self._ended is None:
                    self._ended = set()
                self._ended.add(number)
                self.live -= 1
                self.kv_bytes -= entry.kv_bytes

    def rebase(self, begins_at: float) -> None:
        """A report says when a request would begin at the worker; the entries that the report has not counted in come before a request sent now."""
        for entry in self.entries.values():
            begins_at = max(begins_at, entry.at) + entry.prefill_s
        self.begins_at = begins_at

    def release(self, number: int) -> bool:
        """Take one entry out: acknowledged, refused or given up. False if it was not there."""
        entry = self.entries.pop(number, None)
        if entry is None:
            return False
        if not self.entries:
            self.clear()
            return True
        if self._ended is not None and number in self._ended:
            self._ended.remove(number)
        else:
            self.live -= 1
            self.kv_bytes -= entry.kv_bytes
        if self.loads is not None:
            self.loads.pop(number, None)
        return True

    def acknowledge(self, high: int, missing: tuple[int, ...]) -> bool:
        """Release every entry that a report with this highest number has counted in: all up to it but the missing ones. True if any was released.

        A number that was never given out acknowledges nothing: somebody else has told the worker that number, or the worker invents it. Numbers go on from
        there, because the worker takes lower ones for old; entries under way can be acknowledged no more.
        """
        if high >= self.next_number:
            self.number_from(high + 1)
            return False
        arrived = []
        for number in self.entries:  # rising: the cost does not grow with the dispatches sent after `high`
            if number > high:
                break
            if number >= self._first and number not in missing:
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

    def renew(self) -> None:
        """The worker has a new life, which takes no first number that is more than `JUMP_MAX`."""
        self.clear()
        if self.next_number > JUMP_MAX:
            self.next_number = self._first = 1

    def clear(self) -> None:
        """Forget every entry, because the life of the worker to which they were sent is over; numbers go on growing."""
        self.entries = NO_ENTRIES
        self.loads = self._ends = self._ended = None
        self.live = self.kv_bytes = 0
        self.begins_at = 0.0

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
        """A dispatch arrived. A dispatch of an earlier life of the coordinator counts for nothing, nor does one that the coordinator cannot have sent."""
        if epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch, self.high, self.missing = epoch, 0, ()
        if number > self.high + JUMP_MAX:
            return
        if number > self.high:
            if number > self.high + 1:
                gap = range(max(self.high + 1, number - MISSING_MAX), number)
                self.missing = (*self.missing, *gap)[-MISSING_MAX:]
            self.high = number
        elif number in self.missing:
            self.missing = tuple(n for n in self.missing if n != number)
