#!/usr/bin/env python3
"""Published measurements of real engines against the simulator: step times, first tokens, throughput and loads.

    python3 experiments/engines.py DIR                                 DIR holds serving.csv and loading.csv; each row under its generation's profile
    python3 experiments/engines.py DIR --engine-profile splitwise      all rows under one profile
    python3 experiments/engines.py DIR --rows                          every row, not only sums
    python3 experiments/engines.py DIR --write                         the sums go into docs/validation.md

Each row of serving.csv that the presets cover is simulated with the engine that workers run (`LlmEngine`), under the load it was measured under: a batch
sent at one instant, a closed loop, or requests at a constant rate. Which rows those are is decided by the rules in `left_out`, which know the circumstances
of a measurement and never its value. No row is dropped for its error. Exit status: 0, or 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import re
import sys
from collections import Counter, deque
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from experiments.harness import ROOT, replace_section
from sllm.engine import LlmEngine
from sllm.engine.base import Finished, FirstTokenOut, RequestTooLarge
from sllm.models.catalogue import Catalog
from sllm.models.cost import load_s
from sllm.models.model import DISK, HOST
from sllm.models.presets import MODELS as PRESETS
from sllm.models.profiles import ENGINE_PROFILES, LOADER_PROFILES
from sllm.observe.report.standard import run_script
from sllm.protocol.errors import UsageError

DOCUMENT = ROOT / "docs" / "validation.md"
Row = dict[str, str]

MODELS = {
    "Llama-3-8B": "llama-3.1-8b", "Llama-3.1-8B": "llama-3.1-8b", "Llama-2-7B": "llama-2-7b", "Llama-2-13B": "llama-2-13b", "Mistral-7B": "mistral-7b",
    "Qwen2-7B": "qwen2.5-7b", "Qwen2.5-7B": "qwen2.5-7b", "Qwen3-32B": "qwen3-32b", "Llama-2-70B": "llama-2-70b", "Llama-3-70B": "llama-3-70b",
    "Llama-3.1-70B": "llama-3-70b", "Llama-3.3-70B": "llama-3-70b", "Qwen2-72B": "qwen2-72b", "OPT-6.7B": "opt-6.7b",
}  # fmt: skip
"""Models of the tables and the presets of the same shape."""
GPUS = {
    "H100-SXM-80GB": "h100-80g", "A100-SXM-80GB": "a100-80g", "A100-40GB": "a100-40g", "A100-SXM-40GB": "a100-40g",
    "A800-SXM-80GB": "a100-80g",  # an A100 with a slower NVLink
}  # fmt: skip
LOAD_HOSTS = {
    "H100-SXM-80GB": "h100-80g", "H100-NVL (node n1)": "h100-80g", "A5000-24GB": "a5000-24g", "A100-80GB class (16 GB/s PCIe host not stated)": "a100-80g",
}  # fmt: skip
METRICS = ("ttft_p50", "tpot_p50", "tpot_mean", "itl_p50", "itl_fit", "output_throughput")  # and e2e_mean of a static batch
PACES = ("tpot_p50", "tpot_mean", "itl_p50", "itl_fit")
CLOSED_ROUNDS = 8  # requests of each place of a closed loop, of which the first is left out
RATE_S = 20.0  # of constant arrivals; the source had 60 s
IN_FLIGHT_MAX = 440  # limit of the source's client at a constant rate (notes)
SATURATED_BELOW = 0.95  # an engine that completes a smaller part of the offered rate counts as saturated


class Outcome(NamedTuple):
    """The figures of a simulated measurement, in seconds and output tokens a second."""

    ttft_s: list[float]
    pace_s: list[float]  # per further token
    end_s: float  # from the first request to the last token
    tokens_per_s: float


class Compared(NamedTuple):
    """One row of a table, with the measured and the simulated value."""

    group: str
    text: str
    measured: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1.0


# --- which rows -----------------------------------------------------------------------------------------------------------------------


def hardware_name(row: Row) -> str:
    return GPUS[row["hardware"]] + ("" if row["tp"] == "1" else f"-tp{row['tp']}")


def tokens(text: str) -> int:
    """A mean length; 0 if the table has none."""
    found = re.match(r"~?(\d+(?:\.\d+)?)", text)
    return round(float(found[1])) if found else 0


def left_out(row: Row, rates: dict[tuple[str, str], float]) -> str:
    """Why a row of serving.csv is not compared; "" if it is compared. The first rule that applies counts. `rates`: completed requests a second by source and
    point."""
    metric, throughput = row["metric"], row["metric"] == "output_throughput"
    lone_pace = metric in PACES and row["load_kind"] == "concurrency" and row["load"] == "1"
    open_loop = row["load_kind"] == "rate_req_s"
    saturated = open_loop and rates.get((row["source_id"], row["point"]), 0.0) < SATURATED_BELOW * float(row["load"])
    wanted = metric == "e2e_mean" if row["mode"] == "static batch" else metric in METRICS
    rules = (
        ("another engine than vLLM", row["engine"] != "vLLM"),
        ("weights or KV cache not of 16 bits", row["precision"] not in ("BF16", "FP16", "BF16 weights, BF16 KV")),
        ("no preset of the model", row["model"] not in MODELS),
        ("no preset of the GPU", row["hardware"] not in GPUS),
        ("a percentile above the median, or a figure that others of the same measurement imply", not wanted),
        ("prefix cache on, and not the pace of one request at a time", row["prefix_cache"][:2] == "on" and not lone_pace),
        ("Poisson arrivals of requests whose lengths are known by their mean only", row["mode"] == "open loop Poisson"),
        ("lengths not in the table", not tokens(row["input_tokens"]) or not tokens(row["output_tokens"])),
        ("throughput of an open loop that keeps up: it is the rate that was offered", open_loop and throughput and not saturated),
        ("first token of an open loop that does not keep up: its client's limit and its throughput imply it", saturated and metric == "ttft_p50"),
    )
    return next((why for why, holds in rules if holds), "")


# --- simulated measurements -------------------------------------------------------------------------------------------------------------


def simulate(row: Row, catalog: Catalog) -> Outcome:
    """The row's measurement with the workers' engine."""
    model, prompt, output = MODELS[row["model"]], tokens(row["input_tokens"]), tokens(row["output_tokens"])
    load = float(row["load"])
    slots = re.search(r"max_num_seqs (\d+)", row["notes"])
    if row["load_kind"] == "rate_req_s":
        arrivals, in_flight = [i / load for i in range(max(20, round(load * RATE_S)))], IN_FLIGHT_MAX
    elif row["load_kind"] == "concurrency":
        arrivals, in_flight = [0.0] * (round(load) * CLOSED_ROUNDS if load > 1 else 1), round(load)
    else:
        arrivals, in_flight = [0.0] * round(load), round(load)
    engine = LlmEngine(Catalog({model: catalog[model]}), catalog.get_hardware(hardware_name(row)), slots=int(slots[1]) if slots else None)
    return drive(engine, model, prompt, output, deque(arrivals), in_flight, warm_up=in_flight if len(arrivals) > in_flight else 0)


def drive(engine: LlmEngine, model: str, prompt: int, output: int, arrivals: deque[float], in_flight_max: int, warm_up: int) -> Outcome:
    """Send each request at its time, with at most `in_flight_max` requests in flight; the first `warm_up` requests do not count.
    In a closed loop the first request of each place is shorter, so that places are out of step as with differing lengths."""
    engine.load(0.0, model)
    begin = engine.next_at  # when the model is loaded
    engine.advance(begin)
    count = len(arrivals)
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    now = begin
    closed = count > in_flight_max and arrivals[-1] == 0.0
    while len(last) < count:
        while arrivals and begin + arrivals[0] <= now and len(sent) - len(last) < in_flight_max:
            arrivals.popleft()
            request_id = str(len(sent))
            sent[request_id] = now
            share = (len(sent) / in_flight_max) if closed and len(sent) < in_flight_max else 1.0
            engine.submit(now, request_id, model, prompt, max(1, round(share * output)))
        room = len(sent) - len(last) < in_flight_max
        now = min(engine.next_at, max(now, begin + arrivals[0]) if arrivals and room else inf)
        for note in engine.advance(now):
            if isinstance(note, FirstTokenOut):
                first[note.request_id] = note.at
            elif isinstance(note, Finished):
                last[note.request_id] = note.at
    counted = list(sent)[warm_up:]
    return Outcome(
        [first[name] - sent[name] for name in counted],
        [(last[name] - first[name]) / max(1, output - 1) for name in counted],
        max(last.values()) - begin,
        len(counted) * output / (max(last.values()) - min(sent[name] for name in counted)),
    )


def figure(outcome: Outcome, metric: str) -> float:
    if metric == "ttft_p50":
        return median(outcome.ttft_s)
    if metric == "output_throughput":
        return outcome.tokens_per_s
    if metric == "e2e_mean":  # of a static batch: until all of it is there
        return outcome.end_s
    return mean(outcome.pace_s) if metric == "tpot_mean" else median(outcome.pace_s)


# --- comparisons ----------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def generation(row: Row) -> str:
    """The engine profile of the row's engine: vLLM's second core came in 2025."""
    return "cuda_graphs" if "V1" in row["version"] else "vllm_v0"


GENERATIONS = {"cuda_graphs": "vLLM V1, 2025 and 2026", "vllm_v0": "vLLM V0, mostly 2024"}


def compare_serving(rows: Sequence[Row], catalog: Catalog, profile: str = "") -> tuple[list[Compared], Counter[str]]:
    """Every row that no rule leaves out, and the number of rows left out by reason. `profile`: of all simulated engines; empty: of each row's generation."""
    catalogs = {name: catalog.with_profiles(name, "") for name in ENGINE_PROFILES}
    rates = {(row["source_id"], row["point"]): float(row["value"]) for row in rows if row["metric"] == "request_throughput"}
    outcomes: dict[tuple[str, ...], Outcome | None] = {}
    compared, reasons = [], Counter[str]()
    for row in rows:
        reason = left_out(row, rates)
        if not reason:
            key = tuple(row[name] for name in ("version", "model", "hardware", "tp", "load_kind", "load", "input_tokens", "output_tokens", "notes"))
            if key not in outcomes:
                try:
                    outcomes[key] = simulate(row, catalogs[profile or generation(row)])
                except RequestTooLarge:
                    outcomes[key] = None
            outcome = outcomes[key]
            if outcome is not None:
                text = f"{row['model']} {hardware_name(row)} {row['version']} {row['mode']} {row['load']} ({row['input_tokens']}/{row['output_tokens']})"
                compared.append(Compared(GENERATIONS[generation(row)], f"{text} {row['metric']}", float(row["value"]), figure(outcome, row["metric"])))
                continue
            reason = "does not fit beside the weights in the simulated GPU memory"
        reasons[reason] += 1
    return compared, reasons


