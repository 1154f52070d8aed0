"""The base of every role: a state machine without sockets or clocks.

A driver hands in what arrived and the time, and takes out the datagrams to send, the events and the next deadline:

    node.receive_datagram(data, address, now)      or, in virtual time, node.receive(envelope, address, now)
    node.handle_timer(now)
    for data, address in node.datagrams_to_send(): ...
    for event in node.events: ...                  and node.events.clear()
    at = node.next_deadline()                      or, the same without the call, node.wake_at

`now` is float seconds of a monotonic clock; `wall_offset_s` added to it gives the wall clock, which only freshness needs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

from sllm.protocol.messages import COORDINATOR_ID, Address, AnyEnvelope, Envelope, Message
from sllm.protocol.native import mypyc_attr
from sllm.protocol.replay import FRESH_WITHIN_S, Senders

LIFE_TIMEOUT_S = 10.0  # silence after which a sender's life is forgotten, unless the role has a timeout of its own

Handler = Callable[[Any, Address, float], None]
"""handler(envelope, address, now): hears a message of one type."""


class Rejected(Exception):
    """A datagram is refused and changes nothing but a counter. The only argument is the counter's label."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


Judge = Callable[[type[Message], str, int, int, float, float], str]
"""(message type, sender id, incarnation, sequence, wall_s, now) of an authentic datagram -> why the datagram is refused, or ""."""


