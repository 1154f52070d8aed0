"""The shell that every role shares: a state machine without sockets or clocks.

A driver hands in what arrived and what time it is, and takes out what is to be sent, what has happened and when to come back:

    node.receive_datagram(data, address, now)      or, in virtual time, node.receive(envelope, address, now)
    node.handle_timer(now)
    for data, address in node.datagrams_to_send(): ...
    while (event := node.next_event()): ...
    at = node.next_deadline()                      or, the same without the call, node.wake_at

`now` is float seconds of a monotonic clock; `wall_offset_s` added to it gives the wall clock, which only freshness needs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import update_wrapper
from math import inf
from types import FunctionType
from typing import Any, Protocol

from sllm.protocol.events import Event
from sllm.protocol.messages import COORDINATOR_ID, Address, Envelope, Enveloped, LoadReport, Message, ReportAck, ScheduleError, ScheduleResponse, WorkerLost
from sllm.protocol.recent import Recent

FRESH_WITHIN_S = 30.0  # a datagram stamped further from our wall clock than this is refused
LIFE_TIMEOUT_S = 10.0  # a sender's life that has been silent for so long is forgotten, unless the role has a timeout of its own
REPLAY_WINDOW = 64  # sequence numbers below the highest in which a late datagram is still told from a repeated one
GUARDED_MAX = 200_000  # senders remembered for each message type; those longest silent go first. A repeat they would have shown is harmless
_NONE_SEEN = (1 << REPLAY_WINDOW) - 1

OF_COORDINATOR = frozenset((ScheduleResponse, ScheduleError, ReportAck, WorkerLost))  # what is heard from the coordinator that was asked, and nobody else

Handler = Callable[[Enveloped[Any], Address, float], None]

new_tuple: Callable[[type, tuple[Any, ...]], Any] = tuple.__new__
"""Makes a named tuple, new_tuple(Kind, (fields in order)), in half the time that Kind(...) takes. For the hot paths only: nothing checks the fields."""


class Rejected(Exception):
    """A datagram that changes nothing but a counter; its only argument is the counter's label."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


Judge = Callable[[type, str, int, int, float, float], str]
"""(message type, sender id, incarnation, sequence, wall_s, now) of an authentic datagram -> why it is refused, or ""."""


