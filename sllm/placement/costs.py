"""The cost model as placement reads it: the same seconds for prefill and load that the engine takes."""

from __future__ import annotations

from sllm.fleet.row import Row
from sllm.models.cost import load_s, step_cost, step_s
from sllm.models.model import DISK, HOST, REMOTE, Hardware, Model, StepCost
from sllm.placement.base import Costs


class EngineCosts:
    """Costs of the continuous-batching engine, for the models and hardware of one catalogue."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, str], StepCost] = {}  # by names, which are hashed quicker than what they name

    def _step(self, model: Model, hardware: Hardware) -> StepCost:
        names = model.name, hardware.name
        cost = self._steps.get(names)
        if cost is None:
            cost = self._steps[names] = step_cost(model, hardware)
        return cost

    def prefill_s(self, model: Model, hardware: Hardware, prompt_tokens: int) -> float:
        return step_s(self._step(model, hardware), prompt_tokens, prompt_tokens)

    def service_s(self, model: Model, hardware: Hardware, prompt_tokens: int, output_tokens: int, round_s: float) -> float:
        cost = self._step(model, hardware)
        return step_s(cost, prompt_tokens, prompt_tokens) + (output_tokens - 1) * max(round_s, step_s(cost, 1, prompt_tokens))

    def load_s(self, model: Model, hardware: Hardware, tier: int) -> float:
        return load_s(model, hardware, tier)

    def kv_bytes(self, model: Model, tokens: int) -> int:
        return tokens * model.kv_bytes_per_token

    def fits(self, model: Model, hardware: Hardware, kv_bytes: int) -> bool:
        return model.size_bytes + kv_bytes <= hardware.usable_gpu_bytes

    def tier(self, model: Model, row: Row) -> int:
        engine = row.engine
        if model.name in engine.host_models:
            return HOST
        return DISK if engine.disk_complete or model.name in engine.disk_models else REMOTE


class QueueCosts(EngineCosts):
    """Costs of the queue engine: a request adds its mean service time to the wait, every load takes the same time, memory is no object."""

    def __init__(self, service_mean_s: float, load_s: float) -> None:
        super().__init__()
        self._service_mean_s = service_mean_s
        self._load_s = load_s

    def prefill_s(self, model: Model, hardware: Hardware, prompt_tokens: int) -> float:
        return self._service_mean_s

    def service_s(self, model: Model, hardware: Hardware, prompt_tokens: int, output_tokens: int, round_s: float) -> float:
        return self._service_mean_s

    def load_s(self, model: Model, hardware: Hardware, tier: int) -> float:
        return self._load_s

    def kv_bytes(self, model: Model, tokens: int) -> int:
        return 0

    def fits(self, model: Model, hardware: Hardware, kv_bytes: int) -> bool:
        return True


def make_costs(engine: str, service_mean_s: float, service_load_s: float) -> Costs:
    """The costs that go with an engine's name; the seconds are the queue engine's."""
    return QueueCosts(service_mean_s, service_load_s) if engine == "queue" else EngineCosts()
