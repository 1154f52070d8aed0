"""Questions from other threads to the event loop: the roles' state is touched by the loop's thread only."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from sllm.runtime.udp import UdpDriver

Answer = Callable[[Any], None]
Work = Callable[[Answer], None]  # runs in the loop and gives its answer, at once or some rounds later; the answer must be immutable


class LoopSilent(Exception):
    """The loop did not answer in time: it is stalled or has ended."""


class Bridge:
    """Lets HTTP threads ask the loop. Made, and closed, by the loop's thread."""

    def __init__(self, driver: UdpDriver) -> None:
        self._driver = driver
        self._questions: deque[tuple[Work, Answer]] = deque()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._open = True
        driver.add_reader(self._wake_out.fileno(), self._answer)

    def ask(self, work: Work, timeout_s: float = 2.0) -> Any:
        """What `work` answers. Blocks the calling thread, never the loop. LoopSilent when no answer comes."""
        if not self._open:
            raise LoopSilent("shutting down")
        answers: list[Any] = []
        answered = threading.Event()

        def take(answer: Any) -> None:
            answers.append(answer)
            answered.set()

        self._questions.append((work, take))
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0")
        if not answered.wait(timeout_s):
            raise LoopSilent(f"no answer within {timeout_s:g} s")
        return answers[0]

    def _answer(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass
        while self._questions:
            work, take = self._questions.popleft()
            self._driver.attempt("a question over HTTP", partial(work, take))

    def close(self) -> None:
        self._open = False
        self._driver.remove_reader(self._wake_out.fileno())
        self._wake_in.close()
        self._wake_out.close()
