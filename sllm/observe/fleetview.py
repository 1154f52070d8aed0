"""The fleet for people and programs: an immutable picture of the fleet, taken by the loop in small steps, and pages of that picture.

A walk over 100,000 workers takes the better part of a second, so the loop walks a few hundred workers at a time, and only on request. HTTP threads read the
finished picture without locks.
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

STEP_ROWS = 400  # workers per step of a walk, which take about a millisecond
STEP_NAMES = 10_000  # model names per step of a walk, which take about a millisecond; the names of one worker may exceed this
LIMIT_DEFAULT, LIMIT_MAX = 100, 1000
CELLS_MAX = 10_000  # workers drawn in the page's grid; of a larger fleet every n-th worker is drawn
MODELS_MAX = 200  # models listed, the most loaded ones first
HISTORY_S = 120  # seconds of history kept
SAMPLES_MAX = 1000  # estimates kept for the percentiles of one second
WAIT_FULL_S = 2.0  # a wait at which a worker counts as full: the target for a first token (`sllm.observe.results.TTFT_SLO_S`)


class WorkerView(NamedTuple):
    """One worker, as `/state` lists it."""

    worker_id: str
    state: str
    current: bool  # False: the worker is silent or gone, and the other fields are from its last report, `age_s` ago
    host: str
    port: int
    hardware: str
    incarnation: int
    age_s: float  # since the last report
    running: int
    waiting: int
    pending: int  # requests sent to the worker that no report has confirmed yet
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
    models: tuple[tuple[str, int, int, int], ...]  # (name, workers with the model on the GPU, workers loading it, workers with it in host memory)


GONE = ("DEAD", "LEFT")  # states of workers that are no longer part of the fleet
NOT_CURRENT = ("SUSPECT", *GONE)  # states of workers whose reports are missing


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
    """Read every row, a few rows per step. Each step yields None, the last one the picture. Rows name models of the catalogue only."""
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
    """Takes pictures in the loop, at most one at a time; all requests that come during a walk share its picture."""

    def __init__(self, rows: Callable[[], Iterable[Any]], now: Callable[[], float], later: Callable[[Callable[[], None]], Any]) -> None:
        """later(function) lets the loop call the function in one of its next rounds."""
        self._rows, self._now, self._later = rows, now, later
        self._waiting: list[Callable[[FleetPicture], None]] = []
        self._walk: Iterator[FleetPicture | None] | None = None
        self.latest: FleetPicture | None = None

    def take(self, answer: Callable[[FleetPicture], None], fresh_s: float = 1.0) -> None:
        """Call `answer` with a picture that is at most `fresh_s` old."""
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
    """Counts and estimates of one second."""

    routed: int
    cold: int
    refused: int
    eta_p50_s: float | None
    eta_p95_s: float | None


class History:
    """Counts by second for the page, from events. `tick` ends a second."""

    def __init__(self) -> None:
        self.seconds: deque[Second] = deque(maxlen=HISTORY_S)
        self.routed: Counter[str] = Counter()  # by action, since the start
        self.refused: Counter[str] = Counter()  # by code
        self.by_model: Counter[str] = Counter()  # requests routed, by model; the catalogue bounds the number of models
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
        """One list for each line of the page's plots, the oldest second first."""
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
    """A key for natural order, in which worker-10 comes after worker-9."""
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
    """`limit` workers from `offset` on, filtered by the query (q: part of a name, state, model) and sorted (sort, order). BadQuery for an invalid query."""
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
    # A heap releases the interpreter between its steps, so that the loop's thread runs meanwhile; one long sort would not.
    pick = heapq.nlargest if order == "desc" else heapq.nsmallest
    chosen = pick(offset + limit, rows, key=SORTS[sort])[offset:] if offset < len(rows) else []
    return {"total": len(rows), "offset": offset, "limit": limit, "workers": [view._asdict() for view in chosen]}


def cells_of(picture: FleetPicture) -> dict[str, Any]:
    """The fleet as a grid: for each worker name, state, load, requests, KV cache, wait and seconds since its last report, in natural order of names."""
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
    """How full a worker is, 1 meaning full: the largest of requests / slots, the part of the KV cache in use, and wait / WAIT_FULL_S."""
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
