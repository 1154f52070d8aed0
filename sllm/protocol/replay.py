"""What a node remembers of each sender, so that no datagram counts twice and no earlier life of a sender speaks for the present one.

Time and numbers of a message say whether it is fresh: a sender numbers the messages of each type 1, 2, 3, ... in each of its lives. A message that comes late
is still told from one that is repeated, as far back as the window reaches.
"""

from __future__ import annotations

from sllm.protocol.recent import Recent

FRESH_WITHIN_S = 30.0  # a datagram stamped further from our wall clock than this is refused
REPLAY_WINDOW = 64  # sequence numbers below the highest in which a late datagram is still told from a repeated one
GUARDED_MAX = 200_000  # senders remembered for each message type; those longest silent go first. A repeat they would have shown is harmless
_NONE_SEEN = (1 << REPLAY_WINDOW) - 1


class ReplayWindow:
    """The numbers that one sender's present life has used."""

    __slots__ = ("following", "heard_at", "incarnation", "missing")

    def __init__(self, incarnation: int, sequence: int, now: float) -> None:
        """A life that is first heard with this number. Numbers below it may still come."""
        self.incarnation = incarnation
        self.following = sequence + 1  # the number after the highest
        self.missing = _NONE_SEEN >> max(0, REPLAY_WINDOW + 1 - sequence)  # bitmap of those missing below the highest
        self.heard_at = now

    def admit(self, sequence: int, now: float) -> bool:
        """Take a number of this life. False: it was used before, or is further back than the window reaches."""
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
        """Whether this life, silent for the timeout, makes way for a message that is older by its numbers. For one of another life: a clock was set back. For
        one of the same life: somebody else had spoken for it with too high a number; after such a silence whatever could be replayed is stale."""
        silent_s = now - self.heard_at
        if silent_s < life_timeout_s:
            return False
        return incarnation < self.incarnation or (sequence < self.following and silent_s > 2.0 * FRESH_WITHIN_S)


class Senders:
    """The windows of everybody who has sent messages of one type."""

    __slots__ = ("_windows",)

    def __init__(self) -> None:
        self._windows: Recent[str, ReplayWindow] = Recent()

    def __len__(self) -> int:
        return len(self._windows)

    def admit(self, sender_id: str, incarnation: int, sequence: int, now: float, life_timeout_s: float) -> str:
        """Take the number of a fresh message; returns why it is refused ("old_incarnation", "replayed"), or ""."""
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
        """Remember a sender that has just been heard; of those silent for longest half are forgotten at once when there are too many."""
        if len(self._windows.new) >= GUARDED_MAX // 2:
            self._windows.turn()
        self._windows.new[sender_id] = window
