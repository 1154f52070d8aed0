"""Member states, and what moves a member from one to another: one table for the code, the tests and the diagram in docs/architecture.md."""

from __future__ import annotations

from sllm.protocol.messages import DRAINING, READY, STARTING, STOPPED

SUSPECT = "SUSPECT"
DEAD = "DEAD"
LEFT = "LEFT"  # the worker said that it stopped: nobody is missing
GONE = (DEAD, LEFT)  # still listed for a while, and no part of the fleet any more
NEW = ""
STATES = (STARTING, READY, DRAINING, SUSPECT, DEAD, LEFT)

# What can happen to a member: a report with a state in it, too many missed reports, or the timeout.
SILENT = "silent"
EXPIRED = "expired"
TRANSITIONS: dict[tuple[str, str], str] = {
    **{(old, reported): reported for old in (NEW, *STATES) for reported in (STARTING, READY, DRAINING)},
    **{(old, STOPPED): LEFT for old in (NEW, *STATES)},
    **{(old, SILENT): SUSPECT for old in (STARTING, READY, DRAINING)},
    (SUSPECT, EXPIRED): DEAD,
}
