"""Waiting for sockets: by epoll where the system has it, otherwise by poll."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Protocol

READ, WRITE = 1, 4  # EPOLLIN and EPOLLOUT; the same numbers as POLLIN and POLLOUT
READY_MAX = 4096  # descriptors returned by one call


class Poller(Protocol):
    """The common methods of `select.epoll` and `select.poll`."""

    def register(self, fd: int, mask: int) -> None: ...
    def modify(self, fd: int, mask: int) -> None: ...
    def unregister(self, fd: int) -> None: ...


def make_poller() -> tuple[Poller, Callable[[float], list[tuple[int, int]]]]:
    """(poller, function that waits at most a given number of seconds and returns (descriptor, mask) of each ready descriptor)."""
    if hasattr(select, "epoll"):
        epoll = select.epoll()
        return epoll, lambda timeout_s: epoll.poll(timeout_s, READY_MAX)
    poll = select.poll()
    return poll, lambda timeout_s: poll.poll(-(-timeout_s * 1000 // 1))
