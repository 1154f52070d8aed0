"""Figures of a run by short names, and thresholds on them that say when a run has failed: `ttft_p99>2`, `attainment<0.99`, `failed>0`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sllm.observe.results import DISTRIBUTIONS, SECTIONS
from sllm.observe.statistics import STATISTICS
from sllm.protocol.errors import UsageError

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
WITH_THRESHOLDS = ("requests", "slo", "throughput", "fleet", "actions", "reports")  # sections, in the order in which --help lists their figures
FIGURES: dict[str, tuple[str, str]] = {
    **{f"{name.removesuffix('_s')}_{statistic}": (name, statistic) for name in DISTRIBUTIONS for statistic in STATISTICS},
    **{figure.threshold: (section, key) for section in WITH_THRESHOLDS for key, figure in SECTIONS[section].items() if figure.threshold},
}  # fmt: skip
"""Section and key in the results, by name. Times in seconds, parts from 0 to 1, `requests`, `prompt_tokens` and `output_tokens` a second."""
_EXPRESSION = re.compile(r"\s*([a-z0-9_]+)\s*(>=|<=|==|!=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


class Threshold(NamedTuple):
    """A run fails if the figure compares so with the limit."""

    text: str
    figure: str
    comparison: str
    limit: float

    def value(self, results: Mapping[str, Any]) -> float | None:
        section, key = FIGURES[self.figure]
        value: float | None = results[section][key]
        return value

    def is_missed(self, results: Mapping[str, Any]) -> bool:
        """Whether the run failed by it. A figure that there is none of (the TTFT of no requests) misses every threshold: nothing was shown."""
        value = self.value(results)
        return value is None or COMPARISONS[self.comparison](value, self.limit)


def parse_thresholds(text: str, label: str = "--fail-if") -> list[Threshold]:
    """Expressions FIGURE COMPARISON NUMBER, separated by commas. UsageError says what is wrong with one, and which figures there are."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _EXPRESSION.fullmatch(part)
        if match is None:
            raise UsageError(f"{label} {part!r}: must be FIGURE, one of {' '.join(COMPARISONS)}, and a number, as in ttft_p99>2")
        figure, comparison, limit = match.groups()
        if figure not in FIGURES:
            raise UsageError(f"{label} {part!r}: there is no figure {figure!r}; there are {', '.join(FIGURES)}")
        found.append(Threshold(part, figure, comparison, float(limit)))
    return found


def judge(thresholds: list[Threshold], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How each threshold came out, as it goes into the results."""
    return [{"fail_if": one.text, "value": one.value(results), "missed": one.is_missed(results)} for one in thresholds]
