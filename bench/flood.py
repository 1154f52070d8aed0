"""A coordinator under a flood: how many of its own workers' reports still reach its table.

    python3 bench/flood.py                                    20 s each of garbage, look-alikes and replays
    python3 bench/flood.py --against TREE --runs 5            the same by turns with the code in another folder, and the medians side by side

A coordinator process on a core of its own serves 20 honest workers, reporting once a second, and an honest client, all over loopback. A flooder on another
core sends as fast as that core can: noise; datagrams that look like ours (right magic, version and key id, and a wrong tag; cut ones; other keys, versions
and types); or datagrams that the workers and the client sent a few seconds before. Budgets: nobody is declared dead and every request completes, and
against another tree the median share of honest reports applied is at least that of the other.

Every part runs as a process of the tree that it belongs to, so that trees whose wire formats differ can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("garbage", "look-alikes", "replays")
WORKERS = 20
RATE_PER_S = 4.0  # of the honest client's requests
PREPARED = 4096  # different datagrams of a flood, sent round and round
RECORD_S = 4.0  # seconds of the fleet's own datagrams, recorded before the flood for replays; all are still fresh at the end of the flood
PATIENCE_S = 60.0


class Outcome(NamedTuple):
    """One flood. Shares are parts of 1."""

    sent_per_s: float  # datagrams of the flood
    cpu_us: float  # CPU time of the coordinator per datagram taken from its socket, which does not depend on other work of the machine
    honest: int  # reports that the workers sent during the flood
    applied: float  # share of the honest reports that the coordinator applied
    suspected: int  # times that a living worker became SUSPECT
    dead: int  # times that a living worker became DEAD
    requests: int
    completed: int


# --- the parts: each runs in a process of its own, on the code of the tree that it was told --------------------------------------------


def _key_of(folder: Path) -> Any:
    from config import Config
    from sllm.deploy.keys import load_keyring

    return load_keyring(Config.from_env({"DEPLOYMENT_MODE": "local", "CLUSTER_KEY_FILE": str(folder / "cluster.key")}))


def make_key(folder: Path) -> None:
    from sllm.deploy.keys import create_key_file

    create_key_file(folder / "cluster.key")


def serve_fleet(folder: Path, port: int) -> None:
    """The workers, in one process; a line on stdin is answered with the number of reports sent so far. The first datagrams are kept for a replay."""
    from config import Config
    from sllm.live.clock import Clock
    from sllm.live.udp import UdpDriver
    from sllm.run.assemble import build_catalog, build_engine
    from sllm.wire.frame import FrameCodec
    from worker import Worker

    said: list[bytes] = []

    class Recording(FrameCodec):
        def encode(self, envelope: Any) -> bytes:
            data = super().encode(envelope)
            if len(said) < PREPARED:
                said.append(data)
            return data

    config, ring, clock = Config.from_env({"DEPLOYMENT_MODE": "local"}), _key_of(folder), Clock()
    catalog, workers = build_catalog(config), []
    with UdpDriver(clock) as driver:
        for number in range(WORKERS):
            worker = Worker(
                config, catalog, build_engine(config, catalog, random.Random(number)), ("127.0.0.1", port), random.Random(number), time.time_ns(),
                node_id=f"worker-{number}", codec=Recording(ring), wall_offset_s=clock.wall_offset_s, now=clock.now,
            )  # fmt: skip
            workers.append(worker)
            driver.add(worker, ("127.0.0.1", 0))

        def answer() -> None:
            command = sys.stdin.readline().strip()
            if not command:
                driver.stop()
            if command == "record":
                (folder / "said").write_bytes(b"".join(len(data).to_bytes(4, "big") + data for data in said))
            print(sum(worker.reports_sent for worker in workers), flush=True)

        driver.add_reader(0, answer)
        driver.run()


def prepare(kind: str, folder: Path) -> list[bytes]:
    """The datagrams of a flood."""
    from sllm.wire.frame import MAGIC

    rng = random.Random(kind)
    if kind == "garbage":
        return [rng.randbytes(rng.choice((1, 20, 64, 200, 600, 1400))) for _ in range(PREPARED)]
    packed, real = (folder / "said").read_bytes(), []
    while packed:
        size = int.from_bytes(packed[:4], "big")
        real.append(packed[4 : 4 + size])
        packed = packed[4 + size :]
    if kind == "replays":
        return [rng.choice(real) for _ in range(PREPARED)]
    flood = []
    for number in range(PREPARED):
        data = bytearray(rng.choice(real))
        match number % 8:
            case 0:  # cut
                data = data[: rng.randrange(len(MAGIC), len(data))]
            case 1:  # another version, type or key
                data[rng.choice((4, 5, 6))] ^= 1 << rng.randrange(8)
            case 2:  # a longer name than there is room for
                data[7] = 255
            case 3:  # signed with another key
                data[-16:] = rng.randbytes(16)
            case 4:  # another body
                data[40:-16] = rng.randbytes(max(0, len(data) - 56))
            case _:  # damaged anywhere
                data[rng.randrange(8, len(data))] ^= 1 << rng.randrange(8)
        flood.append(bytes(data))
    return flood


def send_flood(kind: str, folder: Path, port: int, duration_s: float) -> None:
    """Send until the time is over, and print the number of datagrams sent."""
    flood, sent = prepare(kind, folder), 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mouth:
        mouth.connect(("127.0.0.1", port))
        send, until = mouth.send, time.perf_counter() + duration_s
        while time.perf_counter() < until:
            for data in flood:
                send(data)
            sent += len(flood)
    print(sent, flush=True)


# --- the conductor -----------------------------------------------------------------------------------------------------------------------


def _wait_for(what: str, found: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE_S
    while not (result := found()):
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.05)
    return result


class Stage:
    """The processes of one flood, on one tree."""

    def __init__(self, tree: Path, folder: Path, stack: ExitStack) -> None:
        self._tree, self._folder, self._stack = tree, folder, stack
        cores = sorted(os.sched_getaffinity(0))
        self._own, self._other = ({cores[0]}, {cores[1]}) if len(cores) > 1 else (set(cores), set(cores))
        self._part("key", self._other).wait(PATIENCE_S)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._http = probe.getsockname()[1]
        self._coordinator = self._start(
            [str(tree / "entrypoint_coordinator.py")], self._own, "coordinator", COORDINATOR_PORT="0", HEALTH_PORT=str(self._http)
        )  # fmt: skip
        self.port = _wait_for("the coordinator is up", self._port)
        self.fleet = self._part("fleet", self._other, str(self.port))
        _wait_for("every worker is READY", lambda: self.state()["summary"]["states"].get("READY") == WORKERS)

    def _start(self, command: Sequence[str], cores: set[int], log: str, **settings: str) -> subprocess.Popen[str]:
        environ = {
            "PATH": os.environ["PATH"], "HOME": str(self._folder), "DEPLOYMENT_MODE": "local", "LOG_FORMAT": "json", "PYTHONPATH": str(self._tree),
            "PYTHONDONTWRITEBYTECODE": "1", "CLUSTER_KEY_FILE": str(self._folder / "cluster.key"), **settings,
        }  # fmt: skip
        with (self._folder / f"{log}.log").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, *command], env=environ, cwd=self._folder, stdin=subprocess.PIPE,
                stdout=errors if log in ("coordinator", "client") else subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        os.sched_setaffinity(process.pid, cores)
        self._stack.callback(_stop, process)
        return process

    def _part(self, what: str, cores: set[int], *more: str) -> subprocess.Popen[str]:
        return self._start([str(Path(__file__).resolve()), "--tree", str(self._tree), "--part", what, str(self._folder), *more], cores, what)

    def lines(self, log: str) -> list[dict[str, Any]]:
        text = (self._folder / f"{log}.log").read_text(encoding="utf-8", errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def _port(self) -> int:
        return next((int(line["udp"].rpartition(":")[2]) for line in self.lines("coordinator") if line["message"].endswith(" is up")), 0)

    def state(self) -> dict[str, Any]:
        """The coordinator's answer over HTTP; tries for some time, because the coordinator may be busy."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/state", timeout=5.0) as response:
                    found: dict[str, Any] = json.load(response)
                    return found
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def count(self, command: str = "count") -> int:
        """Reports that the workers have sent."""
        assert self.fleet.stdin is not None
        assert self.fleet.stdout is not None
        self.fleet.stdin.write(command + "\n")
        self.fleet.stdin.flush()
        return int(self.fleet.stdout.readline())

    def flood(self, kind: str, duration_s: float) -> Outcome:
        """One flood from its beginning to the last answer of the honest client."""
        client = self._start(
            [str(self._tree / "entrypoint_client.py")], self._other, "client",
            COORDINATOR_PORT=str(self.port), DURATION=f"{RECORD_S + duration_s:g}", RATE=f"{RATE_PER_S:g}", MODELS="4", HEALTH_PORT="0",
        )  # fmt: skip
        time.sleep(RECORD_S)
        before, state, cpu_s = self.count("record"), self.state(), self._cpu_s()
        flooder = self._part("flooder", self._other, str(self.port), kind, f"{duration_s:g}")
        sent = int(flooder.communicate(timeout=duration_s + PATIENCE_S)[0])
        honest, after = self.count() - before, self.state()
        cpu_s = self._cpu_s() - cpu_s
        applied = after["reports"]["accepted"] - state["reports"]["accepted"]
        dropped = after["datagrams"]["kernel_drops"] - state["datagrams"]["kernel_drops"]
        client.wait(PATIENCE_S)
        figures = next(line for line in reversed(self.lines("client")) if line.get("event") == "Results")
        changes = [line["new"] for line in self.lines("coordinator") if line.get("event") == "WorkerStateChanged"]
        return Outcome(
            sent / duration_s, 1e6 * cpu_s / max(1, sent + honest - dropped), honest, applied / max(1, honest), changes.count("SUSPECT"),
            changes.count("DEAD"), figures["sent"], figures["completed"],
        )  # fmt: skip

    def _cpu_s(self) -> float:
        """Processor time of the coordinator so far."""
        fields = Path(f"/proc/{self._coordinator.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()


def run(tree: Path, kind: str, duration_s: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="flood-") as folder, ExitStack() as stack:
        return Stage(tree, Path(folder), stack).flood(kind, duration_s)


def show(name: str, kind: str, outcome: Outcome) -> None:
    print(
        f"{name:<8} {kind:<12} {outcome.sent_per_s:>9,.0f}/s sent   {outcome.cpu_us:>5.2f} us each   "
        f"{100 * outcome.applied:>5.1f} % of {outcome.honest} reports applied   "
        f"SUSPECT {outcome.suspected}  DEAD {outcome.dead}   requests {outcome.completed} of {outcome.requests}",
        flush=True,
    )  # fmt: skip


def compare(kind: str, trees: dict[str, Path], runs: int, duration_s: float) -> bool:
    """`runs` floods of one kind on each tree, by turns."""
    outcomes: dict[str, list[Outcome]] = {name: [] for name in trees}
    for number in range(runs):
        for name in list(trees)[:: 1 if number % 2 else -1]:
            outcome = run(trees[name], kind, duration_s)
            outcomes[name].append(outcome)
            show(name, kind, outcome)
    costs = {name: median(outcome.cpu_us for outcome in found) for name, found in outcomes.items()}
    shares = {name: median(outcome.applied for outcome in found) for name, found in outcomes.items()}
    ours = outcomes["ours"]
    unhurt = all(outcome.dead == 0 and outcome.completed == outcome.requests for outcome in ours)
    kept = unhurt and all(shares["ours"] >= share for share in shares.values())
    medians = ", ".join(f"{name} {100 * share:.1f} % ({costs[name]:.2f} us)" for name, share in shares.items())
    print(f"{kind}: medians {medians}  {'ok' if kept else 'OVER'}", flush=True)
    return kept


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=20.0, help="seconds of each flood")
    parser.add_argument("--runs", type=int, default=1, help="floods of each kind on each tree")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--against", type=Path, help="another tree to compare with")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the tree to measure")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.part:
        sys.path[0] = str(options.tree)  # in place of bench/
        what, folder, *more = options.part
        if what == "key":
            make_key(Path(folder))
        elif what == "fleet":
            serve_fleet(Path(folder), int(more[0]))
        else:
            send_flood(more[1], Path(folder), int(more[0]), float(more[2]))
        return 0
    trees = {"ours": options.tree.resolve(), **({"other": options.against.resolve()} if options.against else {})}
    kept = [compare(kind, trees, options.runs, options.duration) for kind in options.kinds]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
