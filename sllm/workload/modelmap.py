"""Which model of the catalogue stands for each model name of a trace, for the whole run.

A name in a map file (TOML, `"name in the trace" = "model of the catalogue"`) gets the model of the file; several names may share a model there. A name of
the catalogue is that model. Every other name gets a model of its own, the next unused one of the catalogue: the name with the most requests is served first;
of names with equally many requests, the one that comes first in the trace. Only requests that the run replays count, so `--duration` may change the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sllm.inputs import toml
from sllm.protocol.errors import UsageError
from sllm.workload.traces import open_trace
from sllm.workload.traces.base import shorten

SHOWN = 3  # names that a warning lists


class ModelCounts(NamedTuple):
    """The number of requests of a trace for each model name, in order of first appearance, and the number of requests that name no model."""

    requests: dict[str, int]
    unnamed: int


def count_models(path: str, until_s: float, columns: str = "") -> ModelCounts | None:
    """Read a trace once, up to the arrival at `until_s`, and count its models. None if the trace names no models, or is not a regular file and so cannot be
    read twice.

    Memory grows with the number of different names. UsageError as `open_trace`, and for a row that does not fit.
    """
    if not Path(path).is_file():
        return None
    requests: dict[str, int] = {}
    unnamed = 0
    with open_trace(path, columns) as trace:
        if not trace.names_models:
            return None
        for row in trace:
            if row.arrival_s >= until_s:
                break
            if row.model is None:
                unnamed += 1
            else:
                requests[row.model] = requests.get(row.model, 0) + 1
    return ModelCounts(requests, unnamed)


def read_map(path: str) -> dict[str, str]:
    """The pairs of a map file. UsageError names the file, and the place of bad TOML or the key of a bad value."""
    pairs = toml.read_pairs(path, "model map", '"gpt-4.1" = "llama-3.1-8b"')
    for name, model in pairs.items():
        if not isinstance(model, str):
            raise UsageError(f"model map {path}: {shorten(name)} = {shorten(str(model))}: must be the name of a model, in quotes")
    return pairs


class TooFewModels(UsageError):
    """The trace names more models than the catalogue has."""


@dataclass(frozen=True)
class ModelMap:
    """The result of `assign`."""

    models: Mapping[str, str]  # model of the catalogue by name in the trace, the name with the most requests first
    counts: ModelCounts
    replaced: Sequence[str]  # names that got another model without a map file
    idle: Sequence[str]  # names of the map file that the trace does not have

    def describe(self) -> dict[str, Any]:
        """The map as an entry of the results of a run."""
        rows = [{"name": name, "model": model, "requests": self.counts.requests[name]} for name, model in self.models.items()]
        return {"trace_models": rows, "unnamed": self.counts.unnamed}

    def warnings(self, trace: str, map_path: str | None) -> list[str]:
        """Warnings for the user: replaced names, requests without a name, and entries of the map file without effect."""
        said = []
        if self.replaced:
            count, named = len(self.replaced), len(self.models)
            shown = [f"{name} as {self.models[name]}" for name in self.replaced[:SHOWN]]
            listed = ", ".join(shown) + (f" and {count - SHOWN} more" if count > SHOWN else "")
            said.append(f"{trace}: model names not in the catalogue: {count} of {named}; each was mapped to a model of it: {listed} (--model-map)")
        if self.counts.unnamed:
            said.append(f"{trace}: requests that name no model: {self.counts.unnamed}; theirs were drawn by popularity (--zipf)")
        if self.idle:
            listed = ", ".join(shorten(name) for name in self.idle[:SHOWN]) + (f" and {len(self.idle) - SHOWN} more" if len(self.idle) > SHOWN else "")
            said.append(f"model map {map_path}: {listed}: not named by {trace}")
        return said


def check_map(path: str, pairs: Mapping[str, str], models: Sequence[str]) -> None:
    """UsageError if a pair's value is no model of the catalogue."""
    known = frozenset(models)
    for name, model in pairs.items():
        if model not in known:
            listed = ", ".join(models[:SHOWN]) + (f" and {len(models) - SHOWN} more" if len(models) > SHOWN else "")
            raise UsageError(f"model map {path}: {shorten(name)} = {shorten(model)}: not a model that requests can ask for; there are {listed}")


def assign(trace: str, counts: ModelCounts, models: Sequence[str], pairs: Mapping[str, str]) -> ModelMap:
    """A model for each name of the trace; `pairs` are those of a map file. TooFewModels, with both counts, if the catalogue has too few models."""
    by_count = sorted(counts.requests, key=lambda name: -counts.requests[name])  # stable: then by first appearance
    known = frozenset(models)
    settled = {name: pairs.get(name, name) for name in by_count if name in pairs or name in known}
    taken = set(settled.values())
    free = (model for model in models if model not in taken)
    mapped: dict[str, str] = {}
    replaced = []
    for name in by_count:
        model = settled.get(name)
        if model is None:
            model = next(free, None)
            if model is None:
                both = f"names {len(by_count)} models, but only {len(models)} of the catalogue can be asked for"
                raise TooFewModels(f"{trace}: {both}; names can share a model by --model-map")
            replaced.append(name)
        mapped[name] = model
    return ModelMap(mapped, counts, replaced, [name for name in pairs if name not in counts.requests])
