"""Errors that the user can correct: one line that names what is wrong and where."""


class UsageError(Exception):
    """Wrong usage or input. The message is the one line shown to the user; the process exits with `status`."""

    status = 2


class OutputError(UsageError):
    """An output that the user asked for could not be written: the disk is full, or the stream is closed."""

    status = 3
