"""The network: what happens to a datagram between two hosts (latency, loss, duplication, reordering, corruption, cuts, bandwidth).

A `Network` decides, the world carries out. All draws come from one random number generator and in the order in which messages are sent, whether messages
travel as objects or as bytes, so that both give the same run. A quality that is zero draws nothing.

sent + duplicated = delivered + lost (by cause) + in flight, always. Duplicated and lost messages are also counted by kind of message.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from sllm.protocol.messages import AnyEnvelope, Message
from sllm.protocol.record import Record

# Causes of loss.
RANDOM = "random"  # the link dropped it
CUT = "cut"  # a partition
QUEUE = "queue"  # the link's queue was too long for its bandwidth
OVERFLOW = "overflow"  # the receiver's socket buffer was full
DOWN = "down"  # nobody listened at the address any more
UNROUTABLE = "unroutable"  # nobody ever listened at the address

HEADER_BYTES = 120  # approximate size of a datagram without its body: Ethernet, IP and UDP headers, our header and tag
ATOM_BYTES = 6  # a number in the body, with its opcode
SIGMA_MAX = 10.0  # of a lognormal latency; at this sigma one latency in six is more than 22,000 times the median
TEXT_BYTES = 3  # bytes of a string beside its characters


class Latency:
    """One-way latency of a link, in seconds. `kind` is constant, uniform, exponential or lognormal.

    constant: `a`. uniform: between `a` and `b`. exponential: `a` plus an exponential of mean `b`. lognormal: median `a`, sigma `b` of its logarithm.
    """

    __slots__ = ("a", "b", "kind")

    KINDS = ("constant", "uniform", "exponential", "lognormal")

    def __init__(self, kind: str, a: float, b: float = 0.0) -> None:
        if kind not in self.KINDS:
            raise ValueError(f"latency kind {kind!r}: must be one of {', '.join(self.KINDS)}")
        if kind == "lognormal" and b > SIGMA_MAX:
            raise ValueError(f"latency lognormal: sigma is {b:.12g}, must be at most {SIGMA_MAX:.12g}")
        if not (a >= 0.0 and b >= 0.0 and math.isfinite(a) and math.isfinite(b)) or (kind == "uniform" and b < a):
            raise ValueError(f"latency {kind}({a}, {b}): must be finite, not negative and, if uniform, in order")
        self.kind = kind
        self.a = a
        self.b = b

    def draw_s(self, rng: random.Random) -> float:
        if self.kind == "constant":
            return self.a
        if self.kind == "uniform":
            return self.a + (self.b - self.a) * rng.random()
        if self.kind == "exponential":
            return self.a - self.b * math.log(1.0 - rng.random())
        return self.a * math.exp(self.b * rng.gauss(0.0, 1.0))

    def __repr__(self) -> str:
        return f"{self.kind}({self.a:.12g}, {self.b:.12g})" if self.kind != "constant" else f"{self.a:.12g} s"


class Link(NamedTuple):
    """Quality of the way from one host to another. Probabilities are per datagram, 0..1."""

    latency: Latency
    loss: float = 0.0
    duplicate: float = 0.0  # a second copy arrives too, after a latency of its own
    reorder: float = 0.0  # held back by up to `reorder_extra_s`, so that later datagrams overtake it
    reorder_extra_s: float = 0.01
    corrupt: float = 0.0  # one bit arrives wrong
    bandwidth_bytes_per_s: float = 0.0  # 0: unlimited
    queue_max_s: float = 1.0  # a datagram that would wait longer for the bandwidth is dropped

    @property
    def is_plain(self) -> bool:
        """Whether the link has neither randomness nor state."""
        return self.latency.kind == "constant" and not (self.loss or self.duplicate or self.reorder or self.corrupt or self.bandwidth_bytes_per_s)


class Rule(NamedTuple):
    """A temporary change of some links, or a cut of them. None stands for every host."""

    sources: frozenset[str] | None
    targets: frozenset[str] | None
    changes: dict[str, Any] | None  # fields of Link; None: a cut

    def covers(self, source: str, target: str) -> bool:
        return (self.sources is None or source in self.sources) and (self.targets is None or target in self.targets)


Copy = tuple[float, float]
"""One arrival: (absolute time, place of a wrong bit as a part of the datagram from 0 to 1, or -1 for none)."""


class Network:
    """The quality of every link, the present rules that change it, and the counts of datagrams. Host names identify the ends of a link."""

    def __init__(self, link: Link | None = None, *, instant: Collection[type[Message]] = ()) -> None:
        """`instant`: messages of these kinds take no time and are never lost, such as load reports, for perfect knowledge."""
        self.link = link if link is not None else Link(Latency("constant", 0.0002))
        self.instant = frozenset(instant)
        self.rng = random.Random(0)  # replaced by the world's generator
        self.sent = 0
        self.delivered = 0
        self.duplicated = 0
        self.duplicated_by_kind: Counter[type[Message]] = Counter()
        self.corrupted = 0
        self.lost: Counter[str] = Counter()
        self.lost_by_kind: Counter[type[Message]] = Counter()  # includes spoiled datagrams, whose receivers cannot tell the kind
        self._rules: list[Rule] = []
        self._resolved: dict[tuple[str, str], Link | None] = {}
        self._busy_until: dict[tuple[str, str], float] = {}
        self.on_change: Callable[[], None] | None = None  # the world looks again when a link changes

    @property
    def in_flight(self) -> int:
        """Datagrams on their way, or held by a frozen host."""
        return self.sent + self.duplicated - self.delivered - sum(self.lost.values())

    @property
    def plain_latency_s(self) -> float | None:
        """The latency, if it is constant for all datagrams and no link has any fault; otherwise None."""
        return self.link.latency.a if self.link.is_plain and not self._rules and not self.instant else None

    # --- change -----------------------------------------------------------------------------------------------------------------------

    def set_link(self, link: Link) -> None:
        """The quality of every link that no rule changes."""
        self.link = link
        self._changed()

    def degrade(self, sources: Collection[str] | None, targets: Collection[str] | None, **changes: Any) -> Rule:
        """Change fields of the links from `sources` to `targets` until the rule is removed; a later rule wins over an earlier one."""
        self.link._replace(**changes)  # an unknown field raises here
        return self._add(Rule(_names(sources), _names(targets), changes))

    def cut(self, sources: Collection[str] | None, targets: Collection[str] | None) -> Rule:
        """Lose every datagram from `sources` to `targets` until the rule is removed. The other direction needs a rule of its own."""
        return self._add(Rule(_names(sources), _names(targets), None))

    def remove(self, *rules: Rule) -> None:
        """Undo what degrade() or cut() did."""
        self._rules = [known for known in self._rules if not any(known is rule for rule in rules)]
        self._changed()

    def _add(self, rule: Rule) -> Rule:
        self._rules.append(rule)
        self._changed()
        return rule

    def _changed(self) -> None:
        self._resolved.clear()
        if self.on_change is not None:
            self.on_change()

    # --- decide -----------------------------------------------------------------------------------------------------------------------

    def link_between(self, source: str, target: str) -> Link | None:
        """The present quality of the link; None if it is cut."""
        key = (source, target)
        if key in self._resolved:
            return self._resolved[key]
        link: Link | None = self.link
        for rule in self._rules:
            if not rule.covers(source, target):
                continue
            if rule.changes is None:
                link = None
                break
            assert link is not None
            link = link._replace(**rule.changes)
        self._resolved[key] = link
        return link

    def carry(self, source: str, target: str, envelope: AnyEnvelope, now: float) -> Iterable[Copy]:
        """Count one datagram as sent, and return the arrivals of its copies: none if it is lost, two if it is duplicated."""
        self.sent += 1
        kind = type(envelope.message)
        if kind in self.instant:
            return ((now, -1.0),)
        link = self.link_between(source, target)
        if link is None:
            self.lose(CUT, kind)
            return ()
        rng = self.rng
        if link.loss and rng.random() < link.loss:
            self.lose(RANDOM, kind)
            return ()
        leaves = now
        if link.bandwidth_bytes_per_s:
            leaves = self._through_queue(source, target, envelope, now, link)
            if leaves < 0.0:
                self.lose(QUEUE, kind)
                return ()
        first = self._arrival(link, leaves)
        if link.duplicate and rng.random() < link.duplicate:
            self.duplicated += 1
            self.duplicated_by_kind[kind] += 1
            return first, self._arrival(link, leaves)
        return (first,)

    def lose(self, cause: str, kind: type[Message]) -> None:
        """Count one datagram as lost."""
        self.lost[cause] += 1
        self.lost_by_kind[kind] += 1

    def _arrival(self, link: Link, leaves: float) -> Copy:
        rng = self.rng
        at = leaves + link.latency.draw_s(rng)
        if link.reorder and rng.random() < link.reorder:
            at += link.reorder_extra_s * rng.random()
        if link.corrupt:
            draw = rng.random()
            if draw < link.corrupt:
                self.corrupted += 1
                return at, draw / link.corrupt  # a draw below `corrupt`, divided by `corrupt`, is uniform from 0 to 1
        return at, -1.0

    def _through_queue(self, source: str, target: str, envelope: AnyEnvelope, now: float, link: Link) -> float:
        """The time at which the last byte is on the wire; -1 if the queue is too long."""
        key = (source, target)
        start = max(now, self._busy_until.get(key, 0.0))
        if start - now > link.queue_max_s:
            return -1.0
        done = start + estimated_bytes(envelope) / link.bandwidth_bytes_per_s
        self._busy_until[key] = done
        return done


def estimated_bytes(envelope: AnyEnvelope) -> int:
    """The approximate size of the datagram, equal for objects and bytes, so that bandwidth acts alike on both."""
    return HEADER_BYTES + len(envelope.sender_id) + _body_bytes(envelope.message.values())


def _body_bytes(value: object) -> int:
    if isinstance(value, Record):
        value = value.values()
    if isinstance(value, tuple):
        return ATOM_BYTES + sum(map(_body_bytes, value))
    return TEXT_BYTES + len(value) if isinstance(value, str) else ATOM_BYTES


def _names(hosts: Collection[str] | None) -> frozenset[str] | None:
    return None if hosts is None else frozenset(hosts)
