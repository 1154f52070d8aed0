"""Output files of a run, which appear under their names only when they are complete, and standard output.

An output is opened before the run starts, so that a path that cannot be written is an error at the start. A later error (a full disk) does not end the run:
the output is given up, and `commit` raises the error. A pipe that nobody reads any more is no error.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from sllm.observe.report.standard import STDOUT
from sllm.protocol.errors import OutputError, UsageError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_SERIAL = count(1).__next__
_STDOUT_NAMES = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_OPEN_ALREADY = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")  # names of files that this process has open, which cannot be replaced by name


class OutputFile:
    """An output being written. `stream` takes text, `raw` bytes; use one of the two. Neither ever raises an error of the system.

    A regular file is written beside its final name, under which `commit` puts it; `discard` leaves nothing behind. What is no regular file (a pipe,
    /dev/null) is written directly, as is stdout, whose path is "-". UsageError, naming the flag and the path, when the path cannot be opened; OutputError
    when the disk is full already or stdout closed.
    """

    def __init__(self, flag: str, path: str) -> None:
        self.flag = flag
        self.path = path
        self._part: Path | None = None  # the temporary file that is written until `commit` gives it its name
        self._target = Path(path)
        try:
            descriptor = self._open_stdout() if path == STDOUT else self._open(path)
        except (OSError, ValueError) as error:
            at_fault = OutputError if path == STDOUT or getattr(error, "errno", 0) in _NO_ROOM else UsageError
            raise at_fault(self._problem(error)) from None
        self._sink = _Sink(descriptor)
        self.raw = io.BufferedWriter(self._sink, 1 << 16)
        self.stream: TextIO = io.TextIOWrapper(self.raw, encoding="utf-8", newline="")

    @staticmethod
    def _open_stdout() -> int:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        return os.dup(1)

    def _open(self, path: str) -> int:
        if os.path.isdir(path) or path.endswith(os.sep):
            raise IsADirectoryError(errno.EISDIR, "is a directory")
        try:
            kind = os.stat(path).st_mode
        except FileNotFoundError:
            kind = 0  # any other error (a name too long, a link to itself) will come again when the file gets its name
        if (kind and not stat.S_ISREG(kind)) or os.path.abspath(path).startswith(_OPEN_ALREADY):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if kind:
            os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))  # a file without write permission must not be replaced
        self._target = Path(os.path.realpath(path))  # a symbolic link stays, and the file that it points to is replaced
        part = self._target.with_name(f".{os.getpid()}-{_SERIAL()}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._part = part
        if kind:
            os.chmod(part, stat.S_IMODE(kind))
        return descriptor

    def _problem(self, error: Exception) -> str:
        """The error of the system, as one line for the user."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{self.flag} {'' if self.path == STDOUT else self.path}".rstrip() + f": cannot write{' to stdout' if self.path == STDOUT else ''}: {reason}"

    def write(self, text: str) -> None:
        """Append."""
        self.stream.write(text)

    def commit(self) -> None:
        """Close the file and give it its name. OutputError if the system refused any write; the file is removed then. Does nothing if it is closed already."""
        if self.stream.closed:
            return
        self.stream.close()
        error = self._sink.error
        try:
            if self._part is not None and error is None:
                self._part.replace(self._target)
                self._part = None
        except OSError as refused:
            error = refused
        finally:
            self._remove()
        if error is not None and not isinstance(error, BrokenPipeError):
            raise OutputError(self._problem(error))

    def discard(self) -> None:
        """Close and remove the file. Does nothing after `commit`."""
        self.stream.close()
        self._remove()

    def _remove(self) -> None:
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


class _Sink(io.RawIOBase):
    """Writes to a descriptor until the system refuses a write. After that, writes are discarded and `error` has the reason."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = len(data)
        while self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another process has made the pipe or terminal non-blocking
                _wait_for_room(self._descriptor)
            except OSError as error:
                self.error = error
        return size

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        try:
            os.close(self._descriptor)
        except OSError as error:  # a file system may report a full disk only when the file is closed
            self.error = self.error or error


def _wait_for_room(descriptor: int) -> None:
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    room.poll()


# --- which path is which ------------------------------------------------------------------------------------------------------------


def check_distinct(outputs: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    """UsageError if two outputs, or an output and an input, are the same file, even under different paths. Both arguments map a flag to a path, "" being none.

    Any number of outputs may go to one device (/dev/null, a terminal), but only one to stdout.
    """
    seen = {_identity(path): (flag, path) for flag, path in inputs.items() if path}
    seen.pop(None, None)
    for flag, path in outputs.items():
        identity = _identity(path) if path else None
        if identity is None:
            continue
        if identity in seen:
            other, before = seen[identity]
            if STDOUT in (path, before):
                raise UsageError(f"{other} and {flag}: both write to stdout, which takes one of them")
            why = "" if path == before else f" (also called {before})"
            raise UsageError(f"{other} and {flag}: both mean the file {path}{why}; each needs one of its own")
        seen[identity] = flag, path


def is_stdout(path: str) -> bool:
    """Whether the path is one of the names of stdout."""
    return path == STDOUT or (bool(path) and os.path.abspath(path) in _STDOUT_NAMES)


def _identity(path: str) -> object:
    """A value that is equal for all paths of one file, which need not exist yet; None for a device."""
    try:
        found = os.fstat(1) if is_stdout(path) else os.stat(path)
    except (OSError, ValueError):
        return STDOUT if is_stdout(path) else os.path.realpath(path.replace("\0", ""))
    if stat.S_ISCHR(found.st_mode):
        return STDOUT if is_stdout(path) else None
    return found.st_dev, found.st_ino
