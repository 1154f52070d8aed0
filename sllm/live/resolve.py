"""Resolves names to addresses without blocking the event loop: a thread asks the system, and the loop gets the answer.

`Resolver.resolve` looks a name up once, `Resolver.follow` goes on trying until there is an answer, and again when told to. Callbacks run in the
loop's thread.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable

from sllm.live.sockets import literal_address
from sllm.live.udp import UdpDriver

RETRY_FIRST_S = 0.25  # wall seconds until a name without an address is looked up again; doubles with each try
RETRY_MAX_S = 5.0  # a pod's name appears within seconds of the pod
WAITING_MAX = 1000  # names being looked up; peers name hosts, and one look-up may take the system many seconds
FIRST, LATER = 0, 1  # ranks: the coordinator's name is looked up before names that peers use

Answer = Callable[[str | None], None]
_log = logging.getLogger("sllm")


def look_up(name: str) -> str | None:
    """The name's first IPv4 address, else its first IPv6 address, else None. Blocks."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):  # the name does not exist, or is not valid
        return None
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in found:
            if entry[0] == family:
                return str(entry[4][0])
    return None


class Resolver:
    """Name resolution for a driver. A new resolver attaches itself to the driver, and has to be closed before the driver."""

    def __init__(self, driver: UdpDriver, look_up: Callable[[str], str | None] = look_up) -> None:
        self._driver = driver
        self._look_up = look_up
        self._waiting: dict[str, list[Answer]] = {}
        self._questions: queue.PriorityQueue[tuple[int, int, str]] = queue.PriorityQueue()  # (rank, number, name; "": the end)
        self._asked = 0
        self._answers: deque[tuple[str, str | None]] = deque()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread: threading.Thread | None = None
        driver.resolve_with(self)
        driver.add_reader(self._wake_out.fileno(), self._deliver)

    def resolve(self, name: str, answer: Answer, rank: int = LATER) -> None:
        """Call `answer` with the address, or None; at once if `name` is a literal address or too many names are being looked up, otherwise later. Several
        questions about one name share a look-up."""
        if any(literal_address(name, family) for family in (socket.AF_INET, socket.AF_INET6)):
            answer(name)
            return
        waiting = self._waiting.get(name)
        if waiting is not None:
            waiting.append(answer)
            return
        if not self._started() or (len(self._waiting) >= WAITING_MAX and rank == LATER):
            answer(None)
            return
        self._waiting[name] = [answer]
        self._put(rank, name)

    def _put(self, rank: int, name: str) -> None:
        self._asked += 1
        self._questions.put((rank, self._asked, name))

    def _started(self) -> bool:
        """Start the thread, unless it runs; False if the system has no thread left."""
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="resolver", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                _log.warning("no name can be looked up: %s", error)
                return False
            self._thread = thread
        return True

    def follow(self, name: str, found: Callable[[str], None]) -> Callable[[], None]:
        """Call `found` with the name's address as soon as the name has one, without a time limit. Returns a function that looks the name up again."""
        return _Follower(self, name, found).ask

    def _work(self) -> None:
        while name := self._questions.get()[2]:
            self._answers.append((name, self._look_up(name)))
            with contextlib.suppress(OSError):  # a full buffer means that the loop has been woken; a closed one that no answer is wanted any more
                self._wake_in.send(b"\0")

    def _deliver(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass
        while self._answers:
            name, address = self._answers.popleft()
            for answer in self._waiting.pop(name, ()):
                answer(address)

    def close(self) -> None:
        """End the thread; a thread that still waits for the system ends with the process."""
        self._waiting.clear()
        if self._thread is not None:
            self._put(FIRST - 1, "")
            self._thread.join(0.5)
            self._thread = None
        self._driver.remove_reader(self._wake_out.fileno())
        self._wake_out.close()
        self._wake_in.close()


class _Follower:
    """Looks a name up, with backoff, until there is an answer. A call while a look-up is under way or planned does nothing."""

    def __init__(self, resolver: Resolver, name: str, found: Callable[[str], None]) -> None:
        self._resolver = resolver
        self._name = name
        self._found = found
        self._asking = False
        self._wait_s = RETRY_FIRST_S

    def ask(self) -> None:
        if not self._asking:
            self._asking = True
            self._look_up()

    def _look_up(self) -> None:
        self._resolver.resolve(self._name, self._answer, FIRST)

    def _answer(self, address: str | None) -> None:
        if address is not None:
            self._asking = False
            self._wait_s = RETRY_FIRST_S
            self._found(address)
            return
        if self._wait_s == RETRY_FIRST_S:
            _log.warning("the name %s has no address yet; trying again", self._name)
        driver = self._resolver._driver
        driver.call_at(driver.clock.now + self._wait_s * driver.clock.speedup, self._look_up)
        self._wait_s = min(RETRY_MAX_S, self._wait_s * 2.0)
