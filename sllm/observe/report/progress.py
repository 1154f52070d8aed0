"""Progress of a run: a few lines redrawn in place on a terminal, a plain line every few seconds elsewhere, nothing when quiet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple, TextIO

from sllm.observe.recorder import Glance
from sllm.observe.report.text import BOLD, DIM, RED, YELLOW, can_encode, columns_of, count, duration, is_terminal, paint, percent, rate, span, to_ascii

REDRAW_EVERY_S = 0.2  # wall time, on a terminal
LINE_EVERY_S = 5.0  # wall time, elsewhere
RATE_OVER_S = 5.0  # wall time over which rates are averaged
BAR_WIDTHS = (10, 60)  # the bar of the run takes a quarter of the line, within these
GAUGE_WIDTHS = ((150, 24), (100, 14), (60, 8), (0, 5))  # (least columns of the terminal, cells of the bar of slots or KV cache)
LABEL_WIDTH = 9
NARROW, LINES_EACH = 70, 3  # on a terminal of fewer columns, a row may take this many lines
NEARLY_FULL = 0.9  # of slots or KV cache
STATE_ORDER = ("READY", "STARTING", "DRAINING", "SUSPECT", "DEAD", "LEFT")

_HIDE_CURSOR, _SHOW_CURSOR, _CLEAR_BELOW, _CLEAR_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[J", "\x1b[K"


class Snapshot(NamedTuple):
    """The state of a run at one moment, for progress."""

    now_s: float  # of the run's clock, from its start
    total_s: float  # when arrivals end; 0: nobody knows
    states: Mapping[str, int]  # workers by state
    glance: Glance
    slots_used: float | None = None  # the part in use, by the last reports; None: nobody knows
    kv_used: float | None = None
    waiting: int | None = None  # requests at the workers, by the last reports
    phase: str = ""  # "" while requests arrive, otherwise "starting" or "draining"
    total_requests: int = 0  # to be sent in all; 0: nobody knows
    warning: str = ""  # shown while not empty, such as "the machine cannot keep up"


class Progress:
    """Shows snapshots on a stream.

    A driver calls `due()` as often as it likes, which only reads the clock, and hands in a snapshot if one is due. `clock` gives wall seconds from any origin.
    As a context manager `Progress` restores the terminal when the run ends in any way.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float], *, virtual: bool, quiet: bool = False, no_color: bool = False, dumb: bool = False) -> None:
        self._stream = stream
        self._clock = clock
        self._virtual = virtual
        self._quiet = quiet
        self._live = is_terminal(stream) and not dumb  # a dumb terminal cannot move its cursor
        self._colour = self._live and not no_color
        self._utf8 = can_encode(stream)
        self._every_s = REDRAW_EVERY_S if self._live else LINE_EVERY_S
        self._next_at = clock() + (0.0 if self._live else LINE_EVERY_S)
        self._drawn = 0  # lines on the screen
        self._history: deque[tuple[float, float, int, int]] = deque()  # (wall, run's clock, requests ended, requests sent)
        self._last: Snapshot | None = None
        self._last_line = ""
        self._closed = False

    @property
    def is_live(self) -> bool:
        """Whether somebody watches a terminal."""
        return self._live and not self._quiet

    def due(self) -> bool:
        """Whether it is time for another snapshot."""
        return not self._quiet and self._clock() >= self._next_at

    def update(self, snapshot: Snapshot, *, force: bool = False) -> None:
        """Show a snapshot, if it is time or `force`."""
        if self._quiet or self._closed or not (force or self.due()):
            return
        at = self._clock()
        self._next_at = at + self._every_s
        if self._last is not None and self._last.phase != snapshot.phase:
            self._history.clear()  # while the fleet starts, the run's clock stands still, which would distort the pace
        self._last = snapshot
        self._history.append((at, snapshot.now_s, snapshot.glance.ended, snapshot.glance.sent))
        while len(self._history) > 2 and at - self._history[1][0] >= max(RATE_OVER_S, self._every_s):
            self._history.popleft()
        if self._live:
            self._redraw(snapshot)
        else:
            self._print_line(snapshot)

    def note(self, text: str) -> None:
        """Print a line of text above the progress; also when quiet."""
        self._erase()
        self._write(text + "\n")
        if self._last is not None and self._live and not self._quiet and not self._closed:
            self._redraw(self._last)

    def close(self) -> None:
        """On a terminal, remove the progress and show the cursor again; elsewhere print the last state, unless it was printed before."""
        if self._closed:
            return
        if not self._live and self._last is not None and not self._quiet:
            self._print_line(self._last)
        self._closed = True
        self._erase()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- drawing --------------------------------------------------------------------------------------------------------------------

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text if self._utf8 else to_ascii(text))
            self._stream.flush()
        except (OSError, ValueError):
            self._quiet = True  # the reader has gone; the run goes on

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\r\x1b[{self._drawn - 1}A{_CLEAR_BELOW}{_SHOW_CURSOR}" if self._drawn > 1 else f"\r{_CLEAR_BELOW}{_SHOW_CURSOR}")
            self._drawn = 0

    def _redraw(self, snapshot: Snapshot) -> None:
        room = columns_of(self._stream, 80) - 1  # a full line would wrap on some terminals
        gauge = next(cells for columns, cells in GAUGE_WIDTHS if room >= columns)
        rows = (("requests", self._requests(snapshot)), ("TTFT", self._latencies(snapshot)), ("fleet", self._fleet(snapshot, gauge)))
        lines = [_fit(self._clock_parts(snapshot, room), room, self._colour)]
        for label, parts in rows:
            for number, line in enumerate(_wrap(parts, room - LABEL_WIDTH, self._colour, LINES_EACH if room < NARROW else 1)):
                lines.append(paint(("" if number else label).ljust(LABEL_WIDTH), DIM, self._colour) + line)
        if self._drawn > 1:
            start = f"\r\x1b[{self._drawn - 1}A"
        else:
            start = f"\r{_HIDE_CURSOR}"
        self._write(start + f"{_CLEAR_LINE}\n".join(lines) + _CLEAR_BELOW)
        self._drawn = len(lines)

    def _print_line(self, snapshot: Snapshot) -> None:
        latencies = [(f"TTFT {text}" if text.startswith("p50") else text, code) for text, code in self._latencies(snapshot)]
        parts = (*self._clock_parts(snapshot, 0), *self._requests(snapshot), *latencies, *self._fleet(snapshot, 0))
        line = " · ".join(text for text, _ in parts)
        if line != self._last_line:
            self._last_line = line
            self._write(line + "\n")

    # --- words ----------------------------------------------------------------------------------------------------------------------

    def _clock_parts(self, snapshot: Snapshot, room: int) -> list[tuple[str, str]]:
        """The part done: bar, clock, time left, phase."""
        unit = " simulated" if self._virtual else ""
        parts: list[tuple[str, str]] = []
        done = self._fraction(snapshot)
        if done is None:
            parts.append((f"{span(snapshot.now_s)}{unit}", BOLD))
        else:
            if self._live:
                parts.append((_bar(done, min(max(room // 4, BAR_WIDTHS[0]), BAR_WIDTHS[1])), ""))
            parts.append((f"{int(done * 100)} %", BOLD))
            whole = f" of {span(snapshot.total_s)}" if snapshot.total_s else ""
            parts.append((f"{span(snapshot.now_s)}{whole}{unit}", ""))
        left_s = self._left_s(snapshot)
        if snapshot.phase:
            parts.append((snapshot.phase, YELLOW))
        elif left_s is not None:
            parts.append((f"{span(left_s)} left", ""))
        if snapshot.warning:
            parts.append((snapshot.warning, YELLOW))
        return parts

    def _requests(self, snapshot: Snapshot) -> list[tuple[str, str]]:
        """Counts and rates of requests, the most important first, because parts that do not fit the line are left out."""
        glance = snapshot.glance
        parts = [(f"{glance.completed:,} done", ""), (f"{glance.in_flight:,} in flight", "")]
        if glance.failed or glance.rejected:
            parts.append((f"{glance.failed + glance.rejected:,} failed or rejected", RED))
        pace = self._pace()
        if pace is not None:
            clock_pace, ended, sent = pace
            if clock_pace > 0.0:
                parts.append((f"{rate(ended / clock_pace)} of {rate(sent / clock_pace)} offered", ""))
            if self._virtual:
                parts.append((f"{rate(ended)} of wall time", ""))
        return parts

    @staticmethod
    def _latencies(snapshot: Snapshot) -> list[tuple[str, str]]:
        """Percentiles of TTFT and the number of cold starts, over all requests so far."""
        glance = snapshot.glance
        times = [(f"p50 {duration(glance.ttft_p50_s)}, p99 {duration(glance.ttft_p99_s)}", "")] if glance.ttft_p50_s is not None else []
        return [*times, (count(glance.cold_starts, "cold start"), "")]

    @staticmethod
    def _fleet(snapshot: Snapshot, gauge: int) -> list[tuple[str, str]]:
        """Workers by state, the queue, slots and KV cache, with bars of `gauge` cells (0: without bars)."""
        states = snapshot.states
        words = ", ".join(f"{states[state]:,} {state.lower()}" for state in STATE_ORDER if states.get(state))
        good = states.get("READY", 0) == sum(states.values())
        parts = [(words, "" if good else YELLOW)] if words else []
        for name, part in (("slots", snapshot.slots_used), ("KV", snapshot.kv_used)):
            if part is not None:
                bar = f"{_bar(part, gauge)} " if gauge else ""
                parts.append((f"{name} {bar}{percent(round(part, 2))}", RED if part > NEARLY_FULL else ""))
        if snapshot.waiting is not None:
            parts.append((f"{snapshot.waiting:,} waiting", YELLOW if snapshot.waiting else ""))
        return parts

    @staticmethod
    def _fraction(snapshot: Snapshot) -> float | None:
        """The part of the arrivals that is over, 0 to 1; None if unknown."""
        if snapshot.total_s > 0.0:
            return min(1.0, max(0.0, snapshot.now_s / snapshot.total_s))
        if snapshot.total_requests > 0:
            return min(1.0, snapshot.glance.sent / snapshot.total_requests)
        return None

    def _pace(self) -> tuple[float, float, float] | None:
        """The present pace: seconds of the run's clock, requests ended and requests sent, per second of wall time."""
        if not self._history:
            return None
        first, last = self._history[0], self._history[-1]
        wall_s = last[0] - first[0]
        return ((last[1] - first[1]) / wall_s, (last[2] - first[2]) / wall_s, (last[3] - first[3]) / wall_s) if wall_s > 0.0 else None

    def _left_s(self, snapshot: Snapshot) -> float | None:
        """Wall seconds until arrivals end, at the present pace."""
        pace = self._pace()
        if pace is None or pace[0] <= 0.0 or snapshot.total_s <= 0.0:
            return None
        return max(0.0, snapshot.total_s - snapshot.now_s) / pace[0]


def _bar(part: float, cells: int) -> str:
    """A bar of `cells` cells; a part above 0 fills at least one cell."""
    filled = min(cells, max(round(part * cells), 1 if part > 0.005 else 0))
    return "█" * filled + "░" * (cells - filled)


def _wrap(parts: list[tuple[str, str]], room: int, colour: bool, most: int) -> list[str]:
    """Parts on at most `most` lines; parts that do not fit are left out."""
    lines: list[str] = []
    while len(lines) < most and (parts or not lines):
        used, fitting = 0, 0
        for text, _ in parts:
            used += len(text) + (2 if fitting else 0)
            if used > room:
                break
            fitting += 1
        if not fitting and lines:
            break
        lines.append("  ".join(paint(text, code, colour) if code else text for text, code in parts[:fitting]))
        parts = parts[max(fitting, 1) :]
    return lines


def _fit(parts: list[tuple[str, str]], room: int, colour: bool) -> str:
    """The first parts, as many as fit on one line."""
    return _wrap(parts, room, colour, 1)[0]
