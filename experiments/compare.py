#!/usr/bin/env python3
"""Compares placement policies: each under the same requests, over several seeds, with intervals, on all cores.

    python3 experiments/compare.py --policies startup_time,least_loaded --workers 20 --rate 20
    python3 experiments/compare.py --policies all --workers 5,20 --rates 5,10,20 --seeds 10 --html compare.html
    python3 experiments/compare.py --against before.json after.json

Every combination of policies, workers, rates (or traces), report intervals and seeds is one run in virtual time; all other flags are those of
centralized_simulation.py. All policies get the same requests for a seed, so differences are taken seed by seed. Ctrl-C keeps what is done, and the same
command with --resume goes on from there. docs/compare.md says how to read the table.

Exit status: 0 done, 1 an invariant was broken, 2 wrong usage or input, 3 an output could not be written, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TextIO

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from config import Config
from experiments.batch import Bar, Stopped, parse_usual, run_all, watch_signals, whole
from experiments.comparison import Group, compare
from experiments.comparison_html import render_html, render_svg
from experiments.comparison_text import render_csv, render_table
from experiments.plan import Axes, Cell, Done, as_json, document, plan, read_runs, reuse, run_cell, sample_of, split_policies, split_values
from sllm.observe.report.files import OutputFile, check_distinct
from sllm.observe.report.standard import BY_SIGNAL, STDOUT, complain, run_command, silence
from sllm.observe.report.text import can_encode, is_terminal, to_ascii
from sllm.protocol.errors import OutputError, UsageError
from sllm.run.command_line import Options, Parser, flag_fields, input_files

PROGRAM = "compare.py"
DESCRIPTION = "Compares placement policies under the same requests, over several seeds. All other flags are those of centralized_simulation.py --virtual."
SEEDS = 5
UNFINISHED = "compare-unfinished.json"  # the file that keeps finished runs after Ctrl-C, without --json
OUTPUTS = (
    ("--json", "every run, the means, the differences"),
    ("--csv", "a row for each mean"),
    ("--html", "a page with tables and plots"),
    ("--svg", "a picture: how long requests wait for their first token, by policy, in the first setting"),
)
AXES = (
    ("--workers", "workers", "N,N"),
    ("--rates", "rate_per_s", "R,R"),
    ("--traces", "trace", "FILE,FILE"),
    ("--report-intervals", "report_interval_s", "S,S"),
)


class Finished(NamedTuple):
    """The outcome of all runs."""

    done: Mapping[int, Done]
    stopped_by: int  # the number of the signal that stopped the runs; 0: all runs were made
    wall_s: float


def build_parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--policies", metavar="A,B:key=value", help="what is compared, the first being what others are held against; all: every one [all]")
    for flag, field, metavar in AXES:
        single = flag.removesuffix("s") if flag != "--workers" else flag
        (declared,) = (one for one in flag_fields() if one.name == field)
        parser.add_argument(*dict.fromkeys((flag, single)), dest=field, metavar=metavar, help=f"{declared.metadata['meaning']}; several, separated by commas")
    parser.add_argument("--seeds", metavar="N", default=str(SEEDS), help=f"runs of each combination, with the seeds from --seed on [{SEEDS}]")
    parser.add_argument("--resume", metavar="FILE", nargs="?", const="", help=f"take over the runs that FILE has [the file of --json, else {UNFINISHED}]")
    parser.add_argument("--against", metavar=("A.json", "B.json"), nargs=2, help="compare two files of results instead: of this, or of single runs")
    for flag, meaning in OUTPUTS:
        parser.add_argument(flag, metavar="FILE|-", default="", help=f"write here: {meaning}; -: to stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        return run(arguments)
    except (UsageError, OutputError) as error:
        complain(f"{PROGRAM}: error: {error}")
        return error.status
    except RuntimeError as error:
        complain(f"{PROGRAM}: {error}")
        return 1
    except KeyboardInterrupt:
        complain(f"{PROGRAM}: interrupted: nothing more is written")
        return BY_SIGNAL + 2


def run(argv: Sequence[str]) -> int:
    """Compare what the command line names; returns the exit status."""
    parser = build_parser()
    arguments, config, options = parse_usual(parser, argv, PROGRAM)
    paths = {flag: getattr(arguments, flag.removeprefix("--")) for flag, _ in OUTPUTS}
    for warning in options.warnings:
        complain(f"{PROGRAM}: warning: {warning}")
    if arguments.against:
        return compare_files(arguments, options, paths)
    cells = plan(read_axes(arguments, config, options), config, options)
    kept = reuse(cells, read_runs(arguments.resume or kept_in(paths["--json"]), "--resume")) if arguments.resume is not None else {}
    command = shlex.join(["python3", "experiments/compare.py", *argv])
    with ExitStack() as stack:
        outputs = open_outputs(stack, paths, input_files(config, options) | {f"--traces {place}": path for place, path in enumerate(traces_of(cells))})
        stopped = stack.enter_context(watch_signals())  # until everything is written, so that a signal loses no finished run
        finished = make_runs(cells, kept, arguments.jobs, options, stopped)
        groups = compare([sample_of(as_json(cells[place], finished.done[place]), cells[place].config.policy) for place in sorted(finished.done)])
        wall = {"wall_s": round(finished.wall_s, 3), "jobs": arguments.jobs, "command": command, "taken_over": len(kept)}
        kept_as = document(cells, finished.done, {"interrupted": bool(finished.stopped_by), "groups": describe(groups), "wall": wall})
        deliver(outputs, groups, kept_as, command, options, bool(finished.stopped_by))
        if finished.stopped_by:
            return keep(finished, len(cells), kept_as, paths["--json"], argv)
    if arguments.resume == "" and kept_in(paths["--json"]) == UNFINISHED:
        Path(UNFINISHED).unlink(missing_ok=True)
    if not options.quiet:
        complain(f"{len(cells):,} runs in {finished.wall_s:.1f} s on {arguments.jobs} cores")
    return 0


def read_axes(arguments: Any, config: Config, options: Options) -> Axes:
    """The values of everything that is varied; without a flag, the value of the configuration. UsageError names the flag."""
    if "--policy" in options.given:
        raise UsageError("--policy: is for one run: --policies A,B names those that are compared")
    values = {field: split_values(flag, field, text) for flag, field, _ in AXES if (text := getattr(arguments, field)) is not None}
    traces = values.get("trace", [config.trace] if config.trace else [])
    for flag in ("--arrivals", "--cv"):
        if traces and flag in options.given:
            raise UsageError(f"{flag}: --traces bring their own arrivals: give one or the other")
    if traces and "rate_per_s" in values:
        raise UsageError("--rates: --traces bring their own arrivals: give one or the other")
    return Axes(
        split_policies(arguments.policies or "all", config.policy),
        values.get("workers", [config.workers]),
        values.get("rate_per_s", [config.rate_per_s]),
        traces,
        values.get("report_interval_s", [config.report_interval_s]),
        whole("--seeds", arguments.seeds, 1, 100_000),
    )


def traces_of(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.config.trace for cell in cells if cell.config.trace))


def open_outputs(stack: ExitStack, paths: Mapping[str, str], inputs: Mapping[str, str]) -> dict[str, OutputFile]:
    """All outputs, opened before the runs begin; outputs that are not committed are discarded."""
    check_distinct(paths, inputs)
    outputs = {}
    for flag, path in paths.items():
        if path:
            outputs[flag] = OutputFile(flag, path)
            stack.callback(outputs[flag].discard)
    return outputs


def make_runs(cells: Sequence[Cell], kept: Mapping[int, Done], jobs: int, options: Options, stopped: Stopped) -> Finished:
    """Make every run that no file has yet, over all cores, until the end or a signal."""
    began, done = time.monotonic(), dict(kept)
    missing = [place for place in range(len(cells)) if place not in done]
    bar = Bar(sys.stderr, len(cells), quiet=options.quiet)
    bar.step(len(kept))

    def note(index: int, result: Done) -> None:
        done[missing[index]] = result
        bar.step()

    try:
        run_all(run_cell, [cells[place] for place in missing], jobs, stopped, note, bar.show)
    finally:
        bar.close()
    return Finished(done, stopped.number if len(done) < len(cells) else 0, time.monotonic() - began)


def describe(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Means, intervals and differences for JSON."""
    return [
        {
            **group.setting._asdict(),
            "candidates": [
                {
                    "candidate": row.candidate, "seeds": row.seeds, "best_at": sorted(row.best_at),
                    "figures": {name: one and one._asdict() for name, one in row.means.items()},
                    "against_first": {name: one._asdict() for name, one in row.against_first.items() if one},
                }
                for row in group.rows
            ],
        }
        for group in groups
    ]  # fmt: skip


