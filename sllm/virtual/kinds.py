"""The kinds of faults, one class for each: the keys of its table, further conditions on the table, and the values that a random schedule draws.

The docstring of a class is what `--list faults` says of the kind. What a fault does to a world is in `sllm.virtual.inject`, in a method of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, ClassVar

from sllm.inputs.keys import Flag, Key, Names, Number, Whole, is_number
from sllm.virtual.network import Latency

Keys = dict[str, Key]
DEFAULT_HOSTS = ("random:1",)
HOST_NAMES = Names("host names", '["worker-1"]')
HOSTS: Keys = {
    "hosts": Key(HOST_NAMES, "which hosts: names, globs, random:N, random:N%, random:N:GLOB", required=True),
    "stagger": Key(Number(), "time from one host's hit to the next, s", default=0.0),
}
LINKS: Keys = {
    "from": Key(HOST_NAMES, "sending hosts; without it, all"),
    "to": Key(HOST_NAMES, "receiving hosts; without it, all"),
    "both_ways": Key(Flag(), "the opposite direction too", default=False),
}


class FaultKind:
    """One kind of fault."""

    name: ClassVar[str]
    keys: ClassVar[Keys] = HOSTS  # beside the keys that all kinds have
    why_it_ends: ClassVar[str] = ""  # why a fault of this kind cannot last for good; "": faults of this kind can

    def __init_subclass__(cls) -> None:
        KINDS[cls.name] = cls()

    def problem(self, for_s: float | None, values: Mapping[str, Any]) -> str:
        """Why values that fit their keys do not make a valid fault together; "" if they do. `for_s` None: the fault lasts for good."""
        return f"for is missing: {self.why_it_ends}" if for_s is None and self.why_it_ends else ""

    def defaults(self) -> dict[str, Any]:
        """The values of a fault whose table has no keys: the defaults."""
        return {name: key.default for name, key in self.keys.items()}

    def draw(self, rng: Random) -> dict[str, Any]:
        """The values of a random fault, except hosts and duration, which are drawn in the same way for all kinds."""
        return {}


KINDS: dict[str, FaultKind] = {}
"""Every kind by its name, in the order of this file."""


class Crash(FaultKind):
    """The process dies; it comes back with a new incarnation after `for`."""

    name = "crash"


class Freeze(FaultKind):
    """The process stands still; what arrives waits."""

    name = "freeze"


class Zombie(FaultKind):
    """The process stands still, is replaced, and comes back beside its replacement after `for`."""

    name = "zombie"
    keys: ClassVar[Keys] = {
        **HOSTS,
        "restart_after": Key(Number(), "time until the replacement starts, s; without it, half of `for`"),
        "linger": Key(Number(), "time that the zombie lives after it came back, s; without it, for good"),
    }
    why_it_ends = "a zombie comes back"

    def draw(self, rng: Random) -> dict[str, Any]:
        return {"linger": rng.uniform(1.0, 5.0)}


class Drain(FaultKind):
    """The process is told to stop in good order; it ends after `for` and comes back at once with a new incarnation."""

    name = "drain"
    why_it_ends = "a draining host needs time before it ends"


class Slow(FaultKind):
    """Everything on the host takes longer."""

    name = "slow"
    keys: ClassVar[Keys] = {**HOSTS, "factor": Key(Number(low=1.0, high=1e6), "factor on the time that everything on the host takes", required=True)}

    def draw(self, rng: Random) -> dict[str, Any]:
        return {"factor": rng.uniform(1.5, 10.0)}


class ClockJump(FaultKind):
    """The host's wall clock is set."""

    name = "clock_jump"
    keys: ClassVar[Keys] = {**HOSTS, "by": Key(Number(low=-1e9), "its wall clock is set so far ahead (or back), s", required=True)}

    def draw(self, rng: Random) -> dict[str, Any]:
        return {"by": rng.choice((-1.0, 1.0)) * rng.uniform(1.0, 120.0)}


