"""The costs of a step and a load that do not follow from the hardware's datasheet: those of the engine's generation and of the loader.

An **engine profile** gives the parts of a GPU's bandwidth and FLOP/s that an engine reaches, and the fixed time of a step. A **loader profile** gives the
bandwidth that a loader reaches, and the fixed time of a load. Both are chosen for a run (`--engine-profile`, `--loader`) or for the hardware of a catalogue
file. Numbers in a catalogue file (`layer_overhead_ms`, `init_s`, `step` tables) win over both profiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """An engine generation; `sllm.models.cost` has the formulas."""

    name: str
    weights_bandwidth: float  # part of the GPU memory bandwidth that reading weights reaches
    kv_bandwidth: float  # part of the GPU memory bandwidth that attention reaches
    flops: float  # part of the dense FP16 FLOP/s that a prefill reaches
    flat_tokens: int  # new tokens up to which a step takes as long as reading the weights
    step_s: float  # of every step
    layer_s: float  # of every step, per layer
    parallel_layer_s: float  # of every step, per layer, when several GPUs work as one: two all-reduces
    sequence_s: float = 0.0  # of every step, per sequence in it
    layer_s_by_gpu: tuple[tuple[str, float], ...] = ()  # instead of `layer_s`, for these GPUs

    def overhead_s(self, gpu: str, gpus: int, layers: int) -> float:
        """Fixed part of a step."""
        layer_s = dict(self.layer_s_by_gpu).get(gpu, self.layer_s)
        return self.step_s + layers * (layer_s + (self.parallel_layer_s if gpus > 1 else 0.0))


@dataclass(frozen=True, slots=True)
class LoaderProfile:
    """A way to bring weights onto the GPU. The bandwidths are the loader's own limits; a slower bus, disk or network bounds a load further."""

    name: str
    init_s: float  # of every load
    layer_s: float  # of every load, per layer
    host_bytes_per_s: float  # from host memory
    disk_bytes_per_s: float  # from disk and from the remote store

    def fixed_s(self, layers: int) -> float:
        """Seconds of a load besides the transfer of the weights."""
        return self.init_s + layers * self.layer_s


# --- engines ------------------------------------------------------------------------------------------------------------------------

# Least mean relative error over published measurements of vLLM in 16 bits on H100 and A100 (`experiments/engines.py` reads them; docs/validation.md has
# the errors): 363 figures of vLLM 0.5 to 0.9 with its first core, mostly of 2024 (Argonne's LLM-Inference-Bench, static batches on one to four GPUs;
# AccelMark, closed loops and batches on one to eight), and 37 of vLLM 0.11 to 0.20 with its second, 2025 and 2026 (inference-perf at constant rates;
# vLLM's own report on KV caches, 2026; AccelMark). Both cores run decode steps as CUDA graphs; the first schedules and samples between them.
VLLM_V0 = EngineProfile(
    "vllm_v0",
    weights_bandwidth=0.923,
    kv_bandwidth=0.836,
    flops=0.524,
    flat_tokens=1,  # larger values fit no better
    step_s=2.09e-3,
    layer_s=0.0096e-3,
    parallel_layer_s=0.061e-3,
    sequence_s=0.054e-3,
)
CUDA_GRAPHS = EngineProfile(
    "cuda_graphs",
    weights_bandwidth=0.926,
    kv_bandwidth=0.89,  # vLLM's report alone: 43.7 ns more for each token of context, 128 KiB of KV cache, on H100: 3.0e12 B/s, 90 %
    flops=0.73,
    flat_tokens=1,
    step_s=1.15e-3,
    layer_s=VLLM_V0.layer_s,  # the second core's figures, all of models with 32 layers, cannot tell layer_s from step_s
    parallel_layer_s=VLLM_V0.parallel_layer_s,  # no figure of the second core is of more than one GPU
    sequence_s=0.005e-3,
)

# Measurements by Splitwise and Vidur of engines of 2023. Llama-2-70B on eight GPUs was measured as a whole by Splitwise (the tables of
# `sllm.models.presets` belong to this profile). Its decode takes 29.2 ms on A100 and 20.8 ms on H100 more than Vidur's weight floor, over 80 layers; this
# time per layer is assumed to hold for every model and for one GPU too, and the time of the A100 for every GPU but the H100.
A100_LAYER_S = 29.2e-3 / 80
H100_LAYER_S = 20.8e-3 / 80
SPLITWISE = EngineProfile(
    "splitwise",
    weights_bandwidth=0.71,  # Vidur's mlp.csv: 9.3 ms and 5.6 ms for the 13.48 GB of Llama-2-7B on A100 and H100, 71 and 72 %
    kv_bandwidth=0.887,  # Vidur's attention profile: 512 KiB / 2.9e-7 s / 2.039e12 B/s, Llama-2-7B on A100
    flops=0.72,  # a token being 2 FLOP a parameter and a parameter 2 bytes: mlp.csv gives 68 and 77 %
    flat_tokens=64,  # likewise
    step_s=0.0,
    layer_s=A100_LAYER_S,
    parallel_layer_s=0.0,
    layer_s_by_gpu=(("h100", H100_LAYER_S),),
)

# --- loaders ------------------------------------------------------------------------------------------------------------------------

SERVERLESSLLM = LoaderProfile(
    "serverlessllm",
    init_s=0.05,  # a choice: with it the measured 1.175 s of OPT-6.7B onto an A5000 is 12 GB/s, the NVMe RAID 0 of ServerlessLLM's OSDI 2024 paper
    layer_s=0.0,
    host_bytes_per_s=inf,  # no limit beyond bus, disk and network: the presets' bandwidths were measured with this loader
    disk_bytes_per_s=inf,
)
# Weights of 13 to 65 GB read by the safetensors library. From the page cache: 8.3 GB/s into an H100 NVL and an L40S (vLLM 0.8 to 0.10, vllm-startup-profiler),
# 5.3 and 6.4 into an H100 (transformers; ServerlessLLM, benchmarks/results), 1.8 on a slow A100 host; 7 is the median of these four hosts. From NVMe: 3.2 to
# 3.6 GB/s on the H100 server, whose disks give ServerlessLLM 24; 2.6 on the A5000 server.
SAFETENSORS = LoaderProfile("safetensors", init_s=0.05, layer_s=0.0, host_bytes_per_s=7.0e9, disk_bytes_per_s=3.5e9)
# vLLM from the start of its process to the first request it could take, weights left out: 20.3 s for 24 layers, 23 for 32, 27 for 40, 29 for 48 on H100 NVL
# and L40S hosts, its compile cache warm (vllm-startup-profiler); 1.6 times that on a slow A100 host, 20 s more with an empty compile cache.
ENGINE_START = LoaderProfile(
    "engine_start", init_s=12.0, layer_s=0.35, host_bytes_per_s=SAFETENSORS.host_bytes_per_s, disk_bytes_per_s=SAFETENSORS.disk_bytes_per_s
)

ENGINE_PROFILES: Mapping[str, EngineProfile] = {profile.name: profile for profile in (CUDA_GRAPHS, VLLM_V0, SPLITWISE)}
LOADER_PROFILES: Mapping[str, LoaderProfile] = {profile.name: profile for profile in (SERVERLESSLLM, SAFETENSORS, ENGINE_START)}
