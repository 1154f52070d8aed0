"""Draws the scenarios of the seed sweep: a fleet, its workload, every link's quality, the faults and the messages of strangers, all from one seed."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from math import log
from random import Random
from typing import Any, NamedTuple

from config import Config
from experiments.harness import ROOT, configuration
from sllm.models.catalogue import Catalog
from sllm.models.cost import service_s
from sllm.models.model import Hardware, Model
from sllm.placement.base import Costs
from sllm.placement.costs import make_costs
from sllm.placement.registry import policies
from sllm.protocol.limits import TOKENS_MAX
from sllm.protocol.messages import HIGH, LOW, NORMAL
from sllm.protocol.seeds import rng_for
from sllm.run.assemble import build_catalog
from sllm.run.hardware_mix import hardware_of_workers, parse_mix
from sllm.virtual.faults import Fault, Schedule, random_faults
from sllm.virtual.kinds import KINDS
from sllm.virtual.network import Latency
from sllm.workload import Request
from sllm.workload.lengths import AZURE_CONV_OUTPUT, AZURE_CONV_PROMPT, clamped_mean
from sllm.workload.popularity import Zipf

LIMITS_CATALOG = ROOT / "experiments/limits-catalog.toml"
REQUESTS_MAX = 500.0  # mean number of requests in a run
MANY_MODELS = (60, 200, 300)  # more models than a fleet can hold in GPU and host memory
RARE_REPORTS_S = (12.0, 15.0, 30.0, 60.0)
SINGLE_GPU = ("h100-80g", "a100-80g", "a5000-24g")
MIXED = (*SINGLE_GPU, "a100-80g-tp4", "h100-80g-tp8")
FAULTS_FROM_S = 2.0
LASTING_S = (0.5, 12.0)
FRESH_S = 29.0  # messages of a node whose clock is wrong by at most this are still accepted
WORKER_FAULTS = ("crash", "freeze", "zombie", "drain", "slow", "clock_jump", "clock_drift", "overflow", "isolate", "cut", "degrade")
COORDINATOR_FAULTS = ("crash", "freeze", "zombie", "slow", "clock_jump", "clock_drift", "overflow", "isolate", "cut", "degrade")
CLIENT_FAULTS = ("freeze", "slow", "clock_jump", "clock_drift", "overflow", "isolate", "cut", "degrade")  # no restart: no other node has its requests


class Scenario(NamedTuple):
    """One run: the fleet and its workload, every link's quality, the faults, and whether messages travel as bytes."""

    config: Config
    link: dict[str, Any]
    schedule: Schedule
    wire: bool
    limits_part: float  # part of the requests that are at or beyond a limit
    strangers_per_s: float  # messages of strangers while requests come

    def describe(self) -> str:
        """One line for people."""
        config = self.config
        what = f"{config.workers} workers of {config.engine}/{config.hardware}, {config.models} models, {config.policy}"
        how = f"{config.rate_per_s:.2f} req/s {config.arrivals} for {config.duration_s:.0f} s"
        faults = f"{len(self.schedule.faults)} faults{'' if self.schedule.heals else ', some for good'}"
        limits = f", {self.limits_part:.0%} of requests at limits" if self.limits_part else ""
        limits += ", strangers" if self.strangers_per_s else ""
        return f"{what}, {how}{limits}, reports every {config.report_interval_s:.12g} s, {faults}{', bytes' if self.wire else ''}"


def draw_scenario(seed: int, *, small: bool = False) -> Scenario:
    """The scenario of a seed. `small`: fewer workers and requests and no bytes, for tests that run many."""
    rng = rng_for(seed, "scenario")
    config = _draw_config(rng, seed, small)
    until_s = config.duration_s + 2.0
    faults = [] if rng.random() < 0.1 else _draw_faults(rng, config.workers, until_s)
    link: dict[str, Any] = {"latency": _draw_latency(rng), "loss": config.loss}
    if rng.random() < 0.3:
        link |= {"duplicate": rng.uniform(0.0, 0.1), "reorder": rng.uniform(0.0, 0.3), "reorder_extra_s": rng.uniform(0.001, 1.0)}
    if rng.random() < 0.2:
        link["corrupt"] = rng.uniform(0.0, 0.05)
    wire = rng.random() < 0.2 and not small
    limits_part = rng.choice((0.05, 0.2, 1.0)) if config.model_catalog else 0.0
    strangers_per_s = rng.uniform(1.0, 30.0) if rng.random() < 0.2 else 0.0
    return Scenario(config, link, Schedule(tuple(faults), f"seed {seed}"), wire, limits_part, strangers_per_s)


