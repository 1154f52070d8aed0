#!/usr/bin/env python3
"""A whole fleet on one machine: one coordinator, N workers and a client, live over UDP on loopback or in virtual time.

    python3 centralized_simulation.py --workers 5                 30 seconds, live
    python3 centralized_simulation.py --workers 5 --virtual       the same roles in virtual time

Exit status: 0 done, 1 an invariant was broken, 2 wrong usage or input, 130 interrupted (what was measured is printed all the same).
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from config import describe_misspelt, misspelt
from simulation import LiveRun, Run, VirtualRun
from sllm.cli import RUN_VARIABLES, Options, flag_fields, parse
from sllm.errors import UsageError
from sllm.report.files import OutputFile
from sllm.report.html import render_html
from sllm.report.json import to_json
from sllm.report.table import Details, print_table

PROGRAM = "centralized_simulation.py"
DESCRIPTION = "Runs a coordinator, workers and a client: live over UDP on loopback, or with --virtual in simulated time. Nothing but --workers is ever needed."
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    outputs: dict[str, OutputFile] = {}
    try:
        config, options = parse(arguments, os.environ, PROGRAM, DESCRIPTION)
        wrong = misspelt(os.environ, RUN_VARIABLES)
        if wrong:
            print(f"{PROGRAM}: warning: {describe_misspelt(wrong)}", file=sys.stderr)
        outputs = open_outputs(options)
        run = VirtualRun(config, options) if options.virtual else LiveRun(config, options)
        try:
            conduct(run)
        finally:
            run.close()
        results = run.results()
        show(run, results, options)
        write(run, results, outputs, shlex.join(["python3", PROGRAM, *arguments]))
    except UsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    finally:
        for output in outputs.values():
            output.discard()
    if results["invariants"]["violations"]:
        return 1
    return INTERRUPTED if run.interrupted else 0


def open_outputs(options: Options) -> dict[str, OutputFile]:
    """The files that will be written at the end, opened now: a path that cannot be written is an error before the run, not after it."""
    wanted = {"--json": options.json if options.json != "-" else "", "--html": options.html}
    return {flag: OutputFile(flag, path) for flag, path in wanted.items() if path}


def conduct(run: Run) -> None:
    """Run it; the first Ctrl-C ends it early with its books closed, the second at once."""

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run.interrupt()

    before = signal.signal(signal.SIGINT, on_interrupt)
    gc.collect()
    gc.freeze()  # what is there now stays to the end: the collector need not look at it again and again
    gc.set_threshold(100_000, 50, 100)
    try:
        run.conduct()
    finally:
        signal.signal(signal.SIGINT, before)


def show(run: Run, results: dict[str, Any], options: Options) -> None:
    """The closing table for people, and the results on stdout if they were asked for there."""
    if not options.quiet:
        print_table(results, sys.stderr, details=Details(run.recorder), no_color=options.no_color, interrupted=run.interrupted)
    for warning in run.warnings:
        print(f"{PROGRAM}: warning: {warning}", file=sys.stderr)
    for violation in results["invariants"]["violations"]:
        print(f"{PROGRAM}: {violation}", file=sys.stderr)
    if options.json == "-":
        print(to_json(results), end="")


def write(run: Run, results: dict[str, Any], outputs: dict[str, OutputFile], command: str) -> None:
    """The files that were asked for."""
    for flag, output in outputs.items():
        if flag == "--json":
            output.write(to_json(results))
        else:
            parameters = {field.metadata["flag"]: getattr(run.config, field.name) for field in flag_fields()}
            output.write(render_html(results, run.recorder, command=command, parameters=parameters))
        output.commit()


if __name__ == "__main__":
    sys.exit(main())
