"""From a configuration to the parts that roles are made of: the catalogue and a worker's engine. Shared by entry points and simulations."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from config import Config
from sllm.catalog import Catalog, Hardware
from sllm.cost import half_busy_rate, service_s
from sllm.engine import Engine, LlmEngine, QueueEngine
from sllm.workload.lengths import AZURE_CONV_OUTPUT, AZURE_CONV_PROMPT, clamped_mean
from sllm.workload.popularity import Zipf

DEMO_CATALOG_MODELS = 8  # models of the demonstration catalogue unless more are asked for


def build_catalog(config: Config) -> Catalog:
    """The catalogue of `config.model_catalog`, or the demonstration one, which has as many models as are asked for, under the
    configuration's profiles where it names any. UsageError for a bad file, and for hardware that is in neither the catalogue nor the presets."""
    if config.model_catalog:
        catalog = Catalog.from_file(config.model_catalog)
    else:
        catalog = Catalog.demo(max(config.models or DEMO_CATALOG_MODELS, config.demo_models))
    catalog = catalog.with_profiles(config.engine_profile, config.loader)
    catalog.get_hardware(config.hardware)
    return catalog


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
    """Requests a second that keep a fleet of `config.workers` about half busy, for models by popularity and requests of the mean length of the Azure
    conversation trace, which synthetic workloads follow."""
    if config.engine == "queue":
        return 0.5 * config.workers * (config.slots or 1) / config.service_mean_s
    hardware = catalog.get_hardware(config.hardware)
    names = catalog.names[: config.models or None]
    popularity = Zipf(names, config.zipf)
    prompt, output = round(clamped_mean(AZURE_CONV_PROMPT)), round(clamped_mean(AZURE_CONV_OUTPUT))
    mean_s = sum(popularity.probability(rank) * service_s(catalog[name], hardware, prompt, output) for rank, name in enumerate(names))
    return half_busy_rate(config.workers, mean_s)