def print_table(groups: Sequence[Group], stream: TextIO | None, *, no_color: bool, interrupted: bool) -> None:
    """The table for people. OutputError if it cannot be written; a pipe that nobody reads is no error."""
    if stream is None:
        raise OutputError("stdout: cannot write: it is closed")
    text = render_table(groups, colour=is_terminal(stream) and not no_color, interrupted=interrupted) + "\n"
    try:
        stream.write(text if can_encode(stream) else to_ascii(text))
        stream.flush()
    except BrokenPipeError:
        silence(stream)
    except (OSError, ValueError) as error:
        silence(stream)
        raise OutputError(f"{stream.name.strip('<>')}: cannot write: {getattr(error, 'strerror', None) or error}") from None


def deliver(outputs: Mapping[str, OutputFile], groups: Sequence[Group], kept_as: Any, command: str, options: Options, interrupted: bool) -> None:
    """Write everything, the table first. OutputError for the first output that could not be written, after all have been tried."""
    if groups and not options.quiet:
        to_stderr = any(output.path == STDOUT for output in outputs.values())
        print_table(groups, sys.stderr if to_stderr else sys.stdout, no_color=options.no_color, interrupted=interrupted)
    render: dict[str, Callable[[], str]] = {
        "--json": lambda: json.dumps(kept_as, indent=1) + "\n", "--csv": lambda: render_csv(groups),
        "--html": lambda: render_html(groups, command, interrupted=interrupted), "--svg": lambda: render_svg(groups),
    }  # fmt: skip
    refused: OutputError | None = None
    for flag, output in outputs.items():
        output.write(render[flag]())
        try:
            output.commit()
        except OutputError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def kept_in(json_path: str) -> str:
    """The file that keeps finished runs after a signal, which --resume reads."""
    return UNFINISHED if json_path in ("", STDOUT) else json_path