# --- the fleet and its workload -----------------------------------------------------------------------------------------------------


def _draw_config(rng: Random, seed: int, small: bool) -> Config:
    """A fleet and its workload."""
    workers = rng.randint(1, 4 if small else 12)
    config = configuration(
        seed=seed,
        workers=workers,
        duration_s=rng.uniform(10.0, 20.0) if small else rng.uniform(15.0, 60.0),
        arrivals=rng.choice(("poisson", "poisson", "gamma", "deterministic")),
        cv=rng.choice((2.0, 4.0, 8.0)),
        models=rng.choice(MANY_MODELS) if rng.random() < 0.1 else rng.randint(1, 16),
        zipf=rng.choice((0.0, 0.8, 1.1, 2.0)),
        policy=_with_parameters(list(policies())[seed % len(policies())], rng),
        loss=rng.choice((0.0, 0.0, rng.uniform(0.0, 0.1))),
        **_draw_engine(rng, workers),
        **_draw_times(rng),
        demo_models=rng.choice((0, 0, 1, 2)),
        queue_threshold=rng.choice((1, 4, 10, 10, 1000, 100_000)),
        queue_max=rng.choice((2, 20, 1000)),
    )
    if rng.random() < 0.25:
        config = _at_limits(rng, config)
    busy = _half_busy_rate(config) * rng.uniform(0.2, 2.5)
    most = (100.0 if small else REQUESTS_MAX) / config.duration_s
    return dataclasses.replace(config, rate_per_s=min(busy, most))


def _half_busy_rate(config: Config) -> float:
    """Requests a second that leave a worker with nothing to do half of the time: far below saturation, where a batch is full all the time, so that fleets are
    idle, busy and full in turn. Arrivals of rate l at a worker find it busy with probability 1 - exp(-l S) (M/G/infinity), which is a half at l = ln 2 / S."""
    if config.engine == "queue":
        return 0.5 * config.workers * (config.slots or 1) / config.service_mean_s
    catalog = build_catalog(config)
    names = catalog.names[: config.models or None]
    popularity = Zipf(names, config.zipf)
    prompt, output = round(clamped_mean(AZURE_CONV_PROMPT)), round(clamped_mean(AZURE_CONV_OUTPUT))
    rate_per_s = 0.0
    for kind, workers in Counter(hardware_of_workers(config.hardware, config.workers)).items():
        hardware = catalog.get_hardware(kind)
        mean_s = sum(popularity.probability(rank) * service_s(catalog[name], hardware, prompt, output) for rank, name in enumerate(names))
        rate_per_s += workers * log(2) / mean_s
    return rate_per_s


def _draw_engine(rng: Random, workers: int) -> dict[str, Any]:
    """The hardware and the engine of the workers."""
    return {
        "engine": rng.choice(("llm", "llm", "queue")),
        "hardware": _draw_mix(rng, workers, MIXED) if workers > 1 and rng.random() < 0.25 else rng.choice(SINGLE_GPU),
        "service": rng.choice(("exponential", "deterministic", "hyperexponential:3")),
        "service_mean_s": rng.uniform(0.02, 0.3),  # the longest hyperexponential services are 30 times the mean
        "service_load_s": rng.choice((0.0, rng.uniform(0.1, 3.0))),
        "slots": rng.choice((0, 0, 1, 4, 16)),
        "keep_alive_s": rng.choice((0.0, 0.0, rng.uniform(0.5, 10.0))),
    }