class Codec(Protocol):
    """Bytes for an envelope, and back. `decode` and `read` are two forms of one thing; what derives from this class need not have a `read` of its own."""

    def encode(self, envelope: Enveloped[Message]) -> bytes: ...

    def decode(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> Envelope:
        """Raises Rejected. `judge` is asked once the datagram is known to be authentic, before its body is looked at."""

    def read(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> Envelope | str:
        """The envelope, or why there is none. Under a flood most datagrams are refused, and to raise for each costs more than to say so."""
        try:
            return self.decode(data, judge, now)
        except Rejected as rejection:
            return rejection.reason

    def forget(self, sender_id: str) -> None:
        """Nobody keeps the last report of this sender: a codec that would know it again need not."""


class Node:
    """Base of every role. A role fills `handlers`, overrides `handle_timer` and keeps `wake_at` right.

    Slots, because a role has more attributes than the interpreter shares between the dictionaries of its objects (30): beyond, every access is slower.
    """

    __slots__ = (
        "_guard", "_heard_from", "_sequences", "codec", "coordinator", "events", "handlers", "incarnation", "last_refused", "life_timeout_s", "node_id",
        "on_refused", "outbox", "rejected", "wake_at", "wall_offset_s",
    )  # fmt: skip

    def __init_subclass__(cls) -> None:
        """Give each role its own copy of the code that every message runs through: the interpreter specialises code for one class of `self` (PEP 659),
        and where several roles shared it, every attribute would be looked up the long way."""
        for name in ("receive", "judge", "send"):
            function = getattr(cls, name)
            copy = FunctionType(function.__code__.replace(), function.__globals__, name, function.__defaults__, function.__closure__)
            setattr(cls, name, update_wrapper(copy, function))

    def __init__(
        self, node_id: str, incarnation: int, *, codec: Codec | None = None, wall_offset_s: float = 0.0, life_timeout_s: float = LIFE_TIMEOUT_S
    ) -> None:
        self.node_id = node_id
        self.incarnation = incarnation  # start time, ns since 1970; a later life has a higher one
        self.codec = codec
        self.wall_offset_s = wall_offset_s
        self.life_timeout_s = life_timeout_s
        self.coordinator: Address = ("", 0)  # of a role that asks it
        self._heard_from: Address = ("", 0)  # the source of what is being judged
        self.wake_at = inf  # when `handle_timer` wants to be called, absolute; inf: not until something arrives
        self.outbox: list[tuple[Enveloped[Any], Address]] = []
        self.events: list[Event] = []
        self.rejected: Counter[str] = Counter()
        self.on_refused: Callable[[str, Address], None] | None = None  # is told the reason and the source of a datagram refused by `receive_datagram`
        self.last_refused: tuple[str, Address] | None = None  # of several alike in a row, only the first is told. Set it to None to hear of them again
        self.handlers: dict[type, Handler] = {}
        self._sequences: defaultdict[type, int] = defaultdict(int)
        self._guard: defaultdict[type, Recent[str, list[Any]]] = defaultdict(Recent)
        """For each message type and sender: [life, the number after the highest, bitmap of those missing below the highest, when it was heard last]."""

    def set_wall_clock(self, wall_offset_s: float, now: float) -> None:
        """The wall clock was set. If it was so far ahead at our start that peers would refuse our life as one of the future, now that they hear us, our life
        begins anew: none of them has heard of it."""
        self.wall_offset_s = wall_offset_s
        if self.incarnation > (max(now, now + wall_offset_s) + FRESH_WITHIN_S) * 1e9:
            self.incarnation = max(0, round((now + wall_offset_s) * 1e9))

    # --- in -------------------------------------------------------------------------------------------------------------------------

    def receive_datagram(self, data: bytes | memoryview, addr: Address, now: float) -> None:
        """Hear bytes from the network. Whatever they are, nothing is raised: what is not accepted is counted in `rejected` by reason."""
        assert self.codec is not None, "a node without a codec hears envelopes only"
        self._heard_from = addr
        envelope = self.codec.read(data, self.judge, now)
        if not isinstance(envelope, str):
            self.handlers[type(envelope[4])](envelope, addr, now)
            return
        self.rejected[envelope] += 1
        refused = envelope, addr
        if refused != self.last_refused:
            self.last_refused = refused
            if self.on_refused is not None:
                self.on_refused(envelope, addr)

    def receive(self, envelope: Enveloped[Any], addr: Address, now: float) -> None:
        """Hear an authentic envelope."""
        sender_id, incarnation, sequence, wall_s, message = envelope
        kind = type(message)
        handler = self.handlers.get(kind)
        wall_now = now + self.wall_offset_s
        if handler is not None and abs(wall_now - wall_s) <= FRESH_WITHIN_S:  # the usual cases; `judge` finds the same in them
            if kind is LoadReport:
                if incarnation * 1e-9 <= wall_now + FRESH_WITHIN_S:
                    handler(envelope, addr, now)
                    return
                known = None
            else:
                known = self._guard[kind].new.get(sender_id)
            if known is not None and incarnation == known[0] and (sender_id != COORDINATOR_ID or addr == self.coordinator):
                ahead = sequence - known[1]
                if ahead >= 0:
                    if ahead or known[2]:
                        known[2] = _missing_after(known[2], ahead)
                    known[1] = sequence + 1
                    known[3] = now
                    handler(envelope, addr, now)
                    return
        self._heard_from = addr
        reason = self.judge(kind, sender_id, incarnation, sequence, wall_s, now)
        if reason:
            self.rejected[reason] += 1
        else:
            self.handlers[kind](envelope, addr, now)

    def judge(self, kind: type, sender_id: str, incarnation: int, sequence: int, wall_s: float, now: float) -> str:
        """Why something authentic is refused: it is not for this role, not from the coordinator that was asked, stale or repeated. "" if it is not; then its
        number is taken."""
        if kind not in self.handlers:
            return "unexpected"
        if kind in OF_COORDINATOR and (sender_id != COORDINATOR_ID or self._heard_from != self.coordinator):
            return "not_asked"  # before its number counts, which would make those of the coordinator old
        wall_now = now + self.wall_offset_s
        if not -FRESH_WITHIN_S <= wall_now - wall_s <= FRESH_WITHIN_S:  # "not": a time that is no number is not fresh
            return self.refuse(kind, "stale_time", now)
        latest_s = (wall_now if wall_now > now else now) + FRESH_WITHIN_S  # virtual time begins at 0, whatever wall clocks say
        if incarnation * 1e-9 > latest_s:  # it is the time of a start
            return self.refuse(kind, "future_incarnation", now)
        if kind is LoadReport:
            return self.judge_report(sender_id, incarnation, sequence, now)
        senders = self._guard[kind]
        known = senders.get(sender_id)
        if known is None or incarnation > known[0] or (now - known[3] >= self.life_timeout_s and self._is_over(known, incarnation, sequence, now)):
            self._guard_from(senders, sender_id, [incarnation, sequence + 1, _NONE_SEEN >> max(0, REPLAY_WINDOW + 1 - sequence), now])
            return ""
        life, following, missing, _ = known
        if incarnation < life:
            return self.refuse(kind, "old_incarnation", now)
        if sender_id not in senders.new:
            self._guard_from(senders, sender_id, known)
        ahead = sequence - following
        if ahead >= 0:
            known[1] = sequence + 1
            known[2] = _missing_after(missing, ahead)
            known[3] = now
            return ""
        bit = -ahead - 2
        if bit < 0 or bit >= REPLAY_WINDOW or not missing >> bit & 1:
            return "replayed"
        known[2] = missing ^ 1 << bit
        known[3] = now
        return ""

    def judge_report(self, sender_id: str, incarnation: int, sequence: int, now: float) -> str:
        """Why an authentic load report is refused before its body is looked at; "" if it is not. Reports are ordered by the fleet table, more strictly than
        the guard would: a role that has one says here what the table knows already."""
        return ""

    def _is_over(self, known: list[Any], incarnation: int, sequence: int, now: float) -> bool:
        """Whether a life that has been silent for the timeout makes way for a message that is older by its numbers. For one of another life: a clock was set
        back. For one of the same life: somebody else had spoken for it with too high a number; after such a silence whatever could be replayed is stale."""
        if incarnation < known[0]:
            return True
        return bool(sequence < known[1] and now - known[3] > 2.0 * FRESH_WITHIN_S)

    @staticmethod
    def _guard_from(senders: Recent[str, list[Any]], sender_id: str, known: list[Any]) -> None:
        """Keep what is known of a sender that has just been heard; of those silent for longest half are forgotten at once when there are too many."""
        if len(senders.new) >= GUARDED_MAX // 2:
            senders.turn()
        senders.new[sender_id] = known

    def refuse(self, kind: type, reason: str, now: float) -> str:
        """A message of this kind is refused for a time in it: returns the reason. A role that keeps books of a kind enters it there too."""
        return reason

    def relocate(self, address: Address) -> None:
        """A driver says where this node is heard from now on."""

    def handle_timer(self, now: float) -> None:
        """Do what is due at `now`."""

    def next_deadline(self) -> float | None:
        """When `handle_timer` wants to be called, absolute; None: not until something arrives."""
        return self.wake_at if self.wake_at < inf else None

    # --- out ------------------------------------------------------------------------------------------------------------------------

    def send(self, message: Message, addr: Address, now: float) -> None:
        """Queue a message for the driver to send."""
        kind = type(message)
        sequences = self._sequences
        sequences[kind] = sequence = sequences[kind] + 1
        self.outbox.append(((self.node_id, self.incarnation, sequence, now + self.wall_offset_s, message), addr))

    def datagrams_to_send(self, unsendable: Callable[[Exception], None] | None = None) -> list[tuple[bytes, Address]]:
        """Take out what is to be sent, packed and signed. `unsendable` is told of each message that cannot be packed, and the others are packed all the
        same; without it, the error is raised."""
        if not self.outbox:
            return []
        assert self.codec is not None
        encode, outbox = self.codec.encode, self.outbox[:]
        self.outbox.clear()
        datagrams = []
        for envelope, addr in outbox:
            try:
                datagrams.append((encode(envelope), addr))
            except Exception as error:
                if unsendable is None:
                    raise
                unsendable(error)
        return datagrams

    def next_event(self) -> Event | None:
        """Take out the oldest event, or None."""
        return self.events.pop(0) if self.events else None


def _missing_after(missing: int, ahead: int) -> int:
    """The bitmap of numbers missing below the highest, once one has come that is `ahead` numbers further than the next."""
    return (missing << ahead + 1 | (1 << ahead) - 1) & _NONE_SEEN if ahead < REPLAY_WINDOW else _NONE_SEEN
