"""The limits of names (in bytes, as on the wire) and of numbers in messages.

Each limit is defined once; catalogue, traces, sender and receiver all use it, so whatever one role may say, every other role can repeat. The configuration
imports nothing of the project and repeats the limits that it needs; a test holds the two equal.
This module imports nothing of the project, so that every other module can import it.
"""

from __future__ import annotations

import re

DATAGRAM_MAX_BYTES = 8192  # header and tag included
OPCODES_MAX = 1000  # in a body, about one for each value: a compromised peer cannot make us parse 8 KiB of one-byte opcodes
TEXT_MAX_BYTES = 255  # of any string in a body: the largest length that one byte can say

NAME_MAX_BYTES = 128  # of a model, of hardware, of a request
ID_MAX_BYTES = 63  # of a worker, a client, a coordinator: the header's room for an id, and the longest label of a host name
HOST_MAX_BYTES = 253  # the longest name in the domain name system
HARDWARE_SEPARATORS = frozenset(",:")  # not allowed in names of hardware, because a fleet is written NAME:COUNT,NAME:COUNT
NAMES_MAX = 500  # in one list of a report

NUMBER_MAX = (1 << 63) - 1  # of an incarnation, a sequence, bytes
SECONDS_MAX = 1e9  # a longer time counts as "never"
TOKENS_MAX = 10_000_000  # more than any model's context: a larger number is not a token count
REPORT_INTERVAL_MAX_S = 60.0
SLOTS_MAX = 100_000  # requests that a worker serves at once
QUEUE_MAX = 10_000_000  # requests that may wait at a worker
MISSING_MAX = 64  # dispatches that a report names as missing; older ones count as arrived
PLACEMENTS_MAX = 20  # of one request, and so the number of workers that the request may exclude

_HOST = re.compile(r"[A-Za-z0-9._~:%-]+")


def name_problem(text: str, most_bytes: int = NAME_MAX_BYTES) -> str:
    """Why `text` is not a valid name; "" if it is valid. Printable means `str.isprintable`: no control or format characters, no line ends, no halves of
    surrogate pairs."""
    if not text.isprintable():
        return "must have printable characters only"
    size = len(text.encode())
    return "" if 0 < size <= most_bytes else f"must have 1 to {most_bytes} bytes of UTF-8, not {size}"


def id_problem(text: str) -> str:
    """Why `text` is not a valid id of a worker, a client or a coordinator; "" if it is valid."""
    return name_problem(text, ID_MAX_BYTES)


def host_problem(text: str) -> str:
    """Why `text` is not a valid host name or network address; "" if it is valid."""
    if not _HOST.fullmatch(text):
        return "must be a host name or an address: letters, digits and . _ ~ : % -"
    return "" if len(text) <= HOST_MAX_BYTES else f"must have at most {HOST_MAX_BYTES} bytes, not {len(text)}"
