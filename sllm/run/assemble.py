"""From a configuration to the parts that a run is made of: the catalogue, a worker's engine, the workload. Shared by entry points and simulations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable
from random import Random

from config import Config
from sllm.engine import Engine, LlmEngine, QueueEngine
from sllm.models.capacity import saturation_rate
from sllm.models.catalogue import Catalog
from sllm.models.model import GB, Hardware
from sllm.models.presets import DEMO_MODELS
from sllm.placement.costs import make_costs
from sllm.protocol.errors import UsageError
from sllm.run.hardware_mix import hardware_of_workers, parse_mix
from sllm.workload import ModelCounts, Workload, WorkloadSpec, count_models, generate
from sllm.workload.generate import popularity_of
from sllm.workload.lengths import parse_lengths
from sllm.workload.sessions import SessionLaw
from sllm.workload.shares import read_shares
from sllm.workload.stages import Stages
from sllm.workload.traces.base import MODELS_MAX

DEMO_CATALOG_MODELS = 8  # models of the demonstration catalogue unless more are asked for
DURATION_S = 30.0  # of synthetic arrivals, unless said otherwise
LIVE_RATE_MAX_PER_S = 200.0  # of wall time, unless said otherwise: what one process of Python passes on beside whatever else this machine does


def build_catalog(config: Config, counts: ModelCounts | None = None, mix: Iterable[str] = ()) -> Catalog:
    """The catalogue of `config.model_catalog`, or the demonstration one, which has as many models as are asked for: `config.models`, or else eight, or more
    if the models of a trace, which `counts` names, or those of a mix need more. UsageError for a bad file, and for hardware that is in neither the catalogue
    nor the presets."""
    if config.model_catalog:
        catalog = Catalog.from_file(config.model_catalog)
    else:
        catalog = Catalog.demo(max(config.models or max(DEMO_CATALOG_MODELS, demo_models_needed(counts), *map(_demo_position, mix)), config.demo_models))
    catalog = catalog.with_profiles(config.engine_profile, config.loader)
    for name in parse_mix(config.hardware):
        catalog.get_hardware(name)
    return catalog


def demo_models_needed(counts: ModelCounts | None) -> int:
    """How many models the demonstration catalogue must have so that each model that a trace names has one, its own if the demonstration has it."""
    return max([len(counts.requests), *map(_demo_position, counts.requests)]) if counts is not None else 0


def _demo_position(name: str) -> int:
    """Where in the demonstration catalogue the model of this name is, from 1; 0 if nowhere."""
    if name in DEMO_MODELS:
        return DEMO_MODELS.index(name) + 1
    base, _, copy = name.rpartition("-")
    if base not in DEMO_MODELS or not re.fullmatch(r"[2-9]|[1-9]\d{1,5}", copy, re.ASCII):
        return 0
    position = (int(copy) - 1) * len(DEMO_MODELS) + DEMO_MODELS.index(base) + 1
    return position if position <= MODELS_MAX else 0


def profile_names(config: Config, hardware: Iterable[Hardware]) -> tuple[str, str] | tuple[None, None]:
    """The engine profiles and the loaders that the costs of workers on this hardware go by; None for the queue engine, which has its own times."""
    if config.engine == "queue":
        return None, None
    kinds = list(hardware)
    return ", ".join(dict.fromkeys(one.engine.name for one in kinds)), ", ".join(dict.fromkeys(one.loader.name for one in kinds))


def build_engine(config: Config, catalog: Catalog, rng: Random) -> Engine:
    """A worker's engine; service times of the queue engine are drawn from `rng`. UsageError for a service law that is not known."""
    keep_alive_s = config.keep_alive_s or None
    if config.engine == "queue":
        return QueueEngine(
            config.slots or 1, config.service, config.service_mean_s, rng, models=catalog.names, keep_alive_s=keep_alive_s, load_s=config.service_load_s
        )
    return LlmEngine(catalog, catalog.get_hardware(config.hardware), keep_alive_s=keep_alive_s, slots=config.slots or None)


