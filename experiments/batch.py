"""Many virtual runs over all cores: the flags that they share, a progress bar, and an end by Ctrl-C that keeps the finished runs."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, TextIO, TypeVar

from config import Config
from experiments.harness import complete, cores
from sllm.observe.recorder import Recorder
from sllm.observe.report.text import can_encode, columns_of, is_terminal, span, to_ascii
from sllm.protocol.errors import UsageError
from sllm.run.command_line import Options, Parser, parse
from sllm.run.virtual import VirtualRun

T = TypeVar("T")
R = TypeVar("R")
BAR_WIDTH = 24
REDRAW_EVERY_S = 0.2
LINE_EVERY_S = 5.0  # without a terminal
NOT_FOR_MANY = ("--requests-csv", "--record", "--page", "--pace", "--fail-if")  # flags that make sense for a single run only


class Outcome(NamedTuple):
    """The outcome of one run: its results and columns, or the error of the user."""

    results: dict[str, Any]
    recorder: Recorder


def run_virtual(config: Config, options: Options) -> Outcome:
    """Conduct one run in virtual time that prints and writes nothing. UsageError as `simulation.VirtualRun`; RuntimeError if an invariant was broken."""
    run = VirtualRun(config, dataclasses.replace(options, virtual=True, json="", requests_csv="", html="", record="", quiet=True))
    results = complete(run)
    if run.violations:
        raise RuntimeError(run.violations[0])
    return Outcome(results, run.recorder)


def parse_usual(own: Parser, argv: Sequence[str], program: str) -> tuple[Any, Config, Options]:
    """The options of `own`, and the configuration and options of a run from all other flags, which are those of `centralized_simulation.py`. UsageError for
    an unknown flag, and for a flag that makes sense for a single run only."""
    own.add_argument("--jobs", metavar="N", default=str(cores()), help="processes [all cores]")
    arguments, others = own.parse_known_args(list(argv))
    config, options = parse(["--virtual", *others], os.environ, program, "")
    for flag in NOT_FOR_MANY:
        if flag in options.given:
            raise UsageError(f"{flag}: is for one run, and this makes many; centralized_simulation.py --virtual makes one")
    if config.speedup != 1.0:
        config = dataclasses.replace(config, speedup=1.0)  # a speedup from the environment is meant for live runs
    arguments.jobs = whole("--jobs", arguments.jobs, 1, 4096)
    return arguments, config, options


def whole(flag: str, text: str, low: int, high: int) -> int:
    """A whole number from a flag. UsageError names the flag."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and low <= int(text) <= high):
        raise UsageError(f"{flag}={text!r}: must be a whole number from {low} to {high}")
    return int(text)


class Bar:
    """The number of finished runs and the time left: one line redrawn on a terminal, a line every few seconds elsewhere."""

    def __init__(self, stream: TextIO | None, total: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._total = total
        self._done = 0.0
        self._quiet = quiet or stream is None
        self._live = stream is not None and is_terminal(stream)
        self._clock = clock
        self._began = clock()
        self._next_at = self._began + (0.0 if self._live else LINE_EVERY_S)
        self._drawn = False

    def step(self, weight: float = 1.0, note: str = "") -> None:
        """A run is done."""
        self._done += weight
        self.show(note)

    def show(self, note: str = "", *, force: bool = False) -> None:
        now = self._clock()
        if self._quiet or not (force or now >= self._next_at):
            return
        self._next_at = now + (REDRAW_EVERY_S if self._live else LINE_EVERY_S)
        part = min(1.0, self._done / self._total) if self._total else 1.0
        elapsed_s = now - self._began
        words = [f"{int(100 * part)} %", f"{self._done:,.0f} of {self._total:,} runs", span(elapsed_s)]
        if 0.0 < part < 1.0:
            words.append(f"{span(elapsed_s * (1.0 - part) / part)} left")
        if note:
            words.append(note)
        if self._live and self._stream is not None:
            filled = round(BAR_WIDTH * part)
            line = "  ".join(["█" * filled + "░" * (BAR_WIDTH - filled), *words])
            self._write(f"\r{line[: columns_of(self._stream, 80) - 1]}\x1b[K")
            self._drawn = True
        else:
            self._write(" · ".join(words) + "\n")

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._drawn:
            self._write("\r\x1b[K")
            self._drawn = False

    def _write(self, text: str) -> None:
        try:
            assert self._stream is not None
            self._stream.write(text if can_encode(self._stream) else to_ascii(text))
            self._stream.flush()
        except (OSError, ValueError):
            self._quiet = True


class Stopped:
    """Whether Ctrl-C or SIGTERM came while the block ran; another one ends the process at once (KeyboardInterrupt)."""

    def __init__(self) -> None:
        self.number = 0

    def __bool__(self) -> bool:
        return self.number != 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def watch_signals() -> Iterator[Stopped]:
    """Ctrl-C and SIGTERM are noted instead of ending the process."""
    stopped = Stopped()
    before = {number: signal.signal(number, stopped._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begin_process() -> None:
    """Prepare a process of the pool: ignore Ctrl-C, which a terminal sends to all processes and the first process handles; and exclude the present objects
    from garbage collection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def _answer(call: tuple[Callable[[Any], Any], int, Any]) -> tuple[int, Any, str]:
    """(place, result, "") of a function's call for the item at a place, or (place, None, error text) for a UsageError."""
    function, place, item = call
    try:
        return place, function(item), ""
    except UsageError as error:
        return place, None, str(error)


def run_all(function: Callable[[T], R], items: Sequence[T], jobs: int, stopped: Stopped, done: Callable[[int, R], None], wait: Callable[[], None]) -> None:
    """Call function(item) for every item over `jobs` processes. done(place, result) is called for each result, in the order of completion, and `wait` at
    regular intervals. Returns early once `stopped` is true, and gives up the calls under way. UsageError as `function`."""
    if not items:
        return
    with multiprocessing.get_context("fork").Pool(min(jobs, len(items)), _begin_process) as pool:
        answers = pool.imap_unordered(_answer, [(function, place, item) for place, item in enumerate(items)])
        for _ in items:
            while True:
                if stopped:
                    return
                try:
                    place, result, problem = answers.next(REDRAW_EVERY_S)
                    break
                except multiprocessing.TimeoutError:
                    wait()
            if problem:
                raise UsageError(problem)
            done(place, result)
