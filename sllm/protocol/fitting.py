"""Cuts a load report so that it fits a datagram, whatever a worker holds.

The lists of a report grow with the catalogue. A report that would be too long is marked `partial` and names the models that matter most, in this order:
models being loaded, models that serve now, other models on the GPU, models in host memory, models on disk. A model left out counts as further away than it
is, so placement errs towards too long an estimate; a partial report never says anything false.

The worker cuts, not the codec, so a run is the same whether messages travel as objects or as bytes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from sllm.protocol.limits import DATAGRAM_MAX_BYTES, NAME_MAX_BYTES, NAMES_MAX, OPCODES_MAX
from sllm.protocol.messages import EngineSnapshot, LoadReport

LISTS_MAX_BYTES = DATAGRAM_MAX_BYTES - 2192  # for the lists; the header, the tag and the other fields need less than 2,192 bytes
LISTS_MAX_VALUES = OPCODES_MAX - 200
SECONDS_BYTES = 10  # a float, and the pair around the float
SHORT_NAMES = LISTS_MAX_BYTES // (2 + NAME_MAX_BYTES + SECONDS_BYTES)  # names that always fit, even the longest ones in the list that costs most
WHOLE_NAMES = LISTS_MAX_VALUES // 7  # models whose values always fit, even if all five lists name every model


def name_bytes(name: str) -> int:
    """Bytes that a name takes in a body."""
    return 2 + len(name.encode())


def always_fits(names: tuple[str, ...]) -> bool:
    """Whether a report fits even if every list of it names all of these models."""
    return len(names) <= WHOLE_NAMES and sum(SECONDS_BYTES + 5 * name_bytes(name) for name in names) <= LISTS_MAX_BYTES


class _Room:
    """The bytes and values that are left of a datagram."""

    def __init__(self) -> None:
        self._bytes = LISTS_MAX_BYTES
        self._values = LISTS_MAX_VALUES

    def take(self, names: Iterable[str], *, times: int = 1, more_bytes: int = 0) -> int:
        """Take room for as many of the names, from the first on, as fit one list; returns their number. Each name costs its bytes `times` times, and
        `more_bytes` besides."""
        count = 0
        for name in names:
            size, values = times * name_bytes(name) + more_bytes, times + (2 if more_bytes else 0)
            if count == NAMES_MAX or size > self._bytes or values > self._values:
                break
            self._bytes -= size
            self._values -= values
            count += 1
        return count


def same_models(one: EngineSnapshot, other: EngineSnapshot) -> bool:
    """Whether two snapshots name the same models in all of their lists."""
    return (
        one.gpu_models == other.gpu_models and one.busy_models == other.busy_models and one.loading == other.loading
        and one.host_models == other.host_models and one.disk_models == other.disk_models
    )  # fmt: skip


def within(report: LoadReport, models: Container[str]) -> tuple[LoadReport, int]:
    """(The report without the names that are not among `models`, how many of the removed names were on the GPU and idle). The same object if no name was
    removed.

    The memory that a reader needs for a report is then bounded by the reader's own catalogue, whatever the sender says."""
    engine = report.engine
    gpu, busy, host, disk, loading = engine.gpu_models, engine.busy_models, engine.host_models, engine.disk_models, engine.loading
    known = models.__contains__
    if all(map(known, gpu + busy + host + disk)) and (not loading or all(known(name) for name, _ in loading)):
        return report, 0
    busy_there = set(busy)
    idle = sum(not known(name) and name not in busy_there for name in gpu)
    gpu, busy, host, disk = [tuple(filter(known, names)) for names in (gpu, busy, host, disk)]
    loading = tuple(item for item in loading if known(item[0]))
    return report.replace(engine=engine.replace(gpu_models=gpu, busy_models=busy, host_models=host, disk_models=disk, loading=loading)), idle


def fitted(report: LoadReport) -> LoadReport:
    """The report, with its lists cut so that it certainly fits a datagram; the same object if nothing was cut."""
    engine = report.engine
    loading, busy, gpu, host, disk = engine.loading, engine.busy_models, engine.gpu_models, engine.host_models, engine.disk_models
    if len(loading) + len(busy) + len(gpu) + len(host) + len(disk) <= SHORT_NAMES:
        return report
    room = _Room()
    loading = loading[: room.take([name for name, _ in loading], more_bytes=SECONDS_BYTES)]
    busy = busy[: room.take(busy, times=2)]  # a busy model is listed among the GPU's models too: without its place among the busy ones it would count as idle
    said, serving = set(busy), set(engine.busy_models)
    idle = [name for name in gpu if name not in serving]
    said.update(idle[: min(room.take(idle), NAMES_MAX - len(busy))])
    gpu = tuple(name for name in gpu if name in said)
    host = host[: room.take(host)]
    disk = disk[: room.take(disk)]
    cut = engine.replace(loading=loading, busy_models=busy, gpu_models=gpu, host_models=host, disk_models=disk)
    return report if same_models(cut, engine) else report.replace(engine=cut, partial=True)
