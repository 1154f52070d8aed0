"""What is likely wrong is said once and then ever more seldom, and what is remembered has a bound."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from wire_samples import envelope

from sllm.deploy.keys import ephemeral_keyring
from sllm.observe import causes, logs
from sllm.observe.causes import REFUSALS, RefusalLog, SilenceLog
from sllm.protocol.events import CoordinatorSilent
from sllm.protocol.messages import Progress
from sllm.protocol.node import Node
from sllm.wire.frame import FrameCodec, reasons
from sllm.wire.keys import Keyring

ADDRESS = ("10.0.0.5", 9000)


class Lines:
    """What was logged."""

    def __init__(self) -> None:
        self._stream = io.StringIO()
        self.log = logs.setup("debug", "json", self._stream)

    def __call__(self, level: str = "warning") -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self._stream.getvalue().splitlines()) if line["level"] == level]


@pytest.fixture
def lines() -> Iterator[Lines]:
    yield Lines()
    logging.getLogger(logs.LOGGER).handlers.clear()


def test_a_silence_is_told_at_growing_intervals(lines: Lines) -> None:
    """An hour of it, with an event every ten seconds, as a worker gives them: each tells the time since the last."""
    silence = SilenceLog(lines.log, "central-coordinator")
    for number in range(1, 361):
        silence.tell(CoordinatorSilent(1000.0 + 10.0 * number, "w", 10.0), ADDRESS, False)
    told = [line["silent_s"] for line in lines()]
    assert told == pytest.approx([10, 20, 40, 80, 160, 320, 640, 1240, 1840, 2440, 3040])
    assert len(lines("debug")) == 360 - len(told)
    assert lines()[2]["message"].startswith("the coordinator central-coordinator (10.0.0.5:9000) has never answered for 40 s: is COORDINATOR_HOST right, ")


def test_another_silence_is_told_from_its_beginning(lines: Lines) -> None:
    silence = SilenceLog(lines.log, "10.0.0.5")
    for at in (10.0, 20.0, 30.0, 40.0):
        silence.tell(CoordinatorSilent(at, "w", 10.0), ADDRESS, True)
    silence.tell(CoordinatorSilent(61.0, "w", 10.0), ADDRESS, True)  # it answered at 51
    assert [line["silent_s"] for line in lines()] == [10.0, 20.0, 40.0, 10.0]
    assert lines()[-1]["message"].startswith("the coordinator 10.0.0.5:9000 has not answered for 10 s: ")


def test_a_silence_that_is_told_in_full_grows_too(lines: Lines) -> None:
    """A role may as well tell how long it has lasted in all."""
    silence = SilenceLog(lines.log, "c")
    for at in range(10, 101, 10):
        silence.tell(CoordinatorSilent(float(at), "w", float(at)), ADDRESS, True)
    assert [line["silent_s"] for line in lines()] == [10.0, 20.0, 40.0, 80.0]


def test_each_source_is_told_once_for_each_reason(lines: Lines) -> None:
    refusals = RefusalLog(lines.log, 0.0)
    for port in range(100):
        for reason in ("tag", "key_id", "replayed", "schema"):
            refusals(reason, ("10.0.0.1", port))
            refusals(reason, ("10.0.0.2", port))
    told = [(line["source"], line["reason"]) for line in lines()]
    assert sorted(told) == [("10.0.0.1", "key_id"), ("10.0.0.1", "tag"), ("10.0.0.2", "key_id"), ("10.0.0.2", "tag")]
    for line in lines():
        assert line["message"] == f"datagrams from {line['source']} are refused: {REFUSALS[line['reason']]}"
    refusals.forget(causes.REMEMBER_S - 1.0)
    refusals("tag", ("10.0.0.1", 1))
    assert len(lines()) == 4
    refusals.forget(causes.REMEMBER_S)
    refusals("tag", ("10.0.0.1", 1))
    assert len(lines()) == 5


def test_sources_have_a_bound_and_that_is_said(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "SOURCES_MAX", 10)
    refusals = RefusalLog(lines.log, 0.0)
    for number in range(1000):
        refusals("tag", (f"10.0.{number // 250}.{number % 250}", 1))
    assert len(refusals._told) == 11
    assert len(lines()) == 11
    assert lines()[-1]["message"] == "datagrams of more than 10 addresses are refused: no more of them are named"


def other_version(data: bytes) -> bytes:
    return data[:4] + bytes((data[4] + 1,)) + data[5:]


@pytest.mark.parametrize(
    ("speaker", "spoil", "reason"),
    [
        (Keyring(1, {1: b"another key of thirty-two bytes."}), bytes, "tag"), (Keyring(2, {2: b"another key of thirty-two bytes."}), bytes, "key_id"),
        (None, other_version, "version"), (None, lambda data: b"GET " + data[4:], "magic"), (None, bytes, "stale_time"),
    ],
    ids=["tag", "key_id", "version", "magic", "stale_time"],
)  # fmt: skip
def test_a_node_tells_whom_it_refuses_and_why(speaker: Keyring | None, spoil: Callable[[bytes], bytes], reason: str) -> None:
    ring = ephemeral_keyring()
    node = Node("n", 1, codec=FrameCodec(ring))
    node.handlers = {Progress: lambda *_: None}
    told: list[tuple[str, tuple[str, int]]] = []
    node.on_refused = lambda why, source: told.append((why, source))
    datagram = FrameCodec(speaker or ring).encode(envelope(Progress(1.0, 1)))
    node.receive_datagram(spoil(datagram), ("10.0.0.9", 1), 0.0)
    assert told == [(reason, ("10.0.0.9", 1))]
    assert reason in REFUSALS
    assert node.rejected == {reason: 1}


def test_every_reason_that_is_explained_exists() -> None:
    assert set(REFUSALS) <= {*reasons(), "stale_time"}
