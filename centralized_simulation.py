#!/usr/bin/env python3
"""A whole fleet on one machine: one coordinator, N workers and a client, live over UDP on loopback or in virtual time.

    python3 centralized_simulation.py --workers 5                 30 seconds, live
    python3 centralized_simulation.py --workers 5 --virtual       the same roles in virtual time

Exit status: 0 done, 1 an invariant was broken, 2 wrong usage or input, 3 an output could not be written, 4 a threshold of --fail-if was
missed, 130 after Ctrl-C and 143 after SIGTERM (what was measured is printed all the same).
"""

from __future__ import annotations

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any

from config import RUN_VARIABLES, describe_misspelt, misspelt
from sllm.observe.report.files import is_stdout
from sllm.observe.report.html import render_html
from sllm.observe.report.json import to_json
from sllm.observe.report.outputs import HTML, JSON, Outputs
from sllm.observe.report.standard import BY_SIGNAL, complain, run_command, say
from sllm.observe.report.table import print_table
from sllm.protocol.errors import OutputError, UsageError
from sllm.run.command_line import Options, grouped, input_files, parse, print_out, repeat_command
from sllm.run.listing import render_listing
from sllm.run.live import LiveRun
from sllm.run.run import Run
from sllm.run.virtual import VirtualRun

MISSED = 4  # exit status: a threshold that the user set
PROGRAM = "centralized_simulation.py"
DESCRIPTION = "Runs a coordinator, workers and a client: live over UDP on loopback, or with --virtual in simulated time. Nothing but --workers is ever needed."


class Signals:
    """What Ctrl-C and SIGTERM do: the first ends the run early, its books closed; another, or one while no run is under way, ends the process at once
    (KeyboardInterrupt); one that comes even then, without cleaning up."""

    def __init__(self) -> None:
        self.run: Run | None = None  # the one to end
        self._number = 0
        self._before: dict[int, Any] = {}
        self._leaving = False

    @property
    def status(self) -> int:
        """Exit status of a process that a signal ended."""
        return BY_SIGNAL + self._number

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        run, self.run = self.run, None
        self._number = self._number or number
        if run is not None:
            run.interrupt()
            return
        if self._leaving:
            os._exit(self.status)
        self._leaving = True
        raise KeyboardInterrupt

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with Signals() as signals:
        try:
            return simulate(arguments, signals)
        except UsageError as error:
            complain(f"{PROGRAM}: error: {error}")
            return error.status
        except KeyboardInterrupt:
            complain(f"{PROGRAM}: interrupted: nothing more is written")
            return signals.status


def simulate(arguments: list[str], signals: Signals) -> int:
    """Conduct the run and hand out what it measured; returns the exit status."""
    config, options = parse(arguments, os.environ, PROGRAM, DESCRIPTION)
    if options.listing:
        print_out(render_listing(options.listing, config), sys.stdout)
        return 0
    wrong = misspelt(os.environ, RUN_VARIABLES)
    with Outputs(options.outputs, input_files(config, options)) as outputs:
        for warning in [*([describe_misspelt(wrong)] if wrong else []), *options.warnings]:
            complain(f"{PROGRAM}: warning: {warning}")
        run = (VirtualRun if options.virtual else LiveRun)(config, options, outputs=outputs)
        conduct(run, signals)
        run.put_in_flight()
        results = run.results()
        page = partial(
            render_html, results, run.recorder, began_s=run.began_s, marks=run.marks(), command=repeat_command(results, PROGRAM), parameters=grouped(results)
        )  # fmt: skip
        render = {JSON: partial(to_json, results), HTML: page}
        unwritten = deliver([partial(show, run, results, options), *outputs.finish(render)])
    if results["invariants"]["violations"]:
        return 1
    if unwritten:
        return OutputError.status
    if any(threshold["missed"] for threshold in results["slo"]["thresholds"]):
        return signals.status if run.interrupted else MISSED
    return signals.status if run.interrupted else 0


def conduct(run: Run, signals: Signals | None = None) -> None:
    """Run it to its end, or until a signal."""
    signals = signals or Signals()
    gc.collect()
    gc.freeze()  # what is there now stays to the end: the collector need not look at it again and again
    gc.set_threshold(100_000, 50, 100)
    signals.run = run
    try:
        run.conduct()
    finally:
        signals.run = None
        run.close()


def show(run: Run, results: dict[str, Any], options: Options) -> None:
    """The closing table for people, on stdout unless an output goes there, and whatever else they must know. OutputError if the table could not be written."""
    try:
        if not options.quiet:
            taken = any(map(is_stdout, options.outputs.values()))
            say(partial(print_table, results, no_color=options.no_color), "stderr" if taken else "stdout")
    finally:
        for warning in run.warnings:
            complain(f"{PROGRAM}: warning: {warning}")
        for threshold in results["slo"]["thresholds"]:
            if threshold["missed"]:
                value = threshold["value"]
                complain(f"{PROGRAM}: --fail-if {threshold['fail_if']}: it is {'not known' if value is None else format(value, '.6g')}")
        for violation in results["invariants"]["violations"]:
            complain(f"{PROGRAM}: {violation}")


def deliver(steps: Sequence[Callable[[], None]]) -> bool:
    """Take every step; returns whether one of them could not be taken because an output refused. Each of those is one line on stderr."""
    unwritten = False
    for step in steps:
        try:
            step()
        except OutputError as error:
            complain(f"{PROGRAM}: error: {error}")
            unwritten = True
    return unwritten


if __name__ == "__main__":
    run_command(PROGRAM, main)
