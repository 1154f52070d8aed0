"""Checkers of requests and of the work that workers do for them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sllm.protocol.bus import Handler
from sllm.protocol.capabilities import CarriesRequests, HasEngine, capable
from sllm.protocol.events import (
    FirstTokenReceived,
    ModelEvicted,
    ModelLoaded,
    ModelLoadStarted,
    RequestAdmitted,
    RequestCancelled,
    RequestCompleted,
    RequestFailed,
    RequestRejected,
    RequestSent,
    RequestServed,
    WorkerDrained,
)
from sllm.protocol.node import Node
from sllm.verify.base import ROUNDING_S, Checker, Context
from sllm.virtual.host import Host


class Conservation(Checker):
    """A request that was sent ends exactly once: completed, failed or rejected; sent = ended + open + abandoned."""

    name = "conservation"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.open: dict[str, Node] = {}
        self.sent = 0
        self.ended = {RequestCompleted: 0, RequestFailed: 0, RequestRejected: 0}
        self.abandoned = 0  # of clients that crashed

    def handlers(self) -> dict[type, Handler]:
        return {
            RequestSent: self._on_sent, RequestCompleted: self._on_completed, RequestFailed: self._on_end, RequestRejected: self._on_end,
            FirstTokenReceived: self._on_first_token,
        }  # fmt: skip

    def _on_sent(self, node: Node, event: Any) -> None:
        request_id = event.request_id
        if request_id in self.open:
            self.fail(f"request {request_id} was sent while it was still open")
        self.open[request_id] = node
        self.sent += 1

    def _on_end(self, node: Node, event: Any) -> None:
        owner = self.open.pop(event.request_id, None)
        if owner is not node:
            self.fail(f"request {event.request_id} ended ({type(event).__name__}) but was not open: it had ended before, or was never sent")
        self.ended[type(event)] += 1
        self.checked += 1

    def _on_completed(self, node: Node, event: Any) -> None:
        if not 0.0 <= event.ttft_s <= event.e2e_s + ROUNDING_S:
            self.fail(f"request {event.request_id}: first token after {event.ttft_s} s, last after {event.e2e_s} s")
        self._on_end(node, event)

    def _on_first_token(self, node: Node, event: Any) -> None:
        if event.request_id not in self.open:
            self.fail(f"a first token for request {event.request_id}, which is not open")

    def on_life(self, what: str, host: Host) -> None:
        if what != "crash":
            return
        gone = [request_id for request_id, node in self.open.items() if node is host.node]
        self.abandoned += len(gone)
        for request_id in gone:
            del self.open[request_id]

    def inspect(self) -> None:
        ended = sum(self.ended.values())
        if self.sent != ended + len(self.open) + self.abandoned:
            self.fail(f"sent {self.sent}, ended {ended}, open {len(self.open)}, abandoned {self.abandoned}")
        carried = Counter(self.open.values())
        for node in self.context.nodes():
            carrier = capable(node, CarriesRequests)
            if carrier is not None and carrier.in_flight != carried[node]:
                self.fail(f"{node.node_id} carries {carrier.in_flight} requests, {carried[node]} of its requests are open")

    def _left(self) -> list[str]:
        """Open requests at clients that are neither down nor frozen."""
        still = self.context.still_nodes()
        return [request_id for request_id, node in self.open.items() if node not in still]

    @property
    def at_rest(self) -> bool:
        return not self._left()

    @property
    def finished(self) -> int:
        return sum(self.ended.values())

    def finish(self, at_rest: bool) -> None:
        self.inspect()
        left = self._left() if at_rest else []
        if left:
            self.fail(f"at rest {len(left)} requests are open, such as {left[0]}")


class WorkOnce(Checker):
    """A life of a worker takes a request only if it does not have that request, serves the requests it took, and has none left at rest."""

    name = "work-once"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.open: dict[Node, set[str]] = {}
        self._emptying: set[Node] = set()  # workers that gave a request up, which runs on to the end of its round

    def handlers(self) -> dict[type, Handler]:
        return {
            RequestAdmitted: self._on_admitted, RequestServed: self._on_served, RequestCancelled: self._on_cancelled, WorkerDrained: self._on_drained,
        }  # fmt: skip

    def _on_admitted(self, node: Node, event: Any) -> None:
        taken = self.open.get(node)
        if taken is None:
            taken = self.open[node] = set()
        request_id = event.request_id
        if request_id in taken:
            self.fail(f"{event.worker_id} took request {request_id} while it was working on it")
        taken.add(request_id)

    def _on_served(self, node: Node, event: Any) -> None:
        taken = self.open.get(node)
        request_id = event.request_id
        if taken is None or request_id not in taken:
            self.fail(f"{event.worker_id} served request {request_id}, which it does not have")
        else:
            taken.remove(request_id)
        self.checked += 1

    def _on_cancelled(self, node: Node, event: Any) -> None:
        taken = self.open.get(node)
        if taken is None or event.request_id not in taken:
            self.fail(f"{event.worker_id} cancelled request {event.request_id}, which it does not have")
        else:
            taken.remove(event.request_id)
            self._emptying.add(node)

    def _on_drained(self, node: Node, event: Any) -> None:
        self.open.pop(node, None)
        self._emptying.discard(node)

    def on_life(self, what: str, host: Host) -> None:
        if what == "crash" and host.node is not None:
            self.open.pop(host.node, None)

    def _left(self) -> list[tuple[Node, set[str]]]:
        """Open work on nodes that are neither down nor frozen."""
        healthy = {host.node for host in self.context.world.hosts.values() if not host.stands_still} if self.context.world else set()
        return [(node, taken) for node, taken in self.open.items() if taken and node in healthy]

    @property
    def at_rest(self) -> bool:
        return not self._left() and not self._is_emptying()

    def _is_emptying(self) -> bool:
        """Whether a request that was given up still runs on a worker."""
        for host in self.context.world.hosts.values() if self.context.world and self._emptying else ():
            server = capable(host.node, HasEngine)
            if server is not None and host.node in self._emptying and not host.stands_still:
                now = host.clock.node_time(self.context.now())
                if server.engine.next_at <= now or server.engine.snapshot(now).running:
                    return True
        self._emptying.clear()
        return False

    @property
    def finished(self) -> int:
        return self.checked

    def finish(self, at_rest: bool) -> None:
        for node, taken in self._left() if at_rest else ():
            self.fail(f"at rest {node.node_id} still has {len(taken)} requests, such as {min(taken)}")


class SingleFlight(Checker):
    """A worker never loads a model that it is loading already or has loaded."""

    name = "single-flight"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._models: dict[Node, dict[str, str]] = {}

    def handlers(self) -> dict[type, Handler]:
        return {ModelLoadStarted: self._on_started, ModelLoaded: self._on_loaded, ModelEvicted: self._on_evicted}

    def _on_started(self, node: Node, event: Any) -> None:
        models = self._models.setdefault(node, {})
        if models.get(event.model, "evicted") != "evicted":
            self.fail(f"{event.worker_id} began to load {event.model}, which is {models[event.model]} there")
        models[event.model] = "loading"
        self.checked += 1

    def _on_loaded(self, node: Node, event: Any) -> None:
        models = self._models.setdefault(node, {})
        if models.get(event.model) != "loading":
            self.fail(f"{event.worker_id} has loaded {event.model}, which it was not loading")
        models[event.model] = "loaded"

    def _on_evicted(self, node: Node, event: Any) -> None:
        models = self._models.setdefault(node, {})
        if models.get(event.model) != "loaded":
            self.fail(f"{event.worker_id} evicted {event.model}, which was not loaded there")
        models[event.model] = "evicted"

    def on_life(self, what: str, host: Host) -> None:
        if what == "crash" and host.node is not None:
            self._models.pop(host.node, None)


class FirstToken(Checker):
    """A request's time to first token is that of the answer that counts: the first token of the worker that completed the request, if the client saw that token
    arrive, even if other workers had sent a first token before."""

    name = "first-token"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._seen: dict[tuple[Node, str], dict[str, float]] = {}  # (client, request) -> worker -> seconds from the arrival to the worker's first token

    def handlers(self) -> dict[type, Handler]:
        return {FirstTokenReceived: self._on_first_token, RequestCompleted: self._on_completed, RequestFailed: self._on_end, RequestRejected: self._on_end}

    def _on_first_token(self, node: Node, event: Any) -> None:
        seen = self._seen.setdefault((node, event.request_id), {})
        if event.worker_id in seen:
            self.fail(f"a second first token of request {event.request_id} from {event.worker_id}")
        seen[event.worker_id] = event.ttft_s

    def _on_completed(self, node: Node, event: Any) -> None:
        seen = self._seen.pop((node, event.request_id), {})
        came_s = seen.get(event.worker_id)
        if came_s is not None and abs(came_s - event.ttft_s) > ROUNDING_S:
            self.fail(f"request {event.request_id}: {event.worker_id}'s first token came after {came_s} s, counted are {event.ttft_s} s")
        begun_s = min(seen.values(), default=event.ttft_s)
        stalled_s = max(0.0, event.ttft_s - begun_s) if event.placements > 1 else 0.0
        if abs(stalled_s - event.stalled_s) > ROUNDING_S:
            self.fail(f"request {event.request_id}: its stream stalled for {stalled_s} s, counted are {event.stalled_s} s")
        self.checked += 1

    def _on_end(self, node: Node, event: Any) -> None:
        self._seen.pop((node, event.request_id), None)

    def on_life(self, what: str, host: Host) -> None:
        if what == "crash":
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] is not host.node}
