"""Names: looked up beside the loop, with a bound on what peers name, and the coordinator's first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from sllm.live import resolve
from sllm.live.clock import Clock
from sllm.live.resolve import Resolver, look_up
from sllm.live.udp import UdpDriver


class Names:
    """A system whose look-ups wait until they are let go on."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.known = {"central-coordinator": "10.0.0.5"}

    def __call__(self, name: str) -> str | None:
        self.asked.append(name)
        self.begun.release()
        assert self.go_on.wait(60)
        return self.known.get(name)


@pytest.fixture
def driver() -> Iterator[UdpDriver]:
    with UdpDriver(Clock()) as driver:
        yield driver


def test_the_coordinator_does_not_wait_for_names_that_peers_made_up(driver: UdpDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "WAITING_MAX", 50)
    names = Names()
    resolver = Resolver(driver, names)
    answers: dict[str, str | None] = {}
    for number in range(1000):
        resolver.resolve(f"worker-{number}.invalid", lambda answer, number=number: answers.update({f"worker-{number}": answer}))  # type: ignore[misc]
    assert names.begun.acquire(timeout=60)
    assert len(resolver._waiting) == 50
    assert len(answers) == 950, "those beyond the bound are told at once"
    found: list[str] = []
    ask = resolver.follow("central-coordinator", found.append)
    ask()
    names.go_on.set()
    driver.run_until(lambda: bool(found))
    assert found == ["10.0.0.5"]
    assert names.asked.index("central-coordinator") == 1, "right after the one that was under way"
    driver.run_until(lambda: len(answers) == 1000)
    assert set(answers.values()) == {None}
    resolver.close()


def test_a_thread_that_cannot_be_started_is_a_name_without_an_address(driver: UdpDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names()
    names.go_on.set()
    resolver = Resolver(driver, names)
    real = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    answers: list[str | None] = []
    resolver.resolve("central-coordinator", answers.append)
    assert answers == [None]
    monkeypatch.setattr(threading.Thread, "start", real)
    resolver.resolve("central-coordinator", answers.append)
    driver.run_until(lambda: len(answers) == 2)
    assert answers == [None, "10.0.0.5"]
    resolver.close()


@pytest.mark.parametrize("name", ["a\0b", "::1%a\0b", "\ud800", "x" * 300, "..", "a" * 64 + ".invalid"])
def test_what_is_no_name_has_no_address(name: str) -> None:
    assert look_up(name) is None


def test_who_asks_again_and_again_for_a_name_without_an_address_asks_no_more_often(driver: UdpDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker does that hears no coordinator: each of its questions would go on for good beside the others."""
    known: dict[str, str] = {}
    later: list[Callable[[], None]] = []
    found: list[str] = []
    resolver = Resolver(driver)
    monkeypatch.setattr(resolver, "resolve", lambda name, answer, rank: answer(known.get(name)))
    monkeypatch.setattr(driver, "call_at", lambda at, callback: later.append(callback))
    ask = resolver.follow("central-coordinator", found.append)
    for _ in range(5):
        ask()
        assert len(later) == 1
    later.pop()()
    assert len(later) == 1
    known["central-coordinator"] = "10.0.0.5"
    later.pop()()
    ask()
    assert found == ["10.0.0.5", "10.0.0.5"]
    assert later == []
    resolver.close()
