"""The limits of what roles say: of names in bytes as on the wire, and of numbers.

There is one rule for each, and catalogue, traces, sender and receiver go by it: whatever one role may say, every other can repeat. The configuration
imports nothing of the project and writes the rules of its own texts and numbers again; a test holds them equal to these.
This module imports nothing of the project, so that every other module can import it.
"""

from __future__ import annotations

import re

DATAGRAM_MAX_BYTES = 8192  # header and tag included
OPCODES_MAX = 1000  # of a body, about as many as it has values: a peer that has turned cannot keep us busy with 8 KiB of the smallest
TEXT_MAX_BYTES = 255  # of any string in a body: what one length byte can say

NAME_MAX_BYTES = 128  # of a model, of hardware, of a request
ID_MAX_BYTES = 63  # of a worker, a client, a coordinator: what the wire's header has room for, and the longest host name
HOST_MAX_BYTES = 253  # the longest name that the domain name system has
HARDWARE_SEPARATORS = frozenset(",:")  # no name of hardware has them: NAME:COUNT,NAME:COUNT is a fleet
NAMES_MAX = 500  # in one list of a report

NUMBER_MAX = (1 << 63) - 1  # of an incarnation, a sequence, bytes
SECONDS_MAX = 1e9  # what is further off never comes
TOKENS_MAX = 10_000_000  # more than any model's context: a number beyond it is not a token count
REPORT_INTERVAL_MAX_S = 60.0
SLOTS_MAX = 100_000  # requests that a worker serves at once
QUEUE_MAX = 10_000_000  # requests that a worker lets wait
MISSING_MAX = 64  # dispatches that a report names as missing; older ones count as arrived
PLACEMENTS_MAX = 20  # of one request, and so the workers that it names as failed

_HOST = re.compile(r"[A-Za-z0-9._~:%-]+")


def name_problem(text: str, most_bytes: int = NAME_MAX_BYTES) -> str:
    """What keeps `text` from being a name; "" if nothing does. Printable means `str.isprintable`: no control or format characters, no line ends, no halves
    of surrogate pairs."""
    if not text.isprintable():
        return "must have printable characters only"
    size = len(text.encode())
    return "" if 0 < size <= most_bytes else f"must have 1 to {most_bytes} bytes of UTF-8, not {size}"


def id_problem(text: str) -> str:
    """What keeps `text` from being the id of a worker, a client or a coordinator; "" if nothing does."""
    return name_problem(text, ID_MAX_BYTES)


def host_problem(text: str) -> str:
    """What keeps `text` from being a host name or an address; "" if nothing does."""
    if not _HOST.fullmatch(text):
        return "must be a host name or an address: letters, digits and . _ ~ : % -"
    return "" if len(text) <= HOST_MAX_BYTES else f"must have at most {HOST_MAX_BYTES} bytes, not {len(text)}"
