"""What hardware a fleet's workers have: one kind for all, or a count of workers for each of several kinds."""

from __future__ import annotations

from sllm.inputs import toml
from sllm.protocol.errors import UsageError
from sllm.protocol.limits import HARDWARE_SEPARATORS

WORKERS_MAX = 1_000_000


def parse_mix(text: str, label: str = "--hardware") -> dict[str, int]:
    """Workers by hardware name, in order, of `NAME:COUNT,NAME:COUNT`; {NAME: 0} of a bare `NAME`, which is the hardware of all workers.

    UsageError, naming `label`, for a part without a count, a count that no fleet has and a name given twice.
    """
    parts = text.split(",")
    if HARDWARE_SEPARATORS.isdisjoint(text):
        return {text.strip(): 0}
    mix: dict[str, int] = {}
    for part in parts:
        name, _, number = (piece.strip() for piece in part.rpartition(":"))
        if not name or not _is_count(number):
            raise UsageError(f"{label}={text!r}: {part.strip()!r} is not NAME:COUNT with a whole number from 1 to {WORKERS_MAX}")
        if name in mix:
            raise UsageError(f"{label}={text!r}: {name!r} is named twice")
        mix[name] = int(number)
    return mix


def _is_count(number: str) -> bool:
    return number.isascii() and number.isdigit() and len(number) <= len(str(WORKERS_MAX)) and int(number) >= 1


def hardware_of_workers(text: str, workers: int, label: str = "--hardware") -> list[str]:
    """The hardware name of each of `workers` workers: the first kind of the mix comes first. UsageError when the counts do not sum to `workers`."""
    mix = parse_mix(text, label)
    if list(mix.values()) == [0]:
        return list(mix) * workers
    if sum(mix.values()) != workers:
        raise UsageError(f"{label}={text!r}: its counts sum to {sum(mix.values()):,}, but the fleet has {workers:,} workers (--workers)")
    return [name for name, count in mix.items() for _ in range(count)]


def read_fleet(path: str) -> str:
    """The mix that a fleet file says, `"h100-80g" = 3` a line, as `parse_mix` reads it. UsageError names the file and the key."""
    counts = toml.read_pairs(path, "fleet", '"h100-80g" = 3')
    for name, count in counts.items():
        if type(count) is not int or not 0 < count <= WORKERS_MAX:
            raise UsageError(f"fleet {path}: {name!r} = {count!r}: must be a number of workers, at least 1")
    if not counts:
        raise UsageError(f"fleet {path}: names no hardware")
    return ",".join(f"{name}:{count}" for name, count in counts.items())
