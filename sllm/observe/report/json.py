"""The results as JSON, byte for byte the same for the same results, and what is wrong with results that are not as they should be."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

from sllm.observe.results import DISTRIBUTIONS, SCHEMA, WALL
from sllm.observe.statistics import STATISTICS

KEYS: dict[str, tuple[str, ...]] = {
    "run": (
        "mode", "architecture", "version", "workers", "hardware", "policy", "seed", "duration_s", "duration_asked_s", "warmup_s", "interrupted", "workload",
        "engine_profile", "loader", "settings",
    ),
    WALL: ("wall_s", "requests_per_wall_s", "clock_lag", "decision_s"),
    "requests": ("sent", "completed", "failed", "rejected", "in_flight", "duplicates"),
    "actions": ("serve", "cold_start", "migrate"),
    **dict.fromkeys(DISTRIBUTIONS, STATISTICS),
    "slo": ("ttft_s", "tpot_s", "attainment", "goodput"),
    "throughput": ("over_s", "requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "output_tokens"),
    "fleet": (
        "ready", "utilisation", "slot_occupancy", "kv_occupancy", "load_imbalance", "cold_start_rate", "model_hit_rate", "loads", "loads_by_tier",
        "load_mean_s",
    ),
    "reasons": ("failed", "rejected", "retried"),
    "series": ("bin_s", "at_s"),
    "reports": ("sent", "accepted", "lost", "under_way", "rejected"),
    "invariants": ("checked", "violations"),
}  # fmt: skip
ROWS = ("models", "workers")  # sections that are lists of objects
TOP_KEYS = ("schema", *list(KEYS)[:-4], *ROWS, *list(KEYS)[-4:])
NOT_OF_ALL = ("stall_s",)  # distributions that not every completed request has a part in
TEXTS = {("run", "mode"), ("run", "architecture"), ("run", "policy")}
TEXTS_OR_EMPTY = {("run", "version")}
TEXTS_OR_NULL = {("run", "engine_profile"), ("run", "loader")}
COUNTS = {
    ("run", "workers"), ("run", "seed"), ("fleet", "ready"), ("fleet", "loads"), ("invariants", "checked"), ("throughput", "output_tokens"),
    *(("requests", key) for key in KEYS["requests"]), *(("actions", key) for key in KEYS["actions"]), *(("reports", key) for key in KEYS["reports"][:4]),
}  # fmt: skip
COUNTS_BY_NAME = {("run", "hardware"), ("reports", "rejected"), ("fleet", "loads_by_tier"), *(("reasons", key) for key in KEYS["reasons"])}
FRACTIONS = {
    ("slo", "attainment"), *(("fleet", key) for key in ("utilisation", "slot_occupancy", "kv_occupancy", "cold_start_rate", "model_hit_rate")),
}  # fmt: skip
MAPPINGS = {("run", "workload"), ("run", "settings"), *COUNTS_BY_NAME}
LISTS = {("series", "at_s")}
DISTRIBUTED = {(WALL, "decision_s")}  # distributions inside a section
REQUIRED = {("run", "duration_s"), ("run", "warmup_s"), (WALL, "wall_s"), (WALL, "requests_per_wall_s"), (WALL, "clock_lag"), ("slo", "ttft_s")}  # never null
TOLERANCE = 1e-6  # relative; figures are rounded


def to_json(results: dict[str, Any]) -> str:
    """The results as text, keys in their order, with a newline at the end. ValueError for a number that JSON does not know."""
    return json.dumps(results, indent=2, separators=(",", ": "), allow_nan=False) + "\n"


def validate_results(results: Any) -> list[str]:
    """Everything that is wrong with results of schema 2, one line each; empty: nothing is. Keys that it does not know are passed
    over: a later version may have added them."""
    if not isinstance(results, dict):
        return ["the results are not an object"]
    wrong = _check_keys("results", results, TOP_KEYS)
    if results.get("schema") != SCHEMA:
        wrong.append(f"schema: {results.get('schema')!r} is not {SCHEMA}")
    wrong += [f"{name}: is not a list of objects" for name in ROWS if name in results and not _is_rows(results[name])]
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
    wrong = [f"{where}: {key!r} is missing" for key in keys if key not in content]
    known = [key for key in content if key in keys]
    if not wrong and known != list(keys):
        wrong.append(f"{where}: the keys are out of order: {', '.join(content)}")
    return wrong


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _check_value(section: str, key: str, value: Any) -> list[str]:
    path, where = (section, key), f"{section}.{key}: {value!r}"
    if path in TEXTS or (path in TEXTS_OR_NULL and value is not None):
        return [] if isinstance(value, str) and value else [f"{where} is not a text"]
    if path in TEXTS_OR_EMPTY:
        return [] if isinstance(value, str) else [f"{where} is not a text"]
    if path in LISTS:
        return [] if isinstance(value, list) else [f"{where} is not a list"]
    if path in DISTRIBUTED:
        return _check_keys(f"{section}.{key}", value, STATISTICS) if isinstance(value, dict) else [f"{where} is not an object"]
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
