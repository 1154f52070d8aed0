"""What every engine does, whether it knows its future or hears of it from outside; and a worker over an engine that cannot say when anything will happen."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from math import inf
from random import Random
from typing import Any

import pytest
from roles import CATALOG, MODEL, Talk, configuration

from sllm.deploy.keys import ephemeral_keyring
from sllm.engine import ENGINES, EngineUsage, Evicted, Finished, FirstTokenOut, Loaded, Notification, Started
from sllm.engine.base import nobody_to_wake
from sllm.live.clock import Clock
from sllm.live.udp import UdpDriver
from sllm.models.model import DISK
from sllm.protocol.events import ModelLoaded, RequestServed
from sllm.protocol.messages import (
    CANCELLED,
    COMPLETED,
    READY,
    STARTING,
    CancelRequest,
    Dispatch,
    EngineSnapshot,
    FirstToken,
    InferenceRequest,
    InferenceResponse,
    LoadReport,
)
from sllm.protocol.node import Node
from sllm.run.assemble import build_engine
from sllm.wire.frame import FrameCodec
from worker import Worker

OTHER = CATALOG.names[1]
CONTRACT = ("submit", "cancel", "load", "unload", "advance", "next_at", "wake", "snapshot", "usage", "slots", "memory_bytes", "waiting")


class HandDriven:
    """An engine that stands for a server of its own: what happens there is said from outside, by `say`, and the engine cannot know when that will be."""

    def __init__(self) -> None:
        self.wake: Callable[[], None] = nobody_to_wake
        self.next_at = inf
        self.slots = 4
        self.memory_bytes = 0
        self.gpu: set[str] = set()
        self.loading: dict[str, None] = {}
        self.requests: dict[str, tuple[str, int]] = {}  # model and tokens of each request here
        self.running: set[str] = set()
        self.busy_s = 0.0
        self._notes: list[Notification] = []

    # --- what a worker calls ---

    def submit(self, now: float, request_id: str, model: str, prompt_tokens: int, output_tokens: int) -> None:
        if prompt_tokens < 0 or output_tokens < 1:
            raise ValueError(request_id)
        self.load(now, model)
        self.requests[request_id] = model, output_tokens

    def cancel(self, now: float, request_id: str) -> bool:
        self.running.discard(request_id)
        self._notes = [note for note in self._notes if getattr(note, "request_id", None) != request_id]
        return self.requests.pop(request_id, None) is not None

    def load(self, now: float, model: str) -> None:
        if CATALOG[model].name not in self.gpu:
            self.loading[model] = None

    def unload(self, now: float, model: str) -> bool:
        if model not in self.gpu or any(model == used for used, _ in self.requests.values()):
            return False
        self.gpu.discard(model)
        self._notes.append(Evicted(now, model, DISK))
        return True

    def advance(self, now: float) -> list[Notification]:
        notes, self._notes, self.next_at = self._notes, [], inf
        return notes

    @property
    def waiting(self) -> int:
        return len(self.requests) - len(self.running)

    def snapshot(self, now: float) -> EngineSnapshot:
        gpu, loading = tuple(sorted(self.gpu)), tuple((model, 1.0) for model in self.loading)
        return EngineSnapshot(
            slots=self.slots, running=len(self.running), waiting=self.waiting, blocked=0, wait_s=0.0, load_queue_s=0.0, kv_used=0.0, kv_bytes=0, round_s=0.0,
            left_s=0.0, gpu_free_bytes=0, gpu_models=gpu, busy_models=(), loading=loading, host_models=(), disk_models=(), disk_complete=True,
        )  # fmt: skip

    def usage(self, now: float) -> EngineUsage:
        return EngineUsage(self.busy_s, self.busy_s)

    # --- what the server says ---

    def say(self, note: Notification) -> None:
        """It happened at `note.at`, which may be some time ago."""
        if isinstance(note, Loaded):
            del self.loading[note.model]
            self.gpu.add(note.model)
        elif isinstance(note, Started):
            self.running.add(note.request_id)
        elif isinstance(note, Finished):
            self.running.remove(note.request_id)
            del self.requests[note.request_id]
        self._notes.append(note)
        self.next_at = min(self.next_at, note.at)
        self.wake()

    def work(self, now: float) -> None:
        """Finish everything."""
        for model in list(self.loading):
            self.say(Loaded(now, model, DISK, 1.0))
        for request_id, (_, tokens) in list(self.requests.items()):
            if request_id not in self.running:
                self.say(Started(now, request_id))
            self.say(FirstTokenOut(now, request_id))
            self.say(Finished(now, request_id, tokens))


# --- every engine -------------------------------------------------------------------------------------------------------------------


def engines() -> Iterator[Any]:
    for name in ENGINES:
        yield pytest.param(lambda name=name: build_engine(configuration(engine=name), CATALOG, Random(1)), id=name)
    yield pytest.param(lambda: build_engine(configuration(engine="queue", service_load_s=1.0), CATALOG, Random(1)), id="queue that loads")
    yield pytest.param(HandDriven, id="driven by hand")


every_engine = pytest.mark.parametrize("make", list(engines()))


def take(engine: Any, now: float) -> list[Any]:
    """What happened up to `now`; a server that stands apart does all its work at that time."""
    if isinstance(engine, HandDriven):
        engine.work(now)
    notes: list[Any] = engine.advance(now)
    assert engine.next_at > now, "there is nothing left to tell"
    return notes


@every_engine
def test_an_engine_has_all_that_the_contract_names(make: Callable[[], Any]) -> None:
    engine = make()
    assert [name for name in CONTRACT if not hasattr(engine, name)] == []


@every_engine
def test_a_request_is_told_of_from_start_to_end(make: Callable[[], Any]) -> None:
    engine = make()
    engine.submit(0.0, "r", MODEL, 100, 20)
    assert engine.snapshot(0.0).running + engine.snapshot(0.0).waiting == 1
    notes = [note for note in take(engine, 1000.0) if not isinstance(note, Loaded)]
    assert [type(note) for note in notes] == [Started, FirstTokenOut, Finished]
    assert {note.request_id for note in notes} == {"r"}
    assert notes[2].output_tokens == 20
    assert 0.0 <= notes[0].at <= notes[1].at <= notes[2].at <= 1000.0
    assert (engine.snapshot(1000.0).running, engine.waiting) == (0, 0)
    assert MODEL in engine.snapshot(1000.0).gpu_models


@every_engine
@pytest.mark.parametrize("loaded", [False, True])
def test_a_cancelled_request_is_never_heard_of_again(make: Callable[[], Any], loaded: bool) -> None:
    engine = make()
    if loaded:
        engine.load(0.0, MODEL)
        take(engine, 1000.0)
    for name in ("given up", "kept"):
        engine.submit(1000.0, name, MODEL, 100, 20)
    engine.advance(1000.0)
    assert engine.cancel(1000.0, "given up")
    assert not engine.cancel(1000.0, "given up")
    told = [note for note in take(engine, 2000.0) if not isinstance(note, Loaded)]
    assert {note.request_id for note in told} == {"kept"}
    assert isinstance(told[-1], Finished)
    assert not engine.cancel(2000.0, "kept"), "it is done"


@every_engine
def test_a_model_is_loaded_once_and_unloaded_once(make: Callable[[], Any]) -> None:
    engine = make()
    for _ in range(2):
        engine.load(0.0, OTHER)
    told = [note.model for note in take(engine, 1000.0) if isinstance(note, Loaded)]
    assert OTHER in engine.snapshot(1000.0).gpu_models
    assert told in ([OTHER], [])
    assert engine.unload(1001.0, OTHER) == bool(told), "an engine that never loads has all models for good"
    assert [note.model for note in engine.advance(1001.0) if isinstance(note, Evicted)] == told
    assert (OTHER in engine.snapshot(1001.0).gpu_models) is not bool(told)
    assert not told or not engine.unload(1002.0, OTHER)


@every_engine
def test_a_request_that_makes_no_sense_is_not_taken(make: Callable[[], Any]) -> None:
    engine = make()
    for prompt, output in ((-1, 5), (5, 0)):
        with pytest.raises(ValueError, match="r"):
            engine.submit(0.0, "r", MODEL, prompt, output)
    assert engine.waiting == 0
    assert not take(engine, 1000.0)


@every_engine
def test_to_ask_for_the_usage_changes_nothing(make: Callable[[], Any]) -> None:
    engine = make()
    engine.submit(0.0, "r", MODEL, 100, 20)
    engine.advance(0.0)
    before = engine.next_at
    assert engine.usage(500.0) == engine.usage(500.0)
    assert engine.next_at == before
    assert take(engine, 1000.0)
    assert 0.0 <= engine.usage(1000.0).busy_s <= 1000.0


# --- a worker over an engine that cannot know ---------------------------------------------------------------------------------------


class At:
    """A worker over a hand-driven engine, and the time of the driver that the engine wakes."""

    def __init__(self, **changes: Any) -> None:
        self.now = 0.0
        self.engine = HandDriven()
        self.node = Worker(configuration(**changes), CATALOG, self.engine, ("coordinator", 9000), Random(1), 1, node_id="w")
        self.talk = Talk(self.node)
        self.engine.wake = lambda: self.node.handle_timer(self.now)

    def to(self, now: float) -> None:
        self.talk.run_to(now)
        self.now = now


def request(request_id: str = "r", number: int = 1) -> InferenceRequest:
    return InferenceRequest(request_id, MODEL, 1000, 20, Dispatch(7, number), "w")


def test_a_worker_tells_what_its_engine_could_not_foresee_as_soon_as_it_is_woken() -> None:
    at = At()
    at.to(1.0)
    at.talk.say("c", request(), 1.0)
    assert at.node.wake_at < inf, "for its report"
    at.to(31.0)
    at.engine.say(Loaded(30.5, MODEL, DISK, 29.5))
    at.engine.say(Started(30.5, "c/r"))
    assert [event.load_s for event in at.talk.told(ModelLoaded)] == [29.5]
    assert at.talk.heard(FirstToken) == []
    at.now = 31.25
    at.engine.say(FirstTokenOut(31.25, "c/r"))
    assert at.talk.heard(FirstToken) == [FirstToken("r", 29.5)]
    at.to(40.0)
    at.engine.say(Finished(39.0, "c/r", 17))
    (response,) = at.talk.heard(InferenceResponse)
    assert (response.outcome, response.output_tokens) == (COMPLETED, 17), "fewer than the request may have"
    assert (response.queue_wait_s, response.first_token_s, response.total_s, response.load_s) == (29.5, 30.25, 38.0, 29.5)
    assert [event.at for event in at.talk.told(RequestServed)] == [39.0]


def test_a_worker_that_nobody_wakes_tells_it_when_it_looks_next() -> None:
    at = At()
    at.engine.wake = nobody_to_wake
    at.to(1.0)
    at.talk.say("c", request(), 1.0)
    at.to(5.0)
    for note in (Loaded(5.0, MODEL, DISK, 4.0), Started(5.0, "c/r"), FirstTokenOut(5.0, "c/r"), Finished(5.0, "c/r", 20)):
        at.engine.say(note)
    assert at.talk.heard(InferenceResponse) == []
    at.talk.run_to(at.node.wake_at)
    assert [response.total_s for response in at.talk.heard(InferenceResponse)] == [4.0]


def test_first_models_and_cancelled_requests_of_such_an_engine() -> None:
    at = At(demo_models=1)
    at.to(2.0)
    assert at.node.state == STARTING
    at.talk.heard(LoadReport)
    at.engine.say(Loaded(2.0, MODEL, DISK, 2.0))
    assert [report.state for report in at.talk.heard(LoadReport)] == [READY], "a change of state is reported at once"
    at.talk.say("c", request(), 3.0)
    at.now = 3.5
    at.engine.say(Started(3.5, "c/r"))
    at.talk.say("c", CancelRequest("r"), 4.0)
    assert [response.outcome for response in at.talk.heard(InferenceResponse)] == [CANCELLED]
    assert at.engine.requests == {}
    at.node.drain(5.0)
    assert at.node.drained
    at.talk.told(object)
    at.engine.say(Evicted(6.0, MODEL, DISK))  # it is over for the worker; a server that is being stopped may still say something
    assert at.talk.told(object) == []


class Listener(Node):
    """Hears the answers of a worker."""

    def __init__(self, **options: Any) -> None:
        super().__init__("c", 1, **options)
        self.answers: list[Any] = []
        self.handlers = {FirstToken: self.note, InferenceResponse: self.note}

    def note(self, envelope: Any, addr: Any, now: float) -> None:
        self.answers.append(envelope.message)


def test_such_an_engine_live_behind_a_descriptor_that_the_loop_watches() -> None:
    """As a server process would be: its output can be read, the loop calls the engine, and the engine wakes the worker."""
    clock, keyring = Clock(), ephemeral_keyring()
    engine = HandDriven()
    ours, theirs = socket.socketpair()
    with UdpDriver(clock) as driver, ours, theirs:
        options: dict[str, Any] = {"codec": FrameCodec(keyring), "wall_offset_s": clock.wall_offset_s}
        client = Listener(**options)
        client_host = driver.add(client)
        node = Worker(configuration(report_interval_s=60.0), CATALOG, engine, ("127.0.0.1", 9), Random(1), 1, node_id="w", **options)
        host = driver.add(node)

        def heard() -> None:
            os.read(ours.fileno(), 100)
            engine.work(clock.now)

        engine.wake = host.wake
        driver.add_reader(ours.fileno(), heard)
        client.send(request(), host.address, clock.now)
        client_host.touch()
        for _ in range(200):
            if engine.requests and not client.answers:
                theirs.send(b"done")
            if client.answers and isinstance(client.answers[-1], InferenceResponse):
                break
            driver.step(0.05)
        assert [type(answer) for answer in client.answers] == [FirstToken, InferenceResponse]
        assert client.answers[1].outcome == COMPLETED
        driver.remove_reader(ours.fileno())
