#!/usr/bin/env python3
"""The live drill: a fleet of real processes, flooded by a holder of its key with every message that keeps the rules, and an honest client beside it.

    python3 experiments/hostile.py --duration 600             the flood speaks under ids of its own; the client must complete 99 % meanwhile
    python3 experiments/hostile.py --duration 20 --stolen     it speaks under the fleet's own ids; the fleet must be whole again within two timeouts

No process may end or count an internal error. All processes use loopback and free ports. Exit status: 0 the fleet held, 1 it did not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the project's modules are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from sllm.observe.report.standard import end_at_signals

    end_at_signals()

from experiments.harness import ROOT, configuration
from sllm.deploy.keys import create_key_file, load_keyring
from sllm.live.clock import Clock
from sllm.live.udp import UdpDriver
from sllm.observe.report.standard import run_script
from sllm.protocol.messages import Address, LoadReport, Message
from sllm.run.assemble import build_catalog
from sllm.virtual.hostile import Babbler, Mouth
from sllm.wire.frame import FrameCodec

WORKERS = tuple(f"worker-{i}" for i in range(1, 4))
STRANGERS = tuple(f"stranger-{i}" for i in range(1, 9))
TIMEOUT_S = 10.0  # WORKER_TIMEOUT's default
PATIENCE_S = 60.0  # longest wait for something that should come much sooner
LATELY_S = 3.0  # three report intervals
COMPLETED_PART = 0.99
CLIENT_MAX_S = 400.0  # more than REQUEST_TIMEOUT's default: the honest client has given up all requests by then
POLL_S = 0.05


class Outcome(NamedTuple):
    """The outcome of a drill. `problems` is empty if the fleet held."""

    said: int  # messages of the flood
    client: dict[str, Any]  # the honest client's figures
    whole_after_s: float  # from the end of the flood until every worker was READY again; 0: not looked at
    problems: list[str]


class Process:
    """An entry point and its log, one JSON object a line."""

    def __init__(self, role: str, folder: Path, name: str, **settings: str) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        environ = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "DEPLOYMENT_MODE": "local", "LOG_FORMAT": "json", "LOG_LEVEL": "info",
            "CLUSTER_KEY_FILE": str(folder / "cluster.key"), **settings,
        }  # fmt: skip
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(ROOT / f"entrypoint_{role}.py")], env=environ, cwd=folder, stdout=log, stderr=subprocess.STDOUT
            )

    def lines(self) -> list[dict[str, Any]]:
        """Its log; what is no JSON object, as the traceback of a process that ended, is left out."""
        found = []
        for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("{") and line.endswith("}"):
                found.append(json.loads(line))
        return found

    def address(self) -> Address:
        """The address of the process, as soon as it is up."""

        def up() -> Address | None:
            for line in self.lines():
                if line["message"].endswith(" is up"):
                    host, _, port = line["udp"].rpartition(":")
                    return host, int(port)
            return None

        found: Address = wait_for(f"{self.name} is up", up)
        return found

    def figures(self) -> dict[str, Any]:
        """The last line of a load generator."""
        return next((line for line in reversed(self.lines()) if line.get("event") == "Results"), {})

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        if not self.ended:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()


def wait_for(what: str, found: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """The first true value that `found` returns. TimeoutError names the thing waited for."""
    until = time.monotonic() + within_s
    while not (result := found()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {within_s:.12g} s")
        time.sleep(POLL_S)
    return result


def free_tcp_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Fleet:
    """A coordinator and three workers, each a process."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        create_key_file(folder / "cluster.key")
        self._folder, self._stack = folder, stack
        self._http = f"http://127.0.0.1:{(http_port := free_tcp_port())}"
        self.coordinator = self.start("coordinator", "coordinator", COORDINATOR_PORT="0", HEALTH_PORT=str(http_port))
        self.port = str(self.coordinator.address()[1])
        self.workers = [self.start("worker", name, WORKER_ID=name, WORKER_PORT="0", COORDINATOR_PORT=self.port) for name in WORKERS]
        self._at = {worker.name: worker.address() for worker in self.workers}
        wait_for("three workers are READY", self.is_whole)

    def start(self, role: str, name: str, **settings: str) -> Process:
        process = Process(role, self._folder, name, **settings)
        self._stack.callback(process.stop)
        return process

    def client(self, name: str, duration_s: float, rate_per_s: float) -> Process:
        return self.start("client", name, COORDINATOR_PORT=self.port, DURATION=f"{duration_s:.12g}", RATE=f"{rate_per_s:.12g}", MODELS="4")

    def get(self, path: str) -> str:
        """What the coordinator answers over HTTP; "" while it does not."""
        try:
            with urllib.request.urlopen(f"{self._http}{path}", timeout=5.0) as response:
                text: str = response.read().decode()
                return text
        except OSError:
            return ""

    def is_whole(self) -> bool:
        """Every worker of ours is READY, where it is, and has reported lately: a row of its name may be somebody else's."""
        text = self.get("/state?q=worker-&limit=1000")
        rows = json.loads(text)["workers"] if text else []
        ready = {row["worker_id"]: (row["host"], row["port"]) for row in rows if row["state"] == "READY" and row["age_s"] < LATELY_S}
        return ready.items() >= self._at.items()

    def problems(self) -> Iterator[str]:
        """The processes that ended, and those that counted internal errors."""
        for process in (self.coordinator, *self.workers):
            if process.ended:
                yield f"{process.name} ended with status {process.process.returncode}"
            for line in process.lines():
                if line.get("event") == "InternalErrorCaught":
                    yield f"{process.name}: {line['message']}\n{line['trace']}"


