"""How the cost of a virtual run grows: ten times the requests, ten times the workers, and a large run's memory.

Baseline: a run of 100 workers and 10,000 requests, or fewer with a shorter `--duration`. Each run is a process of its own, so that its peak memory is its
own. Ten times the requests come over ten times the time; ten times the workers once for the same requests, and once for ten times as many. The cost
of a request grows with the fleet only because the data of a large fleet do not fit the processor's caches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, show, status

ROOT = Path(__file__).resolve().parent.parent
MEASURED = """
import resource, sys
import centralized_simulation
status = centralized_simulation.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""


def run(workers: int, rate: float, duration_s: float) -> tuple[float, int, float]:
    """(wall seconds, requests, peak MB) of one run in a process of its own."""
    command = f"--virtual --quiet --json - --workers {workers} --rate {rate:g} --duration {duration_s:g}".split()
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    assert not results["invariants"]["violations"], results["invariants"]["violations"]
    wall_s, requests, mb = results["wall"]["wall_s"], results["requests"]["completed"], int(done.stderr.split()[-1]) / 1024
    print(f"  {workers:>6,} workers, {requests:>9,} requests: {wall_s:8.2f} s, {requests / wall_s:8,.0f} a second, {mb:6,.0f} MB", flush=True)
    return wall_s, requests, mb


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--duration", type=float, default=100.0, help="seconds of the shortest run")
    parser.add_argument("--large", action="store_true", help="1,000,000 requests over 10,000 workers besides: minutes")
    options = parser.parse_args()
    duration_s = options.duration
    base_s, base, _ = run(100, 100, duration_s)
    more_s, more, _ = run(100, 100, 10 * duration_s)
    idle_s, _, _ = run(1000, 100, duration_s)
    wide_s, wide, _ = run(1000, 1000, duration_s)
    show("ten times the requests: cost / before", more_s / base_s * (10 * base / more), RATIO, 11.0)
    show("ten times the workers: cost / before", idle_s / base_s, RATIO, 11.0)
    show("ten times both: cost for each request / before", wide_s / wide / (base_s / base), RATIO, 2.0)
    if options.large:
        large_s, _, large_mb = run(10_000, 10_000, 100)
        show("1,000,000 requests over 10,000 workers", large_s / 60, "minutes", 5.0)
        show("its peak memory", large_mb, "MB", 2000.0)
    return status()


if __name__ == "__main__":
    sys.exit(main())
