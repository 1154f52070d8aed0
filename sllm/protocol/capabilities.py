"""What some nodes can do and others cannot. Whoever needs to know asks once, where the node comes in; no caller looks for attributes by name."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from sllm.protocol.messages import Address


@runtime_checkable
class HasCoordinator(Protocol):
    """A node that talks to one coordinator, whose address may change."""

    coordinator: Address


@runtime_checkable
class AsksCoordinator(HasCoordinator, Protocol):
    """A node that waits for answers of its coordinator, and knows whether there has been one."""

    @property
    def acknowledged(self) -> bool: ...


@runtime_checkable
class Drainable(Protocol):
    """A node that can be told to finish what it does, and to take nothing new."""

    def drain(self, now: float) -> None: ...
