"""The cost of a datagram for the codec: of usual datagrams, and of forged ones that look alike.

Baseline: a bare `recvfrom_into` loop over the same load reports in the same run, from a socket that was filled first. Everything else is
`encode` or `decode` alone, over many different datagrams in turn.

A look-alike without the key must cost no more than a hash over its bytes. One with the key (a peer that has turned) may go further, to the opcodes,
the unpickler and the types; 8 KiB and a thousand opcodes are its bound.
"""

from __future__ import annotations

import gc
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, make_report, show, status
from sllm.models.catalogue import Catalog
from sllm.protocol.limits import DATAGRAM_MAX_BYTES
from sllm.protocol.messages import AnyEnvelope, Dispatch, Envelope, InferenceRequest, LoadReport, Message, ScheduleRequest
from sllm.protocol.node import Rejected
from sllm.wire.frame import HEADER, MAGIC, VERSION, FrameCodec
from sllm.wire.keys import TAG_BYTES, Keyring

COUNT = 1000  # datagrams of each kind
HOSTILE_COUNT = 200
REPEATS = 15
BATCH = 100  # datagrams that the default receive buffer holds, with room to spare
RING = Keyring(1, {1: bytes(range(32))})
HELD = 5  # model names in a report


def reports(held: list[tuple[str, ...]], sequence: int, rng: Random) -> list[AnyEnvelope]:
    """One report of each worker: it holds these models, and how busy it is differs from report to report."""
    return [
        Envelope(f"worker-{i}", 1, sequence, 1.0, _with(make_report(rng, (), sequence, names), wait_s=rng.random(), kv_used=rng.random()))
        for i, names in enumerate(held)
    ]


def _with(report: LoadReport, **changes: Any) -> LoadReport:
    """The report with other figures of the engine."""
    return report.replace(engine=report.engine.replace(**changes))


def bare_us(datagrams: list[bytes]) -> float:
    """Microseconds of a bare `recvfrom_into`, for each datagram."""
    best = float("inf")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        ear.bind(("127.0.0.1", 0))
        ear.settimeout(5.0)
        address, receive, buffer = ear.getsockname(), ear.recvfrom_into, bytearray(65536)
        for start in range(0, len(datagrams), BATCH):
            part = datagrams[start : start + BATCH]
            for datagram in part:
                mouth.sendto(datagram, address)
            began = perf_counter()
            for _ in part:
                receive(buffer)
            best = min(best, (perf_counter() - began) / len(part))
    return best * 1e6


def decode_us(datagrams: list[bytes], before: list[bytes] | None = None) -> float:
    """Microseconds of `decode` per datagram, accepted or not. `before`, the last reports of the same workers, is decoded first each time and not timed."""
    views = [memoryview(bytearray(datagram)) for datagram in datagrams]
    codec = FrameCodec(RING)
    best = float("inf")
    for _ in range(REPEATS):
        for datagram in before or ():
            codec.decode(datagram)
        for start in range(0, len(views), BATCH):
            part = views[start : start + BATCH]
            began = perf_counter()
            for view in part:
                with suppress(Rejected):
                    codec.decode(view)
            best = min(best, (perf_counter() - began) / len(part))
    return best * 1e6


def encode_us(envelopes: list[AnyEnvelope]) -> float:
    encode = FrameCodec(RING).encode
    best = float("inf")
    for _ in range(REPEATS):
        began = perf_counter()
        for envelope in envelopes:
            encode(envelope)
        best = min(best, (perf_counter() - began) / len(envelopes))
    return best * 1e6


def look_alike(rng: Random, opcodes: bytes, *, signed: bool, message: type[Message] = LoadReport) -> bytes:
    """A datagram of the largest size, whose body repeats `opcodes` in a frame of the right length."""
    header = HEADER.pack(MAGIC, VERSION, message.CODE, 1, 8, 1, rng.getrandbits(60), 1.0) + b"worker-7"
    room = DATAGRAM_MAX_BYTES - len(header) - TAG_BYTES - 12
    rest = (opcodes * (room // len(opcodes))) + b"."
    data = header + b"\x80\x05\x95" + struct.pack("<Q", len(rest)) + rest
    return data + (RING.tag(1, data) if signed else rng.randbytes(TAG_BYTES))


def hostile(rng: Random) -> dict[str, list[bytes]]:
    """Forged datagrams, by their defect."""
    sorts: dict[str, list[bytes]] = {
        "noise, 200 B": [rng.randbytes(200) for _ in range(HOSTILE_COUNT)],
        "noise, 8 KiB": [rng.randbytes(DATAGRAM_MAX_BYTES) for _ in range(HOSTILE_COUNT)],
        "no key: a wrong tag, 8 KiB": [look_alike(rng, b"K\x01", signed=False) for _ in range(HOSTILE_COUNT)],
    }
    bodies = {
        "empty strings": b"\x8c\x00", "long strings": b"\x8c\xff" + b"x" * 255, "numbers": b"K\x01", "floats": b"G" + bytes(8), "marks": b"(",
        "nesting": b")\x85", "strings and pairs": b"\x8c\x01aG?\xf0" + bytes(6) + b"\x86", "Hangul": b"\x8c\x03\xed\x95\x9c", "memo": b"\x94",
    }  # fmt: skip
    for name, opcodes in bodies.items():
        sorts[f"with the key: {name}, 8 KiB"] = [look_alike(rng, opcodes, signed=True) for _ in range(HOSTILE_COUNT)]
    return sorts


def main() -> int:
    rng = Random(6)
    names = Catalog.demo(50).names
    held = [tuple(sorted(rng.sample(names, HELD))) for _ in range(COUNT)]
    envelopes = reports(held, 2, rng)
    codec = FrameCodec(RING)
    before = [codec.encode(envelope) for envelope in reports(held, 1, rng)]
    datagrams = [codec.encode(envelope) for envelope in envelopes]
    requests = [
        codec.encode(Envelope("client-1", 1, i, 1.0, message))
        for i in range(COUNT // 2)
        for message in (
            ScheduleRequest(f"r{i}", "llama-3.1-8b", 1000 + i, 200, 1, 0.0, ()),
            InferenceRequest(f"r{i}", "llama-3.1-8b", 1000 + i, 200, Dispatch(1, i), "worker-7"),
        )
    ]
    gc.freeze()
    for datagram in (datagrams[0], requests[0], requests[1]):
        codec.decode(datagram)  # the expressions are made on first use
    bare = bare_us(datagrams)
    print(f"bare recvfrom_into {bare:.2f} us; a report has {sum(map(len, datagrams)) / COUNT:.0f} bytes")
    show("decode a report that says something new / bare recvfrom_into", decode_us(datagrams, before) / bare, RATIO, 6.0, compiled=4.0)
    show("decode a report that says the same again / bare recvfrom_into", decode_us(datagrams) / bare, RATIO, 2.0)
    show("decode a request / bare recvfrom_into", decode_us(requests) / bare, RATIO, 4.0)
    show("encode a report / bare recvfrom_into", encode_us(envelopes) / bare, RATIO, 6.0, compiled=4.0)
    for name, sort in hostile(rng).items():
        bound = 2.0 if name.startswith("noise") else 15.0 if name.startswith("no key") else 150.0
        show(f"decode {name} / bare recvfrom_into", decode_us(sort) / bare, RATIO, bound)
    return status()


if __name__ == "__main__":
    sys.exit(main())