def compare_loading(rows: Sequence[Row], catalog: Catalog) -> tuple[list[Compared], Counter[str]]:
    """Loads of a preset's weights from host memory or fast disks, each under the profile of the loader it was measured with."""
    compared, reasons = [], Counter[str]()
    for row in rows:
        storage, phase = row["storage"], row["phase"]
        whole = phase.startswith("engine start total")
        profile = "serverlessllm" if row["loader"].startswith("ServerlessLLM") else "engine_start" if whole else "safetensors"
        if row["model"] not in MODELS or row["hardware"] not in LOAD_HOSTS:
            reasons["no preset of model or GPU"] += 1
        elif not whole and phase not in ("weights to GPU", "weights read into GPU"):
            reasons["one phase of a start, or no load of weights"] += 1
        elif row["metric"] not in ("time", "time_mean"):
            reasons["median or maximum beside the mean"] += 1
        elif storage.startswith("local disk"):
            reasons["a disk of 0.6 GB/s, which no preset has"] += 1
        else:
            tier = DISK if "NVMe" in storage and not row["cache_state"].startswith("cached") else HOST
            hardware = dataclasses.replace(catalog.get_hardware(LOAD_HOSTS[row["hardware"]]), loader=LOADER_PROFILES[profile])
            text = f"{row['model']} {row['hardware'].split(' (')[0]} from {'disk' if tier == DISK else 'host memory'}"
            compared.append(Compared(profile, text, float(row["value"]), load_s(catalog[MODELS[row["model"]]], hardware, tier)))
    return compared, reasons


