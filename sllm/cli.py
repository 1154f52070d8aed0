"""The command line of the simulations: one option for each configuration field that has a flag, and where the output goes.

A flag overrides its environment variable, which overrides the default; all three are declared once, in `config`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from config import Config, parse_setting
from sllm import __version__
from sllm.errors import UsageError


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


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


# Options that say what to do with a run. They have variables too, so that a container can be told by its environment alone.
OUTPUTS: tuple[tuple[str, str, str, str], ...] = (
    ("--faults", "FAULTS", "FILE", "fault schedule to inject (TOML; virtual time only)"),
    ("--json", "RESULTS_JSON", "FILE|-", "write the results here; -: to stdout"),
    ("--requests-csv", "REQUESTS_CSV", "FILE", "write one row for each request here"),
    ("--html", "REPORT_HTML", "FILE", "write a report with plots here"),
    ("--record", "RECORD", "FILE", "write the workload here, to be replayed exactly with --trace"),
)
SWITCHES: tuple[tuple[str, str, str], ...] = (
    ("--virtual", "VIRTUAL", "simulate in virtual time instead of running live on loopback"),
    ("--wire", "WIRE", "in virtual time, send signed bytes instead of objects"),
    ("--quiet", "QUIET", "print no progress and no table"),
)

RUN_VARIABLES = frozenset(env for _, env, *_ in (*OUTPUTS, *SWITCHES))


def flag_fields() -> list[dataclasses.Field[Any]]:
    """The configuration fields that have a command-line option."""
    return [field for field in dataclasses.fields(Config) if field.metadata["flag"]]


def build_parser(program: str, description: str) -> Parser:
    """The parser, with every flag's variable, unit and default in its help."""
    epilog = "Exit status: 0 done, 1 an invariant was broken, 2 wrong usage or input, 130 interrupted."
    parser = Parser(prog=program, description=description, allow_abbrev=False, epilog=epilog)
    parser.add_argument("--version", action="version", version=__version__)
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
        how.add_argument(flag, metavar=metavar, help=f"{meaning} [{env}]")
    return parser


def _metavar(rules: Mapping[str, Any]) -> str:
    if rules["choices"]:
        return "|".join(rules["choices"])
    return str(rules["env"])


def parse(argv: Sequence[str], environ: Mapping[str, str], program: str, description: str) -> tuple[Config, Options]:
    """Configuration and options of a run. UsageError names the flag or variable that does not fit."""
    arguments = build_parser(program, description).parse_args(argv)
    config = Config.from_env(environ)
    overrides = {}
    for field in flag_fields():
        text = getattr(arguments, field.name)
        if text is not None:
            overrides[field.name] = parse_setting(field, text, field.metadata["flag"])
    values: dict[str, Any] = {}
    for flag, env, *_ in OUTPUTS:
        given = getattr(arguments, _dest(flag))
        values[_dest(flag)] = given if given is not None else environ.get(env, "").strip()
    for flag, env, _ in SWITCHES:
        values[_dest(flag)] = bool(getattr(arguments, _dest(flag))) or _switched_on(env, environ)
    values |= {"no_color": bool(environ.get("NO_COLOR")), "dumb_terminal": environ.get("TERM") == "dumb"}
    config, options = dataclasses.replace(config, **overrides), Options(**values)
    check(config, options)
    return config, options


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _switched_on(env: str, environ: Mapping[str, str]) -> bool:
    text = environ.get(env, "").strip()
    if text not in ("", "0", "1"):
        raise UsageError(f"{env}={text!r}: must be 0 or 1")
    return text == "1"


def check(config: Config, options: Options) -> None:
    """Refuse combinations that make no sense."""
    if not options.virtual:
        virtual_only = {
            "--report-interval 0": config.report_interval_s == 0.0, "--wire": options.wire, "--faults": options.faults, "--loss": config.loss > 0.0,
        }  # fmt: skip
        for flag, given in virtual_only.items():
            if given:
                raise UsageError(f"{flag}: goes with --virtual only")
    elif config.speedup != 1.0:
        raise UsageError(f"--speedup {config.speedup:g}: virtual time runs as fast as it can; --speedup is for live runs")
