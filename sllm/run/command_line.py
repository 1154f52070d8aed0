"""The command line of the simulations: one option for each configuration field that has a flag, and where the output goes.

A flag overrides its environment variable, which overrides the default; all three are declared once, in `config`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from config import OUTPUTS, SWITCHES, Config, ConfigError, parse_setting
from sllm import __version__
from sllm.protocol.errors import OutputError, UsageError
from sllm.run.hardware_mix import parse_mix, read_fleet
from sllm.run.thresholds import FIGURES, parse_thresholds
from sllm.workload.lengths import empirical_file
from sllm.workload.shares import share_file


@dataclass(frozen=True)
class Options:
    """What a run is asked to do beyond its configuration."""

    virtual: bool
    wire: bool
    faults: str
    json: str
    requests_csv: str
    html: str
    record: str
    quiet: bool
    no_color: bool  # the user's wish, by the NO_COLOR convention
    dumb_terminal: bool
    given: frozenset[str] = frozenset()  # flags of the command line
    page: bool = False  # asked for
    no_page: bool = False  # refused
    fail_if: str = ""  # thresholds, separated by commas
    warnings: tuple[str, ...] = ()  # what the user should know before the run
    listing: str = ""  # what is to be listed instead of a run, one of LISTINGS

    @property
    def outputs(self) -> dict[str, str]:
        """What is to be written: flag to path, "" where nothing is."""
        return {"--json": self.json, "--requests-csv": self.requests_csv, "--html": self.html, "--record": self.record}


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and version. argparse would pass over what cannot be written."""
        print_out(message, file)


def print_out(message: str, file: Any) -> None:
    """Write to standard output what was asked for instead of a run. OutputError if it cannot be written; a pipe that nobody reads is no error."""
    try:
        if file is None:
            raise OSError(0, "it is closed")
        file.write(message)
        file.flush()
    except BrokenPipeError:
        pass  # whoever reads it has seen enough
    except OSError as error:
        raise OutputError(f"stdout: cannot write: {error.strerror}") from None


LISTINGS = ("policies", "hardware", "models", "traces", "engines", "faults", "arrivals", "lengths")
"""What `--list` shows; see sllm.run.listing."""


def flag_fields() -> list[dataclasses.Field[Any]]:
    """The configuration fields that have a command-line option."""
    return [field for field in dataclasses.fields(Config) if field.metadata["flag"]]


def build_parser(program: str, description: str) -> Parser:
    """The parser, with every flag's variable, unit and default in its help."""
    epilog = (
        "Exit status: 0 done, 1 an invariant was broken, 2 wrong usage or input, 3 an output could not be written, 4 a threshold of --fail-if was missed, "
        "130 after Ctrl-C, 143 after SIGTERM. "
        "A flag that has no effect in a run is refused or warned about; a variable that has none is not, since all processes of a fleet share them. "
        f"Figures for --fail-if: {', '.join(FIGURES)}."
    )
    parser = Parser(prog=program, description=description, allow_abbrev=False, epilog=epilog)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--list", choices=LISTINGS, metavar="WHAT", help=f"show what there is, with parameters and defaults, and exit: {', '.join(LISTINGS)}")
    run = parser.add_argument_group("the run")
    for field in flag_fields():
        rules = field.metadata
        default = field.default if field.default != "" else "none"
        unit = f" {rules['unit']}" if rules["unit"] else ""
        run.add_argument(
            rules["flag"], dest=field.name, metavar=_metavar(rules), help=f"{rules['meaning']} [{rules['env']}, default {default}{unit}]".replace("%", "%%")
        )
    how = parser.add_argument_group("how it runs and what is written")
    for flag, env, meaning in SWITCHES:
        how.add_argument(flag, action="store_true", default=None, help=f"{meaning} [{env}=1]")
    for flag, env, metavar, meaning in OUTPUTS:
        how.add_argument(flag, metavar=metavar, action="append" if flag == "--fail-if" else "store", help=f"{meaning} [{env}]")
    return parser


