"""Fault schedules, read from TOML: the kind, place, time and duration of every fault.

    [[fault]]
    at = 10.0                      # seconds of the run's clock
    kind = "crash"                 # one of KINDS
    hosts = ["worker-1"]           # names, globs, "random:2", "random:25%", "random:2:worker-1*"
    for = 5.0                      # how long; without it, for good

    [random]                       # or: drawn from the seed
    from = 5.0
    until = 60.0
    for = [1.0, 8.0]               # each lasts for a time drawn uniformly from this range, s
    per_minute = { crash = 2.0, degrade = 1.0 }

A fault may repeat (`every`, `until`) and may hit its hosts one after the other (`stagger`). `sllm.virtual.inject` carries a schedule out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from sllm.inputs import toml
from sllm.inputs.keys import Key, Number, Rule, Whole, is_number
from sllm.protocol.errors import UsageError
from sllm.virtual.kinds import DEFAULT_HOSTS, HOST_NAMES, KINDS, FaultKind

REPEATS_MAX = 10_000
RANDOM_MAX = 100_000  # faults drawn, on average
RATE = Number(high=60_000.0)  # of one kind of random faults, a minute

COMMON: dict[str, Key] = {
    "at": Key(Number(), "when it begins, s", required=True),
    "for": Key(Number(), "how long it lasts, s; without it, for good"),
    "every": Key(Number(above=0.0), "time from one repetition to the next, s"),
    "until": Key(Number(), "the last repetition begins before this time, s"),
}
DRAWN_FOR_S = (1.0, 8.0)  # default of the shortest and the longest duration of a drawn fault
RANDOM_KEYS = {
    "from": Key(Number(), "faults begin after this time, s", default=0.0),
    "until": Key(Number(), "no fault begins after this time, s", required=True),
    "seed": Key(Whole(), "draw from this seed; without it, the run's"),
}


@dataclass(frozen=True)
class Fault:
    """One fault. Times are in seconds of the run's clock."""

    at_s: float
    kind: str
    for_s: float | None  # None: for good
    options: Mapping[str, Any] = field(default_factory=dict)  # by the keys of KINDS, defaults filled in
    where: str = ""  # how to name it in an error

    @property
    def end_s(self) -> float:
        """The time of the fault's last action; for a fault that lasts for good, the time at which it begins."""
        return self.end_s_for(len(self.options.get("hosts", ())))

    def end_s_for(self, hosts: int) -> float:
        """The time of the last action of a fault that hits this number of hosts."""
        stagger_s, linger_s = float(self.options.get("stagger", 0.0)), float(self.options.get("linger") or 0.0)
        return self.at_s + (self.for_s or 0.0) + stagger_s * max(0, hosts - 1) + linger_s

    def describe(self) -> str:
        """One line for people."""
        options = self.options
        what = ", ".join(f"{key} {_show(value)}" for key, value in options.items() if key not in ("hosts", "from", "to") and value not in (None, False, 0.0))
        if "hosts" in options:
            place = " ".join(options["hosts"])
        else:
            place = f"{_show(options.get('from') or 'all')} -> {_show(options.get('to') or 'all')}"
        lasting = "for good" if self.for_s is None else f"for {self.for_s:.12g} s"
        return f"at {self.at_s:.12g} s {self.kind} {place} {lasting}" + (f" ({what})" if what else "")


@dataclass(frozen=True)
class Schedule:
    """Faults in order of time."""

    faults: tuple[Fault, ...] = ()
    name: str = ""

    @property
    def end_s(self) -> float:
        """The time after which no fault begins or ends; faults that last for good stay."""
        return max((fault.end_s for fault in self.faults), default=0.0)

    @property
    def heals(self) -> bool:
        """Whether every fault ends by itself, so that the fleet must recover completely."""
        return all(fault.for_s is not None or fault.kind == "drain" for fault in self.faults)

    def describe(self) -> list[str]:
        return [fault.describe() for fault in self.faults]


# --- reading ------------------------------------------------------------------------------------------------------------------------


