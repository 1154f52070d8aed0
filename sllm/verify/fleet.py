"""Checkers of a coordinator's table of workers."""

from __future__ import annotations

from typing import Any

from sllm.protocol.bus import Handler
from sllm.protocol.capabilities import TracksWorkers, capable
from sllm.protocol.events import RequestRouted, WorkerStateChanged
from sllm.protocol.messages import READY
from sllm.protocol.node import Node
from sllm.protocol.replay import FRESH_WITHIN_S
from sllm.verify.base import ROUNDING_S, Checker, Context, Cursor, every_row
from sllm.virtual.host import Host


class LiveDispatch(Checker):
    """The coordinator places requests only on workers that its own table has as READY."""

    name = "live-dispatch"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._states: dict[tuple[Node, str], str] = {}

    def handlers(self) -> dict[type, Handler]:
        return {WorkerStateChanged: self._on_state, RequestRouted: self._on_routed}

    def _on_state(self, node: Node, event: Any) -> None:
        self._states[node, event.worker_id] = event.new

    def _on_routed(self, node: Node, event: Any) -> None:
        state = self._states.get((node, event.worker_id))
        if state != READY:
            self.fail(f"request {event.request_id} was sent to {event.worker_id}, known to be {state or 'nobody'}")
        self.checked += 1

    def on_life(self, what: str, host: Host) -> None:
        if what == "crash" and capable(host.node, TracksWorkers) is not None:
            self._states = {key: state for key, state in self._states.items() if key[0] is not host.node}


class MemberOrder(Checker):
    """A worker's row never goes back to an older (incarnation, sequence). The one exception: a life with a lower incarnation, because its clock was set back,
    may follow a life that has been silent for the timeout. Within a life the count of lost reports does not shrink."""

    name = "member-order"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._seen: dict[tuple[object, str], tuple[tuple[int, int, int], float]] = {}  # (incarnation, sequence, lost), and when that report was heard
        self._cursor = Cursor()

    def handlers(self) -> dict[type, Handler]:
        return {WorkerStateChanged: self._on_state, RequestRouted: self._on_routed}

    def _on_state(self, node: Node, event: Any) -> None:
        if event.old == "":  # the worker is new or was forgotten, so any numbers are allowed
            self._seen.pop((node, event.worker_id), None)
        self._look(node, event.worker_id)

    def _on_routed(self, node: Node, event: Any) -> None:
        self._look(node, event.worker_id)

    def _look(self, node: object, worker_id: str) -> None:
        tracker = capable(node, TracksWorkers)
        row = tracker.fleet.rows.get(worker_id) if tracker is not None else None
        if tracker is None or row is None:
            return
        state = row.incarnation, row.sequence, row.lost
        key = (node, worker_id)
        before, heard_at = self._seen.get(key, (state, row.heard_at))
        if state < before or (state[0] == before[0] and state[2] < before[2]):
            silent_s = row.heard_at - heard_at  # at most: reports may have come since the last inspection
            other_life = state[0] < before[0] or not self.context.is_host(worker_id)  # without a host, a third life may have come between two inspections
            enough_s = self._timeout_s(tracker, worker_id) if other_life else 2.0 * FRESH_WITHIN_S  # same life: a forger had used up its numbers
            if silent_s < enough_s - ROUNDING_S:
                self.fail(f"{worker_id} went from (incarnation, sequence, lost) {before} back to {state}, and had been silent for {silent_s:.3f} s at most")
        self._seen[key] = state, row.heard_at
        self.checked += 1

    def _timeout_s(self, node: TracksWorkers, worker_id: str) -> float:
        """The least silence after which a life of a worker is over. Workers of the world report at the configured interval; the interval of others is unknown.
        """
        config = node.config
        intervals_s = config.suspect_intervals * config.report_interval_s if self.context.is_host(worker_id) else 0.0
        return float(max(config.worker_timeout_s, intervals_s))

    def on_life(self, what: str, host: Host) -> None:
        if what == "crash" and capable(host.node, TracksWorkers) is not None:
            self._seen = {key: state for key, state in self._seen.items() if key[0] is not host.node}

    def inspect(self) -> None:
        for node, row in self._cursor.rows(self.context):
            self._look(node, row.worker_id)

    def finish(self, at_rest: bool) -> None:
        for node, row in every_row(self.context):
            self._look(node, row.worker_id)
            if row.lost < 0:
                self.fail(f"{row.worker_id} lost {row.lost} reports: some were applied twice")


class InFlight(Checker):
    """The dispatches in flight to a worker are never negative, add up, stand in the right index, and are none at rest."""

    name = "in-flight"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._cursor = Cursor()

    def _look(self, row: Any) -> None:
        ledger = row.ledger
        ledger.count_out(row.as_of)
        if not 0 <= ledger.live <= len(ledger.entries):
            self.fail(f"{row.worker_id}: {ledger.live} of {len(ledger.entries)} dispatches in flight are not over")
        most = sum(entry.kv_bytes for entry in ledger.entries.values())
        if not 0 <= ledger.kv_bytes <= most or (ledger.live == len(ledger.entries) and ledger.kv_bytes != most):
            self.fail(f"{row.worker_id}: {ledger.kv_bytes} bytes of KV cache of {ledger.live} live entries, {most} of all {len(ledger.entries)}")
        if (row in row.kind.ready) != (row.state == READY):
            self.fail(f"{row.worker_id} is {row.state} and {'is' if row in row.kind.ready else 'is not'} among those who can be given work")
        if row.state == READY and (row.depth, row.queued) != (row.count_depth(), row.count_queued()):
            self.fail(f"{row.worker_id} stands at depth {row.depth} and {row.queued} queued instead of {row.count_depth()} and {row.count_queued()}")
        if row.level != (row.find_level() if row.state == READY else -1) or row.counted_as != (row.trust if row.state == READY else -1):
            self.fail(f"{row.worker_id} is {row.state}, trusted {row.trust}, counted as {row.counted_as}, and stands at level {row.level}")
        self.checked += 1

    def inspect(self) -> None:
        for _, row in self._cursor.rows(self.context):
            self._look(row)

    def finish(self, at_rest: bool) -> None:
        world, still = self.context.world, self.context.still_nodes()
        for node, row in every_row(self.context):
            self._look(row)
            host = world.hosts.get(row.worker_id) if world else None
            if not at_rest or row.state != READY or host is None or host.stands_still or node in still:
                continue
            if row.ledger.entries:
                self.fail(f"at rest {len(row.ledger.entries)} dispatches are in flight to {row.worker_id}")
            if row.engine.running + row.engine.waiting:
                self.fail(f"at rest {row.worker_id} is said to run {row.engine.running} requests and to have {row.engine.waiting} waiting")