class ClockDrift(FaultKind):
    """The host's clocks run too fast or too slow."""

    name = "clock_drift"
    keys: ClassVar[Keys] = {**HOSTS, "rate": Key(Number(above=0.0, high=100.0), "seconds its clocks run in a second", required=True)}

    def draw(self, rng: Random) -> dict[str, Any]:
        return {"rate": rng.uniform(0.8, 1.25)}


class Overflow(FaultKind):
    """The host's socket buffer is small and slowly read."""

    name = "overflow"
    keys: ClassVar[Keys] = {
        **HOSTS,
        "buffer": Key(Whole(low=1), "datagrams that fit", required=True),
        "drain_per_s": Key(Number(above=0.0), "datagrams read in a second", required=True),
    }

    def draw(self, rng: Random) -> dict[str, Any]:
        return {"buffer": rng.randint(1, 10), "drain_per_s": rng.uniform(2.0, 50.0)}


class Cut(FaultKind):
    """Nothing gets through a link."""

    name = "cut"
    keys: ClassVar[Keys] = LINKS

    def draw(self, rng: Random) -> dict[str, Any]:
        if rng.random() < 0.5:
            return {"from": list(DEFAULT_HOSTS), "both_ways": rng.random() < 0.5}
        return {"to": list(DEFAULT_HOSTS)}


class Isolate(FaultKind):
    """Nothing gets from these hosts to any other, nor back."""

    name = "isolate"


class LatencyRule:
    """A latency in milliseconds: a number, or a law and its figures, of which the sigma of lognormal alone has no unit."""

    meaning = 'number, or ["uniform", low, high], ["exponential", least, mean beyond it], ["lognormal", median, sigma]'

    def problem(self, value: Any) -> str:
        is_law = isinstance(value, list) and 2 <= len(value) <= 3 and isinstance(value[0], str) and all(map(is_number, value[1:]))
        if not is_law and not is_number(value):
            return f"must be {self.meaning}"
        try:
            self.read(value)
        except (ValueError, TypeError) as error:
            return str(error)
        return ""

    def read(self, value: Any) -> Latency:
        """In seconds."""
        if not isinstance(value, list):
            return Latency("constant", value / 1e3)
        kind, *numbers = value
        second = numbers[1] if len(numbers) > 1 else 0.0
        return Latency(kind, numbers[0] / 1e3, second if kind == "lognormal" else second / 1e3)


class Degrade(FaultKind):
    """A link loses, copies, delays or spoils datagrams."""

    name = "degrade"
    qualities: ClassVar[Keys] = {
        "loss": Key(Number(high=1.0), "part of the datagrams that is lost"),
        "duplicate": Key(Number(high=1.0), "part that arrives twice"),
        "reorder": Key(Number(high=1.0), "part that is held back"),
        "reorder_extra_ms": Key(Number(), "longest time for which a reordered datagram is held back"),
        "corrupt": Key(Number(high=1.0), "part that arrives with a wrong bit"),
        "latency_ms": Key(LatencyRule(), LatencyRule.meaning),
        "bandwidth_kb_per_s": Key(Number(above=0.0), "kilobytes a second"),
        "queue_max_ms": Key(Number(), "datagrams that would wait longer for the bandwidth are lost"),
    }
    keys: ClassVar[Keys] = {**LINKS, **qualities}

    def problem(self, for_s: float | None, values: Mapping[str, Any]) -> str:
        if all(values[name] is None for name in self.qualities):
            return f"nothing is degraded; give one of {', '.join(self.qualities)}"
        return super().problem(for_s, values)

    def draw(self, rng: Random) -> dict[str, Any]:
        return {
            "loss": rng.choice((0.0, rng.uniform(0.0, 0.4))),
            "duplicate": rng.choice((0.0, rng.uniform(0.0, 0.4))),
            "reorder": rng.choice((0.0, rng.uniform(0.0, 0.4))),
            "reorder_extra_ms": rng.uniform(1.0, 2000.0),
            "corrupt": rng.choice((0.0, rng.uniform(0.0, 0.2))),
        }
