"""Fault schedules: what goes wrong when, where and for how long, read from TOML.

    [[fault]]
    at = 10.0                      # seconds of the run's clock
    kind = "crash"                 # one of KINDS
    hosts = ["worker-1"]           # names, globs, "random:2", "random:25%", "random:2:worker-1*"
    for = 5.0                      # how long; without it, for good

    [random]                       # or: drawn from the seed
    from = 5.0
    until = 60.0
    for = [1.0, 8.0]               # each lasts uniformly so long
    per_minute = { crash = 2.0, degrade = 1.0 }

A fault may repeat (`every`, `until`) and may hit its hosts one after the other (`stagger`). `sllm.virtual.inject` carries a schedule out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from sllm.inputs import toml
from sllm.protocol.errors import UsageError
from sllm.virtual.network import Latency

REPEATS_MAX = 10_000
RANDOM_MAX = 100_000  # faults drawn, on average
DEFAULT_HOSTS = ("random:1",)


class Key(NamedTuple):
    """What may stand behind one key of a fault."""

    kind: str  # number, whole, flag, names or latency
    meaning: str
    required: bool = False
    default: Any = None
    low: float = 0.0
    above: float | None = None
    high: float = 1e9


NUMBER, WHOLE, FLAG, NAMES, LATENCY = "number", "whole", "flag", "names", "latency"

COMMON: dict[str, Key] = {
    "at": Key(NUMBER, "when it begins, s", required=True),
    "for": Key(NUMBER, "how long it lasts, s; without it, for good"),
    "every": Key(NUMBER, "it comes again after so long, s", above=0.0),
    "until": Key(NUMBER, "the last repetition begins before this time, s"),
}
HOSTS = {
    "hosts": Key(NAMES, "which hosts: names, globs, random:N, random:N%, random:N:GLOB", required=True),
    "stagger": Key(NUMBER, "each host is hit so long after the one before, s", default=0.0),
}
LINKS = {
    "from": Key(NAMES, "sending hosts; without it, all"),
    "to": Key(NAMES, "receiving hosts; without it, all"),
    "both_ways": Key(FLAG, "the opposite direction too", default=False),
}
KINDS: dict[str, dict[str, Key]] = {
    "crash": HOSTS,
    "freeze": HOSTS,
    "zombie": {
        **HOSTS,
        "restart_after": Key(NUMBER, "its replacement starts after so long, s; without it, half of `for`"),
        "linger": Key(NUMBER, "the zombie lives so long after it came back, s; without it, for good"),
    },
    "drain": HOSTS,
    "slow": {**HOSTS, "factor": Key(NUMBER, "everything on it takes so many times as long", required=True, low=1.0, high=1e6)},
    "clock_jump": {**HOSTS, "by": Key(NUMBER, "its wall clock is set so far ahead (or back), s", required=True, low=-1e9)},
    "clock_drift": {**HOSTS, "rate": Key(NUMBER, "seconds its clocks run in a second", required=True, above=0.0, high=100.0)},
    "overflow": {
        **HOSTS,
        "buffer": Key(WHOLE, "datagrams that fit", required=True, low=1),
        "drain_per_s": Key(NUMBER, "datagrams read in a second", required=True, above=0.0),
    },
    "cut": LINKS,
    "isolate": HOSTS,
    "degrade": {
        **LINKS,
        "loss": Key(NUMBER, "part of the datagrams that is lost", high=1.0),
        "duplicate": Key(NUMBER, "part that arrives twice", high=1.0),
        "reorder": Key(NUMBER, "part that is held back", high=1.0),
        "reorder_extra_ms": Key(NUMBER, "by up to so long"),
        "corrupt": Key(NUMBER, "part that arrives with a wrong bit", high=1.0),
        "latency_ms": Key(LATENCY, 'number, or ["uniform", low, high], ["exponential", least, mean beyond it], ["lognormal", median, sigma]'),
        "bandwidth_kb_per_s": Key(NUMBER, "kilobytes a second", above=0.0),
        "queue_max_ms": Key(NUMBER, "datagrams that would wait longer for the bandwidth are lost"),
    },
}
MEANINGS = {
    "crash": "the process dies; it comes back with a new incarnation after `for`",
    "freeze": "it stands still; what arrives waits",
    "zombie": "it stands still, is replaced, and comes back beside its replacement after `for`",
    "drain": "it is told to stop in good order; it ends after `for` and comes back at once with a new incarnation",
    "slow": "everything on it takes longer",
    "clock_jump": "its wall clock is set",
    "clock_drift": "its clocks run too fast or too slow",
    "overflow": "its socket buffer is small and slowly read",
    "cut": "nothing gets through a link",
    "isolate": "nothing gets from these hosts to any other, nor back",
    "degrade": "a link loses, copies, delays or spoils datagrams",
}
"""What goes wrong, by kind."""
LINK_QUALITIES = tuple(key for key in KINDS["degrade"] if key not in LINKS)

# What a random schedule draws for a kind, beside host and duration.
DRAWN: dict[str, Callable[[Random], dict[str, Any]]] = {
    "crash": lambda rng: {},
    "freeze": lambda rng: {},
    "zombie": lambda rng: {"linger": rng.uniform(1.0, 5.0)},
    "drain": lambda rng: {},
    "slow": lambda rng: {"factor": rng.uniform(1.5, 10.0)},
    "clock_jump": lambda rng: {"by": rng.choice((-1.0, 1.0)) * rng.uniform(1.0, 120.0)},
    "clock_drift": lambda rng: {"rate": rng.uniform(0.8, 1.25)},
    "overflow": lambda rng: {"buffer": rng.randint(1, 10), "drain_per_s": rng.uniform(2.0, 50.0)},
    "cut": lambda rng: {"from": list(DEFAULT_HOSTS), "both_ways": rng.random() < 0.5} if rng.random() < 0.5 else {"to": list(DEFAULT_HOSTS)},
    "isolate": lambda rng: {},
    "degrade": lambda rng: {
        "loss": rng.choice((0.0, rng.uniform(0.0, 0.4))),
        "duplicate": rng.choice((0.0, rng.uniform(0.0, 0.4))),
        "reorder": rng.choice((0.0, rng.uniform(0.0, 0.4))),
        "reorder_extra_ms": rng.uniform(1.0, 2000.0),
        "corrupt": rng.choice((0.0, rng.uniform(0.0, 0.2))),
    },
}
DRAWN_FOR_S = (1.0, 8.0)  # least and most that a drawn fault lasts, unless said otherwise
RANDOM_KEYS = {
    "from": Key(NUMBER, "faults begin after this time, s", default=0.0),
    "until": Key(NUMBER, "no fault begins after this time, s", required=True),
    "seed": Key(WHOLE, "draw from this seed; without it, the run's"),
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong. Times in seconds of the run's clock."""

    at_s: float
    kind: str
    for_s: float | None  # None: for good
    options: Mapping[str, Any] = field(default_factory=dict)  # by the keys of KINDS, defaults filled in
    where: str = ""  # how to name it in an error

    @property
    def end_s(self) -> float:
        """When nothing of it is left to happen; for one that lasts for good, when it begins."""
        return self.end_s_for(len(self.options.get("hosts", ())))

    def end_s_for(self, hosts: int) -> float:
        """The same when it hits so many hosts."""
        stagger_s, linger_s = float(self.options.get("stagger", 0.0)), float(self.options.get("linger") or 0.0)
        return self.at_s + (self.for_s or 0.0) + stagger_s * max(0, hosts - 1) + linger_s

    def describe(self) -> str:
        """One line for a report."""
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
        """The faults stop at this time: after it nothing goes wrong any more, though what lasts for good stays wrong."""
        return max((fault.end_s for fault in self.faults), default=0.0)

    @property
    def heals(self) -> bool:
        """Every fault ends by itself, so everything must come right again."""
        return all(fault.for_s is not None or fault.kind == "drain" for fault in self.faults)

    def describe(self) -> list[str]:
        return [fault.describe() for fault in self.faults]


