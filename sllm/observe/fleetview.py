"""The fleet as people and programs look at it: an immutable picture that the loop takes in small steps, and pages of it.

A walk over 100,000 workers takes the better part of a second; the loop takes it a few hundred workers at a time, and only when somebody
looks. What comes of it is read by HTTP threads without locks.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from sllm.live.http import BadQuery
from sllm.protocol import events
from sllm.protocol.bus import Handler

STEP_ROWS = 400  # workers looked at in one go: about a millisecond ...
STEP_NAMES = 10_000  # ... and so many of the models that they name, or those of one more worker: likewise
LIMIT_DEFAULT, LIMIT_MAX = 100, 1000
CELLS_MAX = 10_000  # workers drawn in the page's grid; of more, evenly spaced ones
MODELS_MAX = 200  # models listed, the most loaded ones first
HISTORY_S = 120  # seconds of history kept
SAMPLES_MAX = 1000  # estimates kept of one second, for its percentiles
WAIT_FULL_S = 2.0  # a wait at which a worker counts as full: the goal for a first token (`sllm.observe.results.TTFT_SLO_S`)


class WorkerView(NamedTuple):
    """One worker, as `/state` lists it."""

    worker_id: str
    state: str
    current: bool  # False: it is silent or gone, and what follows is what was last known of it, `age_s` ago
    host: str
    port: int
    hardware: str
    incarnation: int
    age_s: float  # since its last report
    running: int
    waiting: int
    pending: int  # sent to it and not yet confirmed
    slots: int
    kv_used: float
    wait_s: float
    models: tuple[str, ...]  # on the GPU
    loading: tuple[str, ...]


class FleetPicture(NamedTuple):
    """The whole fleet at one moment, or within the second that the walk took."""

    at: float  # clock time
    workers: tuple[WorkerView, ...]
    states: dict[str, int]
    running: int
    waiting: int
    pending: int
    slots: int
    kv_used: float  # mean over the workers that are neither dead nor gone
    models: tuple[tuple[str, int, int, int], ...]  # (name, workers that have it on the GPU, loading it, in host memory)


GONE = ("DEAD", "LEFT")  # states of workers that are no part of the fleet any more
NOT_CURRENT = ("SUSPECT", *GONE)  # states in which nothing has been heard for a while


def view_of(row: Any, now: float) -> WorkerView:
    """The one place that knows what a row of the coordinator's table looks like (`sllm.fleet.table.Row`)."""
    engine = row.engine
    host, port = row.address
    return WorkerView(
        row.worker_id, row.state, row.state not in NOT_CURRENT, host, port, row.report.hardware, row.incarnation, round(max(0.0, now - row.heard_at), 3),
        engine.running, engine.waiting, row.pending, engine.slots, round(engine.kv_used, 4), round(engine.wait_s, 4),
        engine.gpu_models, tuple(name for name, _ in engine.loading),
    )  # fmt: skip


def walk(rows: Iterable[Any], now: float) -> Iterator[FleetPicture | None]:
    """Look at every row, a few for each step; the last thing yielded is the picture, None before that. Rows name models of the catalogue only."""
    views: list[WorkerView] = []
    states: Counter[str] = Counter()
    gpu: Counter[str] = Counter()
    loading: Counter[str] = Counter()
    host: Counter[str] = Counter()
    running = waiting = pending = slots = 0
    kv_used = 0.0
    step_rows = step_names = 0
    for row in list(rows):
        if step_rows >= STEP_ROWS or step_names >= STEP_NAMES:
            yield None
            step_rows = step_names = 0
        step_rows += 1
        view = view_of(row, now)
        views.append(view)
        states[view.state] += 1
        if view.state not in GONE:
            running += view.running
            waiting += view.waiting
            pending += view.pending
            slots += view.slots
            kv_used += view.kv_used
            gpu.update(view.models)
            loading.update(view.loading)
            host.update(row.engine.host_models)
            step_names += len(view.models) + len(view.loading) + len(row.engine.host_models)
    if views:
        yield None
    alive = max(1, len(views) - sum(states[state] for state in GONE))
    names = gpu.keys() | loading.keys() | host.keys()
    models = heapq.nsmallest(MODELS_MAX, ((name, gpu[name], loading[name], host[name]) for name in names), key=_by_copies)
    yield FleetPicture(now, tuple(views), dict(states), running, waiting, pending, slots, kv_used / alive, tuple(models))


