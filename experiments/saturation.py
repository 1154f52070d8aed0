#!/usr/bin/env python3
"""Finds the saturation of a fleet: the largest rate that the fleet serves without a growing queue.

    python3 experiments/saturation.py --workers 5                    the demonstration fleet
    python3 experiments/saturation.py --hardware a100-80g:4,h100-80g:2 --catalog mine.toml --json -

The fleet and the requests are given by the flags of centralized_simulation.py. A rate is *held* if, over three seeds and 300 s each, at least 99 % of the
requests are completed and the queue of the last third is no longer than that of the middle third. Saturation is the largest rate that is held, within 5 %:
the search goes up or down from the closed formula's guess by steps of a quarter, then halves the gap between the largest rate that is held and the smallest
rate that is not. `--policy` measures another policy than the default one.

The fleet is *warm*: before the 300 s, 60 s of the same requests at the same rate are left out, in which models are loaded where the traffic needs them. Further
loads, where models do not all fit, are part of the measurement. The *queue* is the mean number of requests that have been sent and whose prefill has not
begun, computed from the completed requests (Little's law); a growth by one request and a hundredth of the requests in service counts as chance.

Exit status: 0 done, 2 wrong usage, 3 the output could not be written, 130 after Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from config import Config
from experiments.batch import Bar, Stopped, parse_usual, run_all, run_virtual, watch_signals, whole
from sllm.observe.recorder import Recorder
from sllm.observe.report.files import OutputFile
from sllm.observe.report.standard import BY_SIGNAL, complain, run_command
from sllm.protocol.errors import OutputError, UsageError
from sllm.run.assemble import build_catalog, default_rate
from sllm.run.command_line import Options, Parser

PROGRAM = "saturation.py"
DESCRIPTION = "Finds the largest rate that a fleet serves without a growing queue. The fleet is described by the flags of centralized_simulation.py."
WARM_UP_S = 60.0
MEASURED_S = 300.0
SEEDS = 3
WITHIN = 0.05  # precision, as a part of the rate
STEP = 1.25  # factor from one rate to the next, until one rate is held and another is not
STEPS_MAX = 24  # a factor of 200 in all
COMPLETED_MIN = 0.99
SWEPT = ("--rate", "--trace", "--duration", "--faults", "--html")  # flags that the search sets itself or that make no sense for a search


class Trial(NamedTuple):
    """One run at one rate."""

    config: Config
    options: Options
    warm_up_s: float
    measured_s: float


class Observation(NamedTuple):
    """The figures of one run about the requests that arrived in the measured time; `middle` and `last` are means over those thirds."""

    sent: int
    completed: int
    middle: float  # requests waiting
    last: float
    served: float  # requests in service, in the last third


class Verdict(NamedTuple):
    """A rate, over all seeds."""

    rate_per_s: float
    completed: float  # part of the requests sent
    middle: float
    last: float
    held: bool


def waiting(recorder: Recorder, begin_s: float, end_s: float) -> tuple[float, float]:
    """Mean number of requests that wait for their prefill, and of those past it, between two times of the run's clock, from the completed requests.

    A request waits from its arrival at the client to the begin of its prefill. The client knows when the first token came and how long the request waited at
    the worker; what is before that, placements and refusals, is in the time to first token as well. So the wait is the time to first token but for the
    shortest time between the end of a wait at the worker and the first token that the run has seen, which stands for a prefill."""
    shortest_s = min((ttft - wait for ttft, wait in zip(recorder.ttft_s, recorder.queue_wait_s, strict=True)), default=0.0)
    wait_s = served_s = 0.0
    for done_at, e2e_s, ttft_s in zip(recorder.done_at, recorder.e2e_s, recorder.ttft_s, strict=True):
        sent_at = done_at - e2e_s
        begun_at = sent_at + max(0.0, ttft_s - shortest_s)
        wait_s += max(0.0, min(begun_at, end_s) - max(sent_at, begin_s))
        served_s += max(0.0, min(done_at, end_s) - max(begun_at, begin_s))
    return wait_s / (end_s - begin_s), served_s / (end_s - begin_s)


def observe(trial: Trial) -> Observation:
    """Run a trial."""
    recorder = run_virtual(trial.config, trial.options).recorder
    began_s = (recorder.sent_at[0] if recorder.sent_at else 0.0) + trial.warm_up_s
    third_s = trial.measured_s / 3.0
    sent = len(recorder.sent_at) - bisect_left(recorder.sent_at, began_s)
    completed = sum(done_at - e2e_s >= began_s - 1e-9 for done_at, e2e_s in zip(recorder.done_at, recorder.e2e_s, strict=True))
    middle, _ = waiting(recorder, began_s + third_s, began_s + 2.0 * third_s)
    last, served = waiting(recorder, began_s + 2.0 * third_s, began_s + 3.0 * third_s)
    return Observation(sent, completed, middle, last, served)


def judge(rate_per_s: float, seen: Sequence[Observation]) -> Verdict:
    """Whether a rate is held, by the figures of its runs."""
    sent = sum(one.sent for one in seen)
    completed = sum(one.completed for one in seen) / sent if sent else 1.0
    middle, last = (sum(getattr(one, name) for one in seen) / len(seen) for name in ("middle", "last"))
    chance = 1.0 + 0.01 * sum(one.served for one in seen) / len(seen)
    return Verdict(rate_per_s, completed, middle, last, completed >= COMPLETED_MIN and last <= middle + chance)


def search(guess_per_s: float, ask: Callable[[float], Verdict | None], within: float = WITHIN) -> tuple[float, float] | None:
    """(largest rate held, smallest rate not held), no further apart than `within`. None if `ask` returned None, which means interrupted. UsageError if no rate
    around the guess is held, or every rate is."""
    low, high, rate_per_s = 0.0, 0.0, guess_per_s
    for _ in range(STEPS_MAX):
        verdict = ask(rate_per_s)
        if verdict is None:
            return None
        low, high = (rate_per_s, high) if verdict.held else (low, rate_per_s)
        if low and high:
            break
        rate_per_s *= STEP if verdict.held else 1.0 / STEP
    else:
        raise UsageError(f"no saturation between {guess_per_s / STEP**STEPS_MAX:.3g} and {guess_per_s * STEP**STEPS_MAX:.3g} requests a second")
    while high > low * (1.0 + within):
        rate_per_s = sqrt(low * high)
        verdict = ask(rate_per_s)
        if verdict is None:
            return None
        low, high = (rate_per_s, high) if verdict.held else (low, rate_per_s)
    return low, high


class Asker:
    """Answers whether a rate is held, by runs over all cores."""

    def __init__(self, config: Config, options: Options, seeds: int, measured_s: float, jobs: int, stopped: Stopped) -> None:
        self._trial = Trial(config, options, WARM_UP_S, measured_s)
        self._seeds = seeds
        self._jobs = jobs
        self._stopped = stopped
        self.verdicts: list[Verdict] = []

    def __call__(self, rate_per_s: float) -> Verdict | None:
        config = dataclasses.replace(self._trial.config, rate_per_s=rate_per_s, duration_s=WARM_UP_S + self._trial.measured_s)
        trials = [self._trial._replace(config=dataclasses.replace(config, seed=config.seed + place)) for place in range(self._seeds)]
        seen: dict[int, Observation] = {}
        bar = Bar(sys.stderr, self._seeds, quiet=self._trial.options.quiet)
        note = f"{rate_per_s:,.4g} requests/s"

        def note_one(place: int, one: Observation) -> None:
            seen[place] = one
            bar.step(note=note)

        run_all(observe, trials, self._jobs, self._stopped, note_one, lambda: bar.show(note))
        bar.close()
        if len(seen) < self._seeds:
            return None
        verdict = judge(rate_per_s, [one for _, one in sorted(seen.items())])
        self.verdicts.append(verdict)
        if not self._trial.options.quiet:
            complain(
                f"{rate_per_s:>9,.4g} requests/s  {'held    ' if verdict.held else 'not held'}  {100 * verdict.completed:6.2f} % completed  "
                f"queue {verdict.middle:,.2f}, then {verdict.last:,.2f}"
            )
        return verdict


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return find(sys.argv[1:] if argv is None else list(argv))
    except (UsageError, OutputError) as error:
        complain(f"{PROGRAM}: error: {error}")
        return error.status


def find(argv: Sequence[str]) -> int:
    parser = Parser(prog=PROGRAM, allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("--seeds", metavar="N", default=str(SEEDS), help=f"runs at each rate [{SEEDS}]")
    parser.add_argument("--measure", metavar="S", default=f"{MEASURED_S:.0f}", help=f"seconds measured, after the first {WARM_UP_S:.0f} [{MEASURED_S:.0f}]")
    parser.add_argument("--json", metavar="FILE|-", default="", help="write what was found here; -: to stdout")
    arguments, config, options = parse_usual(parser, argv, PROGRAM)
    for flag in SWEPT:
        if flag in options.given:
            raise UsageError(f"{flag}: has no meaning here: the search decides at what rate requests come, and for how long")
    config = dataclasses.replace(config, trace="")
    seeds, measured_s = whole("--seeds", arguments.seeds, 1, 1000), float(whole("--measure", arguments.measure, 3, 86400))
    output = OutputFile("--json", arguments.json) if arguments.json else None
    began = time.perf_counter()
    try:
        guess_per_s = 2.0 * default_rate(config, build_catalog(config))
        with watch_signals() as stopped:
            asker = Asker(config, options, seeds, measured_s, arguments.jobs, stopped)
            found = search(guess_per_s, asker)
        if found is None:
            complain(f"{PROGRAM}: interrupted")
            return BY_SIGNAL + stopped.number
        low, high = found
        line = f"saturation of {config.workers:,} workers: {low:,.4g} requests/s ({high:,.4g} is not held); the closed formula says {guess_per_s:,.4g}"
        if output is not None:
            figures = {
                "workers": config.workers, "policy": config.policy, "saturation_per_s": low, "not_held_per_s": high, "formula_per_s": guess_per_s,
                "seeds": seeds, "warm_up_s": WARM_UP_S, "measured_s": measured_s, "rates": [verdict._asdict() for verdict in asker.verdicts],
                "wall": {"wall_s": round(time.perf_counter() - began, 3)},
            }  # fmt: skip
            output.write(json.dumps(figures, indent=2) + "\n")
            output.commit()
        print(line, file=sys.stderr if arguments.json == "-" else sys.stdout)
        return 0
    finally:
        if output is not None:
            output.discard()


if __name__ == "__main__":
    run_command(PROGRAM, main)
