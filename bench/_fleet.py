"""Shared by the benchmarks: a coordinator with a table full of workers, and the printing of figures."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

from config import Config
from coordinator import Coordinator
from sllm import COMPILED
from sllm.models.catalogue import Catalog
from sllm.placement.registry import make_policy
from sllm.protocol.messages import READY, AnyEnvelope, EngineSnapshot, Envelope, LoadReport, Message, ScheduleRequest

CATALOG_MODELS = 1000
HELD_MODELS = 4  # on each worker's GPU
SOURCE = ("10.0.0.1", 8000)


def make_report(rng: Random, names: tuple[str, ...], sequence: int, held: tuple[str, ...]) -> LoadReport:
    """A report of a worker that is about half busy; `sequence` makes successive reports differ."""
    running = rng.randrange(8)
    return LoadReport(
        READY, "", 0, "h100-80g", 1000,
        EngineSnapshot(
            256, running, 0, 0, 0.01 * running, 0.0, running / 20, running << 30, 0.01, 1.0, (40 + sequence % 7) << 30,
            held, held[:running and 1], (), held, (), True,
        ),
        0, 0, (), 1.0,
    )  # fmt: skip


def make_coordinator(
    workers: int, models: int = CATALOG_MODELS, policy: str = "startup_time", stopwatch: Callable[[], float] | None = None
) -> tuple[Coordinator, list[AnyEnvelope]]:
    """A coordinator at time 1.0 that has heard each worker once, and the last envelope of each."""
    catalog = Catalog.demo(models)
    node = Coordinator(Config(hardware="h100-80g"), catalog, make_policy(policy), Random(1), 1, stopwatch=stopwatch, now=0.0)
    rng = Random(2)
    envelopes = []
    for i in range(workers):
        held = tuple(sorted(rng.sample(catalog.names, min(models, HELD_MODELS))))
        envelope = Envelope(f"worker-{i}", 1, 1, 0.5, make_report(rng, catalog.names, 1, held))
        node.receive(envelope, SOURCE, 0.5)
        envelopes.append(envelope)
    node.handle_timer(1.0)
    drain(node)
    return node, envelopes


def drain(node: Coordinator) -> None:
    """Throw away the node's outbox and events."""
    node.outbox.clear()
    node.events.clear()


def ask(node: Coordinator, number: int, model: str) -> AnyEnvelope:
    """A question of a client, in an envelope."""
    message: Message = ScheduleRequest(f"r{number}", model, 1000, 200, 1, 0.0, ())
    return Envelope("client", 1, number, 1.0, message)


SLACK = float(os.environ.get("BENCH_SLACK", "0"))
"""0: every budget counts. Above: only budgets that are ratios within one run count, and a figure may miss its budget by this factor: for machines on which
other programs run (`make bench-check`)."""

RATIO = "times"
_kept: list[bool] = []


def show(what: str, figure: float, unit: str, budget: float, *, compiled: float | None = None, at_least: bool = False) -> None:
    """One line: what was measured, its budget, and whether it was kept. `compiled`: the budget of compiled modules, where it is another. A figure whose unit
    is RATIO was measured against something else in the same run."""
    if COMPILED and compiled is not None:
        budget = compiled
    counts = not SLACK or unit == RATIO
    if SLACK and counts:
        budget = budget / SLACK if at_least else budget * SLACK
    kept = figure >= budget if at_least else figure <= budget
    if counts:
        _kept.append(kept)
    verdict = "ok" if kept else "OVER" if counts else "over, which does not count"
    print(f"{what:<72} {figure:>12,.2f} {unit:<22} {'at least' if at_least else 'at most'} {budget:>10,.2f}  {verdict}", flush=True)


def status() -> int:
    """The exit status: 1 if a budget that counts was missed. An error if none was shown."""
    assert _kept, "no budget that counts was looked at"
    return 0 if all(_kept) else 1