def _by_copies(model: tuple[str, int, int, int]) -> tuple[int, int, int, str]:
    name, gpu, loading, host = model
    return -gpu, -loading, -host, name


class Photographer:
    """Takes pictures in the loop, no more than one a second, shared by all who ask meanwhile."""

    def __init__(self, rows: Callable[[], Iterable[Any]], now: Callable[[], float], later: Callable[[Callable[[], None]], Any]) -> None:
        """`later` has a function called in one of the loop's next rounds."""
        self._rows, self._now, self._later = rows, now, later
        self._waiting: list[Callable[[FleetPicture], None]] = []
        self._walk: Iterator[FleetPicture | None] | None = None
        self.latest: FleetPicture | None = None

    def take(self, answer: Callable[[FleetPicture], None], fresh_s: float = 1.0) -> None:
        """Give `answer` a picture no older than `fresh_s`."""
        if self.latest is not None and self._now() - self.latest.at < fresh_s:
            answer(self.latest)
            return
        self._waiting.append(answer)
        if self._walk is None:
            self._walk = walk(self._rows(), self._now())
            self._step()

    def _step(self) -> None:
        assert self._walk is not None
        picture = next(self._walk)
        if picture is None:
            self._later(self._step)
            return
        self.latest, self._walk = picture, None
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer(picture)


# --- history ------------------------------------------------------------------------------------------------------------------------


class Second(NamedTuple):
    """What one second brought."""

    routed: int
    cold: int
    refused: int
    eta_p50_s: float | None
    eta_p95_s: float | None


