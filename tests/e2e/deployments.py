"""What the end-to-end tests share: commands, waiting for conditions, a load generator's log, and the same run on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.25
REPORT_INTERVAL_S = 1.0
PLACED_AGAIN_S = 5.0 + 1.0  # after a worker's death, at the default timeouts; and a second for a machine that is busy
# One workload for all three places. Its rate is given, so that nothing depends on the size of the fleet; its two models are the small ones that every
# worker loads by itself, and its seed one without very long answers (a thousand tokens take half a minute), so that a run takes seconds.
WORKLOAD = {"SEED": "853", "RATE": "5", "DURATION": "5", "WORKERS": "3", "MODELS": "2", "DEMO_MODELS": "2", "LOG_FORMAT": "json", "LOG_LEVEL": "debug"}
LOAD = {"SEED": "699", "RATE": "6", "DURATION": "10", "MODELS": "2", "LOG_FORMAT": "json", "LOG_LEVEL": "info"}  # 65 requests, under 20 s

STEADY = {**LOAD, "RATE": "3", "DURATION": "240", "DRAIN_TIMEOUT": "120"}  # goes on until it is told to stop, then waits for what is in flight
STOP = ("python3", "-c", "import os; os.kill(1, 15)")  # to be run in its container
# A new cluster key, step by step: what the key command is told, and the keys that every process must have taken over before the next step.
ROTATION = (
    ("--add", {"signs": 1, "accepted": [1, 2]}), ("--rotate", {"signs": 2, "accepted": [1, 2]}), ("--drop 1", {"signs": 2, "accepted": [2]}),
)  # fmt: skip

T = TypeVar("T")


def run(*command: str, env: Mapping[str, str] | None = None, timeout_s: float = 180.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the project's root; its output is in the failure's message."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    if check:
        assert done.returncode == 0, f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def works(*command: str) -> bool:
    """The command exists and succeeds."""
    return shutil.which(command[0]) is not None and run(*command, check=False).returncode == 0


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """The first true value of `probe`; what it raises counts as not yet."""
    deadline, last = time.monotonic() + timeout_s, "never true"
    while time.monotonic() < deadline:
        try:
            value = probe()
        except (OSError, ValueError, KeyError, AssertionError, StopIteration) as error:
            value, last = None, f"{type(error).__name__}: {error}"
        if value:
            return value
        time.sleep(POLL_S)
    raise AssertionError(f"waited {timeout_s:g} s for {what}: {last}")


def json_lines(text: str) -> list[dict[str, Any]]:
    """Every line as a log line; anything that is none fails."""
    lines = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            raise AssertionError(f"not JSON: {line!r}") from None
        assert isinstance(entry, dict), line
        assert {"time", "level", "message"} <= entry.keys(), line
        lines.append(entry)
    return lines


def when(line: dict[str, Any]) -> float:
    """The time of a log line, in seconds since 1970."""
    return datetime.fromisoformat(line["time"]).timestamp()


def keys_taken_over(log: str) -> dict[str, Any] | None:
    """The keys that a process last said it had taken over."""
    return next((line["keys"] for line in reversed(json_lines(log)) if "keys" in line), None)


def has_keys(read_log: Callable[[], str], keys: dict[str, Any]) -> bool:
    """Whether a process has taken these keys over, by its log."""
    return keys_taken_over(read_log()) == keys


class Served(NamedTuple):
    """What identifies a completed request, wherever it ran."""

    model: str
    prompt_tokens: int
    output_tokens: int


class Outcome(NamedTuple):
    """What a load generator said at its end."""

    results: dict[str, Any]
    completed: dict[str, Served]  # by request id; only at level debug
    lines: list[dict[str, Any]]

    @classmethod
    def of(cls, text: str) -> Outcome:
        lines = json_lines(text)
        results = [line for line in lines if line.get("event") == "Results"]
        assert len(results) == 1, text[-3000:]
        done = [line for line in lines if line.get("event") == "RequestCompleted"]
        completed = {line["request_id"]: Served(line["model"], line["prompt_tokens"], line["output_tokens"]) for line in done}
        assert len(completed) == len(done), "a request was completed twice"
        return cls(results[0], completed, lines)

    def assert_placed_again_soon(self, worker_id: str, killed_at: float) -> None:
        """What the worker had when it was killed (seconds since 1970), or was given afterwards, was taken elsewhere soon."""
        waits = [when(line) - killed_at for line in self.lines if line.get("event") == "RequestRetried" and line["worker_id"] == worker_id]
        assert waits, "its requests went elsewhere"
        assert max(waits) <= PLACED_AGAIN_S, waits

    def assert_nothing_lost(self) -> None:
        """Every request was sent, and completed exactly once."""
        seen = self.results
        assert seen["sent"] > 0
        assert (seen["completed"], seen["failed"], seen["rejected"], seen["in_flight"]) == (seen["sent"], 0, 0, 0), seen


class Fleet(NamedTuple):
    """A coordinator's `/state`, at a glance."""

    state: dict[str, Any]

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["worker_id"]: worker for worker in self.state["workers"]}

    @property
    def ready(self) -> set[str]:
        return {name for name, worker in self.workers.items() if worker["state"] == "READY"}


@contextlib.contextmanager
def local_process(script: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """An entry point on this machine; ended by SIGTERM if it still runs."""
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    with subprocess.Popen(
        [sys.executable, "-u", str(ROOT / script)], env={**clean, **env}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=60)


def local_run(folder: Path) -> Outcome:
    """The workload on this machine: a coordinator, three workers and a load generator, each a process of its own."""
    key = folder / "cluster.key"
    run(sys.executable, "-m", "sllm.deploy.keys", str(key))
    common = {**WORKLOAD, "DEPLOYMENT_MODE": "local", "CLUSTER_KEY_FILE": str(key)}
    with contextlib.ExitStack() as stack:
        coordinator = stack.enter_context(local_process("entrypoint_coordinator.py", {**common, "COORDINATOR_PORT": "0"}))
        assert coordinator.stdout is not None
        up = next(line for line in map(json.loads, coordinator.stdout) if "udp" in line)
        common["COORDINATOR_PORT"] = up["udp"].rpartition(":")[2]
        for number in range(3):
            env = {**common, "LOG_LEVEL": "info", "WORKER_PORT": "0", "WORKER_ID": f"worker-{number}"}
            worker = stack.enter_context(local_process("entrypoint_worker.py", env))
            assert worker.stdout is not None
            next(line for line in worker.stdout if "ModelLoaded" in line)  # as far as the log: it is up, its first model is there
        client = stack.enter_context(local_process("entrypoint_client.py", common))
        text, _ = client.communicate(timeout=120)
        assert client.returncode == 0, text[-3000:]
        # The coordinator's log is only read up to here: a pipe holds more than the few hundred lines that follow.
    return Outcome.of(text)