class Hurried(Babbler):
    """Babbles, and says in every load report that the next one comes in a second. A life that states a long interval stands for three such intervals after
    its last report, up to three minutes: whoever steals an id has the name that long (docs/wire.md), and a drill need not wait for it."""

    def message(self, kind: type[Message] | None = None) -> Message:
        message = super().message(kind)
        return message.replace(interval_s=1.0) if isinstance(message, LoadReport) else message


@contextmanager
def flood(fleet: Fleet, targets: list[Address], senders: Sequence[str], per_s: float, seed: int) -> Iterator[tuple[Mouth, UdpDriver]]:
    """A mouth on a driver of its own; the caller runs the driver."""
    config = configuration(cluster_key_file=str(fleet._folder / "cluster.key"))
    clock = Clock()
    known = {
        "model": build_catalog(config).names, "worker_id": WORKERS, "exclude": WORKERS, "hardware": ["h100-80g", "a5000-24g"],
        "host": ["127.0.0.1", "::1"], "port": [port for _, port in targets], "prompt_tokens": [0, 1, 1000], "max_tokens": [1, 200],
        "request_id": [f"r{i}" for i in range(100)],
    }  # fmt: skip
    mouth = Mouth(
        Hurried(Random(seed), known), targets, senders, per_s=per_s, codec=FrameCodec(load_keyring(config)), wall_offset_s=clock.wall_offset_s
    )  # fmt: skip
    with UdpDriver(clock) as driver:
        driver.add(mouth)
        yield mouth, driver


def drill(duration_s: float, *, stolen: bool, per_s: float = 300.0, rate_per_s: float = 4.0, seed: int = 1) -> Outcome:
    """One drill."""
    whole_after_s = 0.0
    with tempfile.TemporaryDirectory(prefix="hostile-") as name, ExitStack() as stack:
        fleet = Fleet(Path(name), stack)
        client = fleet.client("client", duration_s, rate_per_s)
        processes = (fleet.coordinator, *fleet.workers, client)
        targets = [process.address() for process in processes]
        senders = (*WORKERS, "coordinator", "client") if stolen else STRANGERS
        with flood(fleet, targets, senders, per_s, seed) as (mouth, driver):
            until = time.monotonic() + duration_s
            driver.run_until(lambda: time.monotonic() > until)
        problems = []
        if stolen:
            ended_at = time.monotonic()
            try:
                wait_for("three workers are READY again", fleet.is_whole, 2.0 * TIMEOUT_S)
            except TimeoutError as error:
                problems.append(str(error))
            whole_after_s = time.monotonic() - ended_at
            client.stop()
            client = fleet.client("client-after", 5.0, rate_per_s)
        try:
            client.process.wait(duration_s + CLIENT_MAX_S)
        except subprocess.TimeoutExpired:
            problems.append("the honest client never came to an end")
        figures = client.figures()
        least = 1.0 if stolen else COMPLETED_PART
        if not figures.get("sent") or figures["completed"] < least * figures["sent"]:
            problems.append(f"the honest client completed {figures.get('completed', 0)} of {figures.get('sent', 0)}")
        problems += fleet.problems()
        return Outcome(mouth.said, figures, whole_after_s, problems)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Floods a live fleet with every message that keeps the rules, signed with its key.")
    parser.add_argument("--duration", type=float, default=20.0, help="seconds of the flood [20]")
    parser.add_argument("--stolen", action="store_true", help="speak under the ids of the fleet's own processes")
    parser.add_argument("--per-s", type=float, default=300.0, help="messages a second [300]")
    parser.add_argument("--seed", type=int, default=1, help="seed of what is said [1]")
    arguments = parser.parse_args(argv)
    if arguments.duration <= 0.0 or arguments.per_s <= 0.0:
        parser.error("--duration and --per-s must be above 0")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the fleet must not outlive this process
    outcome = drill(arguments.duration, stolen=arguments.stolen, per_s=arguments.per_s, seed=arguments.seed)
    client = {key: outcome.client.get(key) for key in ("sent", "completed", "failed", "rejected", "ttft_p50_s", "ttft_p99_s")}
    print(f"{outcome.said} messages said; the honest client: {client}; whole again after {outcome.whole_after_s:.1f} s")
    for problem in outcome.problems:
        print(problem)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    run_script(main)
