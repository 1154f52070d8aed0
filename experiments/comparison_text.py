"""A comparison as a table for terminals, and as rows of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from experiments.comparison import DECIDES, SHOWN, Estimate, Figure, Group
from sllm.observe.report.text import BOLD, GREEN, YELLOW, count, paint

BEST = " *"
CUT_SHORT = "Interrupted: not every run was made."
COLUMNS = (
    "workers", "rate_per_s", "trace", "report_interval_s", "candidate", "figure", "seeds", "mean", "half_width", "difference", "difference_half_width", "best",
)  # fmt: skip


def render_table(groups: Sequence[Group], *, colour: bool = False, interrupted: bool = False) -> str:
    """One block for each setting: means with their intervals, and differences to the first candidate."""
    cut = [paint(CUT_SHORT, YELLOW, colour)] if interrupted else []
    return "\n\n".join([*cut, *(_block(group, colour) for group in groups), legend(groups)])


def legend(groups: Sequence[Group]) -> str:
    seeds = max((row.seeds for group in groups for row in group.rows), default=0)
    lines = ["TTFT: of completed requests. In time: first token within the target, of all requests; one that failed had none."]
    if seeds > 1:
        of_files = any(group.setting.more for group in groups)
        served = "That both files have the same workload is for you to know" if of_files else "Every candidate served the same requests"
        lines.append(f"±: 95 % interval of the mean over seeds (Student's t). {served}; differences are taken seed by seed.")
        lines.append("*: better than every other by a difference whose interval leaves out zero.")
    else:
        lines.append("One seed: no intervals, and nobody is called best. --seeds 5 has both.")
    return "\n".join(lines)


def show(estimate: Estimate | None, figure: Figure, *, sign: bool = False) -> str:
    """A mean and the half width of its interval; a dash for a figure that was not measured."""
    if estimate is None:
        return "—"
    mean = ("+" if estimate.mean > 0 else "-" if estimate.mean < 0 else "") * sign + figure.show(abs(estimate.mean) if sign else estimate.mean)
    return mean if estimate.half_width is None else f"{mean} ± {figure.show(estimate.half_width)}"


def _block(group: Group, colour: bool) -> str:
    first = group.rows[0].candidate
    seeds = sorted({row.seeds for row in group.rows})
    title = f"{group.setting.describe()} · {f'{seeds[0]} to ' if len(seeds) > 1 else ''}{count(seeds[-1], 'seed')}"
    table = [["", *(figure.title for figure in SHOWN), *([f"{DECIDES.title} against {first}"] if len(group.rows) > 1 else [])]]
    for row in group.rows:
        cells = [show(row.means.get(figure.name), figure) + (BEST if figure.name in row.best_at else "") for figure in SHOWN]
        if len(group.rows) > 1:
            cells.append("" if row.candidate == first else show(row.against_first.get(DECIDES.name), DECIDES, sign=True))
        table.append([row.candidate, *cells])
    widths = [max(len(line[column].removesuffix(BEST)) for line in table) for column in range(len(table[0]))]
    lines = [paint(title, BOLD, colour)]
    for index, line in enumerate(table):
        text = line[0].ljust(widths[0])
        for cell, width in zip(line[1:], widths[1:], strict=True):
            plain = cell.removesuffix(BEST)
            padded = " " * (width - len(plain)) + plain + (BEST if plain != cell else "  ")
            text += "  " + (paint(padded, GREEN, colour) if plain != cell else padded)
        lines.append(paint(text.rstrip(), BOLD, colour and index == 0))
    return "\n".join(lines)


def render_csv(groups: Sequence[Group]) -> str:
    """One row for each setting, candidate and figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for group in groups:
        setting = group.setting
        for row in group.rows:
            for name, mean in row.means.items():
                other = row.against_first.get(name)
                writer.writerow([
                    setting.workers, setting.rate_per_s, setting.trace, setting.report_interval_s, row.candidate, name, row.seeds,
                    *_pair(mean), *_pair(other), int(name in row.best_at),
                ])  # fmt: skip
    return out.getvalue()


def _pair(estimate: Estimate | None) -> tuple[float | None, float | None]:
    return (None, None) if estimate is None else (estimate.mean, estimate.half_width)
