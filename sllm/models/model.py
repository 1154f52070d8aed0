"""The data of a model and of a hardware.

Sizes are in bytes, bandwidths in bytes per second; 1 GB = 1e9 bytes, 1 KiB = 1024 bytes. `sllm.models.presets` has the built-in models and hardware,
`sllm.models.catalogue` reads others from a file, and `sllm.models.cost` computes the time of a load or a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sllm.models.profiles import CUDA_GRAPHS, SERVERLESSLLM, EngineProfile, LoaderProfile

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
    """The step coefficients of a model on one hardware."""

    hardware: str
    cost: StepCost
    engine: str = ""  # the engine profile that was measured; empty: from a catalogue file, and valid for every profile


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be served. `steps` has measured coefficients; `sllm.models.cost` computes them for other hardware."""

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
    layer_overhead_s: float | None = None  # fixed part of a step, per layer of the model; None: the engine profile's
    init_s: float | None = None  # fixed part of a load; None: the loader profile's
    slots: int = 256  # sequences in the batch at once (vLLM's default max_num_seqs)
    gpus: int = 1  # GPUs that work as one
    gpu: str = ""  # name of the GPU, for profiles that have figures per GPU
    engine: EngineProfile = CUDA_GRAPHS
    loader: LoaderProfile = SERVERLESSLLM

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def usable_gpu_bytes(self) -> int:
        """GPU memory for weights and KV cache."""
        return int(self.gpu_memory_bytes * GPU_MEMORY_USED)
