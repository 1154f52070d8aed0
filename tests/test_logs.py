"""Log lines: what events become, that JSON lines parse whatever is in them, that nothing floods or breaks out of its line."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sllm.observe import logs
from sllm.protocol import events
from sllm.protocol.events import CoordinatorReady, RequestFailed, RequestSent, WorkerStateChanged
from sllm.protocol.node import Node

EVENTS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event]
RFC_3339 = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
NODE = Node("n", 1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stream() -> Iterator[Any]:
    stream = io.StringIO()
    yield stream
    logging.getLogger(logs.LOGGER).handlers.clear()


def every_event() -> list[events.Event]:
    """One of each kind, with values of the right type."""
    made = []
    for kind in EVENTS:
        hints = typing.get_type_hints(kind.__init__)
        made.append(kind(**{name: {float: 1.5, int: 2, str: "x y"}[hints[name]] for name in kind.FIELDS}))
    return made


def test_every_event_has_a_line() -> None:
    assert set(logs.LINES) == set(EVENTS)


@pytest.mark.parametrize("event", every_event(), ids=lambda event: type(event).__name__)
def test_every_event_can_be_told_in_both_formats(event: events.Event, stream: io.StringIO) -> None:
    level, message, fields = logs.describe(event)
    assert message
    assert "at" not in fields
    for form in ("json", "text"):
        stream.truncate(0)
        stream.seek(0)
        logs.EventLog(logs.setup("debug", form, stream))(NODE, event)
        (line,) = stream.getvalue().splitlines()
        if form == "json":
            told = json.loads(line)
            assert RFC_3339.match(told["time"])
            assert told["level"] == logging.getLevelName(level).lower()
            assert told["message"] == message
            assert told["event"] == type(event).__name__
            for name, value in fields.items():
                assert told[name] == value
        else:
            assert message in line


def test_an_unknown_event_is_told_by_its_name() -> None:
    class Surprise(events.Event):
        FIELDS = ("at", "what")
        __slots__ = FIELDS

        def __init__(self, at: float, what: str) -> None:
            self.at = at
            self.what = what

    assert logs.describe(Surprise(0.0, "x")) == (logging.INFO, "Surprise", {"what": "x"})


def test_requests_are_told_at_debug_only(stream: io.StringIO) -> None:
    log = logs.EventLog(logs.setup("info", "json", stream))
    log(NODE, RequestSent(0.0, "r1", "m"))
    assert stream.getvalue() == ""
    log(NODE, CoordinatorReady(0.0, 3))
    assert json.loads(stream.getvalue())["workers"] == 3


@pytest.mark.parametrize(("level", "burst", "per_s"), [("info", logs.BURST, logs.REFILL_PER_S), ("debug", logs.DEBUG_BURST, logs.DEBUG_REFILL_PER_S)])
def test_a_flood_of_one_kind_is_held_back_and_summed_up(stream: io.StringIO, level: str, burst: int, per_s: float) -> None:
    now = [0.0]
    log = logs.EventLog(logs.setup(level, "json", stream, lambda: now[0]))
    flood = RequestSent(0.0, "r", "m") if level == "debug" else WorkerStateChanged(0.0, "w", 1, "", "READY", "reported")
    for _ in range(5000):
        log(NODE, flood)
    log(NODE, CoordinatorReady(0.0, 5000))  # another kind is not held back
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines].count(type(flood).__name__) == burst
    assert lines[-1]["event"] == "CoordinatorReady"
    logs.flush()
    logs.flush()
    (last,) = [json.loads(line) for line in stream.getvalue().splitlines()][burst + 1 :]
    assert (last["suppressed"], last["level"], last["event"]) == (5000 - burst, level, type(flood).__name__)
    assert last["message"] == f"{5000 - burst} more lines suppressed: {type(flood).__name__}"
    now[0] = 1.0
    for _ in range(1000):
        log(NODE, flood)
    assert len(stream.getvalue().splitlines()) == burst + 2 + int(per_s)


def test_every_place_that_logs_has_a_limit(stream: io.StringIO) -> None:
    log = logs.setup("debug", "text", stream)
    for number in range(3 * logs.DEBUG_BURST):
        log.debug("http: %s", number)
        log.warning("a name: %s", number)
    lines = stream.getvalue().splitlines()
    assert sum("http: " in line for line in lines) <= logs.DEBUG_BURST + 500
    assert sum("a name: " in line for line in lines) <= logs.BURST + 50
    logs.flush()
    told = stream.getvalue().splitlines()[len(lines) :]
    assert len(told) == 2
    assert all("more lines suppressed: " in line for line in told)


@pytest.mark.parametrize(
    "nasty",
    ["two\nlines", "\u2028", 'quote " and = sign', "\x1b[31mred", "\x00", "ünïcödé", "\ud800", "gpj.\u202efdp", "\u200b",
     "\u2066", "\ufeff", "\x9b1m"],
)  # fmt: skip
def test_what_a_peer_says_stays_in_its_line(nasty: str, stream: io.StringIO) -> None:
    event = RequestFailed(0.0, nasty, "m", 0.0, nasty)
    logs.EventLog(logs.setup("info", "text", stream))(NODE, event)
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    text.encode()  # can be written
    assert text.rstrip("\n").isprintable()
    stream.truncate(0)
    stream.seek(0)
    logs.EventLog(logs.setup("info", "json", stream))(NODE, event)
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["request_id"] == nasty
    line.encode()  # can be written


def test_values_that_json_cannot_say(stream: io.StringIO) -> None:
    logger = logs.setup("info", "json", stream)
    fields = {"nan": math.nan, "inf": -math.inf, "bytes": b"x", "deep": {"a": (1, {2})}, "level": "mine", "none": None}
    logger.info("hello %s", "you", extra={"fields": fields})
    told = json.loads(stream.getvalue())
    assert told["message"] == "hello you"
    assert told["level"] == "info"
    assert told["level_"] == "mine"
    assert (told["nan"], told["inf"], told["deep"], told["none"]) == ("nan", "-inf", {"a": [1, [2]]}, None)


def test_an_exception_brings_its_type_and_stack(stream: io.StringIO) -> None:
    for form in ("json", "text"):
        stream.truncate(0)
        stream.seek(0)
        logger = logs.setup("info", form, stream)
        try:
            raise KeyError("gone")
        except KeyError:
            logger.exception("it broke")
        if form == "json":
            (line,) = stream.getvalue().splitlines()
            told = json.loads(line)
            assert told["error"] == "KeyError"
            assert "Traceback" in told["stack"]
            assert told["level"] == "error"
        else:
            assert "it broke\nTraceback" in stream.getvalue()


def test_a_reader_that_went_away_is_survived(capsys: pytest.CaptureFixture[str]) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    logger = logs.setup("info", "json", Closed())
    logger.info("nobody hears this")
    logging.getLogger(logs.LOGGER).handlers.clear()
    assert capsys.readouterr().err == ""


def test_setting_up_twice_prints_once(stream: io.StringIO) -> None:
    logs.setup("info", "text", stream)
    logs.setup("info", "text", stream).info("once")
    assert len(stream.getvalue().splitlines()) == 1


def test_a_stack_shows_nothing_that_is_not_printable(stream: io.StringIO) -> None:
    logger = logs.setup("info", "text", stream)
    try:
        raise ValueError("a\u202eb\x1b[31m")
    except ValueError:
        logger.exception("it broke")
    assert all(line.isprintable() for line in stream.getvalue().split("\n"))
    assert "a\\u202eb\\x1b[31m" in stream.getvalue()


def test_nobody_waits_for_a_reader_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads: logging goes on at once, what does not fit is counted, and told when somebody reads."""
    monkeypatch.setattr(logs, "FLUSH_S", 0.05)
    monkeypatch.setattr(logs, "BURST", 10**9)
    monkeypatch.setattr(logs, "BUFFER_BYTES", 200_000)
    reading, writing = os.pipe()
    with open(writing, "w") as stream, open(reading, "rb", buffering=0) as reader:
        logger = logs.setup("info", "json", stream)
        count = 0
        while logs.dropped() < 100:  # returns at once: a blocking write would never come back
            count += 1
            logger.info("line %d", count)
        logs.finish(0.05)
        (handler,) = logger.handlers
        assert isinstance(handler, logs.Output)
        told: list[int] = []
        dropped: list[int] = []
        rest = b""
        while len(told) + sum(dropped) < count:
            *whole, rest = (rest + reader.read(1 << 16)).split(b"\n")
            for line in map(json.loads, whole):
                told += [int(line["message"].removeprefix("line "))] if "dropped" not in line else []
                dropped += [line["dropped"]] if "dropped" in line else []
        assert line["message"] == f"{dropped[-1]} log lines were dropped: nobody read them in time"
        assert sum(dropped) == logs.dropped()
        assert told == sorted(set(told))
        logger.removeHandler(handler)
        handler.close()


def test_a_process_ends_though_nobody_reads_its_log(tmp_path: Path) -> None:
    code = """
import sys
from sllm.observe import logs
logs.BURST = 10**9
logs.FLUSH_S = 0.05
log = logs.setup()
for number in range(5000):
    log.info("line %d, and some more to fill the pipe", number)
sys.exit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.wait(60) == 7
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_everything_is_written_at_the_end() -> None:
    code = "from sllm.observe import logs; logs.BURST = 10**9; log = logs.setup()\nfor n in range(5000): log.info('line %d', n)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.rpartition(" ")[2] for line in done.stdout.splitlines()] == [str(n) for n in range(5000)]


def test_large_numbers_are_written_out(stream: io.StringIO) -> None:
    logs.setup("info", "text", stream).info("configuration", extra={"fields": {"RATE": 1e9, "DURATION": 1234567.5, "SHARE": 0.1 + 0.2}})
    assert stream.getvalue().endswith("configuration RATE=1000000000 DURATION=1234567.5 SHARE=0.3\n")
