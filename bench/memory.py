"""Memory of a coordinator for each tracked worker, and the longest pause of a coordinator that tracks 100,000.

Memory is the growth of the process's resident set, including reports in the state that they have after a network: two reports share only model names.
A pause is one call of Node.receive or Node.handle_timer, in CPU time of this thread, so that other work of the machine is not counted; baseline: the same
measurement of a call that does nothing. Garbage collection is set up as in the entry point.
Usage: python3 bench/memory.py [workers]
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from time import thread_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import SOURCE, drain, make_coordinator, show, status
from sllm.live.garbage import GarbageTamer
from sllm.protocol.messages import Envelope


def resident_bytes() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * 4096


def main() -> int:
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    make_coordinator(100)
    gc.collect()
    before = resident_bytes()
    node, envelopes = make_coordinator(workers)
    envelopes = [Envelope(e.sender_id, 1, 1, 0.5, e.message) for e in envelopes]
    gc.collect()
    spare = resident_bytes()
    ids = [(e.sender_id, e.message) for e in envelopes]
    del envelopes
    gc.collect()
    tamer = GarbageTamer()
    each = (spare - before - workers * 120) / workers  # without the benchmark's own list of envelopes
    show(f"memory for each of {workers:,} workers", each, "bytes", 2048.0)
    # Three report intervals: every worker reports in each, the coordinator's timer runs when it wants to.
    longest_s = {"report": 0.0, "timer": 0.0}
    empty_s = 0.0
    for interval in range(1, 7):
        tamer.tick(0)
        for place, (worker_id, report) in enumerate(ids):
            now = interval + 0.2 + 0.8 * place / workers
            envelope = Envelope(worker_id, 1, interval + 1, now, report)
            due = node.next_deadline()
            began = thread_time()
            if due is not None and due <= now:
                node.handle_timer(now)
                longest_s["timer"] = max(longest_s["timer"], thread_time() - began)
                began = thread_time()
            node.receive(envelope, SOURCE, now)
            longest_s["report"] = max(longest_s["report"], thread_time() - began)
            began = thread_time()
            empty_s = max(empty_s, thread_time() - began)
            drain(node)
    print(f"  the longest pause of doing nothing in the same loop, which is the machine's: {empty_s * 1e3:.2f} ms")
    for what, took_s in longest_s.items():
        show(f"longest pause of a {what} at {workers:,} workers", took_s * 1e3, "ms", 5.0)
    return status()


if __name__ == "__main__":
    sys.exit(main())
