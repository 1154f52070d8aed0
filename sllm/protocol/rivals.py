"""Two lives of the coordinator at the same time (rivals): how a worker notices them.

After a restart a worker hears the older life and then only the newer one. Two running lives are heard in turn: the older, the newer, the older again.
"""

from __future__ import annotations

from math import inf


class Rivals:
    """What a worker has heard of the coordinator's lives. For `keep_s` seconds after two lives were heard in turn, both count as running."""

    __slots__ = ("_keep_s", "_newer_at", "_older_at", "_seen_until")

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._newer_at = -inf  # when the newest life was heard last
        self._older_at = -inf  # when an older life was heard last
        self._seen_until = -inf

    def hear_newest(self, now: float) -> None:
        """A message of the newest known life has arrived."""
        self._newer_at = now

    def hear_older(self, now: float) -> None:
        """A message of a life older than the newest has arrived."""
        if now - self._keep_s < self._older_at < self._newer_at:
            self._seen_until = now + self._keep_s
        self._older_at = now

    def suspected(self, now: float) -> bool:
        """An older life was heard lately, so the next datagram to the coordinator may reach either life."""
        return now - self._keep_s < self._older_at

    def seen(self, now: float) -> bool:
        """Two lives run at the same time."""
        return now < self._seen_until
