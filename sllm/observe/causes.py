"""What is likely wrong, said to whoever runs this: a coordinator that does not answer, and datagrams of others that are refused.

Each is told when it begins and then ever more seldom, and what is remembered of others has a bound.
"""

from __future__ import annotations

import logging

from sllm.protocol.events import CoordinatorSilent
from sllm.protocol.messages import Address

SILENCE_GROWTH = 2.0  # times as long as it was when it was last told, a silence is told again ...
SILENCE_STEP_MAX_S = 600.0  # ... or so much longer
SAME_SILENCE_S = 0.001  # a silence that begins where the last one was told goes on; rounding aside
SOURCES_MAX = 1000  # addresses and reasons remembered
REMEMBER_S = 3600.0  # then everybody is told again

REFUSALS = {
    "magic": "they are not of this program",
    "version": "they are of another version of this program: update the older side",
    "key_id": "they are signed with a key that our key file does not have: the sender has another key file, or ours is not up to date",
    "tag": "they are signed with another key than ours of that number, so the sender has another key file; or they were damaged on their way",
    "stale_time": "the sender's clock and ours are more than 30 s apart",
}
"""Why a datagram is refused (`sllm.wire.frame.REASONS`), where that says something about its sender."""


class SilenceLog:
    """Tells of a coordinator that does not answer."""

    def __init__(self, log: logging.Logger, name: str) -> None:
        """`name` is what COORDINATOR_HOST says."""
        self._log = log
        self._name = name
        self._since: float | None = None  # when the silence began; None: there was none yet
        self._told_at = 0.0
        self._tell_from_s = 0.0  # the silence is told again when it has lasted so long

    def tell(self, event: CoordinatorSilent, address: Address, answered: bool) -> None:
        """`answered`: it has answered before. Events come while the silence lasts, each with the time since the last one or since an answer."""
        began = event.at - event.silent_s
        if self._since is None or began > self._told_at + SAME_SILENCE_S:
            self._since, self._tell_from_s = began, 0.0
        self._told_at = event.at
        silent_s = event.at - min(self._since, began)
        due = silent_s >= self._tell_from_s
        if due:
            self._tell_from_s = min(silent_s * SILENCE_GROWTH, silent_s + SILENCE_STEP_MAX_S)
        host, port = address
        where = f"{host}:{port}" if host == self._name else f"{self._name} ({host}:{port})"
        self._log.log(
            logging.WARNING if due else logging.DEBUG,
            "the coordinator %s has %s for %.0f s: is COORDINATOR_HOST right, does every firewall let UDP port %d through both ways, and have both the same "
            "cluster key? It is looked up again and asked over a new socket",
            where, "not answered" if answered else "never answered", silent_s, port,
            extra={"event": type(event).__name__, "fields": {"node_id": event.node_id, "silent_s": round(silent_s, 3)}},
        )  # fmt: skip


class RefusalLog:
    """Tells once of each address whose datagrams are refused, and of the likely cause."""

    def __init__(self, log: logging.Logger, now: float) -> None:
        self._log = log
        self._told: set[tuple[str, str]] = set()
        self._since = now

    def __call__(self, reason: str, source: Address) -> None:
        if reason not in REFUSALS:
            return
        key = source[0], reason
        if key in self._told or len(self._told) > SOURCES_MAX:
            return
        self._told.add(key)
        fields: dict[str, object] = {"source": source[0], "reason": reason}
        extra = {"event": "DatagramsRefused", "fields": fields}
        if len(self._told) > SOURCES_MAX:
            self._log.warning("datagrams of more than %d addresses are refused: no more of them are named", SOURCES_MAX, extra={"event": "DatagramsRefused"})
        else:
            self._log.warning("datagrams from %s are refused: %s", source[0], REFUSALS[reason], extra=extra)

    def forget(self, now: float) -> None:
        """To be called now and then: what goes on for long is told again."""
        if now - self._since >= REMEMBER_S:
            self._since = now
            self._told.clear()