def _draw_mix(rng: Random, workers: int, names: tuple[str, ...]) -> str:
    """Two or three kinds of hardware, at least one worker of each."""
    kinds = rng.sample(names, rng.randint(2, min(3, workers)))
    cuts = sorted(rng.sample(range(1, workers), len(kinds) - 1))
    counts = [end - begin for begin, end in zip([0, *cuts], [*cuts, workers], strict=True)]
    return ",".join(f"{kind}:{count}" for kind, count in zip(kinds, counts, strict=True))


def _draw_times(rng: Random) -> dict[str, Any]:
    """Intervals and timeouts. The timeout of a request is long enough for the listening time after a start of the coordinator, and for the service."""
    interval_s = rng.choice(RARE_REPORTS_S) if rng.random() < 0.12 else rng.choice((0.0, 0.1, 0.3, 1.0, 1.0, 2.0, 5.0))
    patience_s = 5.0 * interval_s if interval_s in RARE_REPORTS_S else 0.0
    return {
        "report_interval_s": interval_s,
        "worker_timeout_s": rng.choice((2.0, 10.0, 10.0, 30.0)),
        "hold_max_s": rng.choice((5.0, 20.0, 60.0)),
        "forget_after_s": rng.choice((20.0, 300.0, 300.0, 300.0)),
        "request_timeout_s": rng.choice((70.0, 90.0, 120.0)) + patience_s,  # the longest request alone takes 40 s on the slowest GPU
        "drain_timeout_s": rng.choice((1.0, 5.0, 30.0)),
        "response_keep_s": rng.choice((30.0, 120.0)),
        "suspect_intervals": rng.choice((1.5, 3.0, 3.0, 10.0)),
        "dispatch_expiry_intervals": rng.choice((1.0, 3.0, 3.0)),
        "ack_every": rng.choice((1, 4, 4, 50)),
        "decision_keep_s": rng.choice((0.5, 10.0, 10.0)),
        "placements_max": rng.choice((1, 3, 3, 20)),
    }


def _at_limits(rng: Random, config: Config) -> Config:
    """The same fleet with the catalogue of limits: requests ask by popularity for models that fit some worker, and requests at limits ask for the others."""
    names = (*MIXED, "small-box")
    hardware = _draw_mix(rng, config.workers, names) if config.workers > 1 and rng.random() < 0.5 else rng.choice(names)
    config = dataclasses.replace(config, model_catalog=str(LIMITS_CATALOG), hardware=hardware)
    bounds = Bounds(config, build_catalog(config))
    fitting = sum(bounds.fits(model, 1) for model in bounds.catalog.models.values())  # in order of size
    return dataclasses.replace(config, models=rng.randint(1, len(bounds.catalog) if config.engine == "queue" else fitting))


def _with_parameters(name: str, rng: Random) -> str:
    """The policy, sometimes with parameters other than its own."""
    changed = {"power_of_two": f"choices={rng.randint(1, 5)}", "startup_time": f"sample={rng.randint(1, 10)},margin_s={rng.uniform(0.0, 2.0):.3f}"}
    return f"{name}:{changed[name]}" if name in changed and rng.random() < 0.5 else name


class Bounds:
    """The models and requests that a run's fleet can hold, by the rules of placement."""

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self.catalog = catalog
        self.costs: Costs = make_costs(config.engine, config.service_mean_s, config.service_load_s)
        self.hardware: list[Hardware] = [catalog.get_hardware(name) for name in parse_mix(config.hardware)]

    def fits(self, model: Model, tokens: int) -> bool:
        """Whether some worker can hold the model and a request with this number of tokens."""
        kv_bytes = self.costs.kv_bytes(model, tokens)
        return not 0 < model.context_tokens < tokens and any(self.costs.fits(model, hardware, kv_bytes) for hardware in self.hardware)

    def most_tokens(self, model: Model) -> int:
        """Tokens of the largest request that fits; 0 if no request fits."""
        room_bytes = max(hardware.usable_gpu_bytes for hardware in self.hardware) - model.size_bytes
        most = room_bytes // model.kv_bytes_per_token
        return max(0, min(most, model.context_tokens) if model.context_tokens else most)


