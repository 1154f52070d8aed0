"""Seconds for loads, prefills and decodes: pure functions, used by the engine and by the coordinator's policies alike.

One step of a model's batch takes

    step = max(weight_floor, a + p * new tokens) + k * (sum of context tokens) + overhead

A sequence in its prefill step brings its whole prompt as new tokens, later one token a step. Its context in the step that yields token i (counted
from 0, the prefill's) is prompt + i tokens. Known combinations of model and hardware carry measured coefficients (`Model.steps`); others are scaled:

- weight_floor = size / (0.71 * GPU bandwidth): Vidur's mlp.csv has 9.3 ms and 5.6 ms for the 13.48 GB of Llama-2-7B on A100 and H100, 71 and 72 %
- p = size / (0.72 * FP16 FLOP/s), a token being 2 FLOP a parameter and a parameter 2 bytes: the same source gives 68 and 77 %
- a = weight_floor - 64 p, at least 0: the floor is flat up to about 64 tokens (likewise)
- k = KV bytes per token / (0.887 * GPU bandwidth): 0.00029 ms for Llama-2-7B on A100 (Vidur's attention profile)
- overhead = layers * the hardware's overhead per layer

Kernels-only figures (everything from Vidur) know nothing of attention's other costs, all-reduce and CPU; overhead stands for those, measured on Llama-2-70B.
"""

from __future__ import annotations

from functools import lru_cache
from math import log

from sllm.catalog import DISK, GPU, HOST, Hardware, Model
from sllm.catalog import StepCost as StepCost

BANDWIDTH_WEIGHTS = 0.71  # part of the memory bandwidth that reading weights gets
BANDWIDTH_KV = 0.887  # part of it that attention gets: 512 KiB / 2.9e-7 s / 2.039e12 B/s
FLOPS_USED = 0.72  # part of the dense FP16 FLOP/s that a long prefill gets
FLAT_TOKENS = 64  # new tokens up to which reading the weights takes longer than computing


@lru_cache(maxsize=65536)
def load_s(model: Model, hardware: Hardware, tier: int) -> float:
    """Seconds to bring the model from `tier` onto the GPU: init + size / bandwidth of the slowest stage on the path; 0 from the GPU itself.

    Stages are pipelined, as in ServerlessLLM (OSDI 2024): only the slowest counts.
    """
    if tier == GPU:
        return 0.0
    bandwidth = hardware.pcie_bytes_per_s
    if tier != HOST:
        bandwidth = min(bandwidth, hardware.disk_bytes_per_s)
        if tier != DISK:
            bandwidth = min(bandwidth, hardware.network_bytes_per_s)
    return hardware.init_s + model.size_bytes / bandwidth


@lru_cache(maxsize=65536)
def step_cost(model: Model, hardware: Hardware) -> StepCost:
    """The model's step coefficients on that hardware: measured ones if it carries any, else scaled as the module's text says."""
    for name, cost in model.steps:
        if name == hardware.name:
            return cost
    weight_floor_s = model.size_bytes / (BANDWIDTH_WEIGHTS * hardware.gpu_bytes_per_s)
    p_s = model.size_bytes / (FLOPS_USED * hardware.gpu_flops_per_s)
    return StepCost(
        weight_floor_s,
        max(0.0, weight_floor_s - FLAT_TOKENS * p_s),
        p_s,
        model.kv_bytes_per_token / (BANDWIDTH_KV * hardware.gpu_bytes_per_s),
        model.layers * hardware.layer_overhead_s,
    )


def step_s(cost: StepCost, new_tokens: int, context_tokens: int) -> float:
    """Seconds of one step of one model's batch."""
    weight_floor_s, a_s, p_s, k_s, overhead_s = cost
    work_s = a_s + p_s * new_tokens
    return (work_s if work_s > weight_floor_s else weight_floor_s) + k_s * context_tokens + overhead_s


def prefill_s(model: Model, hardware: Hardware, prompt_tokens: int) -> float:
    """Seconds from the start of a lone request's prefill to its first token."""
    return step_s(step_cost(model, hardware), prompt_tokens, prompt_tokens)


def decode_step_s(cost: StepCost, batch: int, context_tokens: int) -> float:
    """Seconds of one step that yields a token for each of `batch` sequences with `context_tokens` of context in all."""
    return step_s(cost, batch, context_tokens)


def service_s(model: Model, hardware: Hardware, prompt_tokens: int, output_tokens: int) -> float:
    """Seconds of a lone request from the start of its prefill to its last token, on an idle worker that has the model."""
    cost = step_cost(model, hardware)
    steps = output_tokens - 1  # the prefill yields the first token
    context_growth = cost.k_s * steps * (steps + 1) / 2  # contexts of prompt + 1, prompt + 2, ...
    return step_s(cost, prompt_tokens, prompt_tokens) + steps * step_s(cost, 1, prompt_tokens) + context_growth


def half_busy_rate(workers: int, mean_service_s: float) -> float:
    """Requests a second that keep `workers` workers busy half of the time, when each request occupies one for `mean_service_s` and any number run at once.

    Arrivals of rate l at each worker find it busy with probability 1 - exp(-l S) (M/G/infinity); a half at l = ln 2 / S.
    """
    return workers * log(2) / mean_service_s
