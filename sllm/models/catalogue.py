"""The catalogue of a run: the models that can be requested, in order, and hardware beside the presets. A catalogue file (TOML) adds both."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sllm.inputs import toml
from sllm.inputs.keys import Number, Whole, find
from sllm.models.model import GB, KIB, Hardware, MeasuredStep, Model, StepCost
from sllm.models.presets import DEMO_MODELS, HARDWARE, MODELS
from sllm.models.profiles import ENGINE_PROFILES, LOADER_PROFILES
from sllm.protocol.errors import UsageError
from sllm.protocol.limits import HARDWARE_SEPARATORS, SLOTS_MAX, name_problem


class Catalog:
    """The models that can be requested, in order, and any hardware that a catalogue file adds."""

    __slots__ = ("_hardware", "models", "names", "size_bytes")

    def __init__(self, models: Mapping[str, Model], hardware: Mapping[str, Hardware] | None = None) -> None:
        self.models: dict[str, Model] = dict(models)
        self.names: tuple[str, ...] = tuple(self.models)
        self.size_bytes: int = sum(model.size_bytes for model in self.models.values())
        self._hardware: dict[str, Hardware] = dict(hardware or {})

    def __contains__(self, name: object) -> bool:
        return name in self.models

    def __getitem__(self, name: str) -> Model:
        """The model of that name; KeyError if it is not in the catalogue."""
        return self.models[name]

    def __len__(self) -> int:
        return len(self.models)

    def __iter__(self) -> Iterator[str]:
        return iter(self.models)

    def get_hardware(self, name: str) -> Hardware:
        """Hardware of the catalogue file, else the preset of that name. UsageError lists the known ones."""
        return self._hardware.get(name) or find("hardware", name, {**self._hardware, **HARDWARE})

    @property
    def hardware_names(self) -> tuple[str, ...]:
        """The hardware of the catalogue file."""
        return tuple(self._hardware)

    def with_profiles(self, engine: str, loader: str) -> Catalog:
        """The same catalogue with all hardware under these profiles; an empty name leaves each hardware its own. UsageError for an unknown profile."""
        chosen: dict[str, Any] = {}
        if engine:
            chosen["engine"] = find("engine profile", engine, ENGINE_PROFILES)
        if loader:
            chosen["loader"] = find("loader", loader, LOADER_PROFILES)
        if not chosen:
            return self
        changed = copy.copy(self)
        changed._hardware = {name: dataclasses.replace(one, **chosen) for name, one in {**HARDWARE, **self._hardware}.items()}
        return changed

    @classmethod
    def demo(cls, n_models: int) -> Catalog:
        """`n_models` models made of DEMO_MODELS: the seventh is a clone of the first called `llama-3.1-8b-2`, and so on."""
        models = {}
        for i in range(n_models):
            base = MODELS[DEMO_MODELS[i % len(DEMO_MODELS)]]
            name = base.name if i < len(DEMO_MODELS) else f"{base.name}-{i // len(DEMO_MODELS) + 1}"
            models[name] = dataclasses.replace(base, name=name)
        return cls(models)

    @classmethod
    def from_file(cls, path: str | Path) -> Catalog:
        """Read a catalogue file.

            [model."llama-3.1-8b"]          # a preset, unchanged
            [model.support-bot]
            preset = "llama-3.1-8b"         # start from a preset and change any of: size_gb, kv_kib_per_token, layers, context_tokens
            count = 20                      # support-bot, support-bot-2, ... support-bot-20
            [model.mine]
            size_gb = 13.4
            kv_kib_per_token = 512
            layers = 32
            step.my-box = { weight_floor_ms = 9.3, a_ms = 5.2, p_ms = 0.063, k_ms = 0.00029, overhead_ms = 11.7 }   # measured on that hardware
            [hardware.my-box]
            preset = "a100-80g"             # and any of the keys in HARDWARE_KEYS
            engine_profile = "cuda_graphs"  # sllm.models.profiles has the names
            loader = "safetensors"

        UsageError names the file, and the line and column of bad TOML or the table and key of a bad value.
        """
        return _Reader(str(path)).catalog(toml.read(path, "catalogue"))


class Figure(NamedTuple):
    """A key that sets a field of a model or of hardware: the field has the number of the file times `factor`."""

    field: str
    factor: float = 1
    rule: Number | Whole = Number(above=0.0)  # at most an exabyte in GB, because a report must be able to give the number of bytes
    required: bool = True


HARDWARE_KEYS = {
    "gpu_memory_gb": Figure("gpu_memory_bytes", GB),
    "host_memory_gb": Figure("host_memory_bytes", GB, Number()),
    "disk_gb": Figure("disk_bytes", GB, Number()),
    "pcie_gb_per_s": Figure("pcie_bytes_per_s", GB),
    "disk_gb_per_s": Figure("disk_bytes_per_s", GB),
    "network_gb_per_s": Figure("network_bytes_per_s", GB),
    "gpu_gb_per_s": Figure("gpu_bytes_per_s", GB),
    "gpu_tflops": Figure("gpu_flops_per_s", 1_000_000_000_000),
    "layer_overhead_ms": Figure("layer_overhead_s", 0.001, Number(), required=False),
    "init_s": Figure("init_s", 1, Number(), required=False),
    "slots": Figure("slots", 1, Whole(1, SLOTS_MAX), required=False),
    "gpus": Figure("gpus", 1, Whole(1), required=False),
}
"""Keys of a [hardware.NAME] table."""
_MODEL_KEYS = {
    "size_gb": Figure("size_bytes", GB),
    "kv_kib_per_token": Figure("kv_bytes_per_token", KIB),
    "layers": Figure("layers", 1, Whole(1)),
    "context_tokens": Figure("context_tokens", 1, Whole(), required=False),
}
_STEP_KEYS = {
    "weight_floor_ms": Number(above=0.0), "a_ms": Number(), "p_ms": Number(), "k_ms": Number(), "overhead_ms": Number(),
}  # fmt: skip
_COUNT = Whole(1, 100_000)  # copies of a model
_PROFILE_KEYS: dict[str, tuple[str, Mapping[str, Any]]] = {"engine_profile": ("engine", ENGINE_PROFILES), "loader": ("loader", LOADER_PROFILES)}
_WHOLE_FIELDS = {field.name for kind in (Model, Hardware) for field in dataclasses.fields(kind) if field.type == "int"}


class _Reader:
    """Turns the tables of a catalogue file into a Catalog; every error names file, table and key."""

    def __init__(self, path: str) -> None:
        self.path = path

    def fail(self, table: str, problem: str) -> UsageError:
        return UsageError(f"catalogue {self.path}: {f'[{table}] ' if table else ''}{problem}")

    def catalog(self, tables: dict[str, Any]) -> Catalog:
        for key in tables:
            if key not in ("model", "hardware"):
                raise self.fail("", f"unknown key {key!r}: must be model or hardware")
        hardware = {name: self.hardware(name, table) for name, table in self.tables(tables, "hardware")}
        known = (*hardware, *HARDWARE)
        models: dict[str, Model] = {}
        for name, table in self.tables(tables, "model"):
            for model in self.model(name, table, known):
                if model.name in models:
                    raise self.fail(f"model.{name}", f"makes {model.name!r}, which is there already")
                models[model.name] = model
        if not models:
            raise self.fail("", "no [model.NAME] table")
        return Catalog(models, hardware)

    def tables(self, parent: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
        found = parent.get(key, {})
        if not isinstance(found, dict):
            raise self.fail(key, "must be a table")
        for name, table in found.items():
            if not isinstance(table, dict):
                raise self.fail(f"{key}.{name}", f"must be a table, not {table!r}")
            if problem := name_problem(name):
                raise self.fail(key, f"name {name!r}: {problem}")
            if key == "hardware" and not HARDWARE_SEPARATORS.isdisjoint(name):
                raise self.fail(key, f"name {name!r}: must have no ',' or ':', which --hardware NAME:COUNT,NAME:COUNT takes for its own")
        return list(found.items())

    def check(self, table: str, key: str, value: Any, rule: Number | Whole) -> None:
        """UsageError for a value that does not fit the rule."""
        if problem := rule.problem(value):
            raise self.fail(table, f"{key} = {value!r}: {problem}")

    def fields(self, table: str, values: dict[str, Any], keys: Mapping[str, Figure], others: tuple[str, ...]) -> dict[str, Any]:
        """The fields that `values` sets. Unknown keys are an error."""
        fields: dict[str, Any] = {}
        for key, value in values.items():
            if key in keys:
                field, factor, rule, _ = keys[key]
                self.check(table, key, value, rule)
                fields[field] = round(value * factor) if field in _WHOLE_FIELDS else float(value * factor)
            elif key not in others:
                raise self.fail(table, f"unknown key {key!r}: must be one of {', '.join((*keys, *others))}")
        return fields

    def preset(self, table: str, values: dict[str, Any], presets: Mapping[str, Any], own_name: str, keys: Mapping[str, Figure]) -> Any:
        """The preset to start from: the preset that the table names, or else the preset called `own_name`; None if there is neither, and then every required
        key must be in the table (UsageError)."""
        name = values.get("preset", own_name if own_name in presets else None)
        if name is None:
            for key, figure in keys.items():
                if figure.required and key not in values:
                    raise self.fail(table, f"{key} is missing (or preset, one of {', '.join(presets)})")
            return None
        if not isinstance(name, str) or name not in presets:
            raise self.fail(table, f"preset = {name!r}: must be one of {', '.join(presets)}")
        return presets[name]

    def hardware(self, name: str, values: dict[str, Any]) -> Hardware:
        table = f"hardware.{name}"
        fields = self.fields(table, values, HARDWARE_KEYS, ("preset", *_PROFILE_KEYS))
        for key, (field, profiles) in _PROFILE_KEYS.items():
            if key in values:
                if not isinstance(values[key], str) or values[key] not in profiles:
                    raise self.fail(table, f"{key} = {values[key]!r}: must be one of {', '.join(profiles)}")
                fields[field] = profiles[values[key]]
        base = self.preset(table, values, HARDWARE, name, HARDWARE_KEYS)
        return dataclasses.replace(base, name=name, **fields) if base else Hardware(name, **fields)

    def model(self, name: str, values: dict[str, Any], known_hardware: tuple[str, ...]) -> list[Model]:
        table = f"model.{name}"
        fields = self.fields(table, values, _MODEL_KEYS, ("preset", "count", "step"))
        base = self.preset(table, values, MODELS, name, _MODEL_KEYS)
        same = fields.keys() <= {"context_tokens"}  # the preset's measurements do not hold for a changed model
        steps = list(base.steps) if base and same else []
        if not isinstance(values.get("step", {}), dict):
            raise self.fail(table, "step must be a table")
        for hardware, step in self.tables(values, "step"):
            if hardware not in known_hardware:
                raise self.fail(f"{table}.step.{hardware}", f"unknown hardware: must be one of {', '.join(known_hardware)}")
            said = MeasuredStep(hardware, self.step(f"{table}.step.{hardware}", step))
            steps = [said, *(known for known in steps if known.hardware != hardware)]
        fields["steps"] = tuple(steps)
        count = values.get("count", 1)
        self.check(table, "count", count, _COUNT)
        count = _COUNT.read(count)
        if count > 1 and (problem := name_problem(f"{name}-{count}")):
            raise self.fail("model", f"name {name!r} of the last of {count} copies, with its number: {problem}")
        first = dataclasses.replace(base, name=name, **fields) if base else Model(name, **fields)
        return [first, *(dataclasses.replace(first, name=f"{name}-{i}") for i in range(2, count + 1))]

    def step(self, table: str, values: dict[str, Any]) -> StepCost:
        for key in _STEP_KEYS:
            if key not in values:
                raise self.fail(table, f"{key} is missing")
        for key in values:
            if key not in _STEP_KEYS:
                raise self.fail(table, f"unknown key {key!r}: must be one of {', '.join(_STEP_KEYS)}")
        for key, rule in _STEP_KEYS.items():
            self.check(table, key, values[key], rule)
        return StepCost(*(values[key] / 1000 for key in _STEP_KEYS))
