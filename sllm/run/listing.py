"""What there is to choose from, for `--list`: all of it read from the registries that runs go by."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

from config import Config
from sllm.engine import ENGINES
from sllm.inputs.keys import Key
from sllm.models.model import GB, KIB
from sllm.models.presets import HARDWARE, MODELS
from sllm.models.profiles import ENGINE_PROFILES, LOADER_PROFILES
from sllm.placement.registry import broken_policies, policies
from sllm.run.assemble import build_catalog
from sllm.run.command_line import EFFECTS, flag_fields, parse
from sllm.virtual.faults import COMMON, DRAWN_FOR_S, RANDOM_KEYS
from sllm.virtual.kinds import DEFAULT_HOSTS, KINDS
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.lengths import LENGTHS
from sllm.workload.traces import BROKEN, FORMATS, TraceFormat
from sllm.workload.traces.base import plain
from sllm.workload.traces.own import OwnColumns

WIDTH = 120
INDENT = "    "
UNITS = (("_bytes_per_s", "GB/s", GB), ("_flops_per_s", "TFLOP/s", 1e12), ("_bytes_per_token", "KiB/token", KIB), ("_bytes", "GB", GB), ("_s", "ms", 1e-3))
"""How a field is shown, by the end of its name: unit, and what to divide by."""


def render_listing(what: str, config: Config) -> str:
    """The text for one of `sllm.run.command_line.LISTINGS`. UsageError for a catalogue that cannot be read."""
    return "\n".join([*LISTS[what](config), ""])


# --- parts ------------------------------------------------------------------------------------------------------------------------------


def _said(of: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(of) or "").partition("\n\n")[0].split())


def _entry(name: str, meaning: str, further: Iterable[str] = ()) -> list[str]:
    return [name, fill(meaning, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT), *(INDENT + line for line in further)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in (head, *rows)]


def _figures(things: Sequence[Any], left_out: Sequence[str] = ()) -> list[str]:
    """A table of what dataclass instances have in common, a column a field, each with its unit."""
    names = [field.name for field in dataclasses.fields(things[0]) if field.name not in left_out]
    return _table([_heading(name) for name in names], [[_figure(name, getattr(thing, name)) for name in names] for thing in things])


def _unit(name: str) -> tuple[str, str, float] | None:
    return next((unit for unit in UNITS if name.endswith(unit[0])), None)


def _heading(name: str) -> str:
    unit = _unit(name)
    return name.replace("_", " ") if unit is None else f"{name.removesuffix(unit[0]).replace('_', ' ')} {unit[1]}"


def _figure(name: str, value: Any) -> str:
    if value is None:
        return "profile's"
    if isinstance(value, (int, float)):
        unit = _unit(name)
        return plain(float(f"{value / (unit[2] if unit is not None else 1.0):.4g}"))
    return str(getattr(value, "name", value))


# --- lists ------------------------------------------------------------------------------------------------------------------------------


def _policies(config: Config) -> list[str]:
    lines = []
    for name, kind in policies().items():
        fields = [field for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
        parameters = [f"{field.name}={field.default:.12g}{' (s)' if field.name.endswith('_s') else ''}" for field in fields]
        default = " (the default)" if name == Config.policy else ""
        lines += _entry(f"{name}{default}", _said(kind), [f"parameters: {', '.join(parameters)}"] if parameters else [])
    lines += [f"not readable: {problem}" for problem in broken_policies()]
    return [*lines, "", "--policy NAME:key=value,key=value, or FILE.py[:NAME][:key=value,...] of your own"]


def _hardware(config: Config) -> list[str]:
    catalog = build_catalog(config)
    names = dict.fromkeys([*catalog.hardware_names, *HARDWARE])
    return _figures([catalog.get_hardware(name) for name in names], ("layer_overhead_s", "init_s", "gpu"))


def _models(config: Config) -> list[str]:
    catalog = build_catalog(config)
    head = ["In the catalogue, in order of popularity:", *_figures(list(catalog.models.values()), ("steps",))]
    return [*head, "", "Presets for a catalogue file:", *_figures(list(MODELS.values()), ("steps",))]


def _traces(config: Config) -> list[str]:
    lines = []
    kinds: list[type[TraceFormat]] = [*map(type, FORMATS.values()), OwnColumns]
    for kind in kinds:
        lines += _entry(kind.name, _said(sys.modules[kind.__module__]), [f"known by: {kind.about}"])
    return [*lines, *(f"not readable: {problem}" for problem in BROKEN.values())]


def _engines(config: Config) -> list[str]:
    lines = []
    for name, kind in ENGINES.items():
        flags = [f"{field.metadata['flag']} (default {_default(field.default)} {field.metadata['unit']}".rstrip() + ")" for field in _fields_of(name)]
        lines += _entry(name, _said(kind), [fill(f"flags: {', '.join(flags)}", WIDTH - len(INDENT), subsequent_indent=INDENT).replace("\n", "\n" + INDENT)])
    profiles = _figures(list(ENGINE_PROFILES.values()), ("layer_s_by_gpu",))
    return [*lines, "", "Engine profiles (--engine-profile):", *profiles, "", "Loaders (--loader):", *_figures(list(LOADER_PROFILES.values()))]


def _default(value: Any) -> str:
    return "none" if value == "" else f"{value:.12g}" if isinstance(value, float) else str(value)


def _fields_of(engine: str) -> list[dataclasses.Field[Any]]:
    """The settings that have an effect with this engine and not with every other one, by the table of effects, and those of ENGINE_FLAGS."""
    idle = {which: _idle(which) for which in ENGINES}
    special = set(ENGINE_FLAGS).union(*idle.values()) - idle[engine]
    return [field for field in flag_fields() if field.metadata["flag"] in special]


def _idle(engine: str) -> set[str]:
    """The flags without effect in a virtual run of this engine that loads models."""
    config, options = parse(["--virtual", "--engine", engine], {}, "", "")
    config = dataclasses.replace(config, service_load_s=1.0)
    return {flag for effect in EFFECTS if effect.missing(config, options) for flag in effect.flags}


ENGINE_FLAGS = ("--slots", "--keep-alive")  # that any engine goes by


def _faults(config: Config) -> list[str]:
    lines = ["[[fault]], any number of them:", *_keys(COMMON), ""]
    for name, kind in KINDS.items():
        lines += [f'kind = "{name}": {_said(kind)}', *_keys(kind.keys)]
    least_s, most_s = DRAWN_FOR_S
    drawn = [
        f"for: [least, most] that each lasts, s (default [{least_s:.12g}, {most_s:.12g}])", f"hosts: as above (default {', '.join(DEFAULT_HOSTS)})",
        f"per_minute: {{ KIND = faults a minute, ... }} (required), of {', '.join(KINDS)}",
    ]  # fmt: skip
    return [*lines, "", "[random], besides them or instead:", *_keys(RANDOM_KEYS), *(INDENT + line for line in drawn)]


def _keys(keys: Mapping[str, Key]) -> list[str]:
    return [f"{INDENT}{name}: {key.meaning}{_bounds(key)}" for name, key in keys.items()]


def _bounds(key: Key) -> str:
    if key.required:
        return " (required)"
    return "" if key.default is None else f" (default {str(key.default).lower() if isinstance(key.default, bool) else format(key.default, '.12g')})"


def _arrivals(config: Config) -> list[str]:
    return [line for name, process in ARRIVALS.items() for line in _entry(name + (" (the default)" if name == Config.arrivals else ""), _said(process))]


def _lengths(config: Config) -> list[str]:
    return [line for name, law in LENGTHS.items() for line in _entry(name + law.form + (" (the default)" if name == Config.lengths else ""), law.meaning)]


LISTS: dict[str, Callable[[Config], list[str]]] = {
    "policies": _policies, "hardware": _hardware, "models": _models, "traces": _traces, "engines": _engines, "faults": _faults, "arrivals": _arrivals,
    "lengths": _lengths,
}  # fmt: skip
