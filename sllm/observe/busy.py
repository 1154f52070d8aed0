"""How long hosts were busy and what of them was in use, in seconds of the world, whatever befell them."""

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
    """What the engine of a host had in use since `begin`, all lives together. It looks when a life ends, when a clock changes and when asked.

    A life counts until it crashes, has drained, or another takes its place. A frozen host counts to the end of what its engine was about when it froze;
    what it makes up for when it thaws counts then. Nobody is busy for longer than there was time.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._began_s = world.now
        self._used: dict[str, EngineUsage] = {}  # by host, up to the last look
        self._seen: dict[Node, EngineUsage] = {}  # what the engine of each life said then, by its own clock
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
        """Up to now, of the host of this name."""
        return self.usage(name).busy_s

    def usage(self, name: str) -> EngineUsage:
        """Up to now, of the host of this name."""
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
        elif what == "zombie":  # it lives on, but the fleet has another in its place
            self._look(host.name.partition(GHOST_MARK)[0], host)

    def _on_drained(self, node: Node, event: Any) -> None:
        """Its process goes; whatever its engine was still about was given up."""
        host = self._world.hosts.get(event.worker_id)
        if host is not None and host.node is node:
            self._look(host.name, host)
            self._drained.add(node)
