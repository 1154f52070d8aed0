"""The runs of a comparison, the key under which each run is kept, and the reading of kept runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from config import Config, ConfigError, parse_setting
from experiments.batch import run_virtual
from experiments.comparison import QUANTILES, Sample, Setting, figures_of, quantiles
from experiments.harness import ROOT
from sllm import __version__
from sllm.placement.registry import make_policy, policies
from sllm.protocol.errors import UsageError
from sllm.run.assemble import build_catalog, default_rate
from sllm.run.command_line import Options, input_files
from sllm.run.hardware_mix import hardware_of_workers

KIND = "comparison"


class Cell(NamedTuple):
    """One run to be made."""

    config: Config
    options: Options

    @property
    def setting(self) -> Setting:
        config = self.config
        return Setting(config.workers, None if config.trace else config.rate_per_s, config.trace, config.report_interval_s)


class Done(NamedTuple):
    """The figures of a run that a comparison keeps."""

    figures: dict[str, float | None]
    ttft_quantiles_s: list[float]


class Axes(NamedTuple):
    """The values of everything that is varied."""

    policies: Sequence[str]
    workers: Sequence[int]
    rates: Sequence[float]  # 0.0: half of what the fleet can serve
    traces: Sequence[str]  # empty: synthetic arrivals
    report_intervals: Sequence[float]
    seeds: int


def run_cell(cell: Cell) -> Done:
    """Make the run. UsageError as `batch.run_virtual`."""
    results, recorder = run_virtual(cell.config, cell.options)
    return Done(figures_of(results), quantiles(recorder.ttft_s))


# --- axes ---------------------------------------------------------------------------------------------------------------------------


def split_policies(text: str, first: str = "") -> list[str]:
    """The policies of `A,B:key=value,key=value,C`, or of `all`: every one, `first` first. UsageError for one that is not known or named twice."""
    found: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if "=" in part.partition(":")[0] and found:  # a further parameter of the policy before it
            found[-1] += f",{part}"
        elif part == "all":
            found += dict.fromkeys([*([first] if first else []), *policies()])
        else:
            found.append(part)
    for name in found:
        make_policy(name)
    return _distinct("--policies", text, found)


def split_values(flag: str, field: str, text: str) -> list[Any]:
    """Values of a field of the configuration, separated by commas. UsageError names the flag."""
    (declared,) = (one for one in dataclasses.fields(Config) if one.name == field)
    try:
        values = [parse_setting(declared, part.strip(), flag) for part in text.split(",")]
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return _distinct(flag, text, values)


def _distinct(flag: str, text: str, values: list[Any]) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"{flag}={text!r}: {value} is there twice")
    return values


def plan(axes: Axes, base: Config, options: Options) -> list[Cell]:
    """Every run, seed by seed, so that an interrupted comparison has runs of every combination. UsageError for an impossible fleet."""
    loads: list[tuple[str, float]] = [(trace, 0.0) for trace in axes.traces] or [("", rate_per_s) for rate_per_s in axes.rates]
    settings = []
    for workers, (trace, rate_per_s), interval_s in product(axes.workers, loads, axes.report_intervals):
        hardware_of_workers(base.hardware, workers)
        config = dataclasses.replace(base, workers=workers, trace=trace, rate_per_s=rate_per_s, report_interval_s=interval_s)
        if not trace and not rate_per_s:
            config = dataclasses.replace(config, rate_per_s=float(f"{default_rate(config, build_catalog(config)):.3g}"))
        settings.append(config)
    return [
        Cell(dataclasses.replace(config, policy=policy, seed=base.seed + place), options)
        for place in range(axes.seeds) for config in settings for policy in axes.policies
    ]  # fmt: skip


# --- kept runs ----------------------------------------------------------------------------------------------------------------------

DECIDE = [
    field for field in dataclasses.fields(Config)
    if field.metadata["flag"] or (field.type in ("int", "float") and not field.name.endswith("_port"))
]  # fmt: skip
"""Fields of the configuration that a virtual run depends on; the others say where processes are and what they log."""


def key_of(cell: Cell) -> str:
    """A key that is equal for two runs exactly if they must give equal numbers: same configuration, input files and program."""
    said: list[object] = [getattr(cell.config, field.name) for field in DECIDE]
    said += [cell.options.wire, *(_digest_of(path) if path else "" for path in input_files(cell.config, cell.options).values()), program_digest()]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=12).hexdigest()


@cache
def _digest_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


@cache
def program_digest() -> str:
    """A digest of every source file that a run uses."""
    digest = hashlib.blake2b()
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("sllm/**/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def as_json(cell: Cell, done: Done) -> dict[str, Any]:
    """A run in the form in which a file keeps it."""
    setting = cell.setting
    return {
        "key": key_of(cell), "policy": cell.config.policy, "workers": setting.workers, "rate_per_s": setting.rate_per_s, "trace": setting.trace,
        "report_interval_s": setting.report_interval_s, "seed": cell.config.seed, "figures": done.figures, "ttft_quantiles_s": done.ttft_quantiles_s,
    }  # fmt: skip


def sample_of(run: Mapping[str, Any], candidate: str, more: str = "") -> Sample:
    """A kept run as a sample of a candidate. Unknown keys are ignored."""
    setting = Setting(run["workers"], run["rate_per_s"], run["trace"], run["report_interval_s"], more)
    known = run.get("ttft_quantiles_s") or []
    return Sample(candidate, setting, run["seed"], run["figures"], known if len(known) == len(QUANTILES) else [])


def read_runs(path: str, flag: str) -> list[dict[str, Any]]:
    """The runs of a file that a comparison wrote, or the one run of a file that `centralized_simulation.py --json` wrote. UsageError names flag and file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{flag} {path}: is not JSON: {error}") from None
    try:
        if content.get("kind") == KIND:
            for run in content["runs"]:
                sample_of(run, "")
            return list(content["runs"])
        return [_single(content)]
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{flag} {path}: is neither of compare.py --json nor of centralized_simulation.py --json") from None


def _single(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of one run, in the form in which a comparison keeps them."""
    run, workload = results["run"], results["run"]["workload"]
    settings: dict[str, Any] = run.get("settings") or {}
    interval_s = settings.get("REPORT_INTERVAL", Config.report_interval_s)
    return {
        "key": "", "policy": run["policy"], "workers": run["workers"], "rate_per_s": workload.get("rate_per_s"), "trace": workload.get("trace", ""),
        "report_interval_s": float(interval_s), "seed": run["seed"], "figures": figures_of(results), "ttft_quantiles_s": [],
    }  # fmt: skip


def reuse(cells: Sequence[Cell], runs: Iterable[Mapping[str, Any]]) -> dict[int, Done]:
    """The cells that have been run already: place -> measured figures."""
    kept = {run.get("key"): run for run in runs}
    found = {}
    for place, cell in enumerate(cells):
        run = kept.get(key_of(cell))
        if run is not None:
            found[place] = Done(run["figures"], run["ttft_quantiles_s"])
    return found


def document(cells: Sequence[Cell], done: Mapping[int, Done], more: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a comparison. Equal cells give an equal file, except for the section `wall`, which depends on the machine."""
    return {"schema": 1, "kind": KIND, "version": __version__, **more, "runs": [as_json(cells[place], done[place]) for place in sorted(done)]}
