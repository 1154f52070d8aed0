"""100,000 workers report once a second to one coordinator over UDP: is anything lost, and how long does a report wait?

A process of its own plays the workers: it sends their reports, evenly spread over each second, from one socket. The coordinator is the real
one on the real driver. A tenth of the reports have new figures; the rest say the same again, as those of workers at rest do. Baseline: the seconds of the run;
the coordinator keeps up if it needs less than one second of CPU time for each.
Usage: python3 bench/hundred_thousand.py [--workers 100000] [--seconds 10]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench._fleet import CATALOG_MODELS, HELD_MODELS, make_report, show, status
from config import Config
from coordinator import Coordinator
from sllm.deploy.keys import ephemeral_keyring
from sllm.live.clock import Clock
from sllm.live.garbage import GarbageTamer
from sllm.live.udp import UdpDriver
from sllm.models.catalogue import Catalog
from sllm.placement.registry import make_policy
from sllm.protocol.messages import Envelope
from sllm.wire.frame import FrameCodec
from sllm.wire.keys import Keyring

CHANGING = 0.1  # of the reports
START_S = 10  # seconds over which the workers start
SLICE_S = 0.002  # seconds of reports that are sent in one go
SIGNING_S = 6e-6  # seconds to sign a report, roughly
RECEIVE_BUFFER_BYTES = 8 << 20
BUFFER_BYTES = 1 << 16


def play_workers(told: Connection, workers: int, seconds: int, keyring: Keyring) -> None:
    """Report for each worker once a second; prints the number of reports sent, and the delay of the last one. All reports are signed, with the times at which
    they will be sent, before the first is sent: signing costs as much as hearing, and both processes share this machine."""
    codec = FrameCodec(keyring)
    names = Catalog.demo(CATALOG_MODELS).names
    rng = Random(2)
    reports = [make_report(rng, names, 1, tuple(sorted(rng.sample(names, HELD_MODELS)))) for _ in range(workers)]
    born_ns = [time.time_ns() - rng.randrange(10**9) for _ in range(workers)]
    began_wall_s = time.time() + workers * (START_S + seconds) * SIGNING_S
    rounds = []
    for second in range(START_S + seconds):
        present = [number for number in range(workers) if number % START_S <= second]  # a START_S-th of them comes with each second
        for number in present if second >= START_S else ():
            if rng.random() < CHANGING:
                reports[number] = make_report(rng, names, second, reports[number].engine.gpu_models)
        wall_s = began_wall_s + second
        rounds.append([codec.encode(Envelope(f"worker-{n}", born_ns[n], second - n % START_S + 1, wall_s, reports[n])) for n in present])
    gc.collect()
    gc.freeze()
    told.send("ready")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(told.recv())
        send = sock.send
        began = time.monotonic()
        for second, datagrams in enumerate(rounds):
            done, count = 0, len(datagrams)
            while done < count:
                due = min(count, int((time.monotonic() - began - second) * count) + 1)
                for datagram in datagrams[done:due]:
                    send(datagram)
                done = max(done, due)
                time.sleep(SLICE_S)
        late_s = time.monotonic() - began - len(rounds)
    told.send((sum(map(len, rounds)), late_s))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=10)
    arguments = parser.parse_args()
    keyring = ephemeral_keyring()
    clock = Clock()
    node = Coordinator(
        Config(hardware="h100-80g"), Catalog.demo(CATALOG_MODELS), make_policy("startup_time"), Random(1), time.time_ns(),
        codec=FrameCodec(keyring), wall_offset_s=clock.wall_offset_s, now=clock.now,
    )  # fmt: skip
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=play_workers, args=(theirs, arguments.workers, arguments.seconds, keyring), daemon=True)
    process.start()
    tamer = GarbageTamer()  # as in the entry point
    with UdpDriver(clock) as driver:
        host = driver.add(node, ("127.0.0.1", 0), count_drops=True, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
        driver.every(1.0, lambda: tamer.tick(driver.received))
        ours.recv()
        ours.send(host.address)
        while len(node.fleet) < arguments.workers and process.is_alive():
            driver.step()
        began, began_cpu = time.monotonic(), time.process_time()
        while not ours.poll():
            driver.step()
        took_s, cpu_s = time.monotonic() - began, time.process_time() - began_cpu
        sent, late_s = ours.recv()
        until = time.monotonic() + 1.0
        while node.reports_accepted < sent and time.monotonic() < until:
            driver.step(0.01)
    process.join()
    states = {state: count for state, count in node.fleet.states.items() if count}
    print(f"  {sent:,} reports sent, {node.reports_accepted:,} accepted, {host.kernel_drops:,} dropped by the kernel; refused: {dict(node.rejected)}")
    print(f"  receive buffer {host.receive_buffer_bytes >> 20} MiB; the sender was {max(0.0, late_s):.2f} s late at its end; states {states}")
    show("reports lost", sent - node.reports_accepted, "reports", 0.0)
    show("CPU time of the coordinator for each second", cpu_s / took_s, "s", 1.0)
    return status()


if __name__ == "__main__":
    sys.exit(main())