def keep(finished: Finished, total: int, kept_as: Any, json_path: str, argv: Sequence[str]) -> int:
    """After a signal: keep the finished runs, unless the file of --json has them already, and print how to go on; returns the exit status."""
    path = kept_in(json_path)
    if path != json_path:
        output = OutputFile("--resume", path)
        output.write(json.dumps(kept_as, indent=1) + "\n")
        output.commit()
    complain(f"{PROGRAM}: interrupted: {len(finished.done):,} of {total:,} runs are done and kept in {path}; to go on:")
    complain(f"  {shlex.join(['python3', 'experiments/compare.py', *without_resume(argv), '--resume'])}")
    return BY_SIGNAL + finished.stopped_by


def without_resume(argv: Sequence[str]) -> list[str]:
    """The command line without --resume and its file."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--resume":
            following = next(words, "--")
            kept += [following] if following.startswith("--") and following != "--" else []
        elif not word.startswith("--resume="):
            kept.append(word)
    return kept


def compare_files(arguments: Any, options: Options, paths: Mapping[str, str]) -> int:
    """Two files of results, side by side."""
    samples = []
    names = [Path(path).name for path in arguments.against]
    labels = names if names[0] != names[1] else list(arguments.against)
    if arguments.against[0] == arguments.against[1]:
        raise UsageError(f"--against {' '.join(arguments.against)}: is one file; give two")
    contents = [read_runs(path, "--against") for path in arguments.against]
    alone = all(len({(run["policy"], run["workers"], run["rate_per_s"], run["trace"], run["report_interval_s"]) for run in runs}) == 1 for runs in contents)
    for label, runs in zip(labels, contents, strict=True):
        for one in runs:
            base = contents[0][0] if alone else one
            more = " against ".join(dict.fromkeys(runs[0]["policy"] for runs in contents)) if alone else one["policy"]
            samples.append(sample_of({**base, **{key: one[key] for key in ("seed", "figures", "ttft_quantiles_s")}}, label, more))
    groups = [group for group in compare(samples) if len(group.rows) == 2]
    if not groups:
        raise UsageError(f"--against {' '.join(arguments.against)}: they have no setting in common (policy, workers, rate or trace, report interval)")
    command = shlex.join(["python3", "experiments/compare.py", "--against", *arguments.against])
    with ExitStack() as stack:
        outputs = open_outputs(stack, paths, dict(zip(("first", "second"), arguments.against, strict=True)))
        deliver(outputs, groups, {"schema": 1, "kind": "files", "files": arguments.against, "groups": describe(groups)}, command, options, False)
    return 0


if __name__ == "__main__":
    run_command(PROGRAM, main)
