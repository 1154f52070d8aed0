"""One placement over UDP: a signed question to a coordinator in a process of its own, and its answer, against a bare UDP echo.

Baseline: a process that sends back what it receives, in the same run. Both are asked one question after the other; signing the questions and reading
the answers is the client's part and is not timed.
"""

from __future__ import annotations

import multiprocessing
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import RATIO, ask, make_coordinator, show, status
from sllm.deploy.keys import ephemeral_keyring
from sllm.live.clock import Clock
from sllm.live.udp import UdpDriver
from sllm.protocol.messages import Envelope, ScheduleResponse
from sllm.wire.frame import FrameCodec
from sllm.wire.keys import Keyring
from sllm.workload.popularity import Zipf

WORKERS = 1000
QUESTIONS = 3000
LOOPBACK = ("127.0.0.1", 0)


def echo(ready: Connection) -> None:
    """Send every datagram back, until no more arrive."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(LOOPBACK)
        sock.settimeout(5.0)
        ready.send(sock.getsockname())
        buffer = memoryview(bytearray(65536))
        try:
            while True:
                size, peer = sock.recvfrom_into(buffer)
                sock.sendto(buffer[:size], peer)
        except TimeoutError:
            return


def coordinate(ready: Connection, keyring: Keyring) -> None:
    """A coordinator with a full table. The workers send no further reports, so the coordinator must be asked within three report intervals."""
    node, _ = make_coordinator(WORKERS)
    node.codec = FrameCodec(keyring)
    clock = Clock()
    node.wall_offset_s = clock.wall_offset_s
    with UdpDriver(clock) as driver:
        host = driver.add(node, LOOPBACK, count_drops=True)
        ready.send(host.address)
        driver.run_until(ready.poll)


def round_trips_us(address: tuple[str, int], questions: list[bytes], check: Callable[[bytes], None]) -> float:
    """Microseconds from a question to its answer, median."""
    took = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5.0)
        sock.connect(address)
        for question in questions:
            began = time.perf_counter()
            sock.send(question)
            answer = sock.recv(65536)
            took.append((time.perf_counter() - began) * 1e6)
            check(answer)
    return median(took)


def main() -> int:
    keyring = ephemeral_keyring()
    codec = FrameCodec(keyring)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=echo, args=(theirs,), daemon=True)
    process.start()
    bare_us = round_trips_us(ours.recv(), [b"x" * 300] * QUESTIONS, lambda answer: None)

    twin, _ = make_coordinator(1)  # only for its catalogue
    rng, popularity = Random(3), Zipf(twin.catalog.names, 1.1)
    coordinator_us = []
    for _ in range(3):
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.Process(target=coordinate, args=(theirs, keyring), daemon=True)
        server.start()
        address = ours.recv()
        now = time.time()
        questions = [
            codec.encode(Envelope("client", 1, number, now, ask(twin, number, popularity.draw(rng)).message)) for number in range(1, QUESTIONS // 3 + 1)
        ]  # fmt: skip

        def check(answer: bytes) -> None:
            message = codec.decode(answer).message
            assert isinstance(message, ScheduleResponse), message

        coordinator_us.append(round_trips_us(address, questions, check))
        ours.send("enough")
        server.join()
    show("one placement over UDP / a UDP echo, round trips, medians", median(coordinator_us) / bare_us, RATIO, 5.0, compiled=4.0)
    print(f"  echo {bare_us:.0f} us, placement {median(coordinator_us):.0f} us")
    return status()


if __name__ == "__main__":
    sys.exit(main())
