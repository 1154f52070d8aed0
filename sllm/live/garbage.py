"""Garbage collection for a loop that must not pause.

CPython's full collection looks at every container of the process: over 100 milliseconds with 100,000 workers in the table, again and again. But
nearly nothing here is garbage in the collector's sense: objects die by reference count, and the few cycles come from the odd exception. So
nothing is collected by itself; once a second, when the loop has little to do, the objects made since are looked at, and what survives is set
aside for good (`gc.freeze`): it still dies by reference count, but is never looked at again.
"""

from __future__ import annotations

import gc

QUIET = 2000  # datagrams since the last time; looking at what that many leave behind takes one to two milliseconds


class GarbageTamer:
    """Takes garbage collection of this process into its hands. Make it once everything that stays is there; `tick` it once a second."""

    def __init__(self) -> None:
        self._received = 0
        gc.collect()
        gc.freeze()
        gc.disable()

    def tick(self, received: int) -> None:
        """`received`: datagrams read since the start."""
        if received - self._received <= QUIET:
            gc.collect(0)
        self._received = received
        gc.freeze()

    def close(self) -> None:
        """Give it back to the interpreter."""
        gc.unfreeze()
        gc.enable()
