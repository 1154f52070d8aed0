#!/usr/bin/env python3
"""Compares the simulator with theory and writes the outcome into docs/validation.md.

    python3 experiments/validate.py                 all claims, some minutes on two cores
    python3 experiments/validate.py --only mm1 jsq2  some of them, printed and (with --write) written
    python3 experiments/validate.py --quick          short runs of the simpler claims, printed and not written

A claim is a mean over independent seeds with its 95 % confidence interval (Student's t) beside the exact value. One true claim in twenty misses such an
interval, so a claim that misses is run once more with twice as many new seeds, and that second result stands.
Exit status: 0 every exact value is inside, 1 one is not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from experiments import theory
from experiments.claims import Claim, claims
from experiments.harness import ROOT, cores, replace_section, spread
from sllm.observe.report.standard import run_script

DOCUMENT = ROOT / "docs" / "validation.md"
SEEDS = 20
FEW_SEEDS = 10
LONG = ("mm10", "mh1", "two", "stale2", "herd", "stale2n", "stalernd", "ledger", "ledger2", "lru", "below", "above")  # claims that need long runs
SCALE = 1.0  # of the lengths that claims state: about a quarter of an hour of one core
QUICK_SCALE = 0.15
AGAIN_FIRST = 1001  # seeds of second runs
ROUNDING = 1e-9  # relative tolerance, for runs without randomness, whose interval has no width


class Task(NamedTuple):
    key: str
    seed: int
    scale: float


class Verdict(NamedTuple):
    """One row of the table."""

    claim: Claim
    exact: float | None
    mean: float
    half_width: float
    seeds: int
    again: bool  # the second run

    @property
    def inside(self) -> bool:
        """Whether the exact value lies in the interval; True if no exact value is known."""
        return self.exact is None or abs(self.mean - self.exact) <= self.half_width + ROUNDING * abs(self.exact)

    def row(self) -> str:
        exact = "" if self.exact is None else f"{self.exact:.5g}"
        verdict = "" if self.exact is None else "inside" if self.inside else "**OUTSIDE**"
        again = " (second run)" if self.again else ""
        source = f" ({self.claim.source})" if self.claim.source else ""
        figures = f"{exact}{source} | {self.mean:.5g} ± {self.half_width:.2g} | {self.seeds}{again} | {verdict}"
        return f"| `{self.claim.key}` | {self.claim.what} | {figures} |"


def run_task(task: Task) -> float:
    """The figure that one run of a claim measured."""
    return next(claim for claim in claims() if claim.key == task.key).figure(task.seed, task.scale)


def exact_value(key: str) -> float | None:
    claim = next(claim for claim in claims() if claim.key == key)
    return claim.exact() if claim.exact else None


def judge(chosen: Sequence[Claim], seeds: range, scale: float, jobs: int, again: bool = False) -> list[Verdict]:
    """Run every claim with every seed."""
    exact = list(spread(exact_value, [claim.key for claim in chosen], jobs))
    tasks = [Task(claim.key, seed, scale) for claim in chosen for seed in seeds]
    measured: Iterator[float] = spread(run_task, tasks, jobs)  # in the order of the tasks: all seeds of the first claim, then of the next
    verdicts = []
    for claim, value in zip(chosen, exact, strict=True):
        mean, half_width = theory.interval(list(islice(measured, len(seeds))))
        verdicts.append(Verdict(claim, value, mean, half_width, len(seeds), again))
        print(f"{claim.key}: {mean:.5g} ± {half_width:.2g}", file=sys.stderr, flush=True)
    return verdicts


def validate(chosen: Sequence[Claim], scale: float, jobs: int, seeds: int = SEEDS) -> list[Verdict]:
    """The verdicts; a claim that misses at first is run again with twice as many new seeds."""
    verdicts = judge(chosen, range(1, seeds + 1), scale, jobs)
    missed = [verdict.claim for verdict in verdicts if not verdict.inside]
    if missed:
        print(f"outside at first, now with new seeds: {', '.join(claim.key for claim in missed)}", file=sys.stderr, flush=True)
        second = {verdict.claim.key: verdict for verdict in judge(missed, range(AGAIN_FIRST, AGAIN_FIRST + 2 * seeds), scale, jobs, again=True)}
        verdicts = [second.get(verdict.claim.key, verdict) for verdict in verdicts]
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    head = "| claim | what is measured | exact value | simulated mean, 95 % interval | seeds | |\n| --- | --- | --- | --- | --- | --- |"
    return "\n".join([head, *(verdict.row() for verdict in verdicts)])


def commands() -> str:
    """For each claim one run from the command line."""
    return "```\n" + "\n".join(f"{claim.key:9}{claim.command}" for claim in claims()) + "\n```"


def write(verdicts: Sequence[Verdict]) -> None:
    """Put these rows into the page's table, in the order of the claims; rows of other claims stay."""
    rows = {line.split("`")[1]: line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")}
    rows |= {verdict.claim.key: verdict.row() for verdict in verdicts}
    kept = [rows[claim.key] for claim in claims() if claim.key in rows]
    replace_section(DOCUMENT, "table", "\n".join([table([]), *kept]))
    replace_section(DOCUMENT, "commands", commands())


def main(argv: Sequence[str] | None = None) -> int:
    keys = [claim.key for claim in claims()]
    parser = argparse.ArgumentParser(description="Holds the simulator against theory; writes docs/validation.md.")
    parser.add_argument("--only", nargs="+", metavar="CLAIM", choices=keys, help=f"these claims only, printed: {', '.join(keys)}")
    parser.add_argument("--write", action="store_true", help="write the rows of --only too")
    parser.add_argument("--quick", action="store_true", help="short runs of those claims for which they are long enough, printed and not written")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes [all cores]")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    wanted = arguments.only or [key for key in keys if not arguments.quick or key not in LONG]
    chosen = [claim for claim in claims() if claim.key in wanted]
    began = time.monotonic()
    verdicts = validate(chosen, QUICK_SCALE if arguments.quick else SCALE, arguments.jobs, FEW_SEEDS if arguments.quick else SEEDS)
    print(table(verdicts))
    if not arguments.quick and (arguments.write or not arguments.only):
        write(verdicts)
    outside = [verdict.claim.key for verdict in verdicts if not verdict.inside]
    print(f"{len(verdicts)} claims, {len(outside)} outside their interval, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if outside else 0


if __name__ == "__main__":
    run_script(main)
