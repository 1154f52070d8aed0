"""Carries out a fault schedule in a world.

Random hosts are drawn when the fault begins, from the generator "faults" (`sllm.protocol.seeds`). A fault is skipped and counted if the state of its host does
not allow it, such as a crash of a host that is down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial
from math import ceil, inf
from typing import Any

from sllm.protocol.capabilities import Drainable, capable
from sllm.protocol.errors import UsageError
from sllm.protocol.seeds import rng_for
from sllm.virtual.faults import Fault, Schedule
from sllm.virtual.host import Host
from sllm.virtual.world import World

RANDOM_FROM = "worker-*"  # "random:2" means two of these
NAMES_SHOWN = 6
SCALED = (("reorder_extra_ms", "reorder_extra_s", 1e-3), ("queue_max_ms", "queue_max_s", 1e-3), ("bandwidth_kb_per_s", "bandwidth_bytes_per_s", 1e3))
GHOST_MARK = "~"  # in the name of a host on which a supplanted node lives


class Injector:
    """A schedule at work. `log` has (time, text) of everything done."""

    def __init__(self, world: World, schedule: Schedule) -> None:
        self.world = world
        self.schedule = schedule
        self.log: list[tuple[float, str]] = []
        self.applied = 0
        self.skipped = 0
        self.end_s = 0.0  # the faults stop at this time of the world; known after install()
        self._last_s = inf  # the schedule makes no change after this time
        self._ends: list[float] = []  # when each fault ends, by the world's time
        self._rng = rng_for(world.seed, "faults")
        self._off_rate: set[str] = set()  # hosts whose clock a fault has changed

    def install(self, origin_s: float = 0.0) -> None:
        """Schedule every fault, its times counted from `origin_s` of the world.

        UsageError names a fault whose hosts this run does not have, or that it cannot carry out.
        """
        for fault in self.schedule.faults:
            hit = self._check(fault)
            self._ends.append(origin_s + fault.end_s_for(hit))
            self._call_at(origin_s + fault.at_s, partial(self._begin, fault))
        self.end_s = max(self._ends, default=0.0)

    def end_by(self, last_s: float) -> int:
        """Let the schedule make no change after the time `last_s` of the world. Returns the number of faults that would begin or end later; those never begin,
        or never end."""
        self._last_s = last_s
        return sum(end_s > last_s for end_s in self._ends)

    def _call_at(self, at: float, fn: Callable[[], object]) -> None:
        """Call action() at a time of the world, unless the schedule has been ended before."""
        self.world.call_at(at, lambda: fn() if self.world.now <= self._last_s else None)

    def _check(self, fault: Fault) -> int:
        """The largest number of hosts that the fault can hit."""
        most = 0
        for key in ("hosts", "from", "to"):
            for pattern in fault.options.get(key) or ():
                count, glob = _split(pattern, fault)
                matching = self._matching(glob)
                if not matching:
                    names = sorted(self.world.hosts)
                    shown = ", ".join(names[:NAMES_SHOWN] + ["..."] * (len(names) > NAMES_SHOWN))
                    raise UsageError(f"{fault.where}: {key}: {pattern!r} matches no host of this run; there are {shown}")
                if key == "hosts":
                    self._check_able(fault, matching)
                    most += len(matching) if count is None else min(len(matching), count(len(matching)))
        return most

    def _check_able(self, fault: Fault, hosts: Iterable[Host]) -> None:
        for host in hosts:
            restarts = fault.kind in ("zombie", "drain") or (fault.kind == "crash" and fault.for_s is not None)
            if restarts and host.make_node is None:
                raise UsageError(f"{fault.where}: {fault.kind}: {host.name} cannot restart in this run")
            if fault.kind == "drain" and capable(host.node, Drainable) is None:
                raise UsageError(f"{fault.where}: drain: {host.name} cannot drain")

    # --- hosts ------------------------------------------------------------------------------------------------------------------------

    def _matching(self, glob: str) -> list[Host]:
        hosts = self.world.hosts
        if glob in hosts:
            return [hosts[glob]]
        return [host for name, host in hosts.items() if fnmatchcase(name, glob) and GHOST_MARK not in name]

    def _choose(self, patterns: Iterable[str], fault: Fault) -> list[Host]:
        """The hosts that the patterns choose, each host once, in a stable order."""
        chosen: dict[str, Host] = {}
        for pattern in patterns:
            count, glob = _split(pattern, fault)
            matching = self._matching(glob)
            if count is not None:
                matching = self._rng.sample(matching, min(len(matching), count(len(matching))))
            chosen.update((host.name, host) for host in matching)
        return list(chosen.values())

    # --- doing ------------------------------------------------------------------------------------------------------------------------

    def _begin(self, fault: Fault) -> None:
        if "hosts" not in fault.options:
            self._begin_links(fault)
            return
        hosts = self._choose(fault.options["hosts"], fault)
        if fault.kind == "isolate":
            names = [host.name for host in hosts]
            rules = [self.world.network.cut(names, None), self.world.network.cut(None, names)]
            self._note(f"isolate {' '.join(names)}")
            self._after(fault.for_s, partial(self.world.network.remove, *rules), f"rejoin {' '.join(names)}")
            return
        act: Callable[[Fault, Host], bool] = getattr(self, f"_{fault.kind}")
        for place, host in enumerate(hosts):
            self._call_at(self.world.now + place * fault.options["stagger"], partial(self._hit, act, fault, host))

    def _hit(self, act: Callable[[Fault, Host], bool], fault: Fault, host: Host) -> None:
        if act(fault, host):
            self._note(f"{fault.kind} {host.name}")
        else:
            self.skipped += 1

    def _begin_links(self, fault: Fault) -> None:
        options, network = fault.options, self.world.network
        ends: list[list[str] | None] = [
            [host.name for host in self._choose(options[key], fault)] if options.get(key) else None for key in ("from", "to")
        ]
        rules = []
        for sources, targets in ((ends[0], ends[1]), (ends[1], ends[0]))[: 2 if options.get("both_ways") else 1]:
            rules.append(network.cut(sources, targets) if fault.kind == "cut" else network.degrade(sources, targets, **_link_changes(options)))
        text = f"{fault.kind} {' '.join(ends[0] or ['all'])} -> {' '.join(ends[1] or ['all'])}"
        self._note(text)
        self._after(fault.for_s, partial(network.remove, *rules), f"end of {text}")

    def _note(self, text: str) -> None:
        self.applied += 1
        self.log.append((self.world.now, text))

    def _after(self, delay_s: float | None, fn: Callable[[], object], text: str) -> None:
        """Call action() after a delay and note it in the log; never, if the delay is None."""
        if delay_s is None:
            return

        def act() -> None:
            fn()
            self.log.append((self.world.now, text))

        self._call_at(self.world.now + delay_s, act)

    # Each method returns False if the state of the host does not allow the fault.

    def _crash(self, fault: Fault, host: Host) -> bool:
        if host.node is None:
            return False
        host.crash()
        self._after(fault.for_s, partial(self._restart_if_down, host), f"restart {host.name}")
        return True

    def _restart_if_down(self, host: Host) -> None:
        if host.node is None:
            host.restart()

    def _freeze(self, fault: Fault, host: Host) -> bool:
        if host.node is None or host.frozen:
            return False
        host.freeze()
        life = host.life
        self._after(fault.for_s, lambda: host.thaw() if host.life == life else None, f"thaw {host.name}")
        return True

    def _zombie(self, fault: Fault, host: Host) -> bool:
        assert fault.for_s is not None
        if host.node is None or host.frozen:
            return False
        world, life = self.world, host.life
        host.freeze()
        restart_after = fault.options["restart_after"]

        def replace() -> None:
            if host.node is None or host.life != life:
                return  # another fault has ended that life
            ghost = host.supplant()
            assert fault.for_s is not None
            back_s = fault.for_s - (world.now - began)
            self._after(max(0.0, back_s), ghost.thaw, f"zombie {ghost.name} comes back")
            linger = fault.options["linger"]
            if linger is not None:
                self._after(max(0.0, back_s) + linger, ghost.crash, f"zombie {ghost.name} ends")

        began = world.now
        self._after(fault.for_s / 2.0 if restart_after is None else restart_after, replace, f"replace {host.name}")
        return True

    def _drain(self, fault: Fault, host: Host) -> bool:
        node = capable(host.node, Drainable)
        if host.frozen or node is None:
            return False
        node.drain(host.read_clock())
        host.touch()
        life = host.life
        self._after(fault.for_s, lambda: host.restart() if host.life == life else None, f"restart {host.name}")
        return True

    def _slow(self, fault: Fault, host: Host) -> bool:
        return self._set_rate(fault, host, 1.0 / fault.options["factor"], wall_steady=True)

    def _clock_drift(self, fault: Fault, host: Host) -> bool:
        return self._set_rate(fault, host, fault.options["rate"], wall_steady=False)

    def _set_rate(self, fault: Fault, host: Host, rate: float, *, wall_steady: bool) -> bool:
        """Change the rate of a host's clocks. A slow host keeps true wall time; a host whose clock drifts does not. One such fault per host at a time."""
        if host.name in self._off_rate:
            return False
        self._off_rate.add(host.name)
        host.set_clock_rate(rate, wall_steady=wall_steady)

        def back() -> None:
            self._off_rate.discard(host.name)
            host.set_clock_rate(1.0, wall_steady=wall_steady)

        self._after(fault.for_s, back, f"end of {fault.kind} {host.name}")
        return True

    def _clock_jump(self, fault: Fault, host: Host) -> bool:
        by_s = fault.options["by"]
        host.jump_wall_clock(by_s)
        self._after(fault.for_s, lambda: host.jump_wall_clock(-by_s), f"clock of {host.name} set right")
        return True

    def _overflow(self, fault: Fault, host: Host) -> bool:
        if host.buffer is not None:
            return False
        host.limit_buffer(fault.options["buffer"], fault.options["drain_per_s"])
        self._after(fault.for_s, lambda: host.limit_buffer(0, 0.0), f"end of overflow {host.name}")
        return True


