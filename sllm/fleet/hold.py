"""Whether expiry is held: our own deafness looks like everybody's death, and then nobody is declared dead until reports come again."""

from __future__ import annotations

from math import inf


class Hold:
    """Why members are not declared dead at the moment, if there is a reason.

    `fraction`: more than this part of the members silent at once is a reason, for at most `most_s` seconds in a row.
    """

    __slots__ = ("_fraction", "_most_s", "_since", "_stalled_until", "why")

    def __init__(self, fraction: float, most_s: float, now: float) -> None:
        self._fraction = fraction
        self._most_s = most_s
        self._since = inf  # since when more than the fraction has been silent; inf: it is not
        self._stalled_until = now
        self.why = ""  # the reason, in words; "": expiry goes on

    def stall(self, until: float) -> None:
        """Our own loop stood still. Reports have until `until` to come in; no member is called silent before."""
        self._stalled_until = until

    def is_stalled(self, now: float) -> bool:
        """No member is called silent yet, because our own loop stood still."""
        return now < self._stalled_until

    def look(self, silent: int, members: int, now: float) -> bool:
        """Bring `why` up to date: `silent` of the `members` are silent. True if expiry has been held or resumed by that."""
        before, self.why = self.why, ""
        if self.is_stalled(now):
            self.why = "our own loop stalled"
        if silent <= self._fraction * members or members <= 1:
            self._since = inf
        elif not self.why:
            self._since = min(self._since, now)
            if now - self._since < self._most_s:
                self.why = "most of the fleet fell silent at once"
        return bool(self.why) != bool(before)
