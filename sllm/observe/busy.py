"""The time for which hosts were busy, and the part of each host that was in use, in seconds of virtual time and across crashes and clock changes."""

from __future__ import annotations

from typing import Any

from sllm.engine.base import NOTHING_USED, EngineUsage
from sllm.protocol.capabilities import HasEngine, capable
from sllm.protocol.events import WorkerDrained
from sllm.protocol.node import Node
from sllm.virtual.host import Host
from sllm.virtual.inject import GHOST_MARK
from sllm.virtual.world import World


class BusyTime:
    """The usage of each host's engine since `begin`, over all lives of the host. Engines are read when a life ends, when a clock changes and when asked.

    A life counts until it crashes, has drained, or another life takes its place. A frozen host counts up to the end of the segment during which it froze;
    work that the host catches up on after thawing counts at that time. No host is busy for longer than the time since `begin`.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._began_s = world.now
        self._used: dict[str, EngineUsage] = {}  # by host, up to the last reading
        self._seen: dict[Node, EngineUsage] = {}  # by life: the engine's usage at the last reading, by the life's own clock
        self._drained: set[Node] = set()
        world.lifecycle.append(self._on_life)
        world.bus.subscribe(self._on_drained, WorkerDrained)

    def begin(self) -> None:
        """Count from now on."""
        for host in self._world.hosts.values():
            self._look(host.name, host)
        self._used.clear()
        self._began_s = self._world.now

    def busy_s(self, name: str) -> float:
        """Busy seconds up to now of the host of this name."""
        return self.usage(name).busy_s

    def usage(self, name: str) -> EngineUsage:
        """Usage up to now of the host of this name."""
        self._look(name, self._world.hosts[name])
        return self._used.get(name, NOTHING_USED)

    def _look(self, name: str, host: Host) -> None:
        node = host.node
        server = capable(node, HasEngine)
        if node is None or server is None or node in self._drained:
            return
        now = self._world.now
        own = server.engine.usage(host.clock.node_time(now))
        seen = self._seen.get(node, NOTHING_USED)
        used = self._used.get(name, NOTHING_USED).plus(own - seen, 1.0 / host.clock.rate)
        if used.busy_s > now - self._began_s:
            used = used.replace(busy_s=now - self._began_s)
        self._used[name] = used
        self._seen[node] = own

    def _on_life(self, what: str, host: Host) -> None:
        if what in ("crash", "clock"):
            self._look(host.name, host)
        elif what == "zombie":  # the old life runs on, but a new life has its place in the fleet
            self._look(host.name.partition(GHOST_MARK)[0], host)

    def _on_drained(self, node: Node, event: Any) -> None:
        """A drained worker's process ends, and its engine gives up the work that is left."""
        host = self._world.hosts.get(event.worker_id)
        if host is not None and host.node is node:
            self._look(host.name, host)
            self._drained.add(node)
