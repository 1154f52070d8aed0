"""Plots as SVG text: axes with units, lines, areas and stacked bars. Colours are CSS classes, which the page's style sheet defines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from math import ceil, floor, log10
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 78, 16, 14, 46
LOG_DECADES_MIN = 0.3  # a shorter log axis is widened to this many decades

Points = Sequence[tuple[float, float]]
Label = Callable[[float], str]


class Line(NamedTuple):
    """A line, and the area under it if `filled`; `dashed` for what is expected rather than measured."""

    name: str
    points: Points
    colour: int  # class c1, c2, ...
    filled: bool = False
    steps: bool = False  # each value holds until the next


class Bars(NamedTuple):
    """One layer of stacked bars: (left edge, height) of bars as wide as the distance to the next."""

    name: str
    heights: Sequence[float]
    colour: int


class Axis:
    """Maps values onto a span of pixels, linear or logarithmic, with ticks at round numbers."""

    def __init__(self, low: float, high: float, title: str, label: Label, *, log: bool = False, ticks: int = 6, base: Sequence[float] = (1, 2, 5, 10)) -> None:
        self.title = title
        self.label = label
        self.log = log
        if log:
            low = max(low, high * 1e-6, 1e-12)
            high = max(high, low * 10**LOG_DECADES_MIN)
            self.ticks = _log_ticks(low, high)
        else:
            high = high if high > low else low + 1.0
            self.ticks = _linear_ticks(low, high, ticks, base)
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        """The place of a value on the axis: 0 at the low end, 1 at the high end; values outside are put on the nearer end."""
        if self.log:
            value = max(value, self.low)
            part = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(max(part, 0.0), 1.0)


def _linear_ticks(low: float, high: float, wanted: int, base: Sequence[float]) -> list[float]:
    """Multiples of a round step within [low, high]."""
    rough = (high - low) / wanted
    power = 10.0 ** floor(log10(rough))
    step = next((factor * power for factor in base if factor * power >= rough * 0.999), base[-1] * power)
    return [index * step for index in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten within [low, high]; only powers of ten when there are many."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1, 2, 5) if log10(high / low) <= 3 else (1,)
    return [tick for power in powers for factor in factors if low * 0.999 <= (tick := factor * 10.0**power) <= high * 1.001]


def nice_top(values: Sequence[float]) -> float:
    """An upper end of a linear axis: a little above the highest value, at a round number."""
    highest = max(values, default=0.0)
    if highest <= 0.0:
        return 1.0
    power = 10.0 ** floor(log10(highest))
    return next(factor * power for factor in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12) if factor * power >= highest * 1.02)


class Plot:
    """A plot under construction. `name` is unique on the page; screen readers read `title` and `description`."""

    def __init__(self, name: str, title: str, description: str, x: Axis, y: Axis) -> None:
        self.name = name
        self.title = title
        self.description = description
        self.x = x
        self.y = y
        self._body: list[str] = []
        self._notes: list[str] = []  # drawn last, over the lines
        self._legend: list[tuple[str, int]] = []

    def add_line(self, line: Line) -> None:
        if not line.points:
            return
        self._legend.append((line.name, line.colour))
        places = [(self._px(x), self._py(y)) for x, y in line.points]
        if line.steps:
            places = [places[0], *(corner for (_, y0), (x1, y1) in pairwise(places) for corner in ((x1, y0), (x1, y1)))]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        if line.filled:
            floor_y = HEIGHT - BOTTOM
            self._body.append(f'<path class="area c{line.colour}" d="M{places[0][0]:.1f} {floor_y}L{path}L{places[-1][0]:.1f} {floor_y}Z"/>')
        if len(places) == 1:
            self._body.append(f'<circle class="dot c{line.colour}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
        else:
            self._body.append(f'<path class="line c{line.colour}" d="M{path}"/>')

    def add_dots(self, name: str, points: Points, colour: int) -> None:
        """A dot for each point."""
        self._legend.append((name, colour))
        path = "".join(f"M{self._px(x):.1f} {self._py(y):.1f}h0" for x, y in points)
        self._body.append(f'<path class="dots c{colour}" d="{path}"/>')

    def add_bars(self, edges: Sequence[float], layers: Sequence[Bars]) -> None:
        """Stack layers in order; `edges` has one entry more than each layer has heights."""
        base = [0.0] * (len(edges) - 1)
        for layer in layers:
            if not any(layer.heights):
                continue
            self._legend.append((layer.name, layer.colour))
            path = []
            for index, height in enumerate(layer.heights):
                if height > 0:
                    left, right = self._px(edges[index]), self._px(edges[index + 1])
                    gap = 1.0 if right - left > 4.0 else 0.0
                    low, high = self._py(base[index]), self._py(base[index] + height)
                    path.append(f"M{left:.1f} {low:.1f}V{high:.1f}H{right - gap:.1f}V{low:.1f}Z")
                    base[index] += height
            self._body.append(f'<path class="bar c{layer.colour}" d="{"".join(path)}"/>')

    def mark_x(self, value: float, text: str, row: int = 0) -> None:
        """A dashed upright line with a word beside it; `row` moves the word down."""
        x = self._px(value)
        left = x > WIDTH - RIGHT - 110
        anchor, dx = ("end", -4) if left else ("start", 4)
        self._body.append(f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        self._notes.append(f'<text class="note" x="{x + dx:.1f}" y="{HEIGHT - BOTTOM - 8 - 15 * row}" text-anchor="{anchor}">{escape(text)}</text>')

    def mark_span(self, begin: float, end: float, text: str, row: int = 0) -> None:
        """A shaded band over the time from `begin` to `end`, with a word at its top; `row` moves the word down."""
        left, right = self._px(begin), self._px(end)
        anchor, x = ("end", left - 3) if left > (LEFT + WIDTH) / 2 else ("start", left + 3)
        self._body.insert(0, f'<path class="span" d="M{left:.1f} {TOP}H{max(right, left + 1.0):.1f}V{HEIGHT - BOTTOM}H{left:.1f}Z"/>')
        self._notes.append(f'<text class="note" x="{x:.1f}" y="{TOP + 12 + 14 * row}" text-anchor="{anchor}">{escape(text)}</text>')

    def mark_y(self, value: float, text: str) -> None:
        """A dashed level line with a word above it."""
        y = self._py(value)
        self._body.append(f'<path class="mark" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        self._notes.append(f'<text class="note" x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}" text-anchor="end">{escape(text)}</text>')

    def render(self) -> str:
        """The figure: heading, legend and drawing."""
        legend = "".join(f'<li><span class="key c{colour}"></span>{escape(name)}</li>' for name, colour in self._legend)
        keys = f'<ul class="legend">{legend}</ul>' if len(self._legend) > 1 else ""
        return (
            f'<figure><figcaption><h3 id="{self.name}-t">{escape(self.title)}</h3><p id="{self.name}-d">{escape(self.description)}</p></figcaption>{keys}'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{self.name}-t {self.name}-d">'
            f"{self._grid()}{''.join(self._body)}{''.join(self._notes)}</svg></figure>\n"
        )

    def _px(self, value: float) -> float:
        return LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT)

    def _py(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM)

    def _grid(self) -> str:
        floor_y, parts = HEIGHT - BOTTOM, []
        for tick in self.y.ticks:
            y = self._py(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(self.y.label(tick))}</text>')
        for tick in self.x.ticks:
            x = self._px(tick)
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{floor_y}"/>')
            parts.append(f'<text x="{x:.1f}" y="{floor_y + 17}" text-anchor="middle">{escape(self.x.label(tick))}</text>')
        middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + floor_y) / 2
        parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor_y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="title" x="{middle_x:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(self.x.title)}</text>')
        turned = f'transform="rotate(-90 13 {middle_y:.0f})"'
        parts.append(f'<text class="title" x="13" y="{middle_y:.0f}" text-anchor="middle" {turned}>{escape(self.y.title)}</text>')
        return "".join(parts)
