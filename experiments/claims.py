"""The claims that validation holds the simulator to: for each, a run of one seed that yields one figure, and the value it should have."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from config import Config
from experiments import theory
from experiments.harness import Simulation, configuration
from sllm.protocol.events import RequestCompleted
from sllm.workload import Workload, WorkloadSpec, generate

Figure = Callable[[int, float], float]
"""(seed, scale of the run's length) -> the figure that one run measured."""


class Claim(NamedTuple):
    """`exact` None: no value is known, the row is there for comparison."""

    key: str
    what: str
    source: str  # of the exact value
    exact: Callable[[], float] | None
    figure: Figure
    command: str  # one such run from the command line, seed 1, as near as its options go


# --- runs -----------------------------------------------------------------------------------------------------------------------------

PATIENT: dict[str, Any] = {  # as in textbooks, no request is refused, given up or polled
    "queue_threshold": 100_000_000, "queue_max": 10_000_000, "request_timeout_s": 1e7, "poll_s": 1e6, "retry_initial_s": 60.0, "retry_max_s": 60.0,
}  # fmt: skip


def completed(run: Simulation) -> list[RequestCompleted]:
    """Conduct a run; returns every completed request, in the order of completion. RuntimeError if an invariant broke or a request got lost."""
    done: list[RequestCompleted] = []
    run.world.bus.subscribe(lambda node, event: done.append(event), RequestCompleted)
    results = run.complete()
    if run.violations:
        raise RuntimeError(run.violations[0])
    if len(done) != results["requests"]["sent"]:
        raise RuntimeError(f"not every request was completed: {results['requests']}")
    return done


def mean_after(run: Simulation, warm_up_s: float, value: Callable[[RequestCompleted], float]) -> float:
    """The mean over requests that came after the warm-up."""
    values = [value(event) for event in completed(run) if event.arrival_s >= run.began_s + warm_up_s]
    return sum(values) / len(values)


def queue_config(seed: int, scale: float, rate: float, requests: float, **changes: Any) -> Config:
    """Queue engine, mean service 1 s, `requests` arrivals (Poisson) beside a tenth more to warm up."""
    settings = PATIENT | {"engine": "queue", "rate_per_s": rate, "duration_s": 1.1 * scale * requests / rate, "report_interval_s": 30.0, "models": 1}
    return configuration(seed=seed, **settings | changes)


def wait(rate: float, requests: float, **changes: Any) -> Figure:
    """Mean wait at the worker."""

    def figure(seed: int, scale: float) -> float:
        config = queue_config(seed, scale, rate, requests, **changes)
        return mean_after(Simulation(config), config.duration_s / 11.0, lambda event: event.queue_wait_s)

    return figure


def time_in_system(rate: float, requests: float, **changes: Any) -> Figure:
    """Mean time from arrival to the end of service."""

    def figure(seed: int, scale: float) -> float:
        config = queue_config(seed, scale, rate, requests, **changes)
        return mean_after(Simulation(config), max(config.duration_s / 11.0, 40.0 * min(1.0, 2.0 * scale)), lambda event: event.e2e_s)

    return figure


def queue_command(rate: float, requests: float, extra: str) -> str:
    run = f"--rate {rate:.12g} --duration {requests / rate:.0f} --models 1"
    return f"python3 centralized_simulation.py --virtual --engine queue --queue-threshold 100000000 {run} {extra}"


def cold_part(rate: float, requests: float, **changes: Any) -> Figure:
    """Part of the requests for which the model was loaded."""

    def figure(seed: int, scale: float) -> float:
        config = queue_config(seed, scale, rate, requests, **changes)
        return mean_after(Simulation(config), config.duration_s / 11.0, lambda event: float(event.load_s > 0.0))

    return figure


# --- a cache of models ------------------------------------------------------------------------------------------------------------------

CACHE_CATALOG = """
[model.m]                      # a hundred of one size; ten of them fit, with room for one request's KV cache
size_gb = 1.0
kv_kib_per_token = 1
layers = 1
count = 100
[hardware.ten]
preset = "h100-80g"
gpu_memory_gb = 11.6           # 90 % of it are 10.44 GB
"""
BATCH_CATALOG = """
[model.m]
size_gb = 1.0
kv_kib_per_token = 1
layers = 1
step.box = { weight_floor_ms = 0.001, a_ms = 10.0, p_ms = 0.05, k_ms = 0.0, overhead_ms = 2.0 }
[hardware.box]
preset = "h100-80g"
slots = 64
"""
PROMPT, OUTPUT, SLOTS = 500, 100, 64
LIMIT = (0.012, 0.00005, 0.00005, PROMPT, OUTPUT)


@cache
def catalog_file(text: str) -> str:
    """The path of a file with this text, one for each process."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", delete=False) as file:
        file.write(text)
    return str(Path(file.name))


def lru_hits(requests: float) -> Figure:
    """Part of the requests that find their model on the GPU; requests are so far apart that no two of them overlap."""

    def figure(seed: int, scale: float) -> float:
        config = configuration(
            seed=seed, workers=1, model_catalog=catalog_file(CACHE_CATALOG), hardware="ten", arrivals="deterministic", rate_per_s=1 / 60.0,
            duration_s=60.0 * 1.05 * scale * requests, zipf=1.0, report_interval_s=30.0, **PATIENT,
        )  # fmt: skip
        return mean_after(Simulation(config), config.duration_s / 21.0, lambda event: float(event.load_s == 0.0))

    return figure


class FixedLengths(Simulation):
    """Requests of one length each."""

    def arrivals(self) -> Iterator[tuple[float, Any]]:
        config = self.config
        spec = WorkloadSpec(config.rate_per_s, config.arrivals, duration_s=config.duration_s, lengths=f"fixed:{PROMPT}:{OUTPUT}")
        self.workload = Workload(spec, iter(generate(spec, self.system.catalog.names, config.seed)), None)
        return super().arrivals()


def batch_config(seed: int, rate: float, duration_s: float) -> Config:
    path = catalog_file(BATCH_CATALOG)
    return configuration(seed=seed, workers=1, model_catalog=path, hardware="box", rate_per_s=rate, duration_s=duration_s, **PATIENT)


def saturated_rate(seed: int, scale: float) -> float:
    """Completions a second under overload, over a whole number of turns of the batch, the first ten left out."""
    run = FixedLengths(batch_config(seed, 3.0 * theory.batching_limit(*LIMIT, SLOTS), 60.0 * max(scale, 0.6)))
    ends = [event.at for event in completed(run)]
    turns = len(ends) // SLOTS - 20
    first, last = ends[10 * SLOTS - 1], ends[(10 + turns) * SLOTS - 1]
    return turns * SLOTS / (last - first)


def growth(load: float) -> Figure:
    """The growth, in requests a second, of the number of requests in the system over the second half of a run, at a given part of the limit."""

    def figure(seed: int, scale: float) -> float:
        run = FixedLengths(batch_config(seed, load * theory.batching_limit(*LIMIT, SLOTS), 400.0 * scale))
        done = completed(run)
        half, end = run.began_s + 200.0 * scale, run.began_s + 400.0 * scale
        inside = [sum(event.arrival_s <= t < event.at for event in done) for t in (half, end)]
        return (inside[1] - inside[0]) / (end - half)

    return figure


# --- the claims -------------------------------------------------------------------------------------------------------------------------

STALE_S = 4.0
BOARD = {"workers": 400, "latency_ms": 0.0, "report_interval_s": STALE_S}
HERD = {"workers": 100, "latency_ms": 0.0, "report_interval_s": STALE_S}


def _queue(key: str, what: str, source: str, exact: Callable[[], float], rate: float, requests: float, extra: str, **changes: Any) -> Claim:
    return Claim(key, what, source, exact, wait(rate, requests, **changes), queue_command(rate, requests, extra))


def _board(key: str, what: str, policy: str, exact: Callable[[], float] | None, source: str, fleet: dict[str, Any], requests: float) -> Claim:
    workers, rate = fleet["workers"], 0.8 * fleet["workers"]
    extra = f"--workers {workers} --policy {policy} --latency-ms 0 --report-interval {STALE_S:.12g}"
    return Claim(key, what, source, exact, time_in_system(rate, requests, policy=policy, **fleet), queue_command(rate, requests, extra))


def claims() -> list[Claim]:
    """All of them, in the order of the table."""
    keep = {"workers": 1, "keep_alive_s": 2.0, "service_load_s": 3.0}
    keep_flags = "--workers 1 --keep-alive 2 --service-load 3"
    popularity = theory.zipf(100, 1.0)
    che = theory.che_hit_ratio(popularity, 10)
    llm = "python3 centralized_simulation.py --virtual --workers 1 --queue-threshold 100000000"
    limit = theory.batching_limit(*LIMIT, SLOTS)
    return [
        _queue("mm1", "M/M/1, load 0.7: wait, s", "Pollaczek-Khinchine", lambda: theory.mg1_wait(0.7, 1.0), 0.7, 15e3, "--workers 1", workers=1),
        _queue("mm10", "M/M/10, load 0.9: wait, s", "Erlang C", lambda: theory.mmc_wait(10, 0.9), 9.0, 30e3, "--workers 1 --slots 10", workers=1, slots=10),
        _queue("md1", "M/D/1, load 0.8: wait, s", "Pollaczek-Khinchine", lambda: theory.mg1_wait(0.8, 0.0), 0.8, 15e3, "--workers 1 --service deterministic",
               workers=1, service="deterministic"),
        _queue("mh1", "M/H2/1, CV 3, load 0.6: wait, s", "Pollaczek-Khinchine", lambda: theory.mg1_wait(0.6, 3.0), 0.6, 20e3,
               "--workers 1 --service hyperexponential:3", workers=1, service="hyperexponential:3"),
        _queue("split", "random splitting over 10 queues, load 0.7: wait, s", "as M/M/1", lambda: theory.mg1_wait(0.7, 1.0), 7.0, 20e3,
               "--workers 10 --policy random", workers=10, policy="random"),
        _queue("jsq2", "join the shortest of 2 queues, perfect knowledge, load 0.8: wait, s", "its Markov chain, solved numerically",
               lambda: theory.jsq2_wait(0.8), 1.6, 20e3,
               "--workers 2 --policy least_loaded --report-interval 0 --latency-ms 0", workers=2, policy="least_loaded", report_interval_s=0.0, latency_ms=0.0),
        Claim("two", "two choices among 200, perfect knowledge, load 0.9: time in system, s", "refined mean field; 2.614057 for infinitely many",
              lambda: theory.two_choices_time(0.9, 200.0),
              time_in_system(180.0, 36e3, workers=200, policy="power_of_two", report_interval_s=0.0, latency_ms=0.0),
              queue_command(180.0, 36e3, "--workers 200 --policy power_of_two --report-interval 0 --latency-ms 0")),
        _board("stale2", f"two choices among 400 that believe boards renewed every {STALE_S:.12g} s, load 0.8: time in system, s", "power_of_two:corrected=0",
               lambda: theory.stale_two_choices_time(0.8, STALE_S), "fixed point of the board, infinitely many", BOARD, 50e3),
        _board("herd", "the same, the shortest of all 100: it herds", "power_of_two:choices=100,corrected=0", None, "", HERD, 15e3),
        _board("stale2n", "the same, two choices among 100: no herd", "power_of_two:corrected=0", None, "", HERD, 15e3),
        _board("stalernd", "the same, at random among 100", "random", lambda: 5.0, "as M/M/1", HERD, 40e3),
        _board("ledger", "the shortest of all 100, boards corrected by the ledger", "least_loaded", None, "", HERD, 15e3),
        _board("ledger2", "two choices among 100, boards corrected by the ledger", "power_of_two", None, "", HERD, 15e3),
        _queue("keep", "one server, keep-alive 2 s, load 3 s, rate 0.5: wait, s", "M/G/1 with set-up after a delay",
               lambda: theory.keep_alive(0.5, 2.0, 3.0)[0], 0.5, 15e3, keep_flags, **keep),
        Claim("cold", "the same: part of cold starts", "likewise", lambda: theory.keep_alive(0.5, 2.0, 3.0)[1], cold_part(0.5, 15e3, **keep),
              queue_command(0.5, 15e3, keep_flags)),
        Claim("lru", "LRU, room for 10 of 100 models, Zipf 1.0: hit ratio", f"exact for independent draws; Che's approximation: {che:.6f}",
              lambda: theory.lru_hit_ratio(popularity, 10), lru_hits(8e3),
              f"{llm} --catalog CACHE.toml --hardware ten --arrivals deterministic --rate 0.0166667 --duration 480000 --zipf 1 --report-interval 30"),
        Claim("batch", f"continuous batching, {SLOTS} slots full: requests/s", f"1 / (α n/{SLOTS} + β (n - 1) + γ p)", lambda: limit, saturated_rate,
              f"{llm} --catalog BATCH.toml --hardware box --rate {3 * limit:.3f} --duration 60"),
        Claim("below", "the same at 0.9 of the limit: growth of the queue, requests/s", "stable: 0", lambda: 0.0, growth(0.9),
              f"{llm} --catalog BATCH.toml --hardware box --rate {0.9 * limit:.3f} --duration 400"),
        Claim("above", "the same at 1.1 of the limit: growth of the queue, requests/s", "a tenth of the limit", lambda: 0.1 * limit, growth(1.1),
              f"{llm} --catalog BATCH.toml --hardware box --rate {1.1 * limit:.3f} --duration 400"),
    ]  # fmt: skip
