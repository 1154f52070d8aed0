"""Two lives of the coordinator at once: how a worker finds out, and how long it is sure.

A restart looks like one life after the other. Two that live speak by turns: an older one is heard, then the newer, then the older again.
"""

from __future__ import annotations

from math import inf


class Rivals:
    """What a worker has heard of the coordinator's lives. `keep_s`: how long two that were heard by turns count as two."""

    __slots__ = ("_keep_s", "_newer_at", "_older_at", "_seen_until")

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._newer_at = -inf  # when the newest life was heard last
        self._older_at = -inf  # when an older one was
        self._seen_until = -inf

    def hear_newest(self, now: float) -> None:
        """The newest life known has spoken."""
        self._newer_at = now

    def hear_older(self, now: float) -> None:
        """A life older than that has spoken."""
        if now - self._keep_s < self._older_at < self._newer_at:
            self._seen_until = now + self._keep_s
        self._older_at = now

    def suspected(self, now: float) -> bool:
        """An older life has spoken lately: another datagram may find either of two."""
        return now - self._keep_s < self._older_at

    def seen(self, now: float) -> bool:
        """Two lives run."""
        return now < self._seen_until
