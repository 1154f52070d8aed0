"""The results as JSON, byte for byte the same for the same results, and what is wrong with results that are not as they should be."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

from sllm.results import DISTRIBUTIONS, SCHEMA, STATISTICS

KEYS: dict[str, tuple[str, ...]] = {
    "run": (
        "mode", "architecture", "workers", "hardware", "policy", "seed", "duration_s", "duration_asked_s", "interrupted", "wall_s", "requests_per_wall_s",
        "workload", "engine_profile", "loader",
    ),
    "requests": ("sent", "completed", "failed", "rejected", "in_flight", "duplicates"),
    "actions": ("serve", "cold_start", "migrate"),
    **dict.fromkeys(DISTRIBUTIONS, STATISTICS),
    "slo": ("ttft_s", "attainment"),
    "fleet": ("ready", "utilisation", "load_imbalance", "cold_start_rate", "model_hit_rate"),
    "reports": ("sent", "accepted", "lost", "under_way", "rejected"),
    "invariants": ("checked", "violations"),
}  # fmt: skip
NOT_OF_ALL = ("stall_s", "decision_s")  # distributions that not every completed request has a part in
TOP_KEYS = ("schema", *KEYS)
TEXTS = {("run", "mode"), ("run", "architecture"), ("run", "policy")}
TEXTS_OR_NULL = {("run", "engine_profile"), ("run", "loader")}
COUNTS = {
    ("run", "workers"), ("run", "seed"), ("fleet", "ready"), ("invariants", "checked"),
    *(("requests", key) for key in KEYS["requests"]), *(("actions", key) for key in KEYS["actions"]), *(("reports", key) for key in KEYS["reports"][:4]),
}  # fmt: skip
COUNTS_BY_NAME = {("run", "hardware"), ("reports", "rejected")}
FRACTIONS = {("slo", "attainment"), ("fleet", "utilisation"), ("fleet", "cold_start_rate"), ("fleet", "model_hit_rate")}
MAPPINGS = {("run", "workload"), *COUNTS_BY_NAME}
REQUIRED = {("run", "duration_s"), ("run", "wall_s"), ("run", "requests_per_wall_s"), ("slo", "ttft_s")}  # numbers that are never null
TOLERANCE = 1e-6  # relative; figures are rounded


def to_json(results: dict[str, Any]) -> str:
    """The results as text, keys in their order, with a newline at the end. ValueError for a number that JSON does not know."""
    return json.dumps(results, indent=2, separators=(",", ": "), allow_nan=False) + "\n"


def validate_results(results: Any) -> list[str]:
    """Everything that is wrong with results of schema 1, one line each; empty: nothing is."""
    if not isinstance(results, dict):
        return ["the results are not an object"]
    wrong = _check_keys("results", results, TOP_KEYS)
    if results.get("schema") != SCHEMA:
        wrong.append(f"schema: {results.get('schema')!r} is not {SCHEMA}")
    for section, keys in KEYS.items():
        content = results.get(section)
        if not isinstance(content, dict):
            if section in results:
                wrong.append(f"{section}: is not an object")
            continue
        wrong += _check_keys(section, content, keys)
        for key in keys:
            if key in content:
                wrong += _check_value(section, key, content[key])
    return wrong or [*_check_books(results), *_check_distributions(results)]


def _check_keys(where: str, content: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    missing = [key for key in keys if key not in content]
    unknown = [key for key in content if key not in keys]
    wrong = [f"{where}: {key!r} is missing" for key in missing] + [f"{where}: {key!r} is not of the schema" for key in unknown]
    if not wrong and tuple(content) != keys:
        wrong.append(f"{where}: the keys are out of order: {', '.join(content)}")
    return wrong


def _check_value(section: str, key: str, value: Any) -> list[str]:
    path, where = (section, key), f"{section}.{key}: {value!r}"
    if path in TEXTS or (path in TEXTS_OR_NULL and value is not None):
        return [] if isinstance(value, str) and value else [f"{where} is not a text"]
    if path in COUNTS:
        return [] if _is_count(value) else [f"{where} is not a whole number of at least 0"]
    if path in MAPPINGS:
        if not isinstance(value, dict):
            return [f"{where} is not an object"]
        return [f"{where}: {count!r} is not a whole number above 0" for count in value.values() if path in COUNTS_BY_NAME and not (_is_count(count) and count)]
    if path == ("run", "interrupted"):
        return [] if isinstance(value, bool) else [f"{where} is neither true nor false"]
    if path == ("invariants", "violations"):
        return [] if isinstance(value, list) and all(isinstance(item, str) for item in value) else [f"{where} is not a list of texts"]
    if value is None and path not in REQUIRED:
        return []
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        return [f"{where} is not a number of at least 0"]
    return [f"{where} is above 1"] if path in FRACTIONS and value > 1 else []


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_books(results: dict[str, Any]) -> list[str]:
    """What went in came out or is still there."""
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
    """Percentiles grow, the mean is not above the maximum, and there are figures exactly if there were requests."""
    wrong = []
    completed = results["requests"]["completed"]
    for name in DISTRIBUTIONS:
        values = [results[name][key] for key in STATISTICS]
        if None in values:
            if any(value is not None for value in values):
                wrong.append(f"{name}: some figures are null, others are not")
            elif completed and name not in NOT_OF_ALL:
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
