"""TCP connections with one request and one answer each, all in one thread. Slow, silent and many clients cost a bounded amount of memory and time.

    reading   the head of the request must be whole within its time and `HEAD_MAX_BYTES`
    working   an answer that takes longer is made by one of `WORKERS` threads; at most `JOBS_MAX` wait for one
    writing   the answer must be taken within its time; all answers not taken yet have `UNSENT_MAX_BYTES`
    closing   bytes that the client still sends are thrown away for a second, because closing at once could destroy the answer on its way

A new connection is always accepted: if there are `CONNECTIONS_MAX`, or no file descriptor is left, the connection that has waited longest for its client is
closed. The client of a health check sends its request at once and is answered in the same round, so health checks are not closed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

READING, WORKING, WRITING, CLOSING = "reading", "working", "writing", "closing"
PATIENCE_S = {READING: 5.0, WRITING: 10.0, CLOSING: 1.0}  # a connection that stays in a state for longer is closed
LOOK_S = 0.25  # between two searches for connections to close
HEAD_MAX_BYTES = 8192
CONNECTIONS_MAX = 128
UNSENT_MAX_BYTES = 8 << 20
WORKERS = 2
JOBS_MAX = 16
REST_MAX_S = 0.25  # longest rest of a worker; it rests for the CPU time of its last answer, which leaves the event loop half of the interpreter
ACCEPT_PAUSE_S = 0.1  # pause in accepting when no descriptor is left and no connection can be closed
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_GIVEN_UP_FIRST = {CLOSING: 0, READING: 1, WRITING: 2}

Work = Callable[[], bytes]
Respond = Callable[[bytes, bool], bytes | Work]
"""(head, whole) -> the answer, or a function that makes the answer in a worker thread. Raises nothing."""

_log = logging.getLogger("sllm")


class _Connection:
    """One client. `since` is when its state began, seconds of the monotonic clock."""

    __slots__ = ("data", "since", "socket", "state")

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.socket = sock
        self.state = READING
        self.since = now
        self.data: bytes | memoryview = b""  # the head so far; later the part of the answer that is not sent yet


class Connections:
    """Serves the connections of `listener` in its own threads until `close`. `busy` is the answer when too many requests wait already."""

    def __init__(self, listener: socket.socket, respond: Respond, busy: bytes) -> None:
        """RuntimeError if the threads cannot be started. No thread is started later."""
        self._listener = listener
        self._respond = respond
        self._busy = busy
        self._open: dict[_Connection, None] = {}  # in order of age
        self._unsent_bytes = 0
        self._jobs: queue.SimpleQueue[tuple[_Connection, Work] | None] = queue.SimpleQueue()
        self._jobs_open = 0
        self._done: deque[tuple[_Connection, bytes]] = deque()
        self._ending = False
        self._spare: int | None = None  # a file descriptor kept in reserve for when the process has no other
        self._accept_again_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._keep_spare()
        self._threads: list[threading.Thread] = []
        try:
            for number in range(WORKERS):
                self._start(self._work, f"http-work-{number}")
            self._start(self._run, "http")
        except RuntimeError:
            self.close()
            raise

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def close(self) -> None:
        """End the threads and close every connection and the listener."""
        self._ending = True
        self._wake()
        for _ in range(WORKERS):
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.socket.close()
        self._open.clear()
        self._selector.close()
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    # --- the thread of the connections --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._ending:
            for key, _ in self._selector.select(self._wait_s()):
                if key.data is not None:
                    self._move(key.data)
                elif key.fileobj is self._listener:
                    self._accept()
                else:
                    self._take_answers()
            self._expire(time.monotonic())

    def _wait_s(self) -> float | None:
        if self._accept_again_at is not None:
            return ACCEPT_PAUSE_S
        return LOOK_S if self._open else None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a full buffer means that the thread has been woken already
            self._wake_in.send(b"\0")

    def _move(self, connection: _Connection) -> None:
        """The socket of the connection is ready to be read or written."""
        if connection not in self._open:
            return  # closed earlier in this round
        try:
            {READING: self._read, WRITING: self._write, CLOSING: self._discard}[connection.state](connection)
        except BlockingIOError:
            pass
        except OSError:  # the client went away
            self._drop(connection)

    def _expire(self, now: float) -> None:
        for connection in [c for c in self._open if c.state != WORKING and now - c.since > PATIENCE_S[c.state]]:
            self._drop(connection)
        if self._accept_again_at is not None and now >= self._accept_again_at:
            self._accept_again_at = None
            self._selector.register(self._listener, selectors.EVENT_READ)

    # --- accepting ----------------------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # an errno not in _NO_ROOM: the client went away before it was accepted
            if error.errno in _NO_ROOM and not self._make_room():
                self._selector.unregister(self._listener)
                self._accept_again_at = time.monotonic() + ACCEPT_PAUSE_S
            return
        self._keep_spare()
        sock.setblocking(False)
        if len(self._open) >= CONNECTIONS_MAX:
            self._give_up_one()
        connection = _Connection(sock, time.monotonic())
        self._open[connection] = None
        self._selector.register(sock, selectors.EVENT_READ, connection)
        self._move(connection)  # the request has mostly arrived already

    def _make_room(self) -> bool:
        """Make sure that a file descriptor is free for the next connection; False if none can be freed."""
        if self._give_up_one():
            return True
        if self._spare is None:
            return False
        os.close(self._spare)
        self._spare = None
        return True

    def _keep_spare(self) -> None:
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = os.open(os.devnull, os.O_RDONLY)

    def _give_up_one(self) -> bool:
        """Close the connection that has waited longest for its client; False if no connection waits for its client."""
        waiting = [connection for connection in self._open if connection.state != WORKING]
        if not waiting:
            return False
        self._drop(min(waiting, key=lambda connection: (_GIVEN_UP_FIRST[connection.state], connection.since)))
        return True

    def _drop(self, connection: _Connection) -> None:
        del self._open[connection]
        if connection.state == WRITING:
            self._unsent_bytes -= len(connection.data)
        if connection.state != WORKING:
            self._selector.unregister(connection.socket)
        connection.socket.close()

    # --- one connection, state by state -------------------------------------------------------------------------------------------------

    def _read(self, connection: _Connection) -> None:
        more = connection.socket.recv(HEAD_MAX_BYTES - len(connection.data))
        head = bytes(connection.data) + more
        connection.data = head
        whole = b"\r\n\r\n" in head or b"\n\n" in head
        if not whole and more and len(head) < HEAD_MAX_BYTES:
            return
        if not head.strip():
            self._drop(connection)  # the client closed without sending a request
            return
        answer = self._respond(head, whole)
        if isinstance(answer, bytes):
            self._begin_writing(connection, answer)
        elif self._jobs_open >= JOBS_MAX:
            self._begin_writing(connection, self._busy)
        else:
            self._selector.unregister(connection.socket)
            connection.state, connection.data = WORKING, b""
            self._jobs_open += 1
            self._jobs.put((connection, answer))

    def _take_answers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096):
                pass
        while self._done:
            connection, answer = self._done.popleft()
            self._jobs_open -= 1
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
            try:
                self._begin_writing(connection, answer)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(connection)

    def _begin_writing(self, connection: _Connection, answer: bytes) -> None:
        connection.state, connection.since, connection.data = WRITING, time.monotonic(), memoryview(answer)
        self._unsent_bytes += len(answer)
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        self._write(connection)
        while self._unsent_bytes > UNSENT_MAX_BYTES:
            others = [c for c in self._open if c.state == WRITING and c is not connection]
            if not others:
                return
            self._drop(min(others, key=lambda c: c.since))

    def _write(self, connection: _Connection) -> None:
        sent = 0
        with contextlib.suppress(BlockingIOError):
            sent = connection.socket.send(connection.data)
        connection.data = connection.data[sent:]
        self._unsent_bytes -= sent
        if not connection.data:
            connection.state, connection.since = CLOSING, time.monotonic()
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
            connection.socket.shutdown(socket.SHUT_WR)

    def _discard(self, connection: _Connection) -> None:
        if not connection.socket.recv(65536):
            self._drop(connection)

    # --- the threads that make the longer answers -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            connection, work = job
            began_s = time.thread_time()
            self._done.append((connection, work()))
            self._wake()
            time.sleep(min(time.thread_time() - began_s, REST_MAX_S))
