"""Files a run writes: found to be writable before the run starts, and there under their name only when they are complete."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from sllm.errors import UsageError


class OutputFile:
    """A text file being written beside its final name, under which `commit` puts it; `discard` leaves nothing behind.

    What is no regular file (a pipe, /dev/null) is written directly. UsageError, naming the flag and the path, for anything the system refuses.
    """

    def __init__(self, flag: str, path: str) -> None:
        self.flag = flag
        self.path = Path(path)
        try:
            if self.path.is_dir():
                raise IsADirectoryError(21, "is a directory")
            self._direct = self.path.exists() and not self.path.is_file()
            self._part = self.path if self._direct else self.path.with_name(f"{self.path.name}.part")
            if not self._direct and self.path.exists():
                self.path.open("a").close()  # a file we may not write is not replaced either
            self.stream: TextIO = self._part.open("w", encoding="utf-8", newline="")
        except (OSError, ValueError) as error:
            raise self.error(error) from None

    def error(self, error: OSError | ValueError) -> UsageError:
        """What the system said, as one line for the user."""
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return UsageError(f"{self.flag} {self.path}: cannot write: {reason}")

    def write(self, text: str) -> None:
        """Append. UsageError if the system refuses (a full disk)."""
        try:
            self.stream.write(text)
        except OSError as error:
            raise self.error(error) from None

    def commit(self) -> None:
        """Close, and give the file its name. Nothing happens if it is closed already."""
        if self.stream.closed:
            return
        try:
            self.stream.close()
            if not self._direct:
                self._part.replace(self.path)
        except OSError as error:
            raise self.error(error) from None

    def discard(self) -> None:
        """Close and remove what was written. Nothing happens after `commit`."""
        if self.stream.closed:
            return
        try:
            self.stream.close()
        except OSError:
            pass  # what cannot be written need not be
        finally:
            if not self._direct:
                self._part.unlink(missing_ok=True)
