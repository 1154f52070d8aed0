"""Models and hardware: what there is to serve, and on what.

Sizes in bytes, bandwidths in bytes per second, 1 GB = 1e9 bytes, 1 KiB = 1024 bytes. Presets say beside each number where it comes from; a
catalogue file (TOML) adds others. What a load or a step costs is worked out in `sllm.models.cost`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sllm.inputs import toml
from sllm.models.profiles import (
    A100_LAYER_S,
    CUDA_GRAPHS,
    ENGINE_PROFILES,
    H100_LAYER_S,
    LOADER_PROFILES,
    SERVERLESSLLM,
    EngineProfile,
    LoaderProfile,
    find_profile,
)
from sllm.protocol.errors import UsageError
from sllm.protocol.limits import HARDWARE_SEPARATORS, SLOTS_MAX, name_problem

GPU, HOST, DISK, REMOTE = 0, 1, 2, 3
"""Storage tiers, nearest first."""
TIER_NAMES = ("gpu", "host", "disk", "remote")

GB = 1_000_000_000
KIB = 1024

GPU_MEMORY_USED = 0.9
"""Part of the GPU memory for weights and KV cache; the rest is activations and the runtime (vLLM's default gpu_memory_utilization)."""


class StepCost(NamedTuple):
    """step = max(weight_floor_s, a_s + p_s * new tokens) + k_s * (sum of context tokens) + overhead_s + sequence_s * sequences"""

    weight_floor_s: float  # reading all the weights once
    a_s: float
    p_s: float  # per new token
    k_s: float  # per token of context
    overhead_s: float  # CPU, kernel launches, all-reduce: everything else, per step
    sequence_s: float = 0.0  # scheduling, sampling and detokenizing, per sequence


class MeasuredStep(NamedTuple):
    """What a model's step costs on one hardware."""

    hardware: str
    cost: StepCost
    engine: str = ""  # the engine profile that it is a measurement of; empty: what a catalogue file says, which holds whatever the profile


@dataclass(frozen=True, slots=True)
class Model:
    """Something that can be served. `steps` holds measured coefficients; `sllm.models.cost` scales the rest."""

    name: str
    size_bytes: int  # weights, FP16
    kv_bytes_per_token: int
    layers: int
    steps: tuple[MeasuredStep, ...] = ()
    context_tokens: int = 0  # most tokens of prompt and output together; 0: no limit but the KV cache

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One engine's hardware: a GPU, or several that work as one (tensor parallel), with the server's memory, disk and network."""

    name: str
    gpu_memory_bytes: int  # all GPUs of the engine together
    host_memory_bytes: int  # for keeping models
    disk_bytes: int  # for keeping models
    pcie_bytes_per_s: float  # host memory to GPU
    disk_bytes_per_s: float  # local disk to host memory
    network_bytes_per_s: float  # remote store to local disk
    gpu_bytes_per_s: float  # GPU memory bandwidth
    gpu_flops_per_s: float  # dense FP16
    layer_overhead_s: float | None = None  # fixed part of a step, per layer of the model; None: what the engine profile says
    init_s: float | None = None  # fixed part of a load; None: what the loader profile says
    slots: int = 256  # sequences in the batch at once (vLLM's default max_num_seqs)
    gpus: int = 1  # that work as one
    gpu: str = ""  # of which kind, for profiles that tell kinds apart
    engine: EngineProfile = CUDA_GRAPHS
    loader: LoaderProfile = SERVERLESSLLM

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def usable_gpu_bytes(self) -> int:
        """GPU memory for weights and KV cache."""
        return int(self.gpu_memory_bytes * GPU_MEMORY_USED)


# --- presets ------------------------------------------------------------------------------------------------------------------------

# Measured tables of 2023. They are measurements of that generation's engine, so they hold under the engine profile `splitwise` only.
#
# Llama-2-70B, measured as a whole by Splitwise (ISCA 2024; splitwise-sim's performance table): least squares of the relative error over medians. Decode:
# batches of 1 to 64 with prompts of 512, and single prompts of 128 to 8192; prefill: 512 to 2048 tokens. The weight floors are Vidur's (mlp.csv, kernels
# only); measured decode is 3.6 times that on H100 TP8, and overhead_s is the explicit rest. Largest error of the fit in those ranges: decode 11 %, prefill
# 3 %. Outside, a step of more than 2048 new tokens really takes up to 2.1 times as long, a prompt of 128 tokens up to 1.8 times.
_LLAMA_2_70B = (
    MeasuredStep("a100-80g-tp4", StepCost(25.0e-3, 16.5e-3, 182.2e-6, 6.90e-7, 17.9e-3), "splitwise"),
    MeasuredStep("a100-80g-tp8", StepCost(14.3e-3, 5.2e-3, 116.5e-6, 6.74e-7, 29.2e-3), "splitwise"),
    MeasuredStep("h100-80g-tp4", StepCost(14.5e-3, 0.0, 90.2e-6, 5.40e-7, 13.9e-3), "splitwise"),
    MeasuredStep("h100-80g-tp8", StepCost(8.4e-3, 4.6e-3, 52.8e-6, 5.35e-7, 20.8e-3), "splitwise"),
)

# Vidur (mlp.csv, kernels only): weight floor w, and the rate r at 2048 new tokens. "The floor is flat up to about 64 tokens" gives
# p = (2048 / r - w) / (2048 - 64) and a = w - 64 p. k: 2.9e-7 s per token for Llama-2-7B on A100 (Vidur's attention profile), elsewhere by KV bytes over
# bandwidth. The overhead is the profile's.
_LLAMA_2_7B = (
    MeasuredStep("a100-80g", StepCost(9.3e-3, 5.25e-3, 63.2e-6, 2.90e-7, 32 * A100_LAYER_S), "splitwise"),  # 15.2k tokens/s
    MeasuredStep("h100-80g", StepCost(5.6e-3, 4.46e-3, 17.8e-6, 1.77e-7, 32 * H100_LAYER_S), "splitwise"),  # 50.0k tokens/s
)
_LLAMA_3_8B = (MeasuredStep("a100-80g", StepCost(9.8e-3, 5.46e-3, 67.7e-6, 7.25e-8, 32 * A100_LAYER_S), "splitwise"),)  # 14.2k tokens/s

# KV bytes per token: 2 (key, value) x layers x KV heads x head size x 2 B, from each model's published config.json.
_MODELS = {
    model.name: model
    for model in (
        Model("llama-3.1-8b", 16_060_000_000, 128 * KIB, 32, _LLAMA_3_8B),  # 8.03 G parameters x 2 B; 32 x 8 x 128
        Model("opt-6.7b", 13_400_000_000, 512 * KIB, 32),  # 6.7 G; 32 x 32 x 128 (OPT paper, 2022)
        Model("mistral-7b", 14_480_000_000, 128 * KIB, 32),  # 7.24 G; 32 x 8 x 128
        Model("llama-2-7b", 13_480_000_000, 512 * KIB, 32, _LLAMA_2_7B),  # 6.74 G; 32 x 32 x 128
        Model("qwen2.5-7b", 15_230_000_000, 56 * KIB, 28),  # 7.61 G; 28 x 4 x 128
        Model("opt-2.7b", 5_300_000_000, 320 * KIB, 32),  # 2.65 G; 32 x 32 x 80 (OPT paper, 2022)
        Model("opt-13b", 25_700_000_000, 800 * KIB, 40),  # 12.85 G; 40 x 40 x 128 (OPT paper, 2022)
        Model("llama-2-13b", 26_030_000_000, 800 * KIB, 40),  # 13.02 G; 40 x 40 x 128
        Model("opt-30b", 60_000_000_000, 1344 * KIB, 48),  # 30 G; 48 x 56 x 128 (OPT paper, 2022)
        Model("qwen3-32b", 65_500_000_000, 256 * KIB, 64),  # 32.8 G; 64 x 8 x 128
        Model("qwen2-72b", 145_400_000_000, 320 * KIB, 80),  # 72.7 G; 80 x 8 x 128
        Model("llama-2-70b", 140_000_000_000, 320 * KIB, 80, _LLAMA_2_70B),  # 70 G; 80 x 8 x 128
        Model("llama-3-70b", 140_000_000_000, 320 * KIB, 80, _LLAMA_2_70B),  # the same shape but for the vocabulary: its cost is assumed to be the same
    )
}

DEMO_MODELS = ("llama-3.1-8b", "opt-6.7b", "mistral-7b", "llama-2-7b", "qwen2.5-7b", "opt-2.7b")
"""The demonstration catalogue: each fits every hardware preset, with the KV cache of a request of 15,000 tokens."""

_H100 = Hardware(
    "h100-80g",
    gpu_memory_bytes=80 * GB,  # NVIDIA H100 SXM datasheet
    host_memory_bytes=256 * GB,  # an eighth of the 2 TiB of a server with eight (AWS p5.48xlarge), rounded down
    disk_bytes=3_000 * GB,  # about an eighth of its 8 x 3.84 TB of NVMe, with room for other things
    pcie_bytes_per_s=52.3e9,  # Qwen3-32B from the page cache in 1.253 s (ServerlessLLM, benchmarks/results): 65.5 GB / 1.253 s; PCIe 5
    disk_bytes_per_s=23.7e9,  # Llama-3.1-8B from NVMe in 0.678 s (likewise): 16.06 GB / 0.678 s; Qwen3-32B in 3.216 s is 20.4 GB/s
    network_bytes_per_s=1.25e9,  # 10 Gbps
    gpu_bytes_per_s=3.35e12,  # NVIDIA H100 SXM datasheet
    gpu_flops_per_s=989e12,  # likewise, without sparsity
    gpu="h100",
)
_A100 = Hardware(
    "a100-80g",
    gpu_memory_bytes=80 * GB,  # NVIDIA A100 SXM datasheet
    host_memory_bytes=144 * GB,  # an eighth of 1152 GiB (AWS p4de.24xlarge), rounded down
    disk_bytes=1_000 * GB,  # an eighth of its 8 x 1 TB of NVMe
    pcie_bytes_per_s=25e9,  # PCIe 4 x16 (ServerlessLLM, hardware_info_collector.py)
    disk_bytes_per_s=12e9,  # NVMe RAID 0 (ServerlessLLM, OSDI 2024, second hand)
    network_bytes_per_s=1.25e9,  # 10 Gbps
    gpu_bytes_per_s=2.039e12,  # NVIDIA A100 SXM datasheet
    gpu_flops_per_s=312e12,  # likewise, without sparsity
    gpu="a100",
)
_A100_40 = dataclasses.replace(
    _A100,
    name="a100-40g",
    gpu_memory_bytes=40 * GB,  # NVIDIA A100 SXM datasheet
    gpu_bytes_per_s=1.555e12,  # likewise
)
_A5000 = Hardware(
    "a5000-24g",
    gpu_memory_bytes=24 * GB,  # NVIDIA RTX A5000 datasheet
    host_memory_bytes=128 * GB,  # assumed: a quarter of a server with 512 GB
    disk_bytes=1_000 * GB,  # assumed
    pcie_bytes_per_s=25e9,  # PCIe 4 x16 (ServerlessLLM, hardware_info_collector.py)
    disk_bytes_per_s=12e9,  # NVMe RAID 0 (ServerlessLLM, OSDI 2024, second hand)
    network_bytes_per_s=1.25e9,  # 10 Gbps
    gpu_bytes_per_s=768e9,  # NVIDIA RTX A5000 datasheet
    gpu_flops_per_s=111e12,  # likewise, tensor cores without sparsity
    gpu="a5000",
)


def _tensor_parallel(single: Hardware, gpus: int) -> Hardware:
    """`gpus` GPUs of a server as one engine. Memory, disk space, PCIe and compute add up; the bandwidths of the server's NVMe array and network do not."""
    return dataclasses.replace(
        single,
        name=f"{single.name}-tp{gpus}",
        gpu_memory_bytes=single.gpu_memory_bytes * gpus,
        host_memory_bytes=single.host_memory_bytes * gpus,
        disk_bytes=single.disk_bytes * gpus,
        pcie_bytes_per_s=single.pcie_bytes_per_s * gpus,
        gpu_bytes_per_s=single.gpu_bytes_per_s * gpus,
        gpu_flops_per_s=single.gpu_flops_per_s * gpus,
        gpus=gpus,
    )


_HARDWARE = {
    hardware.name: hardware
    for hardware in (_H100, _A100, _A100_40, _A5000, *(_tensor_parallel(one, n) for one in (_H100, _A100, _A100_40) for n in (2, 4, 8)))
}
HARDWARE_NAMES = tuple(_HARDWARE)
MODEL_NAMES = tuple(_MODELS)


def hardware_preset(name: str) -> Hardware:
    """A built-in hardware. UsageError lists the known ones."""
    try:
        return _HARDWARE[name]
    except KeyError:
        raise UsageError(f"unknown hardware {name!r}: must be one of {', '.join(_HARDWARE)}") from None


def model_preset(name: str) -> Model:
    """A built-in model. UsageError lists the known ones."""
    try:
        return _MODELS[name]
    except KeyError:
        raise UsageError(f"unknown model preset {name!r}: must be one of {', '.join(_MODELS)}") from None


# --- the catalogue ------------------------------------------------------------------------------------------------------------------


class Catalog:
    """The models that can be asked for, in order, and any hardware that a catalogue file adds."""

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
        found = self._hardware.get(name) or _HARDWARE.get(name)
        if found is None:
            raise UsageError(f"unknown hardware {name!r}: must be one of {', '.join(dict.fromkeys([*self._hardware, *_HARDWARE]))}")
        return found

    @property
    def hardware_names(self) -> tuple[str, ...]:
        """The hardware of the catalogue file."""
        return tuple(self._hardware)

    def with_profiles(self, engine: str, loader: str) -> Catalog:
        """The same catalogue with all hardware under these profiles; an empty name leaves each hardware its own. UsageError for unknown ones."""
        chosen: dict[str, Any] = {}
        if engine:
            chosen["engine"] = find_profile("engine profile", engine, ENGINE_PROFILES)
        if loader:
            chosen["loader"] = find_profile("loader", loader, LOADER_PROFILES)
        if not chosen:
            return self
        changed = copy.copy(self)
        changed._hardware = {name: dataclasses.replace(one, **chosen) for name, one in {**_HARDWARE, **self._hardware}.items()}
        return changed

    @classmethod
    def demo(cls, n_models: int) -> Catalog:
        """`n_models` models made of DEMO_MODELS: the seventh is a clone of the first called `llama-3.1-8b-2`, and so on."""
        models = {}
        for i in range(n_models):
            base = _MODELS[DEMO_MODELS[i % len(DEMO_MODELS)]]
            name = base.name if i < len(DEMO_MODELS) else f"{base.name}-{i // len(DEMO_MODELS) + 1}"
            models[name] = dataclasses.replace(base, name=name)
        return cls(models)

    @classmethod
    def from_file(cls, path: str | Path) -> Catalog:
        """Read a catalogue file.

            [model."llama-3.1-8b"]          # a preset as it is
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
        return _Reader(str(path)).catalog(toml.parse(toml.read_text(path, "catalogue"), f"catalogue {path}"))


HARDWARE_KEYS = {
    "gpu_memory_gb": ("gpu_memory_bytes", GB),
    "host_memory_gb": ("host_memory_bytes", GB),
    "disk_gb": ("disk_bytes", GB),
    "pcie_gb_per_s": ("pcie_bytes_per_s", GB),
    "disk_gb_per_s": ("disk_bytes_per_s", GB),
    "network_gb_per_s": ("network_bytes_per_s", GB),
    "gpu_gb_per_s": ("gpu_bytes_per_s", GB),
    "gpu_tflops": ("gpu_flops_per_s", 1_000_000_000_000),
    "layer_overhead_ms": ("layer_overhead_s", 0.001),
    "init_s": ("init_s", 1),
    "slots": ("slots", 1),
    "gpus": ("gpus", 1),
}
"""Keys of a [hardware.NAME] table: the field it sets and the factor."""
_OPTIONAL = ("layer_overhead_ms", "init_s", "slots", "gpus")
_PROFILE_KEYS: dict[str, tuple[str, Mapping[str, Any]]] = {"engine_profile": ("engine", ENGINE_PROFILES), "loader": ("loader", LOADER_PROFILES)}
_MODEL_KEYS = {"size_gb": ("size_bytes", GB), "kv_kib_per_token": ("kv_bytes_per_token", KIB), "layers": ("layers", 1), "context_tokens": ("context_tokens", 1)}
_STEP_KEYS = ("weight_floor_ms", "a_ms", "p_ms", "k_ms", "overhead_ms")
_MAY_BE_ZERO = ("a_ms", "p_ms", "k_ms", "overhead_ms", "init_s", "layer_overhead_ms", "host_memory_gb", "disk_gb", "context_tokens")
_WHOLE = ("size_bytes", "kv_bytes_per_token", "layers", "context_tokens", "gpu_memory_bytes", "host_memory_bytes", "disk_bytes", "slots", "gpus")
_LARGEST = 1e9  # of any number: an exabyte in GB, whose bytes a report can still say
_MOST = {"slots": SLOTS_MAX}  # of those that have a bound of their own


class _Reader:
    """Turns the tables of a catalogue file into a Catalog; every complaint names file, table and key."""

    def __init__(self, path: str) -> None:
        self.path = path

    def fail(self, table: str, problem: str) -> UsageError:
        return UsageError(f"catalogue {self.path}: {f'[{table}] ' if table else ''}{problem}")

    def catalog(self, tables: dict[str, Any]) -> Catalog:
        for key in tables:
            if key not in ("model", "hardware"):
                raise self.fail("", f"unknown key {key!r}: must be model or hardware")
        hardware = {name: self.hardware(name, table) for name, table in self.tables(tables, "hardware")}
        known = (*hardware, *_HARDWARE)
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

    def number(self, table: str, values: dict[str, Any], key: str) -> float:
        value = values[key]
        low = "0 or more" if key in _MAY_BE_ZERO else "above 0"
        most = _MOST.get(key, _LARGEST)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most or (value == 0 and key not in _MAY_BE_ZERO):
            raise self.fail(table, f"{key} = {value!r}: must be a number {low}, at most {most:.0f}")
        return value

    def fields(self, table: str, values: dict[str, Any], keys: Mapping[str, tuple[str, float]], others: tuple[str, ...]) -> dict[str, Any]:
        """The fields that `values` sets. Unknown keys are an error."""
        fields: dict[str, Any] = {}
        for key in values:
            if key in keys:
                field, factor = keys[key]
                value = self.number(table, values, key) * factor
                if field in ("layers", "slots", "gpus", "context_tokens") and value != int(value):
                    raise self.fail(table, f"{key} = {values[key]!r}: must be a whole number")
                fields[field] = round(value) if field in _WHOLE else float(value)
            elif key not in others:
                raise self.fail(table, f"unknown key {key!r}: must be one of {', '.join((*keys, *others))}")
        return fields

    def preset(self, table: str, values: dict[str, Any], presets: Mapping[str, Any], default: str | None, required: Iterable[str]) -> Any:
        """The preset to start from; None if there is none, and then every key of `required` must be there."""
        name = values.get("preset", default)
        if name is None:
            for key in required:
                if key not in values:
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
        required = [key for key in HARDWARE_KEYS if key not in _OPTIONAL]
        base = self.preset(table, values, _HARDWARE, name if name in _HARDWARE else None, required)
        return dataclasses.replace(base, name=name, **fields) if base else Hardware(name, **fields)

    def model(self, name: str, values: dict[str, Any], known_hardware: tuple[str, ...]) -> list[Model]:
        table = f"model.{name}"
        fields = self.fields(table, values, _MODEL_KEYS, ("preset", "count", "step"))
        base = self.preset(table, values, _MODELS, name if name in _MODELS else None, [key for key in _MODEL_KEYS if key != "context_tokens"])
        same = fields.keys() <= {"context_tokens"}  # a changed model is another one: its preset's measurements do not hold
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
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 100_000:
            raise self.fail(table, f"count = {count!r}: must be a whole number from 1 to 100000")
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
        return StepCost(*(self.number(table, values, key) / 1000 for key in _STEP_KEYS))