# --- reading ------------------------------------------------------------------------------------------------------------------------


def load_schedule(path: str, seed: int) -> Schedule:
    """The schedule in a TOML file. UsageError names the file, the line where it can, the fault and the key."""
    return parse_schedule(toml.read_text(path, "fault file"), seed, path)


def parse_schedule(text: str, seed: int, source: str = "faults") -> Schedule:
    """Like load_schedule, from text; `source` names it in errors."""
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
            options = {key: rule.default for key, rule in KINDS[kind].items()}
            drawn = DRAWN[kind](rng)
            if "hosts" in options:
                drawn["hosts"] = list(hosts)
            else:
                drawn = {key: list(hosts) if key in ("from", "to") else value for key, value in drawn.items()}
            faults.append(Fault(at, kind, rng.uniform(*for_s), options | drawn, f"random {kind}"))
    return sorted(faults, key=lambda fault: fault.at_s)


class _Reader:
    """Checks tables and says where in the text a mistake stands."""

    def __init__(self, source: str, text: str) -> None:
        self._source = source
        self._lines = text.splitlines()

    def fail(self, problem: str, *, table: str = "", index: int = 0, key: str = "") -> None:
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
        kind = table.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            problem = "kind is missing" if kind is None else f"kind={kind!r}: no such kind"
            self.fail(f"{problem}; there are {', '.join(KINDS)}", table="fault", index=index, key="kind")
        assert isinstance(kind, str)
        values = self.read_keys(COMMON | KINDS[kind], {k: v for k, v in table.items() if k != "kind"}, "fault", index, f" of {kind}")
        at, lasts, every, until = (values.pop(key) for key in COMMON)
        if kind == "zombie" and lasts is None:
            self.fail("for is missing: a zombie comes back", table="fault", index=index)
        if kind == "drain" and lasts is None:
            self.fail("for is missing: a draining host needs time before it ends", table="fault", index=index)
        if kind == "degrade" and all(values[key] is None for key in LINK_QUALITIES):
            self.fail(f"nothing is degraded; give one of {', '.join(LINK_QUALITIES)}", table="fault", index=index)
        if (every is None) != (until is None):
            self.fail("every and until go together", table="fault", index=index, key="every" if until is None else "until")
        if until is not None and until <= at:
            self.fail(f"until={until:.12g}: must be after at={at:.12g}", table="fault", index=index, key="until")
        times = [at]
        while every is not None and (following := at + every * len(times)) < until:
            times.append(following)
            if len(times) > REPEATS_MAX:
                self.fail(f"every={every!r}: repeats more than {REPEATS_MAX} times until {until:.12g}", table="fault", index=index, key="every")
        return [Fault(time, kind, lasts, values, f"{self._source}: fault {index + 1}") for time in times]

    def read_random(self, table: Any, seed: int) -> list[Fault]:
        """The [random] table, drawn."""
        if not isinstance(table, dict):
            self.fail("random faults are written as one [random] table", key="random")
        rest = {k: v for k, v in table.items() if k not in ("for", "hosts", "per_minute")}
        values = self.read_keys(RANDOM_KEYS, rest, "random", 0, "")
        rates = table.get("per_minute")
        if not isinstance(rates, dict) or not rates:
            self.fail("per_minute is missing: a rate for each kind, such as per_minute = { crash = 2.0 }", table="random", key="per_minute")
        assert isinstance(rates, dict)
        for kind, rate in rates.items():
            if kind not in KINDS:
                self.fail(f"per_minute: {kind!r} is no kind of fault; there are {', '.join(KINDS)}", table="random", key="per_minute")
            self.value(Key(NUMBER, "", high=60_000.0), rate, "random", 0, f"per_minute.{kind}")
        begins_s, ends_s = values["from"], values["until"]
        if begins_s >= ends_s:
            self.fail(f"from={begins_s:.12g}: must be before until={ends_s:.12g}", table="random", key="from")
        expected = sum(rates.values()) * (ends_s - begins_s) / 60.0
        if expected > RANDOM_MAX:
            self.fail(f"until={ends_s:.12g}: would draw about {expected:,.0f} faults, must be at most {RANDOM_MAX:,}", table="random", key="until")
        span = table.get("for", list(DRAWN_FOR_S))
        if not isinstance(span, list) or len(span) != 2 or not all(_is_number(x) and x >= 0 for x in span) or span[0] > span[1]:
            self.fail(f"for={span!r}: must be [least, most] seconds", table="random", key="for")
        hosts = self.value(HOSTS["hosts"], table.get("hosts", list(DEFAULT_HOSTS)), "random", 0, "hosts")
        chosen = values["seed"] if values["seed"] is not None else seed
        rng = Random(f"{chosen}/fault schedule")
        return random_faults(rng, begins_s, ends_s, rates, (float(span[0]), float(span[1])), tuple(hosts))

    def read_keys(self, rules: Mapping[str, Key], table: Mapping[str, Any], name: str, index: int, of: str) -> dict[str, Any]:
        """Every key checked, defaults filled in."""
        for key in table:
            if key not in rules:
                self.fail(f"{key!r} is no key{of or f' of [{name}]'}; there are {', '.join(rules)}", table=name, index=index, key=key)
        values = {}
        for key, rule in rules.items():
            if key in table:
                values[key] = self.value(rule, table[key], name, index, key)
            elif rule.required:
                self.fail(f"{key} is missing: {rule.meaning}", table=name, index=index)
            else:
                values[key] = rule.default
        return values

    def value(self, rule: Key, value: Any, name: str, index: int, key: str) -> Any:
        """The value as the rule wants it."""
        wanted = _mismatch(rule, value)
        if wanted:
            self.fail(f"{key}={value!r}: must be {wanted}", table=name, index=index, key=key)
        if rule.kind == LATENCY:
            try:
                return _latency(value)
            except (ValueError, TypeError) as error:
                self.fail(f"{key}={value!r}: {error}", table=name, index=index, key=key)
        return float(value) if rule.kind == NUMBER else value