class History:
    """Counts by second, from the event stream: what the page draws. `tick` ends a second."""

    def __init__(self) -> None:
        self.seconds: deque[Second] = deque(maxlen=HISTORY_S)
        self.routed: Counter[str] = Counter()  # by action, since the start
        self.refused: Counter[str] = Counter()  # by code
        self.by_model: Counter[str] = Counter()  # requests routed; the catalogue bounds it
        self.handlers: dict[type, Handler] = {events.RequestRouted: self._on_routed, events.RequestRefused: self._on_refused}
        self._new()

    def _new(self) -> None:
        self._routed = self._cold = self._refused = 0
        self._etas: list[float] = []

    def _on_routed(self, node: object, event: events.RequestRouted) -> None:
        self._routed += 1
        self._cold += event.action != "serve"
        self.routed[event.action] += 1
        self.by_model[event.model] += 1
        if len(self._etas) < SAMPLES_MAX:
            self._etas.append(event.eta_s)

    def _on_refused(self, node: object, event: events.RequestRefused) -> None:
        self._refused += 1
        self.refused[event.code] += 1

    def tick(self) -> None:
        etas = sorted(self._etas)
        p50 = etas[len(etas) // 2] if etas else None
        p95 = etas[min(len(etas) - 1, int(len(etas) * 0.95))] if etas else None
        self.seconds.append(Second(self._routed, self._cold, self._refused, p50, p95))
        self._new()

    def as_columns(self) -> dict[str, list[float | None]]:
        """One list a line of the page's plots, oldest first."""
        columns = zip(*self.seconds, strict=True) if self.seconds else [()] * len(Second._fields)
        return {name: list(column) for name, column in zip(Second._fields, columns, strict=True)}


# --- pages of a picture ---------------------------------------------------------------------------------------------------------------

SORTS: dict[str, Callable[[WorkerView], Any]] = {
    "worker_id": lambda view: natural(view.worker_id),
    "state": lambda view: (view.state, natural(view.worker_id)),
    "running": lambda view: view.running,
    "waiting": lambda view: view.waiting,
    "pending": lambda view: view.pending,
    "kv_used": lambda view: view.kv_used,
    "wait_s": lambda view: view.wait_s,
    "age_s": lambda view: view.age_s,
    "models": lambda view: len(view.models),
}


def natural(name: str) -> tuple[str, int, str]:
    """worker-10 after worker-9."""
    head = name.rstrip("0123456789")
    digits = name[len(head) :]
    return (head, int(digits[:18]), name) if digits else (head, -1, name)


def whole(query: Mapping[str, str], name: str, default: int, high: int) -> int:
    """A whole number of the query. BadQuery names it and its value."""
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or len(text) > 12 or int(text) > high:
        raise BadQuery(f"{name}={text[:40]!r}: must be a whole number, at most {high}")
    return int(text)


def page_of(picture: FleetPicture, query: Mapping[str, str]) -> dict[str, Any]:
    """Workers of the picture: filtered (q: part of a name, state, model), sorted (sort, order), and of those `limit` from `offset` on."""
    offset = whole(query, "offset", 0, 10_000_000)
    limit = whole(query, "limit", LIMIT_DEFAULT, LIMIT_MAX)
    sort, order = query.get("sort") or "worker_id", query.get("order") or "asc"
    if sort not in SORTS:
        raise BadQuery(f"sort={sort[:40]!r}: must be one of {', '.join(SORTS)}")
    if order not in ("asc", "desc"):
        raise BadQuery(f"order={order[:40]!r}: must be asc or desc")
    wanted, state, model = query.get("q", "").lower(), query.get("state", ""), query.get("model", "")
    rows: list[WorkerView] | tuple[WorkerView, ...] = picture.workers
    if wanted or state or model:
        rows = [
            view for view in rows
            if wanted in view.worker_id.lower() and (not state or view.state == state) and (not model or model in view.models or model in view.loading)
        ]  # fmt: skip
    # Without holding the interpreter through one long sort: the loop's thread gets its turns in between.
    pick = heapq.nlargest if order == "desc" else heapq.nsmallest
    chosen = pick(offset + limit, rows, key=SORTS[sort])[offset:] if offset < len(rows) else []
    return {"total": len(rows), "offset": offset, "limit": limit, "workers": [view._asdict() for view in chosen]}


def cells_of(picture: FleetPicture) -> dict[str, Any]:
    """The fleet as a grid: for each worker its name, state, load, requests, KV cache, wait and seconds since it was heard, in the order of names."""
    views = sorted(zip(map(natural, map(itemgetter(0), picture.workers)), picture.workers, strict=True), key=itemgetter(0))
    step = -(-len(views) // CELLS_MAX) or 1
    states = sorted(picture.states)
    index = {state: i for i, state in enumerate(states)}
    cells = []
    for _, view in views[::step]:
        requests = view.running + view.waiting + view.pending
        cells.append([view.worker_id, index[view.state], round(load_of(view), 2), requests, view.kv_used, view.wait_s, view.age_s])
    return {"states": states, "step": step, "cells": cells}


def load_of(view: WorkerView) -> float:
    """How full a worker is, 1 being full, by the worst of its measures: requests against slots, the KV cache, and the wait of a request that comes now."""
    requests = view.running + view.waiting + view.pending
    return max(requests / max(1, view.slots), view.kv_used, view.wait_s / WAIT_FULL_S)


def summary_of(picture: FleetPicture) -> dict[str, Any]:
    """The totals of the picture."""
    return {
        "workers": len(picture.workers),
        "states": picture.states,
        "running": picture.running,
        "waiting": picture.waiting,
        "pending": picture.pending,
        "slots": picture.slots,
        "kv_used": round(picture.kv_used, 4),
    }
