"""One placement in process, with 100 and with 100,000 workers and 1,000 models: the decision by the coordinator's own stopwatch, and the whole way of a
question: heard, decided, entered in the ledger and answered.

CPU time of the thread, so that other work of the machine is not counted. Baseline: the same with 100 workers. The chosen worker reports between two
questions, outside the timing.
Usage: python3 bench/placement.py [workers]
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import thread_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, SOURCE, ask, drain, make_coordinator, show, status
from sllm.protocol.events import RequestRouted
from sllm.protocol.messages import Envelope, LoadReport, ScheduleResponse
from sllm.workload.popularity import Zipf

PLACEMENTS = 20_000


def placements_us(workers: int) -> tuple[list[float], list[float]]:
    """Microseconds of each decision, and of each question from Node.receive to its answer."""
    node, envelopes = make_coordinator(workers, stopwatch=thread_time)
    rng = Random(3)
    popularity = Zipf(node.catalog.names, 1.1)
    gc.collect()
    gc.freeze()
    decided, answered = [], []
    now = 1.0
    for number in range(1, PLACEMENTS + 1):
        question = ask(node, number, popularity.draw(rng))
        began = thread_time()
        node.receive(question, SOURCE, now)
        answered.append((thread_time() - began) * 1e6)
        (routed,) = node.events
        assert isinstance(routed, RequestRouted), routed
        decided.append(routed.decision_s * 1e6)
        answer = node.outbox[0][0].message
        assert isinstance(answer, ScheduleResponse), answer
        place = int(answer.worker_id.rpartition("-")[2])  # the chosen worker reports at once, so that the load stays level
        last = envelopes[place]
        assert isinstance(last.message, LoadReport)
        report = last.message.replace(epoch=node.incarnation, dispatch_high=answer.dispatch.number)
        envelopes[place] = Envelope(last.sender_id, 1, last.sequence + 1, now, report)
        drain(node)
        node.receive(envelopes[place], SOURCE, now)
        drain(node)
    gc.unfreeze()
    return decided, answered


def main() -> int:
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    few, few_answered = placements_us(100)
    many, many_answered = placements_us(workers)
    show(f"decision, {workers:,} workers and 1,000 models, median", median(many), "us", 20.0, compiled=10.0)
    show(f"decision, {workers:,} workers and 1,000 models, p99", quantiles(many, n=100)[98], "us", 100.0)
    show(f"question heard to answer given, {workers:,} workers, median", median(many_answered), "us", 30.0, compiled=15.0)
    show(f"decision, {workers:,} workers / 100 workers, medians", median(many) / median(few), RATIO, 2.0)
    show(f"question to answer, {workers:,} workers / 100 workers, medians", median(many_answered) / median(few_answered), RATIO, 2.0)
    return status()


if __name__ == "__main__":
    sys.exit(main())