def load_schedule(path: str, seed: int) -> Schedule:
    """The schedule in a TOML file. UsageError names the file, the line where it can, the fault and the key."""
    return parse_schedule(toml.read_text(path, "fault file"), seed, path)


def parse_schedule(text: str, seed: int, source: str = "faults") -> Schedule:
    """The schedule in a text; `source` names the text in errors. UsageError as `load_schedule`."""
    data = toml.parse(text, source)
    reader = _Reader(source, text)
    for key in data:
        if key not in ("name", "fault", "random"):
            reader.fail(f"{key!r} is no key of a schedule; there are name, [[fault]] and [random]", key=key)
    faults: list[Fault] = []
    tables = data.get("fault", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        reader.fail("faults are written as [[fault]] tables", key="fault")
    for index, table in enumerate(tables):
        faults.extend(reader.read_fault(index, table))
    if "random" in data:
        faults.extend(reader.read_random(data["random"], seed))
    faults.sort(key=lambda fault: fault.at_s)
    return Schedule(tuple(faults), str(data.get("name", "")) or Path(source).stem)


def random_faults(
    rng: Random,
    from_s: float,
    until_s: float,
    per_minute: Mapping[str, float],
    for_s: tuple[float, float] = DRAWN_FOR_S,
    hosts: tuple[str, ...] = DEFAULT_HOSTS,
) -> list[Fault]:
    """Faults of each kind as a Poisson process between two times; each lasts uniformly within `for_s` and hits `hosts`."""
    faults = []
    for kind, rate in per_minute.items():
        at = from_s
        while rate > 0.0:
            at += rng.expovariate(rate / 60.0)
            if at >= until_s:
                break
            options, drawn = KINDS[kind].defaults(), KINDS[kind].draw(rng)
            if "hosts" in options:
                drawn["hosts"] = list(hosts)
            else:
                drawn = {key: list(hosts) if key in ("from", "to") else value for key, value in drawn.items()}
            faults.append(Fault(at, kind, rng.uniform(*for_s), options | drawn, f"random {kind}"))
    return sorted(faults, key=lambda fault: fault.at_s)


class _Reader:
    """Checks tables; errors name the place in the text."""

    def __init__(self, source: str, text: str) -> None:
        self._source = source
        self._lines = text.splitlines()

    def fail(self, problem: str, *, table: str = "", index: int = 0, key: str = "") -> NoReturn:
        """Raise UsageError: file, line, fault and key."""
        line = self._line_of(table, index, key)
        place = f"{self._source}:{line}" if line else self._source
        label = f" fault {index + 1}:" if table == "fault" else f" [{table}]:" if table else ""
        raise UsageError(f"{place}:{label} {problem}")

    def _line_of(self, table: str, index: int, key: str) -> int:
        """Line of `key` in the index-th table of that name, or of the table, or 0."""
        start = 0
        if table:
            headers = [n for n, line in enumerate(self._lines, 1) if re.match(rf"\s*\[{{1,2}}\s*{table}\s*\]", line)]
            if index >= len(headers):
                return 0
            start = headers[index]
        for number in range(start, len(self._lines)):
            line = self._lines[number]
            if table and re.match(r"\s*\[\s*(\[\s*)?\w", line):
                break
            if key and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*[=.]""", line):
                return number + 1
        return start

    def read_fault(self, index: int, table: dict[str, Any]) -> list[Fault]:
        """One [[fault]] with its repetitions."""
        kind = self._kind_of(table, index)
        values = self.read_keys(COMMON | kind.keys, {k: v for k, v in table.items() if k != "kind"}, "fault", index, f" of {kind.name}")
        at, lasts, every, until = (values.pop(key) for key in COMMON)
        if problem := kind.problem(lasts, values):
            self.fail(problem, table="fault", index=index)
        return [Fault(time, kind.name, lasts, values, f"{self._source}: fault {index + 1}") for time in self._repeat(index, at, every, until)]

    def _kind_of(self, table: dict[str, Any], index: int) -> FaultKind:
        name = table.get("kind")
        if isinstance(name, str) and name in KINDS:
            return KINDS[name]
        problem = "kind is missing" if name is None else f"kind={name!r}: no such kind"
        self.fail(f"{problem}; there are {', '.join(KINDS)}", table="fault", index=index, key="kind")

    def _repeat(self, index: int, at: float, every: float | None, until: float | None) -> list[float]:
        """The times at which a fault begins."""
        if every is None and until is None:
            return [at]
        if every is None or until is None:
            self.fail("every and until go together", table="fault", index=index, key="every" if until is None else "until")
        if until <= at:
            self.fail(f"until={until:.12g}: must be after at={at:.12g}", table="fault", index=index, key="until")
        times = [at]
        while (following := at + every * len(times)) < until:
            times.append(following)
            if len(times) > REPEATS_MAX:
                self.fail(f"every={every!r}: repeats more than {REPEATS_MAX} times until {until:.12g}", table="fault", index=index, key="every")
        return times

    def read_random(self, table: Any, seed: int) -> list[Fault]:
        """The [random] table, drawn."""
        if not isinstance(table, dict):
            self.fail("random faults are written as one [random] table", key="random")
        rest = {k: v for k, v in table.items() if k not in ("for", "hosts", "per_minute")}
        values = self.read_keys(RANDOM_KEYS, rest, "random", 0, "")
        rates = table.get("per_minute")
        if not isinstance(rates, dict) or not rates:
            self.fail("per_minute is missing: a rate for each kind, such as per_minute = { crash = 2.0 }", table="random", key="per_minute")
        for kind, rate in rates.items():
            if kind not in KINDS:
                self.fail(f"per_minute: {kind!r} is no kind of fault; there are {', '.join(KINDS)}", table="random", key="per_minute")
            self.value(RATE, rate, "random", 0, f"per_minute.{kind}")
        begins_s, ends_s = values["from"], values["until"]
        if begins_s >= ends_s:
            self.fail(f"from={begins_s:.12g}: must be before until={ends_s:.12g}", table="random", key="from")
        expected = sum(rates.values()) * (ends_s - begins_s) / 60.0
        if expected > RANDOM_MAX:
            self.fail(f"until={ends_s:.12g}: would draw about {expected:,.0f} faults, must be at most {RANDOM_MAX:,}", table="random", key="until")
        span = table.get("for", list(DRAWN_FOR_S))
        if not isinstance(span, list) or len(span) != 2 or not all(is_number(x) and x >= 0 for x in span) or span[0] > span[1]:
            self.fail(f"for={span!r}: must be [least, most] seconds", table="random", key="for")
        hosts = self.value(HOST_NAMES, table.get("hosts", list(DEFAULT_HOSTS)), "random", 0, "hosts")
        chosen = values["seed"] if values["seed"] is not None else seed
        rng = Random(f"{chosen}/fault schedule")
        return random_faults(rng, begins_s, ends_s, rates, (float(span[0]), float(span[1])), tuple(hosts))

    def read_keys(self, keys: Mapping[str, Key], table: Mapping[str, Any], name: str, index: int, of: str) -> dict[str, Any]:
        """Every key checked, defaults filled in."""
        for key in table:
            if key not in keys:
                self.fail(f"{key!r} is no key{of or f' of [{name}]'}; there are {', '.join(keys)}", table=name, index=index, key=key)
        values = {}
        for key, declared in keys.items():
            if key in table:
                values[key] = self.value(declared.rule, table[key], name, index, key)
            elif declared.required:
                self.fail(f"{key} is missing: {declared.meaning}", table=name, index=index)
            else:
                values[key] = declared.default
        return values

    def value(self, rule: Rule, value: Any, name: str, index: int, key: str) -> Any:
        """The value, converted to the type that the program uses."""
        if problem := rule.problem(value):
            self.fail(f"{key}={value!r}: {problem}", table=name, index=index, key=key)
        return rule.read(value)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.12g}" if isinstance(value, float) else str(value)
