"""Carriers take datagrams from host to host: a fast one for a network without faults and with one constant latency, and one for every other network.

A world has one carrier at a time, and another one as soon as its network changes. Both give the same run on a plain network.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from sllm.protocol.node import Node
from sllm.virtual.datagram import Packed, Spoiled, flip_bit, kind_of
from sllm.virtual.host import Host
from sllm.virtual.network import UNROUTABLE

if TYPE_CHECKING:
    from sllm.virtual.world import Entry, World


class Carrier:
    """Sends the datagrams in the outboxes of nodes."""

    __slots__ = ("_world",)

    def __init__(self, world: World) -> None:
        self._world = world

    def transmit(self, host: Host, node: Node) -> None:
        """Empty the outbox of a host's node, and schedule the arrivals."""
        raise NotImplementedError


class PlainCarrier(Carrier):
    """For one constant latency and a network without faults. Datagrams then arrive in the order in which they are sent, and a queue (the lane) replaces the
    heap."""

    __slots__ = ("_lane", "_latency_s")

    def __init__(self, world: World, latency_s: float, lane: deque[Entry]) -> None:
        super().__init__(world)
        self._latency_s = latency_s
        self._lane = lane

    def transmit(self, host: Host, node: Node) -> None:
        world, outbox = self._world, host.outbox
        at = world.now + self._latency_s
        world.network.sent += len(outbox)
        for envelope, address in outbox:
            target = world.routes.get(address)
            if target is not None:
                self._lane.append((at, world.order(), target, envelope, host.address))
            else:
                world.network.lose(UNROUTABLE, kind_of(envelope))
        outbox.clear()


class LinkCarrier(Carrier):
    """Asks the network about each datagram, and carries datagrams as bytes if the world has a codec (`--wire`)."""

    __slots__ = ()

    def transmit(self, host: Host, node: Node) -> None:
        outbox = node.outbox[:]
        node.outbox.clear()
        for envelope, address in outbox:
            target = self._world.routes.get(address)
            if target is not None:
                self._send(host, node, target, envelope)
            else:
                self._world.network.sent += 1
                self._world.network.lose(UNROUTABLE, kind_of(envelope))

    def _send(self, host: Host, node: Node, target: Host, envelope: Any) -> None:
        """Schedule the arrivals of one datagram: none if it is lost, several if the network copies it."""
        world, source = self._world, host.address
        packed = Packed(_pack(node, envelope), kind_of(envelope)) if world.wire else None
        for at, flip in world.network.carry(host.name, target.name, envelope, world.now):
            if flip >= 0.0:
                spoiled = Spoiled(target, flip_bit(packed.data, flip) if packed is not None else None, kind_of(envelope))
                world.push(at, spoiled, spoiled, source)
            elif type(envelope.message) in world.network.instant:
                target.happen(packed or envelope, source)
            else:
                world.push(at, target, packed or envelope, source)


def _pack(node: Node, envelope: Any) -> bytes:
    assert node.codec is not None, "bytes on the wire need a codec in every node"
    return node.codec.encode(envelope)
