"""The replay window: what a node remembers of each sender, so that no datagram counts twice and no earlier life of a sender speaks for the present one.

A sender numbers the messages of each type 1, 2, 3, ... in each of its lives. Within the window a message that arrives late is accepted and a message that
arrives twice is refused.
"""

from __future__ import annotations

from sllm.protocol.recent import Recent

FRESH_WITHIN_S = 30.0  # a datagram stamped further from our wall clock than this is refused
REPLAY_WINDOW = 64  # sequence numbers below the highest within which a late datagram can be told from a repeated one
GUARDED_MAX = 200_000  # senders remembered for each message type; those silent for longest are forgotten first, and a repeat of theirs is harmless
_NONE_SEEN = (1 << REPLAY_WINDOW) - 1


class ReplayWindow:
    """The numbers that one sender's present life has used."""

    __slots__ = ("following", "heard_at", "incarnation", "missing")

    def __init__(self, incarnation: int, sequence: int, now: float) -> None:
        """A life whose first message heard has this number. Lower numbers may still come."""
        self.incarnation = incarnation
        self.following = sequence + 1  # the number after the highest
        self.missing = _NONE_SEEN >> max(0, REPLAY_WINDOW + 1 - sequence)  # bitmap of the numbers missing below the highest
        self.heard_at = now

    def admit(self, sequence: int, now: float) -> bool:
        """Mark a number of this life as used. False: the number was used before, or is below the window."""
        ahead = sequence - self.following
        if ahead >= 0:
            if ahead or self.missing:
                self.missing = (self.missing << ahead + 1 | (1 << ahead) - 1) & _NONE_SEEN if ahead < REPLAY_WINDOW else _NONE_SEEN
            self.following = sequence + 1
        else:
            bit = -ahead - 2
            if bit < 0 or bit >= REPLAY_WINDOW or not self.missing >> bit & 1:
                return False
            self.missing ^= 1 << bit
        self.heard_at = now
        return True

    def is_over(self, incarnation: int, sequence: int, now: float, life_timeout_s: float) -> bool:
        """Whether this life has been silent for the timeout and makes way for a message with older numbers. An older incarnation: the sender's clock was set
        back. A lower number of the same life: a forger had used too high a number; after 2 * FRESH_WITHIN_S of silence every recorded message is stale."""
        silent_s = now - self.heard_at
        if silent_s < life_timeout_s:
            return False
        return incarnation < self.incarnation or (sequence < self.following and silent_s > 2.0 * FRESH_WITHIN_S)


class Senders:
    """The replay windows of all senders of one type of message."""

    __slots__ = ("_windows",)

    def __init__(self) -> None:
        self._windows: Recent[str, ReplayWindow] = Recent()

    def __len__(self) -> int:
        return len(self._windows)

    def admit(self, sender_id: str, incarnation: int, sequence: int, now: float, life_timeout_s: float) -> str:
        """Mark the number of a fresh message as used; returns why the message is refused ("old_incarnation", "replayed"), or ""."""
        window = self._windows.new.get(sender_id)
        if window is None:
            window = self._windows.get(sender_id)
            if window is None:
                self._keep(sender_id, ReplayWindow(incarnation, sequence, now))
                return ""
        if incarnation != window.incarnation or sequence < window.following:
            if incarnation > window.incarnation or window.is_over(incarnation, sequence, now, life_timeout_s):
                self._keep(sender_id, ReplayWindow(incarnation, sequence, now))
                return ""
            if incarnation < window.incarnation:
                return "old_incarnation"
        if sender_id not in self._windows.new:
            self._keep(sender_id, window)
        return "" if window.admit(sequence, now) else "replayed"

    def _keep(self, sender_id: str, window: ReplayWindow) -> None:
        """Remember a sender that has just been heard. When there are too many senders, the half that has been silent for longest is forgotten."""
        if len(self._windows.new) >= GUARDED_MAX // 2:
            self._windows.turn()
        self._windows.new[sender_id] = window
