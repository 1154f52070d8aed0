"""Questions from other threads to the event loop, because only the loop's thread may touch the state of roles."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

Answer = Callable[[Any], None]
Work = Callable[[Answer], None]  # runs in the loop and calls its argument with the answer, at once or some rounds later; the answer must be immutable


class Loop(Protocol):
    """An event loop that calls back when a descriptor can be read."""

    def add_reader(self, descriptor: int, callback: Callable[[], None]) -> Any: ...
    def remove_reader(self, descriptor: int) -> Any: ...


class LoopSilent(Exception):
    """The loop did not answer in time: it is stalled or has ended."""


class _Question:
    """A question of a thread. `completed` is set once there is an answer or an error."""

    __slots__ = ("abandoned", "answer", "completed", "error", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.answer: Any = None
        self.error: Exception | None = None
        self.completed = threading.Event()
        self.abandoned = False  # no thread waits for the answer any more

    def complete(self, answer: Any = None, error: Exception | None = None) -> None:
        self.answer, self.error = answer, error
        self.completed.set()


class Bridge:
    """Lets HTTP threads ask the loop. The loop's thread makes and closes the bridge."""

    def __init__(self, driver: Loop) -> None:
        self._driver = driver
        self._questions: deque[_Question] = deque()
        self._asked: set[_Question] = set()  # questions that wait for an answer, at most one for each asking thread
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._open = True
        driver.add_reader(self._wake_out.fileno(), self._answer)

    def ask(self, work: Work, timeout_s: float = 2.0) -> Any:
        """The answer of `work`. Blocks the calling thread, never the loop. LoopSilent if no answer comes within `timeout_s`; an exception of `work` is raised
        here, and not in the loop."""
        question = _Question(work)
        self._asked.add(question)
        try:
            if not self._open:
                raise LoopSilent("shutting down")
            self._questions.append(question)
            with contextlib.suppress(OSError):
                self._wake_in.send(b"\0")
            if not question.completed.wait(timeout_s):
                raise LoopSilent(f"no answer within {timeout_s:.12g} s")
            if question.error is not None:
                raise question.error
            return question.answer
        finally:
            question.abandoned = True
            self._asked.discard(question)

    def _answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass
        while self._questions:
            question = self._questions.popleft()
            if question.abandoned:  # the loop was stalled for longer than the thread waited
                continue
            try:
                question.work(question.complete)
            except Exception as error:
                question.complete(error=error)

    def close(self) -> None:
        """Close the bridge; threads that wait for an answer get LoopSilent."""
        self._open = False
        for question in list(self._asked):
            question.complete(error=LoopSilent("shutting down"))
        self._driver.remove_reader(self._wake_out.fileno())
        self._wake_in.close()
        self._wake_out.close()