def _split(pattern: str, fault: Fault) -> tuple[Callable[[int], int] | None, str]:
    """Parses "random:2:worker-*", "random:25%" or "worker-1" into (function from the number of hosts to the number to draw, or None for all; glob)."""
    if not pattern.startswith("random:"):
        return None, pattern
    number, _, glob = pattern.removeprefix("random:").partition(":")
    share = number.endswith("%")
    try:
        amount = float(number[:-1]) if share else int(number)
    except ValueError:
        amount = 0
    if amount <= 0 or (share and amount > 100):
        raise UsageError(f'{fault.where}: {pattern!r}: must be like "random:2", "random:25%" or "random:2:worker-1*"')
    if share:
        return lambda of: ceil(of * amount / 100.0), glob or RANDOM_FROM
    return lambda of: int(amount), glob or RANDOM_FROM


def _link_changes(options: Any) -> dict[str, Any]:
    """Keys of a degrade fault to fields of a Link."""
    changes = {key: options[key] for key in ("loss", "duplicate", "reorder", "corrupt") if options.get(key) is not None}
    if options.get("latency_ms") is not None:
        changes["latency"] = options["latency_ms"]
    for key, name, scale in SCALED:
        if options.get(key) is not None:
            changes[name] = options[key] * scale
    return changes
