"""Errors that are the user's to mend: one line that names what is wrong and where."""


class UsageError(Exception):
    """Wrong usage or input. The message is the one line shown to the user; the process exits with status 2."""