# --- output ---------------------------------------------------------------------------------------------------------------------------


def sums(what: str, compared: Sequence[Compared]) -> str:
    errors = [abs(one.error) for one in compared]
    within = sum(error <= 0.25 for error in errors)
    worst = max(errors)
    return f"| {what} | {len(errors)} | {100 * mean(errors):.1f} % | {100 * median(errors):.1f} % | {100 * within / len(errors):.0f} % | {100 * worst:.0f} % |"


HEAD = "| figures | rows | mean error | median | within 25 % | largest |\n| --- | --- | --- | --- | --- | --- |"


def table(compared: Sequence[Compared]) -> list[str]:
    """One row for each group, and one for all."""
    groups = sorted({one.group for one in compared})
    return [HEAD, *(sums(group, [one for one in compared if one.group == group]) for group in groups), sums("**all**", compared)]


def reasons_text(reasons: Counter[str]) -> str:
    return "Left out: " + "; ".join(f"{count:,} ({why})" for why, count in reasons.most_common()) + "."


def every_row(compared: Sequence[Compared]) -> list[str]:
    return [f"{one.measured:12.6g} {one.simulated:12.6g} {100 * one.error:+7.1f} %  {one.text}" for one in compared]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Published measurements of real engines against the simulator.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where serving.csv and loading.csv are")
    parser.add_argument("--engine-profile", choices=list(ENGINE_PROFILES), default="", help="of all simulated engines; without it each row's own generation's")
    parser.add_argument("--rows", action="store_true", help="print every row: measured, simulated, error")
    parser.add_argument("--write", action="store_true", help="put the sums into docs/validation.md: before, after, and all rows under the default profile")
    arguments = parser.parse_args(argv)
    try:
        serving, loading = read(arguments.folder / "serving.csv"), read(arguments.folder / "loading.csv")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    catalog = Catalog({name: PRESETS[name] for name in dict.fromkeys(MODELS.values())})
    lines: list[str] = []
    for profile in ("splitwise", "", "cuda_graphs") if arguments.write else (arguments.engine_profile,):
        compared, reasons = compare_serving(serving, catalog, profile)
        under = f"all rows under `{profile}`" if profile else "each row under the profile of its engine's generation"
        lines += [f"Serving, {under}:", "", *table(compared), ""]
        if arguments.rows:
            print("\n".join(every_row(compared)))
    lines += [f"{len(serving):,} rows of serving.csv. {reasons_text(reasons)}", ""]
    compared, reasons = compare_loading(loading, catalog)
    lines += ["Loading, each row under the profile of its loader:", "", *table(compared), "", f"{len(loading):,} rows of loading.csv. {reasons_text(reasons)}"]
    if arguments.rows:
        print("\n".join(every_row(compared)))
    print("\n".join(lines))
    if arguments.write:
        replace_section(DOCUMENT, "engines", "\n".join(lines))
    return 0


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
