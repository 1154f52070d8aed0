"""Garbage collection for a loop that must not pause.

CPython's full collection visits every container of the process, which takes over 100 milliseconds with 100,000 workers in the table. But this program
makes almost no reference cycles: objects die by reference count, and the few cycles come from rare exceptions. So automatic collection is off. Once a
second, when the loop has little to do, the objects made since the last time are collected, and the survivors are excluded from later collections
(`gc.freeze`); they still die by reference count.
"""

from __future__ import annotations

import gc

QUIET = 2000  # datagrams since the last collection; collecting the objects of 2,000 datagrams takes one to two milliseconds


class GarbageTamer:
    """Replaces automatic garbage collection of this process. To be made when all long-lived objects exist; `tick` has to be called once a second."""

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
        """Switch automatic garbage collection on again."""
        gc.unfreeze()
        gc.enable()
