"""A comparison as one HTML file without external parts, and as a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from experiments.comparison import DECIDES, QUANTILES, SHOWN, Estimate, Figure, Group, Row
from experiments.comparison_text import BEST, CUT_SHORT, legend, show
from sllm.observe.report.style import STYLE
from sllm.observe.report.svg import HEIGHT, WIDTH, Axis, Line, Plot, nice_top
from sllm.observe.report.text import count, rate

COLOURS = 6  # classes c1 to c6
CDFS_MAX = 12
LEGEND_LINE, LEGEND_COLUMN = 18, 150  # pixels of the picture's legend
PAGE_RULES = r"(?m)^(body|main|h1|h2|h3|header|figure|table|th|td|pre|\.tiles|\.tables|\.plots|\.wide|\.bad|\.cut|figcaption|thead|@media print).*\n"
"""Rules of the page's style sheet that a picture does not need."""
FIGURES = {figure.name: figure for figure in SHOWN}


class Curve(NamedTuple):
    """One candidate along an axis: the places on the axis, and the estimates there."""

    candidate: str
    points: Sequence[tuple[float, Estimate]]


class SpreadPlot(Plot):
    """A plot whose points have intervals."""

    def add_spread(self, x: float, low: float, high: float, colour: int) -> None:
        """An upright line from `low` to `high`."""
        place = self._px(x)
        self._body.append(f'<path class="line c{colour}" d="M{place:.1f} {self._py(low):.1f}V{self._py(high):.1f}"/>')


def time_label(value: float) -> str:
    """A tick of a time axis: 50 ms, 2 s."""
    return "0" if value == 0.0 else f"{value * 1000:,.4g} ms" if value < 0.9995 else f"{value:,.6g} s"


def plain_label(value: float) -> str:
    return f"{value:,.6g}"


def part_label(value: float) -> str:
    return f"{value * 100:.3g} %"


LABELS: dict[str, Callable[[float], str]] = {"s": time_label, "part": part_label, "number": plain_label}


def colour_of(candidate: str, groups: Sequence[Group]) -> int:
    names = list(dict.fromkeys(row.candidate for group in groups for row in group.rows))
    return names.index(candidate) % COLOURS + 1


# --- plots --------------------------------------------------------------------------------------------------------------------------


def cdf_plot(group: Group, groups: Sequence[Group], name: str) -> Plot | None:
    """The part of the requests whose first token came within a time, for each candidate; the time at each part is a mean over seeds."""
    rows = [row for row in group.rows if row.ttft_quantiles_s]
    if not rows:
        return None
    low, high = min(row.ttft_quantiles_s[0] for row in rows), max(row.ttft_quantiles_s[-1] for row in rows)
    x = Axis(low * 0.95, high * 1.05, "time to first token", time_label, log=True)
    y = Axis(0.0, 1.0, "part of completed requests", part_label, ticks=5)
    plot = Plot(name, "Time to first token", group.setting.describe(), x, y)
    for row in rows:
        points = [(value, percent / 100.0) for percent, value in zip(QUANTILES, row.ttft_quantiles_s, strict=True)]
        plot.add_line(Line(row.candidate, points, colour_of(row.candidate, groups)))
    return plot


class Swept(NamedTuple):
    """An axis that was varied, and the settings along the axis, which are otherwise equal."""

    title: str
    rest: str
    groups: Sequence[tuple[float, Group]]


SWEPT: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("rate_per_s", "requests a second", frozenset({"rate_per_s"})),
    ("workers", "workers", frozenset({"workers"})),
    ("workers", "workers", frozenset({"workers", "rate_per_s"})),  # each number of workers may have a rate of its own
    ("report_interval_s", "seconds between reports", frozenset({"report_interval_s"})),
)
"""Axes that settings may lie along: the field, its title, and the fields that differ along it."""


def sweeps(groups: Sequence[Group]) -> list[Swept]:
    """The settings along the first axis that has several settings."""
    for field, title, differing in SWEPT:
        lines: dict[object, dict[float, Group]] = {}
        for group in groups:
            value = getattr(group.setting, field)
            if value is not None:
                alike = tuple(other for key, other in group.setting._asdict().items() if key not in differing)
                lines.setdefault(alike, {})[float(value)] = group
        found = [sorted(line.items()) for line in lines.values() if len(line) > 1]
        if found:
            return [Swept(title, _rest(line[0][1], differing), line) for line in found]
    return []


def _rest(group: Group, differing: frozenset[str]) -> str:
    """The text of the fields that a line's settings have in common."""
    setting = group.setting
    words = {
        "workers": count(setting.workers, "worker"),
        "rate_per_s": setting.trace if setting.rate_per_s is None else rate(setting.rate_per_s),
        "report_interval_s": f"reports every {setting.report_interval_s:.12g} s",
    }
    return " · ".join(word for field, word in words.items() if field not in differing)


