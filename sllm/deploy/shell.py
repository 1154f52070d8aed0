"""One role as a process of its own: signals, logs, HTTP, name resolution and an orderly end, around the driver.

The entry points make a role and hand it over as a `Part`; nothing here knows which role it is.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from config import RUN_VARIABLES, Config, describe_misspelt, misspelt, resolve_defaults
from sllm import __version__
from sllm.deploy.keys import key_path
from sllm.deploy.keywatch import KeyWatch
from sllm.deploy.launch import variables_of
from sllm.live.bridge import Answer, Bridge
from sllm.live.clock import Clock
from sllm.live.garbage import GarbageTamer
from sllm.live.host import UdpHost
from sllm.live.http import HttpServer, Page, Site
from sllm.live.resolve import Resolver
from sllm.live.sockets import literal_address
from sllm.live.udp import UdpDriver
from sllm.observe import logs
from sllm.observe.causes import RefusalLog, SilenceLog
from sllm.observe.metrics import RoleMetrics
from sllm.protocol.bus import EventBus
from sllm.protocol.capabilities import AsksCoordinator, capable
from sllm.protocol.errors import UsageError
from sllm.protocol.events import CoordinatorOverdue, CoordinatorSilent
from sllm.protocol.messages import Address
from sllm.protocol.node import Node
from sllm.wire.frame import FrameCodec

TICK_S = 1.0  # history and held-back log lines are brought up to date this often
KEYS_S = 10.0  # interval at which the key file is checked, so that keys rotate without a restart
RENEW_S = 10.0  # interval at which the socket to the coordinator is renewed; one long flow could lead to one of two coordinators for good, unnoticed
KEY_WAIT_S = 100.0  # a kubelet brings a new Secret into a pod within a minute and a half, most often at once
KEY_LOOK_S = 0.1
STALLED_S = 10.0  # a loop without a round for this time is not alive
LAST_LINES_S = 0.2  # longest wait for the reader of the log after a second signal
SWITCH_INTERVAL_S = 0.0005  # time after which an HTTP thread hands the interpreter back to the loop


class Part(Protocol):
    """A role, with the functions that only its entry point knows. All methods are called in the loop's thread, except `page_state` and `ready`."""

    @property
    def node(self) -> Node: ...
    @property
    def metrics(self) -> RoleMetrics: ...
    @property
    def page(self) -> Page | None: ...

    def ready(self) -> tuple[bool, str]:
        """(whether the role is ready, the reason). Also called in HTTP threads, so the method may only read attributes with immutable values."""
        ...

    def subscribe(self, bus: EventBus) -> None:
        """Subscribe to the events that the part and its metrics need."""
        ...

    def tick(self) -> None:
        """Called once a second."""
        ...

    def collect(self, answer: Callable[[], None]) -> None:
        """Bring the metrics up to date, then call `answer`."""
        ...

    def state(self, answer: Answer) -> None:
        """Call `answer` with the state that `page_state` needs; that state must not change afterwards."""
        ...

    def page_state(self, state: Any, query: Mapping[str, str]) -> dict[str, Any]:
        """The answer of `/state` to this query. Called in an HTTP thread. Raises BadQuery."""
        ...

    def stop(self) -> None:
        """Begin to end, because a signal has asked for the end."""
        ...

    def finished(self) -> bool:
        """Whether the part has nothing left to do."""
        ...


