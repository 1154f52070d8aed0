"""The rate of requests at which a fleet saturates, as a closed formula of slots, KV cache and the costs of steps and loads.

A worker's batch in the long run: N requests run, as many as slots and KV cache allow, and each yields one token a round. A round takes

    T = step(N decodes and the prompts that come in a round, their context) + (g - 1) * (weight floor + overhead of one more model)

where g is the number of models that a worker serves at once. A request needs as many rounds as it has output tokens, so it takes T * output / N seconds of a
worker, and the fleet serves the sum over its workers of 1 / that, by the mean over models. Prompts that come in a round: N / output of them. Context: prompt
and half of the output for each. KV cache is reserved for prompt and output in full.

W workers dealt out to M models in proportion to their demand make W + M - 1 pairs of a worker and a model at most: cut a line of the demand of all models
into W equal parts, and each of the M - 1 borders between models adds one pair. A policy that follows demand up and down keeps some models on more workers
than W + M - 1 pairs: so g = 1 + BORDERS * (M - 1) / W, as long as g models leave room for KV cache. Where the fleet has no room for all models, each request
for one of the least wanted models pays a load from disk. No fleet reaches the sum, because the workers of a fleet are never all equally full: the default
policy reaches the part EFFICIENCY. A fleet of fewer workers than wanted models loads and evicts all the time, and reaches EFFICIENCY * sqrt(workers / wanted
models). The number of wanted models is the exponential of the entropy of the demand: M equally wanted models count as M, rare models count little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log, sqrt
from typing import NamedTuple

from sllm.models.cost import load_s, step_cost
from sllm.models.model import DISK, Hardware, Model

BORDERS, EFFICIENCY = 1.75, 0.82  # fitted to experiments/saturation.py for the demonstration mix on 5, 20 and 100 H100s; docs/compare.md says how well
KV_PART_MIN = 0.25  # part of the GPU memory that stays for KV cache on workers that cannot hold all models

Demand = Sequence[tuple[Model, float]]  # (model, part of the requests that ask for it), the most wanted model first


class Mean(NamedTuple):
    """The mean over the models of a demand that fit a hardware: the cost of one further model on a worker."""

    size_bytes: float
    round_s: float  # weight floor and overhead of a step


def saturation_rate(workers: Mapping[Hardware, int], demand: Demand, prompt_tokens: float, output_tokens: float, slots: int = 0) -> float:
    """Requests a second at which a fleet of these workers saturates. Lengths are means; `slots` 0: the hardware's own. 0.0 if no worker can hold a model."""
    together = 1.0 + BORDERS * (len(demand) - 1) / sum(workers.values())
    fitting = {hardware: [pair for pair in demand if pair[0].size_bytes < hardware.usable_gpu_bytes] for hardware in workers}
    means = {hardware: _mean(hardware, models) for hardware, models in fitting.items() if models}
    room = {hardware: max(1.0, (1.0 - KV_PART_MIN) * hardware.usable_gpu_bytes / mean.size_bytes) for hardware, mean in means.items()}
    kept = int(sum(workers[hardware] * most for hardware, most in room.items()))  # models that the fleet can hold on its GPUs
    rate_per_s = 0.0
    for hardware, mean in means.items():
        models, at_once = fitting[hardware], min(together, room[hardware])
        cost_s = sum(part * service_s(model, hardware, mean, at_once, prompt_tokens, output_tokens, slots or hardware.slots) for model, part in models)
        cost_s += sum(part * load_s(model, hardware, DISK) for model, part in models[kept:])
        rate_per_s += workers[hardware] * sum(part for _, part in models) / cost_s
    wanted = exp(-sum(part * log(part) for _, part in demand if part > 0.0))
    return EFFICIENCY * min(1.0, sqrt(sum(workers.values()) / wanted)) * rate_per_s


def _mean(hardware: Hardware, models: Demand) -> Mean:
    costs = [step_cost(model, hardware) for model, _ in models]
    return Mean(sum(model.size_bytes for model, _ in models) / len(models), sum(cost.weight_floor_s + cost.overhead_s for cost in costs) / len(costs))


def service_s(
    model: Model, hardware: Hardware, other: Mean, at_once: float, prompt_tokens: float, output_tokens: float, slots: int
) -> float:  # fmt: skip
    """Seconds of a full worker that a request for `model` takes, when the worker serves `at_once` models: `model` and others like `other`."""
    kv_bytes = hardware.usable_gpu_bytes - model.size_bytes - (at_once - 1.0) * other.size_bytes
    running = max(1.0, min(slots, kv_bytes / ((prompt_tokens + output_tokens) * model.kv_bytes_per_token)))
    weight_floor_s, a_s, p_s, k_s, overhead_s, sequence_s = step_cost(model, hardware)
    work_s = max(weight_floor_s, a_s + p_s * running * (1.0 + prompt_tokens / output_tokens))
    round_s = work_s + (k_s * (prompt_tokens + output_tokens / 2.0) + sequence_s) * running + overhead_s
    return (round_s + (at_once - 1.0) * other.round_s) * output_tokens / running
