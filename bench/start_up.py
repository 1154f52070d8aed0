"""How long a live fleet of 1,000 workers takes from the command line to the coordinator counting every one READY.

Each start is a process of its own, imports included. Baseline: a fleet of 10.
Usage: python3 bench/start_up.py [workers]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import show, status

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 3
STARTED = """
import io, sys
from sllm.run.live import LiveRun
from sllm.run.command_line import parse
config, options = parse(["--quiet", "--workers", sys.argv[1]], {}, "bench", "")
run = LiveRun(config, options, io.StringIO())
with run.driver:
    run.start_fleet()
    print(run.system.ready, flush=True)
run.close()
"""


def start_s(workers: int) -> float:
    """Seconds from the start of the process to the last worker READY, median."""
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", STARTED, str(workers)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            took.append(time.perf_counter() - began)
        assert process.returncode == 0
        assert ready == str(workers), ready
    return median(took)


def main() -> int:
    workers = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    few_s, many_s = start_s(10), start_s(workers)
    show(f"{workers:,} workers up and reporting", many_s, "s", 5.0)
    print(f"  10 workers: {few_s:.2f} s, of which the coordinator listens for 1 s before it is ready")
    return status()


if __name__ == "__main__":
    sys.exit(main())
