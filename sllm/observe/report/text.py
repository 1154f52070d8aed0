"""Figures as text for people, and the abilities of output streams."""

from __future__ import annotations

import os
from typing import TextIO

ASCII = str.maketrans({"µ": "u", "·": "-", "—": "-", "×": "x", "█": "#", "░": ".", "≤": "<=", "…": "~"})
RED, GREEN, YELLOW, DIM, BOLD = "31", "32", "33", "2", "1"
NARROWEST = 20  # columns; a smaller figure of a terminal is not believed


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


def columns_of(stream: TextIO, fallback: int = 100) -> int:
    """Width of the terminal behind a stream; `fallback` where there is none."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return fallback
    return columns if columns >= NARROWEST else fallback


def can_encode(stream: TextIO) -> bool:
    """Whether a stream can encode the characters beyond ASCII that are used here. A stream without an encoding is in memory and takes all characters."""
    try:
        "".join(map(chr, ASCII)).encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def to_ascii(text: str) -> str:
    return text.translate(ASCII).encode("ascii", "replace").decode()


def paint(text: str, code: str, colour: bool) -> str:
    """The text in a colour of the terminal, if colours are wanted."""
    return f"\x1b[{code}m{text}\x1b[0m" if colour and text else text


def duration(value: float | None) -> str:
    """Seconds with three digits and a unit: 12.3 µs, 212 ms, 1.94 s, 125 s; a dash for None."""
    if value is None:
        return "—"
    if value == 0.0:
        return "0 s"
    for scale, unit in ((1e6, "µs"), (1e3, "ms")):
        if abs(value) * scale < 999.5:
            return f"{_three(value * scale)} {unit}"
    return f"{_three(value)} s"


def span(value: float) -> str:
    """A span of time, rounded for reading: 45 s, 3 min 20 s, 2 h 05 min, 12 d 04 h."""
    seconds = round(value)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 172800:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


def rate(value: float) -> str:
    """A number a second: 0.12/s, 9.8/s, 15,203/s."""
    if value == 0.0:
        return "0/s"
    return f"{_three(value) if value < 99.95 else f'{value:,.0f}'}/s"


def percent(value: float | None) -> str:
    """A fraction as a percentage; 100 % and 0 % only if it is exactly that."""
    if value is None:
        return "—"
    text = f"{value * 100:.1f}"
    if text == "100.0" and value < 1.0:
        return "> 99.9 %"
    if text == "0.0" and value > 0.0:
        return "< 0.1 %"
    return f"{text.removesuffix('.0')} %"


def count(value: int, singular: str, plural: str | None = None) -> str:
    """1 cold start, 1,204 cold starts."""
    return f"{value:,} {singular if value == 1 else plural or singular + 's'}"


def _three(value: float) -> str:
    """Three significant digits without an exponent."""
    size = abs(value)
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{value:,.{decimals}f}"
