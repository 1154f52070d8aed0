"""The results as JSON, byte for byte equal for equal results, and the validation of results."""

from __future__ import annotations

import json
from typing import Any

from sllm.observe.results import DISTRIBUTIONS, SCHEMA, SECTIONS, TOP_KEYS
from sllm.observe.statistics import STATISTICS
from sllm.observe.values import Check, a_list, check_keys, number_or_null

ROWS = ("models", "workers")  # sections that are lists of objects
CHECKS: dict[str, dict[str, Check]] = {
    **{section: {key: figure.check for key, figure in figures.items()} for section, figures in SECTIONS.items()},
    **{name: dict.fromkeys(STATISTICS, number_or_null) for name in DISTRIBUTIONS},
    "series": {"bin_s": number_or_null, "at_s": a_list},
}
"""The check of each value, by section and key. A section may have further keys."""
NOT_OF_ALL = ("stall_s",)  # distributions that do not have a value of every completed request
TOLERANCE = 1e-6  # relative; figures are rounded


def to_json(results: dict[str, Any]) -> str:
    """The results as text, keys in their order, with a newline at the end. ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(results, indent=2, separators=(",", ": "), allow_nan=False) + "\n"


def validate_results(results: Any) -> list[str]:
    """All errors in results of schema 2, one line each; empty for valid results. Unknown keys are ignored, because a later version may have
    added them."""
    if not isinstance(results, dict):
        return ["the results are not an object"]
    wrong = check_keys("results", results, TOP_KEYS)
    if results.get("schema") != SCHEMA:
        wrong.append(f"schema: {results.get('schema')!r} is not {SCHEMA}")
    wrong += [f"{name}: is not a list of objects" for name in ROWS if name in results and not _is_rows(results[name])]
    for section in TOP_KEYS:
        if section in results and section in CHECKS:
            wrong += _check_section(section, results[section])
    return wrong or [*_check_books(results), *_check_distributions(results)]


def _check_section(section: str, content: Any) -> list[str]:
    if not isinstance(content, dict):
        return [f"{section}: is not an object"]
    checks = CHECKS[section]
    wrong = check_keys(section, content, tuple(checks))
    return wrong + [problem for key, check in checks.items() if key in content for problem in check(f"{section}.{key}", content[key])]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _check_books(results: dict[str, Any]) -> list[str]:
    """Errors in the sums of counts: requests, reports, placements."""
    wrong = []
    requests, reports, actions = results["requests"], results["reports"], results["actions"]
    ends = ("completed", "failed", "rejected", "in_flight")
    if requests["sent"] != sum(requests[key] for key in ends):
        wrong.append(f"requests: sent {requests['sent']} is not " + " + ".join(f"{key} {requests[key]}" for key in ends))
    rejected = sum(reports["rejected"].values())
    if reports["sent"] != reports["accepted"] + reports["lost"] + reports["under_way"] + rejected:
        unheard = f"lost {reports['lost']} + under way {reports['under_way']}"
        wrong.append(f"reports: sent {reports['sent']} is not accepted {reports['accepted']} + {unheard} + rejected {rejected}")
    placed, rate = sum(actions.values()), results["fleet"]["cold_start_rate"]
    if placed < requests["completed"]:
        wrong.append(f"actions: {placed} placements for {requests['completed']} completed requests")
    if (rate is None) != (placed == 0) or (placed and abs(rate * placed - actions["cold_start"]) > TOLERANCE * placed):
        wrong.append(f"fleet.cold_start_rate: {rate} is not {actions['cold_start']} of {placed} placements")
    if results["fleet"]["ready"] > results["run"]["workers"]:
        wrong.append(f"fleet.ready: {results['fleet']['ready']} of {results['run']['workers']} workers")
    imbalance = results["fleet"]["load_imbalance"]
    if imbalance is not None and imbalance < 1.0 - TOLERANCE:
        wrong.append(f"fleet.load_imbalance: {imbalance} is below 1")
    return wrong


def _check_distributions(results: dict[str, Any]) -> list[str]:
    """Errors unless percentiles grow, the mean is not above the maximum, and figures are there exactly if there were requests."""
    wrong = []
    completed = results["requests"]["completed"]
    may_lack = DISTRIBUTIONS if results["run"]["warmup_s"] else NOT_OF_ALL  # all may have arrived in the warm-up
    for name in DISTRIBUTIONS:
        values = [results[name][key] for key in STATISTICS]
        if None in values:
            if any(value is not None for value in values):
                wrong.append(f"{name}: some figures are null, others are not")
            elif completed and name not in may_lack:
                wrong.append(f"{name}: null though {completed} requests were completed")
            continue
        if not completed and name not in NOT_OF_ALL:
            wrong.append(f"{name}: figures though no request was completed")
        mean, *ordered = values
        if ordered != sorted(ordered):
            wrong.append(f"{name}: percentiles do not grow: {ordered}")
        if mean > ordered[-1] * (1.0 + TOLERANCE):
            wrong.append(f"{name}: mean {mean} is above the maximum {ordered[-1]}")
    return wrong
