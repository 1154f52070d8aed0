"""Log lines: what events become, that JSON lines parse whatever is in them, that nothing floods or breaks out of its line."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import typing

import pytest

from sllm import events
from sllm.events import CoordinatorReady, RequestFailed, RequestSent, WorkerStateChanged
from sllm.node import Node
from sllm.runtime import logs

RFC_3339 = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
NODE = Node("n", 1)


@pytest.fixture
def stream():
    stream = io.StringIO()
    yield stream
    logging.getLogger(logs.LOGGER).handlers.clear()


def every_event() -> list[events.Event]:
    """One of each kind, with values of the right type."""
    made = []
    for kind in typing.get_args(events.Event):
        hints = typing.get_type_hints(kind)
        made.append(kind(**{name: {float: 1.5, int: 2, str: "x y"}[hints[name]] for name in kind._fields}))
    return made


def test_every_event_has_a_line() -> None:
    assert set(logs.LINES) == set(typing.get_args(events.Event))


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
    class Surprise(typing.NamedTuple):
        at: float
        what: str

    assert logs.describe(Surprise(0.0, "x")) == (logging.INFO, "Surprise", {"what": "x"})  # type: ignore[arg-type]


def test_requests_are_told_at_debug_only(stream: io.StringIO) -> None:
    log = logs.EventLog(logs.setup("info", "json", stream))
    log(NODE, RequestSent(0.0, "r1", "m"))
    assert stream.getvalue() == ""
    log(NODE, CoordinatorReady(0.0, 3))
    assert json.loads(stream.getvalue())["workers"] == 3


def test_a_flood_of_one_kind_is_held_back_and_summed_up(stream: io.StringIO) -> None:
    now = [0.0]
    log = logs.EventLog(logs.setup("info", "json", stream), lambda: now[0])
    for i in range(5000):
        log(NODE, WorkerStateChanged(0.0, f"worker-{i}", 1, "", "READY", "reported"))
    log(NODE, CoordinatorReady(0.0, 5000))  # another kind is not held back
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines].count("WorkerStateChanged") == logs.BURST
    assert lines[-1]["event"] == "CoordinatorReady"
    log.flush()
    log.flush()
    last = [json.loads(line) for line in stream.getvalue().splitlines()][logs.BURST + 1 :]
    assert [line["held"] for line in last] == [5000 - logs.BURST]
    now[0] = 1.0
    for i in range(100):
        log(NODE, WorkerStateChanged(0.0, f"worker-{i}", 1, "", "READY", "reported"))
    assert len(stream.getvalue().splitlines()) == logs.BURST + 2 + int(logs.REFILL_PER_S)


@pytest.mark.parametrize("nasty", ["two\nlines", "\u2028", 'quote " and = sign', "\x1b[31mred", "\x00", "ünïcödé", "\ud800"])
def test_what_a_peer_says_stays_in_its_line(nasty: str, stream: io.StringIO) -> None:
    event = RequestFailed(0.0, nasty, "m", 0.0, nasty)
    logs.EventLog(logs.setup("info", "text", stream))(NODE, event)
    text = stream.getvalue()
    assert len(text.splitlines()) == 1
    text.encode()  # can be written
    assert "\x1b" not in text
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
