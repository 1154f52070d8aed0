"""Likely causes of trouble, logged for the operator: a coordinator that does not answer, and datagrams that are refused.

Each trouble is logged when it begins and then at growing intervals; the number of remembered peers is bounded.
"""

from __future__ import annotations

import logging

from sllm.protocol.events import CoordinatorSilent
from sllm.protocol.messages import Address

SILENCE_GROWTH = 2.0  # a silence is logged again when it has grown by this factor since it was last logged,
SILENCE_STEP_MAX_S = 600.0  # or by this many seconds, whichever comes first
SAME_SILENCE_S = 0.001  # a silence that begins within this time of the last log line continues the silence of that line
SOURCES_MAX = 1000  # pairs of address and reason remembered
REMEMBER_S = 3600.0  # after this time every address is logged again

REFUSALS = {
    "magic": "they are not of this program",
    "version": "they are of another version of this program: update the older side",
    "key_id": "they are signed with a key that our key file does not have: the sender has another key file, or ours is not up to date",
    "tag": "they are signed with another key than ours of that number, so the sender has another key file; or they were damaged on their way",
    "stale_time": "the sender's clock and ours are more than 30 s apart",
}
"""Explanations of the reasons for refusals (`sllm.wire.frame.reasons`) that say something about the sender."""


class SilenceLog:
    """Logs that the coordinator does not answer."""

    def __init__(self, log: logging.Logger, name: str) -> None:
        """`name`: the value of COORDINATOR_HOST."""
        self._log = log
        self._name = name
        self._since: float | None = None  # when the silence began; None: no silence yet
        self._told_at = 0.0
        self._tell_from_s = 0.0  # seconds after which the silence is logged again

    def tell(self, event: CoordinatorSilent, address: Address, answered: bool) -> None:
        """Log a silence if a log line is due. `answered`: the coordinator has answered before. Each event has the time since the event before or the last
        answer."""
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
    """Logs once for each address that its datagrams are refused, and the likely cause."""

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
        """Forget the addresses logged so far when `REMEMBER_S` have passed, so that a lasting trouble is logged again. To be called regularly."""
        if now - self._since >= REMEMBER_S:
            self._since = now
            self._told.clear()
