"""Standard input, output and error in every state: closed, on a full disk, or a pipe that nobody reads any more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TextIO

from sllm.protocol.errors import OutputError

STDOUT = "-"  # as a path
BY_SIGNAL = 128  # plus the number of the signal: the exit status of a process that a signal ended


def complain(text: str) -> None:
    """Write a line to stderr; errors are ignored."""
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)


def say(write: Callable[[TextIO], object], where: str = "stderr") -> None:
    """Write something that the user asked for to stdout or stderr. OutputError if it cannot be written; a pipe that nobody reads is no error."""
    stream: TextIO | None = getattr(sys, where)
    if stream is None:
        raise OutputError(f"{where}: cannot write: it is closed")
    try:
        write(stream)
        stream.flush()
    except (OSError, ValueError) as error:
        silence(stream)
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"{where}: cannot write: {getattr(error, 'strerror', None) or error}") from None


def occupy_closed_descriptors() -> None:
    """Open /dev/null in place of closed stdin, stdout or stderr. Otherwise the next file or socket would get that descriptor, and with it everything that is
    written to the standard stream."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one


def end_at_signals() -> None:
    """Let SIGINT and SIGTERM end the process at once and without a message, until the program installs its own handlers. To be called before the imports of
    the program, which take a third of a second."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(BY_SIGNAL + number))


def run_script(main: Callable[[], int]) -> NoReturn:
    """End this process with the exit status of `main`. Ctrl-C is a KeyboardInterrupt, so that `main` cleans up, and no traceback. A second Ctrl-C
    is ignored while `main` does so; SIGTERM ends the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(BY_SIGNAL + signal.SIGINT)


def run_command(program: str, main: Callable[[], int]) -> NoReturn:
    """Be this process: end it with the exit status of `main`, or of the SystemExit it raised. What is left in the buffers of stdout and stderr is written
    first: where that fails, the status is that of an OutputError and one line says so, unless nobody reads the pipe or the run failed anyway.

    The process ends without taking itself apart, which takes seconds for a large fleet. A signal that `main` does not take care of ends it at once.
    """
    end_at_signals()
    occupy_closed_descriptors()
    try:
        status = main()
    except SystemExit as end:  # argparse, after --help and --version
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            silence(stream)
            if not isinstance(error, BrokenPipeError) and status == 0:
                complain(f"{program}: error: {stream.name.strip('<>')}: cannot write: {getattr(error, 'strerror', None) or error}")
                status = OutputError.status
    os._exit(status)


def silence(stream: TextIO) -> None:
    """Discard the content of the stream's buffer, which the interpreter would otherwise try to write again at its end, with an error message."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
        stream.flush()
    except (OSError, ValueError):
        pass
