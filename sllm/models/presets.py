"""The built-in models and hardware, with the source of each number beside it."""

from __future__ import annotations

import dataclasses

from sllm.models.model import GB, KIB, Hardware, MeasuredStep, Model, StepCost
from sllm.models.profiles import A100_LAYER_S, H100_LAYER_S

# Measured tables of 2023. The tables are measurements of engines of that year, so they hold for the engine profile `splitwise` only.
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
MODELS = {
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
    disk_bytes=3_000 * GB,  # about an eighth of the server's 8 x 3.84 TB of NVMe, with room for other things
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
    disk_bytes=1_000 * GB,  # an eighth of the server's 8 x 1 TB of NVMe
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


HARDWARE = {
    hardware.name: hardware
    for hardware in (_H100, _A100, _A100_40, _A5000, *(_tensor_parallel(one, n) for one in (_H100, _A100, _A100_40) for n in (2, 4, 8)))
}
