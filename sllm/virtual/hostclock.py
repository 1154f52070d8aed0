"""The clocks of a simulated machine: a monotonic clock, which may have a rate of its own, and a wall clock, which may be set wrong."""

from __future__ import annotations

from copy import copy

from sllm.protocol.node import Node

STILL_RATE = 0.01  # a machine with a slower clock counts as standing still


class HostClock:
    """The clocks of one machine. Times of the world are the `now` of its methods."""

    __slots__ = ("_base_s", "_node_base_s", "is_true", "rate", "wall_jump_s", "wall_lag_s", "wall_steady")

    def __init__(self) -> None:
        self.rate = 1.0  # seconds the monotonic clock runs in a second of the world
        self.is_true = True  # the monotonic clock shows the time of the world
        self._base_s = 0.0  # time of the world at the last change of the rate
        self._node_base_s = 0.0  # the monotonic clock at that time of the world
        self.wall_jump_s = 0.0  # seconds by which the wall clock was set wrong
        self.wall_steady = False  # the wall clock keeps true time although the monotonic one does not
        self.wall_lag_s = 0.0  # seconds that have been added to the wall clock to keep true time

    @property
    def stands_still(self) -> bool:
        return self.rate < STILL_RATE

    @property
    def wall_offset_s(self) -> float:
        """Seconds by which the wall clock of a life that begins now is ahead."""
        return self.wall_jump_s + self.wall_lag_s

    def node_time(self, now: float) -> float:
        """The monotonic clock."""
        return now if self.is_true else self._node_base_s + (now - self._base_s) * self.rate

    def world_time(self, node_s: float) -> float:
        """The time of the world at which the monotonic clock shows `node_s`."""
        return node_s if self.is_true else self._base_s + (node_s - self._node_base_s) / self.rate

    def read(self, node: Node | None, now: float) -> float:
        """The monotonic clock. Corrects the node's wall clock first if that clock is to keep true time."""
        node_now = self.node_time(now)
        if self.wall_steady and node is not None:
            node.wall_offset_s += now - node_now - self.wall_lag_s
            self.wall_lag_s = now - node_now
        return node_now

    def set_rate(self, rate: float, now: float, node_now: float, *, wall_steady: bool) -> None:
        """Let the monotonic clock run at `rate` from `now` on, when it shows `node_now`."""
        self._base_s, self._node_base_s, self.rate = now, node_now, rate
        self.is_true = rate == 1.0 and now == node_now
        self.wall_steady = wall_steady

    def copy(self) -> HostClock:
        """A copy: clocks that show the same times and go on independently."""
        return copy(self)
