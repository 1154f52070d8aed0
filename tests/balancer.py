"""Whatever leads each flow of datagrams to one of several servers, as a Service of Kubernetes does: here to the next one in turn."""

from __future__ import annotations

import itertools
import selectors
import socket
import threading
from types import TracebackType


class Balancer:
    """Listens on loopback. The first flow goes to the first port, the next to the second, and each stays there."""

    def __init__(self, *ports: str) -> None:
        self._turns = itertools.cycle([("127.0.0.1", int(port)) for port in ports])
        self._front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._front.bind(("127.0.0.1", 0))
        self.port = str(self._front.getsockname()[1])
        self._flows: dict[tuple[str, int], socket.socket] = {}
        self._end_in, self._end_out = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Balancer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_in.send(b"\0")
        self._thread.join()
        for sock in (self._front, self._end_in, self._end_out, *self._flows.values()):
            sock.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._end_out, selectors.EVENT_READ)
            selector.register(self._front, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._end_out:
                        return
                    if key.data is None:
                        self._forward(selector)
                    else:
                        self._front.sendto(key.fileobj.recv(65536), key.data)  # type: ignore[union-attr]

    def _forward(self, selector: selectors.BaseSelector) -> None:
        data, flow = self._front.recvfrom(65536)
        if flow not in self._flows:
            back = self._flows[flow] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            back.connect(next(self._turns))
            selector.register(back, selectors.EVENT_READ, flow)
        self._flows[flow].send(data)