def default_rate(config: Config, catalog: Catalog) -> float:
    """Half of the requests a second at which a fleet of `config.workers` saturates, for the models and the mean lengths of its synthetic requests."""
    if config.engine == "queue":
        return 0.5 * config.workers * (config.slots or 1) / config.service_mean_s
    popularity = popularity_of(_spec(config), catalog.names[: config.models or None])
    demand = [(catalog[name], share) for name, share in popularity.items()]
    fleet = {catalog.get_hardware(kind): count for kind, count in Counter(hardware_of_workers(config.hardware, config.workers)).items()}
    rate_per_s = 0.5 * saturation_rate(fleet, demand, *mean_lengths(config), config.slots)
    return rate_per_s or 1.0  # nothing fits: whoever asks for a run is told so by `check_models_fit`


def check_models_fit(config: Config, catalog: Catalog, workload: Workload) -> None:
    """UsageError when a model that requests will be for fits on no worker of the fleet, by the same rule as placement's."""
    costs = make_costs(config.engine, config.service_mean_s, config.service_load_s)
    fleet = [catalog.get_hardware(name) for name in parse_mix(config.hardware)]
    largest = max(fleet, key=lambda hardware: hardware.usable_gpu_bytes)
    for name in workload.asked_for(catalog.names):
        model = catalog[name]
        if not any(costs.fits(model, hardware, costs.kv_bytes(model, 1)) for hardware in fleet):
            room = f"the largest, {largest.name}, has room for less than {largest.usable_gpu_bytes / GB:,.1f} GB"
            raise UsageError(f"model {name!r} has {model.size_bytes / GB:,.1f} GB of weights and fits on no worker: {room} (--hardware, --catalog, --models)")


def mean_lengths(config: Config) -> tuple[float, float]:
    """Mean tokens of prompt and output of synthetic requests. A turn of a session has one turn fewer before it than sessions have in the mean, and a session
    that would grow too long is begun anew, which is a bound here."""
    lengths = parse_lengths(config.lengths, config.trace_columns)
    prompt, output = lengths.prompt_mean, lengths.output_mean
    if not config.sessions:
        return prompt, output
    law = SessionLaw.parse(config.sessions)
    return min(prompt + (law.turns - 1.0) * (prompt + output), max(prompt, law.longest - output)), output


def mix_models(config: Config) -> tuple[str, ...]:
    """The models that the mix of a configuration names; none if it has no mix."""
    return tuple(read_shares(config.mix, "mix")) if config.mix else ()


def count_trace_models(config: Config) -> ModelCounts | None:
    """The models that the trace of a configuration names; None if there is no trace, or one that names none. Reads the trace once."""
    return count_models(config.trace, config.duration_s or math.inf, config.trace_columns) if config.trace else None


def _spec(config: Config) -> WorkloadSpec:
    """The workload of a configuration, all but its default rate."""
    spec = WorkloadSpec(
        config.rate_per_s or 1.0, config.arrivals, config.cv, duration_s=config.duration_s or None, zipf=config.zipf, models=config.models,
        mix=config.mix, priorities=config.priorities, columns=config.trace_columns, model_map=config.model_map or None,
        trace=config.trace or None, trace_rate=config.trace_rate,
    )  # fmt: skip
    if config.trace:
        return spec
    stages = "" if config.concurrency else config.stages
    duration_s = config.duration_s or DURATION_S
    if stages:
        duration_s = min(config.duration_s or math.inf, Stages.parse(stages).duration_s)
    return dataclasses.replace(
        spec, lengths=config.lengths, sessions=config.sessions, concurrency=config.concurrency, think_s=config.think_s, stages=stages, duration_s=duration_s
    )


def build_workload(config: Config, catalog: Catalog, counts: ModelCounts | None = None, *, live: bool = False) -> Workload:
    """The requests that a configuration describes, for the models of `catalog`; `counts` is what `count_trace_models` returned, if it was asked. A default
    rate is bounded by what a process can pass on if the run is `live`. UsageError as `generate`."""
    spec = _spec(config)
    if not (config.rate_per_s or spec.trace or spec.stages or spec.concurrency):
        most_per_s = LIVE_RATE_MAX_PER_S / config.speedup if live else math.inf
        spec = dataclasses.replace(spec, rate_per_s=min(default_rate(config, catalog), most_per_s))
    return generate(spec, catalog.names, config.seed, counts)