def _mismatch(rule: Key, value: Any) -> str:
    """What the value should have been, or "" if it fits."""
    if rule.kind == FLAG:
        return "" if isinstance(value, bool) else "true or false"
    if rule.kind == NAMES:
        fits = isinstance(value, list) and value and all(isinstance(name, str) and name for name in value)
        return "" if fits else 'a list of host names, such as ["worker-1"]'
    if rule.kind == LATENCY:
        fits = _is_number(value) or (isinstance(value, list) and 2 <= len(value) <= 3 and isinstance(value[0], str) and all(map(_is_number, value[1:])))
        return "" if fits else rule.meaning
    if rule.kind == WHOLE and (not isinstance(value, int) or isinstance(value, bool)):
        return "a whole number"
    if not _is_number(value):
        return "a number"
    if rule.above is not None and value <= rule.above:
        return f"above {rule.above:.12g}"
    return "" if rule.low <= value <= rule.high else f"between {rule.low:.12g} and {rule.high:.12g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _latency(value: Any) -> Latency:
    """Milliseconds of the file to seconds; sigma of lognormal has no unit."""
    if not isinstance(value, list):
        return Latency("constant", value / 1e3)
    kind, *numbers = value
    second = numbers[1] if len(numbers) > 1 else 0.0
    return Latency(kind, numbers[0] / 1e3, second if kind == "lognormal" else second / 1e3)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:.12g}" if isinstance(value, float) else str(value)