def limit_requests(rng: Random, bounds: Bounds, part: float) -> Callable[[Request], Request]:
    """A function that changes a random part of a workload's requests into requests at or beyond a limit. Outputs stay short; the longest would take hours."""
    names = bounds.catalog.names

    def reshape(request: Request) -> Request:
        if rng.random() >= part:
            return request
        model = bounds.catalog[rng.choice(names)]
        output = rng.choice((1, 1, 2, 60))
        tokens = rng.choice((bounds.most_tokens(model), model.context_tokens, rng.randint(1, 2000))) + rng.choice((-1, 0, 0, 1))
        prompt = max(1, tokens - output) if rng.random() < 0.8 else rng.choice((1, TOKENS_MAX))
        priority = rng.choice((LOW, NORMAL, HIGH))
        return request._replace(model=model.name, prompt_tokens=min(prompt, TOKENS_MAX), output_tokens=output, priority=priority)

    return reshape


# --- what goes wrong ----------------------------------------------------------------------------------------------------------------


def _draw_latency(rng: Random) -> Latency:
    kind = rng.choice(Latency.KINDS)
    typical_s = 10.0 ** rng.uniform(-4.0, -1.0)
    a, b = {"constant": (typical_s, 0.0), "uniform": (0.0, 2.0 * typical_s), "exponential": (1e-4, typical_s), "lognormal": (typical_s, 0.7)}[kind]
    return Latency(kind, a, b)


def _draw_faults(rng: Random, workers: int, until_s: float) -> list[Fault]:
    """Some fault kinds, each at a rate of its own, on workers, on the coordinator and on the client."""
    faults: list[Fault] = []
    for kinds, hosts, chance in ((WORKER_FAULTS, "random:1:worker-*", 0.5), (COORDINATOR_FAULTS, "coordinator", 0.2), (CLIENT_FAULTS, "client", 0.1)):
        rates = {kind: rng.uniform(0.5, 6.0) for kind in kinds if rng.random() < chance}
        if hosts != "random:1:worker-*":
            rates = {kind: rate / 3.0 for kind, rate in rates.items()}
        faults += random_faults(rng, FAULTS_FROM_S, until_s, rates, LASTING_S, (hosts,))
    for host in (f"worker-{rng.randrange(workers)}", "coordinator"):
        if rng.random() < 0.25:
            faults += _draw_set_back(rng, host, until_s)
    if rng.random() < 0.1:
        faults += _draw_deaths(rng, workers, until_s)
    return sorted(faults, key=lambda fault: fault.at_s)


def _draw_set_back(rng: Random, host: str, until_s: float) -> list[Fault]:
    """A life begins while the host's clock is ahead; the next life, which sometimes begins while the first still runs, begins when the clock is right again."""
    at, ahead_for_s = rng.uniform(FAULTS_FROM_S, until_s), rng.uniform(3.0, 10.0)
    by_s = rng.uniform(10.0, FRESH_S) if rng.random() < 0.8 else rng.uniform(FRESH_S, 120.0)
    last = rng.choice(("crash", "crash", "zombie"))
    options = {"restart_after": 1.0, "linger": rng.uniform(1.0, 5.0)} if last == "zombie" else {}
    return [
        _fault(at, "clock_jump", ahead_for_s, host, by=by_s),
        _fault(at + 0.5, "crash", rng.uniform(0.1, 2.0), host),
        _fault(at + ahead_for_s - 0.5, last, rng.uniform(1.0, 4.0), host, **options),
    ]


def _draw_deaths(rng: Random, workers: int, until_s: float) -> list[Fault]:
    """Some of the workers, in some scenarios most or all of them, die for good: one by one or at once."""
    dead = rng.sample(range(workers), rng.randint(1, workers))
    at_once_s = rng.uniform(FAULTS_FROM_S, until_s)
    one_by_one = rng.random() < 0.5
    return [_fault(rng.uniform(FAULTS_FROM_S, until_s) if one_by_one else at_once_s, "crash", None, f"worker-{number}") for number in dead]


def _fault(at_s: float, kind: str, for_s: float | None, host: str, **options: Any) -> Fault:
    defaults = KINDS[kind].defaults()
    return Fault(at_s, kind, for_s, defaults | {"hosts": [host]} | options, f"drawn {kind}")