def await_key_file(config: Config, wait_s: float = KEY_WAIT_S, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait for the key file if its folder is there and empty, as when a Secret is mounted before it is made. If the file is still missing after the wait,
    reading the keys raises the error. SIGTERM ends the wait and the process; without a handler the first process of a container would ignore SIGTERM."""
    folder = Path(config.cluster_key_file)
    if not (config.cluster_key_file and config.in_container and folder.is_dir()):
        return
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        deadline = time.monotonic() + wait_s
        while not key_path(config).exists() and time.monotonic() < deadline:
            sleep(KEY_LOOK_S)
    finally:
        signal.signal(signal.SIGTERM, old)


class Service:
    """The shell of one role. To be made first in the process, because it installs the signal handlers; then `start`, `run`, and always `close`."""

    def __init__(self, role: str, config: Config, environ: Mapping[str, str]) -> None:
        self.role = role
        self.config = config
        self.environ = environ
        await_key_file(config)
        self._key_watch = KeyWatch(config, environ)
        self.codec = FrameCodec(self._key_watch.keyring)
        self.stopping = False
        self._signals: list[int] = []
        self._signal_in, self._signal_out = socket.socketpair()
        self._signal_in.setblocking(False)
        self._signal_out.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._signal_in.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        self.log = logs.setup(config.log_level, config.log_format)
        wrong = misspelt(environ, RUN_VARIABLES)
        if wrong:
            self.log.warning("%s", describe_misspelt(wrong), extra={"event": "UnknownVariables"})
        self.started_wall_s = time.time()
        self.incarnation = time.time_ns()
        self.clock = Clock()
        self.driver = UdpDriver(self.clock, survive=role != "client")  # a load generator that cannot go on must end
        self.driver.add_reader(self._signal_out.fileno(), self._on_wakeup)
        self.resolver = Resolver(self.driver)
        self.bridge = Bridge(self.driver)
        self._silences = SilenceLog(self.log, config.coordinator_host)
        self._refusals = RefusalLog(self.log, self.clock.now)
        bus = self.driver.bus
        bus.subscribe(logs.EventLog(self.log, {CoordinatorSilent}))
        bus.subscribe(self._on_silence, CoordinatorSilent)
        bus.subscribe(lambda node, event: self.renew_way(), CoordinatorOverdue, CoordinatorSilent)
        self.http: HttpServer | None = None
        self.host: UdpHost | None = None
        self.part: Part | None = None
        self._asks: AsksCoordinator | None = None  # the part's node, if that node asks the coordinator
        self.tamer: GarbageTamer | None = None
        self._stopping_why = ""
        self._ask_again: Callable[[], None] | None = None

    # --- start ----------------------------------------------------------------------------------------------------------------------

    def listen(self, make: Callable[[Address], Part], port: int, setting: str, **options: Any) -> Part:
        """Bind the UDP socket, make the part (it is told the address) and drive it. Locally a port nobody asked for gives way to any free one,
        so that several processes can be started by hand without a thought."""
        bind_host = self.config.bind_host
        placeholder = Node("starting", 0)  # the socket must be bound before the role is made, because the role needs its own address
        try:
            host = self.driver.add(placeholder, (bind_host, port), setting=setting, **options)
        except UsageError:
            if self.config.in_container or self.environ.get(setting, "").strip() or setting == "COORDINATOR_PORT":
                raise
            host = self.driver.add(placeholder, (bind_host, 0), setting=setting, **options)
            self.log.info("UDP port %d is taken; listening on %d instead", port, host.address[1])
        self.part = part = make(host.address)
        part.subscribe(self.driver.bus)
        host.adopt(part.node)
        self._asks = capable(part.node, AsksCoordinator)
        part.node.on_refused = self._refusals
        self.host = host
        self._serve_http()
        self._follow_coordinator()
        self.driver.every(TICK_S, self._tick)
        self.driver.every(KEYS_S, self._look_at_keys)
        if host.uplink is not None:
            self.driver.every(RENEW_S, self.renew_way)
        self._say_hello(host)
        host.touch()
        self._tick()
        return part

    def _serve_http(self) -> None:
        port, part = self.config.health_port, self.part
        assert part is not None
        if port == 0:
            return
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        site = Site(self._live, self._ready, self._metrics, self._state, part.page)
        self.http = HttpServer((self.config.bind_host, port), site, hosts=self._host_names())

    def _host_names(self) -> set[str]:
        """The names under which HTTP is served, beside localhost and addresses."""
        config = self.config
        names = {socket.gethostname(), self.environ.get("HOSTNAME", ""), config.bind_host, config.coordinator_host, config.advertise_host}
        return (names | {name.strip() for name in config.http_hosts.split(",")}) - {""}

    def _follow_coordinator(self) -> None:
        """Follow the coordinator's name, so that the node has its present address; does nothing for a literal address, or a node without a coordinator."""
        name, port = self.config.get_coordinator_address()
        node = self._asks
        if node is None:
            return

        def found(address: str) -> None:
            if node.coordinator != (address, port):
                self.log.info("the coordinator %s is at %s:%d", name, address, port)
                node.coordinator = (address, port)
                assert self.host is not None
                self.host.touch()

        self._ask_again = self.resolver.follow(name, found)
        self._ask_again()

    @property
    def resolved(self) -> bool:
        """The coordinator's name has an address."""
        node = self._asks
        return node is None or any(literal_address(node.coordinator[0], family) for family in (socket.AF_INET, socket.AF_INET6))

    def _say_hello(self, host: UdpHost) -> None:
        values, defaults = self.config.describe(), resolve_defaults(Config(), self.environ).describe()
        own = variables_of(self.role).keys() & values.keys()
        changed = {name: value for name, value in values.items() if name in own and value != defaults[name]}
        self.log.info("configuration", extra={"fields": {"role": self.role, "version": __version__, **changed}})
        self.log.debug("configuration, all of it", extra={"fields": {"role": self.role, **values}})
        where = {"udp": f"{host.address[0]}:{host.address[1]}", "receive_buffer_bytes": host.receive_buffer_bytes}
        if self.http is not None:
            where["http"] = self.http.url
        assert self.part is not None
        self.log.info("%s is up", self.part.node.node_id, extra={"fields": where})

    # --- run ------------------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until the part is finished, of its own accord or after a signal."""
        part = self.part
        assert part is not None
        self.driver.run_until(part.finished)

    def request_stop(self, why: str) -> None:
        """Readiness goes false, the part begins to end."""
        if self.stopping:
            return
        self.stopping = True
        self._stopping_why = why
        self.log.info("stopping: %s", why)
        if self.part is not None:
            self.part.stop()
            assert self.host is not None
            self.host.touch()

    def close(self) -> None:
        """Release threads, ports and signal handlers."""
        self.bridge.close()  # first, so that no HTTP thread waits for the loop any more
        if self.http is not None:
            self.http.close()
        self.resolver.close()
        self.driver.close()
        if self.tamer is not None:
            self.tamer.close()
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._signal_in.close()
        self._signal_out.close()
        logs.flush()
        logs.finish()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- in the loop ------------------------------------------------------------------------------------------------------------------

    def _on_silence(self, node: AsksCoordinator, event: CoordinatorSilent) -> None:
        self._silences.tell(event, node.coordinator, node.acknowledged)

    def renew_way(self) -> None:
        """Look the coordinator's name up again, and use a new socket towards it, so that load balancers and address translators choose its target anew."""
        if self._ask_again is None or self.host is None:
            return
        self._ask_again()
        try:
            self.host.renew_uplink()
        except UsageError as error:
            self.log.warning("%s; the old socket stays", error)

    def _tick(self) -> None:
        part = self.part
        assert part is not None
        part.node.set_wall_clock(self.clock.wall_offset_s, self.clock.now)  # the system's clock may have been set
        part.tick()
        logs.flush()
        self._refusals.forget(self.clock.now)
        part.node.last_refused = None
        if self.tamer is not None:
            self.tamer.tick(self.driver.received)

    def _look_at_keys(self) -> None:
        """Take over the keys of a key file that has changed. A file that cannot be used changes nothing."""
        if not self._key_watch.look(self.log):
            return
        assert self.part is not None
        self.codec = self.part.node.codec = FrameCodec(self._key_watch.keyring)
        self.log.info("the cluster's keys have changed and were taken over", extra={"fields": {"keys": self._keys()}})

    def _keys(self) -> dict[str, Any]:
        """Log the ids of the keys in use: an operator who rotates keys waits until every process has logged the new id."""
        ring = self.codec.keyring
        return {"signs": ring.signer, "accepted": sorted(ring.ids)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler, which Python calls between any two steps of the main thread. The loop handles the first signal; a second one ends the process
        without waiting for the loop."""
        self._signals.append(number)
        if len(self._signals) > 1:
            logs.finish(LAST_LINES_S)
            os._exit(128 + number)

    def _on_wakeup(self) -> None:
        try:
            while self._signal_out.recv(64):
                pass
        except BlockingIOError:
            pass
        if self._signals:
            self.request_stop(signal.Signals(self._signals[0]).name)

    @property
    def interrupted_by(self) -> int:
        """The signal that asked for the end; 0: none has come."""
        return self._signals[0] if self._signals else 0

    # --- for HTTP threads -------------------------------------------------------------------------------------------------------------

    def _live(self) -> tuple[bool, str]:
        age_s = time.monotonic() - self.driver.heartbeat
        return age_s < STALLED_S, "ok" if age_s < STALLED_S else f"the event loop last turned {age_s:.0f} s ago"

    def _ready(self) -> tuple[bool, str]:
        if self.stopping:
            return False, f"stopping: {self._stopping_why}"
        return self.part.ready() if self.part is not None else (False, "starting")

    def _metrics(self) -> str:
        def work(answer: Answer) -> None:
            part, host = self.part, self.host
            assert part is not None
            assert host is not None
            part.metrics.up.set(1 if self._ready()[0] else 0)
            part.metrics.collect(part.node)
            part.metrics.collect_driver(self.driver, host)
            part.metrics.log_drops.set(logs.dropped())
            part.collect(lambda: answer(part.metrics.render()))

        text: str = self.bridge.ask(work)
        return text

    def _state(self, query: Mapping[str, str]) -> dict[str, Any]:
        part = self.part
        assert part is not None
        state, (ready, reason) = self.bridge.ask(lambda answer: part.state(lambda state: answer((state, self._ready()))))
        return {
            "role": self.role,
            "node_id": part.node.node_id,
            "version": __version__,
            "incarnation": part.node.incarnation,
            "time": logs.timestamp(time.time()),
            "uptime_s": round(self.clock.elapsed_wall_s, 3),
            "ready": ready,
            "reason": reason,
            "keys": self._keys(),
            **part.page_state(state, query),
        }