def sweep_plot(swept: Swept, figure: Figure, groups: Sequence[Group], name: str) -> Plot | None:
    """One figure along an axis, with the intervals of its means."""
    candidates = list(dict.fromkeys(row.candidate for _, group in swept.groups for row in group.rows))
    curves = [Curve(candidate, list(_points(swept, candidate, figure.name))) for candidate in candidates]
    means = [one.mean for curve in curves for _, one in curve.points]
    if not means:
        return None
    xs = [x for x, _ in swept.groups]
    log = figure.unit == "s" and min(means) > 0.0
    margin = 0.04 * (max(xs) - min(xs))
    x = Axis(max(0.0, min(xs) - margin), max(xs) + margin, swept.title, plain_label)
    low, high = (min(means) / 1.5, max(means) * 1.5) if log else (0.0, 1.0 if figure.unit == "part" else nice_top(means))
    y = Axis(low, high, figure.title, LABELS[figure.unit], log=log)
    plot = SpreadPlot(name, f"{figure.title} by {swept.title}", swept.rest, x, y)
    for curve in curves:
        colour = colour_of(curve.candidate, groups)
        plot.add_line(Line(curve.candidate, [(at, one.mean) for at, one in curve.points], colour))
        for at, one in curve.points:
            if one.half_width:
                plot.add_spread(at, one.mean - one.half_width, one.mean + one.half_width, colour)
    return plot


def _points(swept: Swept, candidate: str, name: str) -> Iterable[tuple[float, Estimate]]:
    for at, group in swept.groups:
        for row in group.rows:
            if row.candidate == candidate and (found := row.means.get(name)) is not None:
                yield at, found


def plots_of(groups: Sequence[Group]) -> list[Plot]:
    plots: list[Plot | None] = []
    for number, swept in enumerate(sweeps(groups)):
        for name in ("ttft_p99_s", "attainment", "cold_starts", "completed"):
            plots.append(sweep_plot(swept, FIGURES[name], groups, f"sweep{number}-{name}"))
    plots += [cdf_plot(group, groups, f"cdf{number}") for number, group in enumerate(groups[:CDFS_MAX])]
    return [plot for plot in plots if plot is not None]


# --- the page -----------------------------------------------------------------------------------------------------------------------


def render_html(groups: Sequence[Group], command: str, *, interrupted: bool = False) -> str:
    """The page: a table for each setting, then the plots."""
    candidates = list(dict.fromkeys(row.candidate for group in groups for row in group.rows))
    title = f"{', '.join(candidates[:4])}{' and others' if len(candidates) > 4 else ''} compared"
    cut = '<section class="cut" role="alert"><p>' + CUT_SHORT + "</p></section>\n" if interrupted else ""
    tables = "".join(_table(group) for group in groups)
    plots = "".join(plot.render() for plot in plots_of(groups))
    notes = "".join(f"<p>{escape(line)}</p>" for line in legend(groups).splitlines())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"<header><h1>{escape(title)}</h1>{notes}</header>\n{cut}"
        f'<section class="tables" style="margin-top:22px">\n{tables}</section>\n<section aria-label="Plots" class="plots">\n{plots}</section>\n'
        f"<section><h2>Repeat this comparison</h2><pre><code>{escape(command)}</code></pre></section>\n</main>\n</body>\n</html>\n"
    )


def _table(group: Group) -> str:
    first = group.rows[0].candidate
    titles = [*(figure.title for figure in SHOWN), *([f"{DECIDES.title} against {first}"] if len(group.rows) > 1 else [])]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in titles)
    body = "".join(_line(row, group) for row in group.rows)
    seeds = count(max(row.seeds for row in group.rows), "seed")
    return (
        f'<div class="wide"><h2>{escape(group.setting.describe())} · {seeds}</h2>'
        f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def _line(row: Row, group: Group) -> str:
    cells = ""
    for figure in SHOWN:
        text = escape(show(row.means.get(figure.name), figure))
        cells += f"<td><strong>{text}{BEST}</strong></td>" if figure.name in row.best_at else f"<td>{text}</td>"
    if len(group.rows) > 1:
        cells += f"<td>{'' if row is group.rows[0] else escape(show(row.against_first.get(DECIDES.name), DECIDES, sign=True))}</td>"
    return f'<tr><th scope="row">{escape(row.candidate)}</th>{cells}</tr>'


# --- the picture --------------------------------------------------------------------------------------------------------------------


def render_svg(groups: Sequence[Group]) -> str:
    """The distribution of the first setting as a separate SVG file with its legend; an empty picture if there is nothing to show."""
    plot = cdf_plot(groups[0], groups, "cdf") if groups else None
    drawing = plot.render() if plot is not None else ""
    found = re.search(r"<svg[^>]*>(.*)</svg>", drawing, re.DOTALL)
    names = [row.candidate for row in groups[0].rows if row.ttft_quantiles_s] if groups else []
    columns = WIDTH // LEGEND_COLUMN
    keys = []
    for place, name in enumerate(names):
        x, y = 20 + place % columns * LEGEND_COLUMN, 16 + place // columns * LEGEND_LINE
        keys.append(f'<rect class="bar c{colour_of(name, groups)}" x="{x}" y="{y - 6}" width="14" height="4"/>')
        keys.append(f'<text x="{x + 20}" y="{y}">{escape(name)}</text>')
    top = 12 + LEGEND_LINE * (-(-len(names) // columns))
    label = escape(f"Time to first token, part of completed requests: {groups[0].setting.describe()}") if groups else ""
    style = re.sub(PAGE_RULES, "", STYLE)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT + top}" width="{WIDTH}" height="{HEIGHT + top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">\n'
        f"<style>\n{style}svg {{ font-family: system-ui, sans-serif; padding: 0; }}\n</style>\n"
        f'<rect width="100%" height="100%" style="fill: var(--card)"/>\n{"".join(keys)}\n'
        f'<g transform="translate(0 {top})">{found[1] if found else ""}</g>\n</svg>\n'
    )
