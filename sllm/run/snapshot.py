"""Where a run stands, for its progress."""

from __future__ import annotations

from itertools import islice
from typing import Any

from sllm.observe.recorder import Recorder
from sllm.observe.report.progress import Snapshot
from sllm.run.meter import Meter

LOOKED_AT_MAX = 1000  # workers


def take_snapshot(fleet: Any, meter: Meter, recorder: Recorder, duration_s: float | None, warning: str = "") -> Snapshot:
    """The state of the run. `fleet` is the table of workers (`sllm.fleet.table.Fleet`): slots and KV cache are as the workers' reports say, and some workers
    of a large fleet stand for all. `duration_s`: for how long requests come; None: nobody knows."""
    step = len(fleet.rows) // LOOKED_AT_MAX + 1
    engines = [row.engine for row in islice(fleet.rows.values(), 0, None, step)]
    slots = sum(engine.slots for engine in engines)
    return Snapshot(
        meter.now_s, duration_s or 0.0, {name: count for name, count in fleet.states.items() if count}, recorder.glance(),
        sum(engine.running for engine in engines) / slots if slots else None,
        sum(engine.kv_used for engine in engines) / len(engines) if engines else None,
        step * sum(engine.waiting for engine in engines) if engines else None,
        "starting" if not meter.has_begun else "draining" if meter.has_ended else "", warning=warning,
    )  # fmt: skip
