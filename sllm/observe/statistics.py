"""Statistics, rounded to the digits that go into results.

Percentiles interpolate linearly between the two nearest order statistics: of n sorted values, percentile p lies at index (n - 1) * p / 100. That is the
`inclusive` method of `statistics.quantiles` and the default of most tools. A statistic of no values is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum, isfinite
from typing import Any

SIGNIFICANT_DIGITS = 9  # of a float in the results: a nanosecond in a second, and no noise of the last bits
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")

Statistics = dict[str, float | None]


def percentile(ordered: Sequence[float], percent: int) -> float | None:
    """The percentile of sorted values, by linear interpolation; None if there are no values. `percent` is a whole number from 0 to 100."""
    if not ordered:
        return None
    index, part = divmod((len(ordered) - 1) * percent, 100)
    if part == 0:
        return ordered[index]
    low, high = ordered[index], ordered[index + 1]
    return low + (high - low) * (part / 100.0)


def summarize(values: Sequence[float]) -> Statistics:
    """Mean, percentiles and maximum of values in any order, rounded; None for each if there are none."""
    ordered = sorted(values)
    summary: Statistics = {"mean": fsum(ordered) / len(ordered) if ordered else None}
    for name in STATISTICS[1:-1]:
        summary[name] = percentile(ordered, int(name[1:]))
    summary["max"] = ordered[-1] if ordered else None
    return {name: value if value is None else rounded(value) for name, value in summary.items()}


def rounded(value: float) -> float:
    """A float with the digits that go into the results."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def ratio(part: float, whole: float) -> float | None:
    """part / whole, rounded; None if `whole` is not above 0."""
    return rounded(part / whole) if whole > 0 else None


def rounded_tree(value: Any) -> Any:
    """The tree with every float rounded, tuples as lists, and NaN and infinities as None."""
    if isinstance(value, float):
        return rounded(value) if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded_tree(item) for item in value]
    return value