def _metavar(rules: Mapping[str, Any]) -> str:
    if rules["choices"]:
        return "|".join(rules["choices"])
    return str(rules["env"])


def parse(argv: Sequence[str], environ: Mapping[str, str], program: str, description: str) -> tuple[Config, Options]:
    """Configuration and options of a run. UsageError names the flag or variable that does not fit."""
    arguments = build_parser(program, description).parse_args(argv)
    try:
        config = _read_config(arguments, environ)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    options = _read_options(arguments, environ)
    return config, dataclasses.replace(options, warnings=tuple(check(config, options)))


def _read_config(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """The configuration of the environment, changed by the flags that were given. ConfigError for a value that does not fit, UsageError for an empty flag and
    for a bad fleet file."""
    config = Config.from_env(environ)
    overrides = {}
    for field in flag_fields():
        text = getattr(arguments, field.name)
        if text is not None:
            if not text.strip() and "" not in (field.metadata["choices"] or ()):
                raise UsageError(f"{field.metadata['flag']}: is empty")
            overrides[field.name] = parse_setting(field, text, field.metadata["flag"])
    config = dataclasses.replace(config, **overrides)
    if config.fleet:
        config = dataclasses.replace(config, hardware=read_fleet(config.fleet))
    if "workers" not in overrides and not environ.get("WORKERS", "").strip():
        config = _count_workers(config)
    return config


def _read_options(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Options:
    """What the flags, or else the variables, say beyond the configuration. UsageError for a flag that is empty and a switch that is neither 0 nor 1."""
    values: dict[str, Any] = {}
    for flag, env, *_ in OUTPUTS:
        given = getattr(arguments, _dest(flag))
        parts = given if isinstance(given, list) else [] if given is None else [given]
        if not all(part.strip() for part in parts):
            raise UsageError(f"{flag}: is empty")
        values[_dest(flag)] = ",".join(parts) if given is not None else environ.get(env, "").strip()
    for flag, env, _ in SWITCHES:
        values[_dest(flag)] = bool(getattr(arguments, _dest(flag))) or _switched_on(env, environ)
    given = frozenset(name for name, value in vars(arguments).items() if value is not None)
    values["no_page"] = environ.get("PAGE", "").strip() == "0" and not values["page"]
    values |= {"listing": arguments.list or "", "no_color": bool(environ.get("NO_COLOR")), "dumb_terminal": environ.get("TERM") == "dumb"}
    return Options(**values, given=_flags_of(given))


def _count_workers(config: Config) -> Config:
    """A fleet of several kinds of hardware has as many workers as its counts say, unless their number was given."""
    count = sum(parse_mix(config.hardware).values())
    if not count:
        return config
    (field,) = (field for field in flag_fields() if field.name == "workers")
    return dataclasses.replace(config, workers=parse_setting(field, str(count), f"--hardware {config.hardware}: workers"))


def _flags_of(names: frozenset[str]) -> frozenset[str]:
    """The flags behind the parser's names."""
    by_name = {field.name: field.metadata["flag"] for field in flag_fields()}
    return frozenset(by_name.get(name, f"--{name.replace('_', '-')}") for name in names)


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _switched_on(env: str, environ: Mapping[str, str]) -> bool:
    text = environ.get(env, "").strip()
    if text not in ("", "0", "1"):
        raise UsageError(f"{env}={text!r}: must be 0 or 1")
    return text == "1"


def input_files(config: Config, options: Options) -> dict[str, str]:
    """The files that the run reads: flag to path, "" where there is none."""
    return {
        "--catalog": config.model_catalog, "--fleet": config.fleet, "--trace": config.trace, "--model-map": config.model_map,
        "--lengths": empirical_file(config.lengths), "--mix": share_file(config.mix), "--faults": options.faults,
    }  # fmt: skip


class Effect(NamedTuple):
    """When flags have no effect. A flag that asks for what the run excludes is refused; one that is merely useless is warned about."""

    flags: tuple[str, ...]
    missing: Callable[[Config, Options], bool]
    why: str
    refuse: bool = True


EFFECTS = (
    Effect(("--latency-ms", "--loss", "--wire", "--faults"), lambda config, options: not options.virtual, "goes with --virtual only"),
    Effect(("--pace",), lambda config, options: not options.virtual, "goes with --virtual only; --speedup is for live runs"),
    Effect(("--page",), lambda config, options: options.virtual and not config.pace, "in virtual time it goes with --pace, or there is nothing to watch"),
    Effect(("--speedup",), lambda config, options: options.virtual, "virtual time runs as fast as it can; --speedup is for live runs"),
    Effect(("--service", "--service-mean", "--service-load"), lambda config, options: config.engine != "queue", "goes with --engine queue only"),
    Effect(
        ("--rate", "--arrivals", "--cv", "--stages", "--concurrency"), lambda config, options: bool(config.trace),
        "--trace brings its own arrivals: give one or the other",
    ),
    Effect(("--lengths", "--sessions"), lambda config, options: bool(config.trace), "--trace brings its own lengths: give one or the other"),
    Effect(
        ("--rate", "--arrivals", "--cv", "--stages"), lambda config, options: bool(config.concurrency),
        "users (--concurrency) send when their last request has ended, at no given rate: give one or the other",
    ),
    Effect(("--rate", "--duration"), lambda config, options: bool(config.stages), "--stages says at what rate requests come, and how long"),
    Effect(("--think",), lambda config, options: not config.concurrency, "goes with --concurrency only"),
    Effect(
        ("--sessions",), lambda config, options: bool(config.concurrency) and "gap" in config.sessions,
        "gap: users (--concurrency) let --think pass between two turns: give one or the other",
    ),
    Effect(("--cv",), lambda config, options: config.arrivals != "gamma", "goes with --arrivals gamma only"),
    Effect(("--trace-rate", "--model-map"), lambda config, options: not config.trace, "goes with --trace only"),
    Effect(
        ("--columns",), lambda config, options: not config.trace and not empirical_file(config.lengths), "goes with --trace or --lengths empirical:FILE only",
    ),
    Effect(("--hardware",), lambda config, options: bool(config.fleet), "--fleet says the hardware: give one or the other"),
    Effect(("--zipf",), lambda config, options: bool(config.mix), "--mix says how often each model is asked for: give one or the other"),
    Effect(
        ("--zipf", "--mix"), lambda config, options: config.models == 1, "has no effect: --models 1 leaves one model to ask for", refuse=False,
    ),
    Effect(
        ("--lengths", "--sessions"), lambda config, options: config.engine == "queue",
        "has no effect on the service times of the queue engine", refuse=False,
    ),
    Effect(
        ("--keep-alive",), lambda config, options: config.engine == "queue" and not config.service_load_s,
        "has no effect: the queue engine loads nothing without --service-load", refuse=False,
    ),
    Effect(("--engine-profile", "--loader"), lambda config, options: config.engine == "queue", "has no effect on the times of the queue engine", refuse=False),
    Effect(
        ("--hardware",), lambda config, options: config.engine == "queue" and not sum(parse_mix(config.hardware).values()),
        "has no effect on what the queue engine serves", refuse=False,
    ),
)  # fmt: skip
"""Each flag that can be without effect. What is so in the environment alone is passed over: its variables are shared by all roles and runs."""
NEUTRAL = {
    "--loss": "loss", "--pace": "pace", "--speedup": "speedup", "--keep-alive": "keep_alive_s", "--service-load": "service_load_s",
    "--concurrency": "concurrency",
    "--think": "think_s", "--trace-rate": "trace_rate", "--mix": "mix", "--sessions": "sessions", "--stages": "stages",
}  # fmt: skip
"""Flags whose default says that something is off: saying so is right in every run."""


def check(config: Config, options: Options) -> list[str]:
    """Refuse combinations that make no sense (UsageError); returns a warning for each flag that has no effect."""
    if config.report_interval_s == 0.0 and not options.virtual:
        raise UsageError("--report-interval 0: goes with --virtual only")
    parse_thresholds(options.fail_if, "--fail-if" if "--fail-if" in options.given else "FAIL_IF")
    warnings = []
    for flags, missing, why, refuse in EFFECTS:
        for flag in flags:
            if flag not in options.given or _is_neutral(flag, config) or not missing(config, options):
                continue
            if refuse:
                raise UsageError(f"{flag}: {why}")
            warnings.append(f"{flag}: {why}")
    return warnings


def _is_neutral(flag: str, config: Config) -> bool:
    name = NEUTRAL.get(flag)
    return name is not None and getattr(config, name) == Config.__dataclass_fields__[name].default


# --- the command that repeats a run ---------------------------------------------------------------------------------------------------

NOT_OF_A_RUN = frozenset({
    "DEPLOYMENT_MODE", "BIND_HOST", "COORDINATOR_HOST", "COORDINATOR_PORT", "WORKER_PORT", "ADVERTISE_HOST", "WORKER_ID", "CLUSTER_KEY_FILE", "HEALTH_PORT",
    "HTTP_HOSTS", "LOG_LEVEL", "LOG_FORMAT", "PACE",
})  # fmt: skip
"""Variables of processes of their own: where they are and what they say. Nothing that a simulation measures depends on them."""
_OPTIONS = {"--virtual": "VIRTUAL", "--wire": "WIRE", "--faults": "FAULTS", "--fail-if": "FAIL_IF"}  # those that the run and its verdict depend on


def settings_of(config: Config, options: Options) -> dict[str, Any]:
    """Every setting that a run depends on, by variable, as it goes into the results."""
    settings = {name: value for name, value in config.describe().items() if name not in NOT_OF_A_RUN}
    return settings | {env: getattr(options, _dest(flag)) for flag, env in _OPTIONS.items()}


def repeat_command(results: Mapping[str, Any], program: str = "centralized_simulation.py") -> str:
    """The command that repeats the run of these results, from their settings alone. What is as it is by default, or without effect in that run, is left out."""
    settings: Mapping[str, Any] = results["run"]["settings"]
    fields = {field.metadata["env"]: field for field in dataclasses.fields(Config) if field.metadata["env"] in settings}
    config = dataclasses.replace(Config(), **{field.name: settings[env] for env, field in fields.items()})
    switches = {_dest(flag): settings.get(env, False if flag in ("--virtual", "--wire") else "") for flag, env in _OPTIONS.items()}
    options = Options(**switches, json="", requests_csv="", html="", record="", quiet=False, no_color=False, dumb_terminal=False)
    useless = {flag for effect in EFFECTS if effect.missing(config, options) for flag in effect.flags}
    variables, arguments = [], []
    for env, field in fields.items():
        flag, value = field.metadata["flag"], settings[env]
        if value == field.default or flag in useless:
            continue
        if flag:
            arguments += [flag, str(value)]
        else:
            variables.append(f"{env}={value}")
    for flag, env in _OPTIONS.items():
        value = settings.get(env)
        if value and flag not in useless:
            arguments += [flag] if value is True else [flag, str(value)]
    return shlex.join([*(["env", *variables] if variables else []), "python3", program, *arguments])


GROUPS = {"run": "The run", "common": "The run", "coordinator": "Coordinator", "worker": "Workers", "client": "Client"}


def grouped(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of these results by what they are about, each once: by flag, or by variable where there is no flag."""
    settings = results["run"]["settings"]
    found: dict[str, dict[str, Any]] = {title: {} for title in dict.fromkeys(GROUPS.values())}
    for field in dataclasses.fields(Config):
        env, flag, unit = (field.metadata[key] for key in ("env", "flag", "unit"))
        if env in settings:
            value = settings[env]
            shown = f"{value:.12g} {unit}" if unit in ("s", "ms", "req/s") else value
            found[GROUPS[field.metadata["group"]]][flag or env] = shown
    return {title: pairs | ({flag: settings[env] for flag, env in _OPTIONS.items()} if title == "The run" else {}) for title, pairs in found.items() if pairs}
