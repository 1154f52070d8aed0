"""Seconds for loads, prefills and decodes: pure functions, which both the engine and the coordinator's policies use.

One step of a model's batch takes

    step = max(weight_floor, a + p * new tokens) + k * (sum of context tokens) + overhead + sequence * sequences

A sequence brings its whole prompt as new tokens in its prefill step, and one token in each later step. The context of a sequence in the step that yields
token i (counted from 0, the prefill's token) is prompt + i tokens. The coefficients come from the first of these sources that has them:

1. a `step` table of a catalogue file for the model on the hardware, which holds for every engine profile
2. a measurement with the hardware's engine profile (the tables of `sllm.models.presets`); the hardware's own overhead per layer, if it has one, replaces
   the measured overhead
3. the profile's parts of the hardware's bandwidth and FLOP/s, which are the sums over all GPUs that work as one:
    - weight_floor = size / (weights_bandwidth * GPU bandwidth)
    - p = size / (flops * FP16 FLOP/s), a token being 2 FLOP a parameter and a parameter 2 bytes
    - a = weight_floor - flat_tokens * p, at least 0: the floor is flat up to `flat_tokens` new tokens
    - k = KV bytes per token / (kv_bandwidth * GPU bandwidth)
    - sequence is the profile's
    - overhead = layers * the hardware's own overhead per layer if it has one, else the profile's fixed part

A load takes a fixed time (the hardware's own, else the loader profile's) and size / bandwidth of the slowest of loader, bus, disk and network.
"""

from __future__ import annotations

from functools import lru_cache

from sllm.models.model import DISK, GPU, HOST, Hardware, Model, StepCost


@lru_cache(maxsize=65536)
def load_s(model: Model, hardware: Hardware, tier: int) -> float:
    """Seconds to bring the model from `tier` onto the GPU: a fixed part + size / bandwidth of the slowest stage on the path; 0 from the GPU itself.

    Stages are pipelined, as in ServerlessLLM (OSDI 2024): only the slowest counts.
    """
    if tier == GPU:
        return 0.0
    loader = hardware.loader
    if tier == HOST:
        bandwidth = min(hardware.pcie_bytes_per_s, loader.host_bytes_per_s)
    else:
        bandwidth = min(hardware.pcie_bytes_per_s, hardware.disk_bytes_per_s, loader.disk_bytes_per_s)
        if tier != DISK:
            bandwidth = min(bandwidth, hardware.network_bytes_per_s)
    fixed_s = loader.fixed_s(model.layers) if hardware.init_s is None else hardware.init_s
    return fixed_s + model.size_bytes / bandwidth


@lru_cache(maxsize=65536)
def step_cost(model: Model, hardware: Hardware) -> StepCost:
    """The step coefficients of the model on the hardware; the module's text gives their sources."""
    engine, own_s = hardware.engine, hardware.layer_overhead_s
    for known in model.steps:
        if known.hardware == hardware.name and known.engine in ("", engine.name):
            return known.cost if not known.engine or own_s is None else known.cost._replace(overhead_s=model.layers * own_s)
    weight_floor_s = model.size_bytes / (engine.weights_bandwidth * hardware.gpu_bytes_per_s)
    p_s = model.size_bytes / (engine.flops * hardware.gpu_flops_per_s)
    return StepCost(
        weight_floor_s,
        max(0.0, weight_floor_s - engine.flat_tokens * p_s),
        p_s,
        model.kv_bytes_per_token / (engine.kv_bandwidth * hardware.gpu_bytes_per_s),
        engine.overhead_s(hardware.gpu, hardware.gpus, model.layers) if own_s is None else model.layers * own_s,
        engine.sequence_s,
    )


def step_s(cost: StepCost, new_tokens: int, context_tokens: int, sequences: int = 1) -> float:
    """Seconds of one step of a batch of one model with `sequences` sequences."""
    weight_floor_s, a_s, p_s, k_s, overhead_s, sequence_s = cost
    work_s = a_s + p_s * new_tokens
    return (work_s if work_s > weight_floor_s else weight_floor_s) + k_s * context_tokens + overhead_s + sequence_s * sequences


def prefill_s(model: Model, hardware: Hardware, prompt_tokens: int) -> float:
    """Seconds from the start of a lone request's prefill to its first token."""
    return step_s(step_cost(model, hardware), prompt_tokens, prompt_tokens)


def service_s(model: Model, hardware: Hardware, prompt_tokens: int, output_tokens: int) -> float:
    """Seconds of a lone request from the start of its prefill to its last token, on an idle worker that has the model."""
    cost = step_cost(model, hardware)
    steps = output_tokens - 1  # the prefill yields the first token
    context_growth = cost.k_s * steps * (steps + 1) / 2  # contexts of prompt + 1, prompt + 2, ...
    return step_s(cost, prompt_tokens, prompt_tokens) + steps * step_s(cost, 1, prompt_tokens) + context_growth
