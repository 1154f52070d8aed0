"""Every setting: its environment variable, unit, default, range and meaning, declared once.

`from config import config` gives the process-wide configuration, read from the environment on first use. Simulations build their configuration from the
same declarations: a field with a `flag` is also a command-line option, so a variable and its flag cannot differ.

A value that does not fit raises `ConfigError` with one line that names the variable (or flag) and the value. This module imports nothing of the project:
bounds that messages have too are repeated here, and a test holds both equal.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MODES = ("kubernetes", "docker", "local")


class ConfigError(ValueError):
    """A setting has a value that does not fit. The message is one line for the user: the variable or flag, its value, and the values that would fit."""


class TextRule(NamedTuple):
    """The texts that a field takes: every character must fit, and so must the size in bytes of UTF-8."""

    characters: Callable[[str], object]  # true for a text whose characters all fit
    characters_wanted: str  # the error for other characters
    bytes_max: int
    size_wanted: str  # the error for a text that is too long or empty; `{size}` stands for its size

    def problem(self, text: str) -> str:
        """Why `text` does not fit; "" if it fits."""
        if not self.characters(text):
            return self.characters_wanted
        size = len(text.encode())
        return "" if 0 < size <= self.bytes_max else self.size_wanted.format(size=size)


HOST = TextRule(
    re.compile(r"[A-Za-z0-9._~:%-]+").fullmatch, "must be a host name or an address: letters, digits and . _ ~ : % -",
    253, "must have at most 253 bytes, not {size}",
)  # fmt: skip
"""A host name or an address; 253 bytes is the longest name that the domain name system has."""
ID = TextRule(str.isprintable, "must have printable characters only", 63, "must have 1 to 63 bytes of UTF-8, not {size}")
"""The name of a worker: 63 bytes is the header's room for an id, and the longest label of a host name."""

# Bounds that hold for fields of messages too; `sllm.protocol.limits` has the same values.
REPORT_INTERVAL_MAX_S = 60.0
SLOTS_MAX = 100_000
QUEUE_MAX = 10_000_000
PLACEMENTS_MAX = 20


