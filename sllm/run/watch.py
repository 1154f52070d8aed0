"""The fleet page of a run in one process: the coordinator's own page, served from a free port on loopback while the run goes on."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from sllm import __version__
from sllm.deploy.shell import SWITCH_INTERVAL_S
from sllm.live.bridge import Answer, Bridge, Loop
from sllm.live.http import HttpServer, Site
from sllm.observe.coordinatorview import CoordinatorView
from sllm.observe.page import fleet_page
from sllm.protocol.driver import Driver
from sllm.protocol.messages import Address

LOOPBACK: Address = ("127.0.0.1", 0)
VIEW_TICK_S = 1.0  # of the run's clock


class Watch:
    """Serves the page until `close`. `view` is called in the loop's thread only; HTTP threads ask the loop, and wait."""

    def __init__(self, loop: Loop, view: CoordinatorView, coordinator: Callable[[], Any], driver: Driver[Any]) -> None:
        """`driver` runs the fleet that `view` shows, and `loop` answers the questions. UsageError if no port can be had."""
        self.view = view
        self._coordinator = coordinator
        self._driver = driver
        self._bridge = Bridge(loop)
        self._before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        site = Site(lambda: (True, "ok"), view.ready, self._metrics, self._state, fleet_page())
        try:
            self._http = HttpServer(LOOPBACK, site, setting="--page")
        except BaseException:
            self._bridge.close()
            raise
        view.subscribe(driver.bus)
        driver.every(VIEW_TICK_S, view.tick)

    @property
    def url(self) -> str:
        return self._http.url + "/"

    def _metrics(self) -> str:
        def work(answer: Answer) -> None:
            self.view.metrics.up.set(1 if self.view.ready()[0] else 0)
            self.view.metrics.collect(self._coordinator())
            self.view.collect(lambda: answer(self.view.metrics.render()))

        text: str = self._bridge.ask(work)
        return text

    def _state(self, query: Mapping[str, str]) -> dict[str, Any]:
        def work(answer: Answer) -> None:
            node = self._coordinator()
            uptime_s = round(self._driver.now, 3)
            head = {"role": "coordinator", "node_id": node.node_id, "version": __version__, "incarnation": node.incarnation, "uptime_s": uptime_s}
            ready, reason = self.view.ready()
            self.view.state(lambda state: answer(({**head, "ready": ready, "reason": reason}, state)))

        head, state = self._bridge.ask(work)
        return {**head, **self.view.page_state(state, query)}

    def close(self) -> None:
        """Leave nothing behind. Who still waits for an answer is told that none will come."""
        self._bridge.close()
        self._http.close()
        sys.setswitchinterval(self._before_s)


class Pacer:
    """Holds simulated time back to `pace` seconds for each second of wall time, and answers questions meanwhile: the loop of a run in virtual time."""

    def __init__(self, pace: float) -> None:
        self._pace = pace
        self._readers: dict[int, Callable[[], None]] = {}
        self._began: tuple[float, float] | None = None  # wall clock, simulated time

    def add_reader(self, descriptor: int, callback: Callable[[], None]) -> None:
        self._readers[descriptor] = callback

    def remove_reader(self, descriptor: int) -> None:
        self._readers.pop(descriptor, None)

    def hold(self, now: float, is_over: Callable[[], bool]) -> None:
        """Come back when simulated time may go on from `now`, or when it is over. A run that is late does not wait, and answers what was asked."""
        if self._began is None:
            self._began = time.monotonic(), now
        due = self._began[0] + (now - self._began[1]) / self._pace
        while True:
            left_s = max(0.0, due - time.monotonic())
            readable, _, _ = select.select(list(self._readers), [], [], min(left_s, 0.1))
            for descriptor in readable:
                with contextlib.suppress(KeyError):
                    self._readers[descriptor]()
            if left_s == 0.0 or is_over():
                return
