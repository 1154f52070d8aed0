"""One load report from the socket to the updated table: received, authenticated, unpacked, applied.

Baseline: a bare `recvfrom_into` loop over the same datagrams in the same run. Every socket is filled first, in rounds that its buffer holds, and only
the emptying is timed. Also shown: the coordinator's own part, with envelopes as objects, for a report that changes nothing and for one that does.
"""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, SOURCE, drain, make_coordinator, make_report, show, status
from coordinator import Coordinator
from sllm.deploy.keys import ephemeral_keyring
from sllm.protocol.messages import AnyEnvelope, Envelope, LoadReport
from sllm.wire.frame import FrameCodec

WORKERS = 1000
ROUND = 100  # datagrams that the default receive buffer holds, with room to spare
ROUNDS = 300
REPEATS = 5


def fresh(envelopes: list[AnyEnvelope], changed: bool, rng: Random, names: tuple[str, ...], now: float) -> list[AnyEnvelope]:
    """The next report of each worker, with the same figures or new ones."""
    out = []
    for last in envelopes:
        report = last.message
        assert isinstance(report, LoadReport)
        if changed:
            report = make_report(rng, names, last.sequence, report.engine.gpu_models)
        out.append(Envelope(last.sender_id, 1, last.sequence + 1, now, report))
    return out


def emptying_us(datagrams: list[bytes], take: Callable[[socket.socket, memoryview], None]) -> float:
    """Microseconds per datagram: the median of the rounds, because a busy machine interrupts some rounds."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        ear.bind(("127.0.0.1", 0))
        ear.settimeout(5.0)
        address = ear.getsockname()
        buffer = memoryview(bytearray(65536))
        rounds_us = []
        for start in range(0, len(datagrams), ROUND):
            part = datagrams[start : start + ROUND]
            for datagram in part:
                mouth.sendto(datagram, address)
            began = perf_counter()
            for _ in part:
                take(ear, buffer)
            rounds_us.append((perf_counter() - began) / len(part) * 1e6)
    return median(rounds_us)


def socket_to_table(changed: bool) -> tuple[float, float]:
    """(bare, whole) microseconds per report, of workers whose figures change or stay the same."""
    codec = FrameCodec(ephemeral_keyring())
    node, envelopes = make_coordinator(WORKERS)
    node.codec = codec
    rng, names = Random(4), node.catalog.names
    bare_us, whole_us = [], []

    def bare(ear: socket.socket, buffer: memoryview) -> None:
        ear.recvfrom_into(buffer)

    def whole(ear: socket.socket, buffer: memoryview) -> None:
        size, source = ear.recvfrom_into(buffer)
        node.receive_datagram(buffer[:size], source, 1.0)

    for _ in range(REPEATS):
        datagrams = []
        for _ in range(ROUND * ROUNDS // REPEATS // WORKERS or 1):
            envelopes = fresh(envelopes, changed, rng, names, 1.0)
            datagrams += [codec.encode(envelope) for envelope in envelopes]
        bare_us.append(emptying_us(datagrams, bare))
        accepted = node.reports_accepted
        whole_us.append(emptying_us(datagrams, whole))
        assert node.reports_accepted - accepted == len(datagrams), node.rejected
        drain(node)
    return min(bare_us), min(whole_us)


def table_us(node: Coordinator, envelopes: list[AnyEnvelope], changed: bool) -> tuple[float, list[AnyEnvelope]]:
    """Microseconds of Node.receive for each report; and the last envelopes."""
    rng = Random(5)
    best = float("inf")
    for _ in range(REPEATS):
        envelopes = fresh(envelopes, changed, rng, node.catalog.names, 1.0)
        began = perf_counter()
        for envelope in envelopes:
            node.receive(envelope, SOURCE, 1.0)
        best = min(best, (perf_counter() - began) / len(envelopes) * 1e6)
        drain(node)
    return best, envelopes


def changing_names_us(count: int) -> float:
    """Microseconds for a report with `count` models on the GPU and as many in host memory, none of which the last one named."""
    node, _ = make_coordinator(1)
    names = node.catalog.names
    report = make_report(Random(6), names, 1, names[:count])
    parts = names[:count], names[500 : 500 + count]
    turns = [report.replace(engine=report.engine.replace(gpu_models=part, host_models=part, busy_models=())) for part in parts]
    best = float("inf")
    for sequence in range(2, 202):
        envelope = Envelope("worker-0", 1, sequence, 1.0, turns[sequence % 2])
        began = perf_counter()
        node.receive(envelope, SOURCE, 1.0)
        best = min(best, perf_counter() - began)
    drain(node)
    return best * 1e6


def main() -> int:
    node, envelopes = make_coordinator(WORKERS)
    gc.freeze()
    unchanged_us, envelopes = table_us(node, envelopes, False)
    changed_us, _ = table_us(node, envelopes, True)
    for what, changes, budget in (("the same again", False, 4.0), ("new figures", True, 6.0)):
        bare_us, whole_us = socket_to_table(changes)
        show(f"a report with {what}, socket to table / bare recvfrom_into", whole_us / bare_us, RATIO, budget, compiled=4.0)
        print(f"  bare {bare_us:.2f} us, whole {whole_us:.2f} us: {1e6 / whole_us:,.0f} reports a second")
    show("of that the coordinator's part, nothing changed", unchanged_us, "us", 2.0)
    show("of that the coordinator's part, figures changed", changed_us, "us", 4.0)
    few_us, many_us = changing_names_us(100), changing_names_us(500)
    show("the coordinator's part of 500 names that all change / of 100", many_us / few_us, RATIO, 6.0)
    print(f"  100 names {few_us:.0f} us, 500 names {many_us:.0f} us")
    return status()


if __name__ == "__main__":
    sys.exit(main())