def setting(
    default: Any,
    env: str,
    meaning: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    rule: TextRule | None = None,
    flag: str | None = None,
    group: str = "common",
) -> Any:
    """A configuration field. `low` and `high` are inclusive bounds, `above` is an exclusive lower bound; `rule` is the rule of a text; `flag` is the field's
    command-line option."""
    metadata = {
        "env": env, "meaning": meaning, "unit": unit, "low": low, "high": high, "above": above, "choices": choices, "rule": rule,
        "flag": flag, "group": group,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The configuration of one process; immutable. Fields end in their unit, variables do not."""

    # --- where things are -----------------------------------------------------------------------------------------------------------
    deployment_mode: str = setting("", "DEPLOYMENT_MODE", "the environment of the process; empty: detected", choices=("", *MODES))
    bind_host: str = setting("", "BIND_HOST", "address to listen on; empty: 127.0.0.1 locally, 0.0.0.0 in containers", rule=HOST)
    coordinator_host: str = setting("", "COORDINATOR_HOST", "the coordinator's name or address; empty: 127.0.0.1 locally, central-coordinator in containers", rule=HOST)
    coordinator_port: int = setting(9000, "COORDINATOR_PORT", "the coordinator's UDP port", low=0, high=65535)
    worker_port: int = setting(8000, "WORKER_PORT", "a worker's UDP port; 0: any free one", low=0, high=65535, group="worker")
    advertise_host: str = setting("", "ADVERTISE_HOST", "address at which clients reach this worker; empty: its own address towards the coordinator; source: the address that its reports come from, for translated addresses", rule=HOST, group="worker")
    worker_id: str = setting("", "WORKER_ID", "a worker's name; empty: the pod's or container's host name, locally worker-<process id>", rule=ID, group="worker")
    cluster_key_file: str = setting("", "CLUSTER_KEY_FILE", "file or folder with the keys that sign datagrams; empty: made on first use for this user (locally only)")
    health_port: int = setting(-1, "HEALTH_PORT", "TCP port of health, metrics and state over HTTP; 0: none; -1: 8080 in containers, none locally", low=-1, high=65535)
    http_hosts: str = setting("", "HTTP_HOSTS", "names, beside localhost, addresses, this host's and the coordinator's, under which HTTP is served, separated by commas; *: any")
    log_level: str = setting("info", "LOG_LEVEL", "least severe log line to print", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "LOG_FORMAT", "log lines for people or for machines", choices=("text", "json"))
    seed: int = setting(1, "SEED", "seed of all of a run's randomness", low=0, flag="--seed", group="run")

    # --- the fleet --------------------------------------------------------------------------------------------------------------------
    report_interval_s: float = setting(
        1.0, "REPORT_INTERVAL", "time between a worker's load reports; 0: at every change, at once (virtual time only)", unit="s", low=0.0, high=REPORT_INTERVAL_MAX_S, flag="--report-interval", group="run"
    )
    worker_timeout_s: float = setting(10.0, "WORKER_TIMEOUT", "silence of a worker after which it is dead", unit="s", above=0.0, high=3600.0, group="coordinator")
    suspect_intervals: float = setting(3.0, "SUSPECT_INTERVALS", "missed reports until a worker is suspect; one lost datagram must not move work", unit="report intervals", low=1.5, high=100.0, group="coordinator")
    forget_after_s: float = setting(300.0, "FORGET_AFTER", "time for which a worker that is dead or has left stays listed", unit="s", above=0.0, group="coordinator")
    workers_max: int = setting(200_000, "WORKERS_MAX", "workers in the coordinator's table; reports of others are refused while it is full", unit="workers", low=1, high=1_000_000, group="coordinator")
    dispatch_expiry_intervals: float = setting(3.0, "DISPATCH_EXPIRY_INTERVALS", "a dispatch that no report has acknowledged is written off after this number of report intervals", unit="report intervals", low=1.0, high=100.0, group="coordinator")
    hold_fraction: float = setting(0.5, "HOLD_FRACTION", "part of the fleet; when more of it is silent at once, no worker is declared dead", low=0.1, high=1.0, group="coordinator")
    hold_max_s: float = setting(60.0, "HOLD_MAX", "longest time for which no worker is declared dead because most of the fleet is silent", unit="s", above=0.0, high=86400.0, group="coordinator")
    stall_s: float = setting(2.0, "STALL_AFTER", "a gap in the coordinator's own loop from which expiry is held for three report intervals", unit="s", above=0.0, group="coordinator")
    ack_every: int = setting(4, "ACK_EVERY", "reports for each acknowledgement by the coordinator", unit="reports", low=1, high=1000, group="coordinator")
    queue_threshold: int = setting(10, "QUEUE_THRESHOLD", "waiting requests above which a worker gets no more requests of normal priority", unit="requests", low=1, high=100_000_000, flag="--queue-threshold", group="coordinator")
    memory_threshold: float = setting(0.9, "MEMORY_THRESHOLD", "used part of its KV cache above which a worker is a last resort", above=0.0, high=1.0, group="coordinator")
    policy: str = setting("startup_time", "POLICY", "placement policy: NAME[:key=value,...], or FILE.py[:NAME][:key=value,...] of your own", flag="--policy", group="run")
    decision_keep_s: float = setting(10.0, "DECISION_KEEP", "least time for which a placement is kept, so that a repeated question gets the same answer", unit="s", above=0.0, group="coordinator")

    # --- workers ----------------------------------------------------------------------------------------------------------------------
    model_catalog: str = setting("", "MODEL_CATALOG", "TOML file of models and hardware; empty: the built-in demonstration catalogue", flag="--catalog", group="run")
    demo_models: int = setting(0, "DEMO_MODELS", "models each worker loads by itself at start", unit="models", low=0, high=64, group="worker")
    hardware: str = setting("h100-80g", "HARDWARE", "hardware of a worker; of a fleet also NAME:COUNT,NAME:COUNT", flag="--hardware", group="run")
    fleet: str = setting("", "FLEET", "TOML file of a fleet: hardware and how many workers have it; empty: --workers of --hardware (simulations only)", flag="--fleet", group="run")
    engine_profile: str = setting("", "ENGINE_PROFILE", "engine generation whose costs of steps are used; empty: the hardware's own", choices=("", "cuda_graphs", "vllm_v0", "splitwise"), flag="--engine-profile", group="run")
    loader: str = setting("", "LOADER", "loader that brings models onto the GPU; empty: the hardware's own", choices=("", "serverlessllm", "safetensors", "engine_start"), flag="--loader", group="run")
    engine: str = setting("llm", "ENGINE", "how a worker serves: continuous batching, or a queue with exponential, deterministic or hyperexponential service", choices=("llm", "queue"), flag="--engine", group="run")
    service: str = setting("exponential", "SERVICE", "service times of the queue engine: exponential, deterministic or hyperexponential:CV", flag="--service", group="run")
    service_mean_s: float = setting(1.0, "SERVICE_MEAN", "mean service time of the queue engine", unit="s", above=0.0, flag="--service-mean", group="run")
    service_load_s: float = setting(0.0, "SERVICE_LOAD", "time the queue engine takes to load a model; 0: every model is always there", unit="s", low=0.0, flag="--service-load", group="run")
    slots: int = setting(0, "SLOTS", "requests a worker serves at once; 0: the hardware's batch limit, 1 for the queue engine", unit="requests", low=0, high=SLOTS_MAX, flag="--slots", group="run")
    keep_alive_s: float = setting(0.0, "KEEP_ALIVE", "idle time after which a model leaves the GPU; 0: only under memory pressure", unit="s", low=0.0, flag="--keep-alive", group="run")
    queue_max: int = setting(1000, "QUEUE_MAX", "requests that may wait at a worker before it refuses more", unit="requests", low=1, high=QUEUE_MAX, group="worker")
    response_keep_s: float = setting(120.0, "RESPONSE_KEEP", "time for which a worker keeps a finished response, to answer a poll; less if 20,000 more have finished", unit="s", above=0.0, group="worker")
    drain_timeout_s: float = setting(30.0, "DRAIN_TIMEOUT", "time that a stopping worker has to finish its requests", unit="s", low=0.0, high=3600.0, group="worker")
    coordinator_silent_s: float = setting(10.0, "COORDINATOR_SILENT", "time without an answer after which the coordinator's name is resolved again and a new socket opened", unit="s", above=0.0, group="common")

    # --- clients ----------------------------------------------------------------------------------------------------------------------
    retry_initial_s: float = setting(0.5, "RETRY_INITIAL", "wait before a datagram is sent again; doubles, with jitter", unit="s", above=0.0, group="client")
    retry_max_s: float = setting(4.0, "RETRY_MAX", "longest wait before a datagram is sent again", unit="s", above=0.0, group="client")
    worker_tries: int = setting(3, "WORKER_TRIES", "unanswered datagrams after which a worker counts as silent", low=1, high=100, group="client")
    poll_s: float = setting(10.0, "POLL_INTERVAL", "silence about an accepted request after which the worker is asked about it", unit="s", above=0.0, group="client")
    placements_max: int = setting(3, "PLACEMENTS_MAX", "placements of one request: the first and two more", low=1, high=PLACEMENTS_MAX, group="client")
    request_timeout_s: float = setting(300.0, "REQUEST_TIMEOUT", "time after which an unfinished request has failed", unit="s", above=0.0, group="client")

    # --- a run ------------------------------------------------------------------------------------------------------------------------
    workers: int = setting(5, "WORKERS", "workers in the fleet", low=1, high=1_000_000, flag="--workers", group="run")
    duration_s: float = setting(0.0, "DURATION", "time in which requests arrive, in seconds of the run's clock; 0: 30 s, or all of the stages or the trace", unit="s", low=0.0, flag="--duration", group="run")
    rate_per_s: float = setting(0.0, "RATE", "mean arrivals; 0: half of what the fleet can serve, live 200 at most", unit="req/s", low=0.0, flag="--rate", group="run")
    arrivals: str = setting("poisson", "ARRIVALS", "arrival process", choices=("poisson", "gamma", "deterministic"), flag="--arrivals", group="run")
    cv: float = setting(8.0, "CV", "coefficient of variation of gamma arrivals", above=0.0, high=100.0, flag="--cv", group="run")
    stages: str = setting("", "STAGES", "a rate that changes, as LENGTH:RATE,... such as 30s:5,60s:20,30s:0: linear from the rate before, at first 0, to RATE; 0s:RATE is a jump", flag="--stages", group="run")
    concurrency: int = setting(0, "CONCURRENCY", "closed-loop load: number of users, each of whom sends the next request when the last has ended; 0: requests come by --rate", unit="users", low=0, high=20_000, flag="--concurrency", group="run")
    think_s: float = setting(0.0, "THINK", "mean time for which a user of --concurrency thinks before each request, exponential", unit="s", low=0.0, high=1e6, flag="--think", group="run")
    lengths: str = setting("azure-conv", "LENGTHS", "tokens of a request: azure-conv, fixed:IN,OUT, lognormal:MEDIAN_IN,MEAN_IN,MEDIAN_OUT,MEAN_OUT[,MOST] or empirical:FILE", flag="--lengths", group="run")
    mix: str = setting("", "MIX", "models and their shares of the requests, MODEL=SHARE,... or a TOML file of such pairs; empty: by --zipf", flag="--mix", group="run")
    priorities: str = setting("", "PRIORITIES", "shares of the priorities, such as high=1,normal=8,low=1; empty: all normal", flag="--priorities", group="run")
    sessions: str = setting("", "SESSIONS", "sessions whose prompts repeat all earlier turns, such as turns=5,gap=10,longest=14000 (mean turns, mean s between them, most tokens); empty: none", flag="--sessions", group="run")
    trace: str = setting("", "TRACE", "trace file to replay instead of synthetic arrivals", flag="--trace", group="run")
    model_map: str = setting("", "MODEL_MAP", "TOML file that says which model of the catalogue each model of the trace is; empty: by name, then by number of requests", flag="--model-map", group="run")
    trace_rate: float = setting(1.0, "TRACE_RATE", "factor on the requests of the trace in the same time: above 1 by superposition, below 1 by thinning", above=0.0, high=100.0, flag="--trace-rate", group="run")
    trace_columns: str = setting("", "TRACE_COLUMNS", "columns of a CSV trace of any origin: arrival=NAME,prompt=NAME,output=NAME[,model=NAME][,unit=s|ms|us|ns]", flag="--columns", group="run")
    speedup: float = setting(1.0, "SPEEDUP", "factor by which the run's clock is faster than the wall clock (live runs)", above=0.0, high=10000.0, flag="--speedup", group="run")
    pace: float = setting(0.0, "PACE", "simulated seconds in a second of wall time, to watch a run; 0: as fast as possible (virtual time)", low=0.0, high=1e6, flag="--pace", group="run")
    models: int = setting(0, "MODELS", "number of models that requests ask for, the first of the catalogue; 0: eight (in a simulation more, if its trace names more), or all of a catalogue file", low=0, high=100000, flag="--models", group="run")
    zipf: float = setting(1.1, "ZIPF", "exponent of model popularity; 0: all models are equally popular", low=0.0, high=10.0, flag="--zipf", group="run")
    latency_ms: float = setting(0.2, "LATENCY_MS", "one-way network latency in virtual time", unit="ms", low=0.0, high=60000.0, flag="--latency-ms", group="run")
    loss: float = setting(0.0, "LOSS", "part of the datagrams lost in virtual time", low=0.0, high=1.0, flag="--loss", group="run")

    # --- what is measured -------------------------------------------------------------------------------------------------------------
    slo_ttft_s: float = setting(2.0, "SLO_TTFT", "target for the time to first token", unit="s", above=0.0, flag="--slo-ttft", group="run")
    slo_tpot_s: float = setting(0.0, "SLO_TPOT", "target for the mean time of each further token; 0: no target", unit="s", low=0.0, flag="--slo-tpot", group="run")
    warmup_s: float = setting(0.0, "WARMUP", "requests that arrive in this time from the start are counted and left out of the statistics", unit="s", low=0.0, flag="--warmup", group="run")

    @property
    def life_timeout_s(self) -> float:
        """Silence of a sender after which a life with a lower incarnation is accepted, because the sender's clock may have been set back."""
        return max(self.worker_timeout_s, self.suspect_intervals * self.report_interval_s)

    # --- derived values ---------------------------------------------------------------------------------------------------------------

    def get_coordinator_address(self) -> tuple[str, int]:
        """The coordinator's (name or address, port)."""
        return self.coordinator_host, self.coordinator_port

    def get_worker_id(self) -> str:
        """This worker's name."""
        return self.worker_id

    @property
    def reports_per_ack(self) -> int:
        """Reports for each acknowledgement by the coordinator; few enough that a worker hears at least two in `coordinator_silent_s`."""
        return max(1, min(self.ack_every, int(self.coordinator_silent_s / 2.0 / (self.report_interval_s or 1.0))))

    @property
    def in_container(self) -> bool:
        return self.deployment_mode != "local"

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Config:
        """Read and validate every variable; a variable that is unset or empty keeps its default. ConfigError names the variable and its value."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = environ.get(field.metadata["env"], "").strip()
            if text:
                values[field.name] = parse_setting(field, text, field.metadata["env"])
        config = resolve_defaults(cls(**values), environ)
        if config.in_container and (problem := ID.problem(config.worker_id)):
            raise ConfigError(f"HOSTNAME={config.worker_id!r}: {problem}; or set WORKER_ID")
        return config

    def describe(self) -> dict[str, Any]:
        """The effective configuration by variable, for printing. It has no secrets: keys are in files, and only the path of the file is here."""
        return {field.metadata["env"]: getattr(self, field.name) for field in dataclasses.fields(self)}


# Outputs and switches of a simulation: flag, variable, [metavar,] meaning. The variables are for containers, which are configured by their environment only.
OUTPUTS: tuple[tuple[str, str, str, str], ...] = (
    ("--faults", "FAULTS", "FILE", "fault schedule to inject (TOML; virtual time only)"),
    ("--json", "RESULTS_JSON", "FILE|-", "write the results here; -: to stdout"),
    ("--requests-csv", "REQUESTS_CSV", "FILE|-", "write one row for each request here; -: to stdout"),
    ("--html", "REPORT_HTML", "FILE|-", "write an HTML report with plots here; -: to stdout"),
    ("--fail-if", "FAIL_IF", "FIGURE>LIMIT", "exit with status 4 if the condition holds, as in ttft_p99>2; several by commas, or by giving the flag again"),
    ("--record", "RECORD", "FILE|-", "write the workload here, to be replayed exactly with --trace; -: to stdout"),
)
SWITCHES: tuple[tuple[str, str, str], ...] = (
    ("--virtual", "VIRTUAL", "simulate in virtual time instead of running live on loopback"),
    ("--wire", "WIRE", "in virtual time, send signed bytes instead of objects"),
    ("--page", "PAGE", "serve the fleet's page on a free port of this machine; a live run watched on a terminal does so unless PAGE=0"),
    ("--quiet", "QUIET", "print no progress and no table"),
)
RUN_VARIABLES = frozenset(env for _, env, *_ in (*OUTPUTS, *SWITCHES))


def parse_setting(field: dataclasses.Field[Any], text: str, label: str) -> Any:
    """`text` as the field's value. ConfigError names `label`, the text and the values that would fit."""
    rules = field.metadata
    if field.type == "str":
        if rules["choices"] and text not in rules["choices"]:
            raise ConfigError(f"{label}={text!r}: must be one of {', '.join(c for c in rules['choices'] if c)}")
        if rules["rule"] and (problem := rules["rule"].problem(text)):
            raise ConfigError(f"{label}={text!r}: {problem}")
        return text
    whole = field.type == "int"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not _is_inside(value, rules):
        raise ConfigError(f"{label}={text!r}: must be {'a whole number' if whole else 'a number'}{_range_text(rules)}")
    return value


def _is_inside(value: float, rules: Mapping[str, Any]) -> bool:
    low, above, high = rules["low"], rules["above"], rules["high"]
    return (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)


def _range_text(rules: Mapping[str, Any]) -> str:
    parts = []
    if rules["low"] is not None:
        parts.append(f"at least {rules['low']:.12g}")
    if rules["above"] is not None:
        parts.append(f"above {rules['above']:.12g}")
    if rules["high"] is not None:
        parts.append(f"at most {rules['high']:.12g}")
    unit = f" ({rules['unit']})" if rules["unit"] else ""
    return (", " + " and ".join(parts) if parts else "") + unit


BEGIN_LIKE_OURS = ("ADVERTISE_", "COORDINATOR_", "DEMO_", "DISPATCH_", "DRAIN_", "PLACEMENTS_", "REPORT_", "SLLM_", "SUSPECT_", "WORKER_")
"""Beginnings of our variables that few other programs use. LOG_, HTTP_ and SERVICE_ are left out, because many programs use them."""
NEARLY_ALIKE = 0.85  # similarity of two names by `difflib.SequenceMatcher.ratio`: one letter in six is extra, missing or wrong
LONG_ENOUGH = 6  # least characters of a name; for shorter names (MODEL, ZIP) similarity says little
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_SERVICE_LINK = re.compile(r"[A-Z0-9_]+_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")


def misspelt(environ: Mapping[str, str], others: Iterable[str] = ()) -> dict[str, str]:
    """Variables that look like ours and are not, with the variable that was probably meant ("": none in particular). `others`: further variables of ours.

    The variables that Kubernetes sets for Services (WORKER_SERVICE_HOST, WORKER_PORT_8000_UDP_ADDR) look like ours as well, and are left out.
    """
    known = {field.metadata["env"] for field in dataclasses.fields(Config)} | set(others)
    found: dict[str, str] = {}
    for name in sorted(environ.keys() - known):
        link = _SERVICE_LINK.fullmatch(name) or (name.endswith("_PORT") and "://" in environ[name])
        if link or not _VARIABLE.fullmatch(name):
            continue
        nearest = difflib.get_close_matches(name, known, 1, NEARLY_ALIKE) if len(name) >= LONG_ENOUGH else []
        if nearest or name.startswith(BEGIN_LIKE_OURS):
            found[name] = (nearest or difflib.get_close_matches(name, known, 1) or [""])[0]
    return found


def describe_misspelt(found: Mapping[str, str]) -> str:
    """One line for people."""
    return "ignored, as no variables of ours: " + ", ".join(f"{name} (is {meant} meant?)" if meant else name for name, meant in found.items())


def detect_mode(environ: Mapping[str, str]) -> str:
    """kubernetes if the API server's variables are set; docker if `/.dockerenv` exists and the container's first process is one of our entry points (a
    shell in a development container is local); otherwise local."""
    if environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    try:
        with open("/proc/1/cmdline", "rb") as first_process:
            ours = b"entrypoint_" in first_process.read()
    except OSError:
        ours = False
    return "docker" if ours and os.path.exists("/.dockerenv") else "local"


def resolve_defaults(config: Config, environ: Mapping[str, str]) -> Config:
    """Fill in the defaults that depend on the environment of the process."""
    mode = config.deployment_mode or detect_mode(environ)
    local = mode == "local"
    host_name = environ.get("HOSTNAME", "").strip() or socket.gethostname()
    return dataclasses.replace(
        config,
        deployment_mode=mode,
        bind_host=config.bind_host or ("127.0.0.1" if local else "0.0.0.0"),
        coordinator_host=config.coordinator_host or ("127.0.0.1" if local else "central-coordinator"),
        health_port=config.health_port if config.health_port >= 0 else (0 if local else 8080),
        worker_id=config.worker_id or (f"worker-{os.getpid()}" if local else host_name),
    )


def __getattr__(name: str) -> Any:
    """`config`, built from the process's environment on first use."""
    if name != "config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    built = globals()["config"] = Config.from_env(os.environ)
    return built