class Codec(Protocol):
    """Packs an envelope into bytes and back."""

    def encode(self, envelope: AnyEnvelope) -> bytes: ...

    def read(self, data: bytes | memoryview, judge: Judge | None = None, now: float = 0.0) -> AnyEnvelope | str:
        """The envelope, or the reason for a refusal. Under a flood most datagrams are refused, and raising an exception costs more than returning a text.
        `judge` is asked after the datagram has proved authentic and before its body is parsed."""

    def forget(self, sender_id: str) -> None:
        """Drop what the codec caches of this sender, whose last message nobody keeps any more."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Node:
    """Base of every role. A role fills `handlers`, overrides `handle_timer` and keeps `wake_at` right."""

    __slots__ = (
        "_heard_from", "_replay", "_sequences", "codec", "coordinator", "events", "handlers", "incarnation", "last_refused", "life_timeout_s", "node_id",
        "on_refused", "outbox", "rejected", "wake_at", "wall_offset_s",
    )  # fmt: skip

    def __init__(
        self, node_id: str, incarnation: int, *, codec: Codec | None = None, wall_offset_s: float = 0.0, life_timeout_s: float = LIFE_TIMEOUT_S
    ) -> None:
        self.node_id = node_id
        self.incarnation = incarnation  # start time, ns since 1970; a later life has a higher one
        self.codec = codec
        self.wall_offset_s = wall_offset_s
        self.life_timeout_s = life_timeout_s
        self.coordinator: Address = ("", 0)  # where the coordinator is, for roles that ask it
        self._heard_from: Address = ("", 0)  # the source of the datagram being judged
        self.wake_at = inf  # when `handle_timer` is to be called, absolute seconds; inf: not until something arrives
        self.outbox: list[tuple[AnyEnvelope, Address]] = []
        self.events: list[Any] = []
        self.rejected: Counter[str] = Counter()
        self.on_refused: Callable[[str, Address], None] | None = None  # called with the reason and the source of a datagram refused by `receive_datagram`
        self.last_refused: tuple[str, Address] | None = None  # of equal refusals in a row only the first is told; None: the next refusal is told
        self.handlers: dict[type[Message], Handler] = {}
        self._sequences: defaultdict[type[Message], int] = defaultdict(int)
        self._replay: defaultdict[type[Message], Senders] = defaultdict(Senders)

    def set_wall_clock(self, wall_offset_s: float, now: float) -> None:
        """The wall clock was set to `now` + `wall_offset_s`. If the old clock was so far ahead at this life's start that peers would now refuse the
        incarnation as one of the future, the node takes a new incarnation: no peer has accepted the old one."""
        self.wall_offset_s = wall_offset_s
        if self.incarnation > (max(now, now + wall_offset_s) + FRESH_WITHIN_S) * 1e9:
            self.incarnation = max(0, round((now + wall_offset_s) * 1e9))

    # --- in -------------------------------------------------------------------------------------------------------------------------

    def receive_datagram(self, data: bytes | memoryview, addr: Address, now: float) -> None:
        """Hear bytes from the network. No bytes raise an error: a datagram that is not accepted is counted in `rejected` by reason."""
        assert self.codec is not None, "a node without a codec hears envelopes only"
        self._heard_from = addr
        envelope = self.codec.read(data, self.judge, now)
        if not isinstance(envelope, str):
            self.handlers[type(envelope.message)](envelope, addr, now)
            return
        self.rejected[envelope] += 1
        refused = envelope, addr
        if refused != self.last_refused:
            self.last_refused = refused
            if self.on_refused is not None:
                self.on_refused(envelope, addr)

    def receive(self, envelope: AnyEnvelope, addr: Address, now: float) -> None:
        """Hear an authentic envelope."""
        self._heard_from = addr
        kind = type(envelope.message)
        reason = self.judge(kind, envelope.sender_id, envelope.incarnation, envelope.sequence, envelope.wall_s, now)
        if reason:
            self.rejected[reason] += 1
        else:
            self.handlers[kind](envelope, addr, now)

    def judge(self, kind: type[Message], sender_id: str, incarnation: int, sequence: int, wall_s: float, now: float) -> str:
        """Why an authentic message is refused: it is not for this role, not from the coordinator that was asked, stale or repeated. "" if the message is
        accepted; its sequence number then counts as used."""
        if kind not in self.handlers:
            return "unexpected"
        if kind.OF_COORDINATOR and (sender_id != COORDINATOR_ID or self._heard_from != self.coordinator):
            return "not_asked"  # without using the number, which would make the true coordinator's numbers old
        wall_now = now + self.wall_offset_s
        if not -FRESH_WITHIN_S <= wall_now - wall_s <= FRESH_WITHIN_S:  # written with "not" so that NaN is refused
            return self.refuse(kind, "stale_time", now)
        latest_s = (wall_now if wall_now > now else now) + FRESH_WITHIN_S  # virtual time begins at 0, whatever wall clocks say
        if incarnation * 1e-9 > latest_s:  # an incarnation is the time of a start
            return self.refuse(kind, "future_incarnation", now)
        if kind.ORDERED:
            return self.judge_order(kind, sender_id, incarnation, sequence, now)
        reason = self._replay[kind].admit(sender_id, incarnation, sequence, now, self.life_timeout_s)
        return self.refuse(kind, reason, now) if reason == "old_incarnation" else reason

    def judge_order(self, kind: type[Message], sender_id: str, incarnation: int, sequence: int, now: float) -> str:
        """Why a message whose order its role checks (`Message.ORDERED`) is refused before its body is parsed; "" if the message is accepted. A role that hears
        such messages overrides this method."""
        return ""

    def refuse(self, kind: type, reason: str, now: float) -> str:
        """Count nothing and return the reason: a message of this kind is refused for a time in its header. A role that counts refusals of a kind of
        message overrides this method."""
        return reason

    def relocate(self, address: Address) -> None:
        """The driver receives for this node at `address` from now on."""

    def handle_timer(self, now: float) -> None:
        """Do what is due at `now`."""

    def next_deadline(self) -> float | None:
        """When `handle_timer` is to be called, absolute seconds; None: not until something arrives."""
        return self.wake_at if self.wake_at < inf else None

    # --- out ------------------------------------------------------------------------------------------------------------------------

    def send(self, message: Message, addr: Address, now: float) -> None:
        """Queue a message for the driver to send."""
        kind = type(message)
        sequence = self._sequences[kind] = self._sequences[kind] + 1
        self.outbox.append((Envelope(self.node_id, self.incarnation, sequence, now + self.wall_offset_s, message), addr))

    def datagrams_to_send(self, unsendable: Callable[[Exception], None] | None = None) -> list[tuple[bytes, Address]]:
        """Take out the messages to send, packed and signed. unsendable(error) is called for each message that cannot be packed, and the other messages are
        still packed; without `unsendable` the error is raised."""
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
