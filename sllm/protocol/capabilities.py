"""What some nodes can do and others cannot. Code that handles nodes of any role asks for a capability, and never looks for an attribute by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from sllm.protocol.messages import Address

T = TypeVar("T")
_KNOWN: dict[tuple[type, object], bool] = {}  # which class of nodes has which capability


def capable(node: object, capability: Callable[..., T]) -> T | None:
    """The node, typed as one that has the capability (one of the protocols of this module); None if the node does not have it. Each class of nodes is
    tested once, because `isinstance` with a protocol takes microseconds."""
    key = type(node), capability
    known = _KNOWN.get(key)
    if known is None:
        known = _KNOWN[key] = isinstance(node, cast(type, capability))
    return cast(T, node) if known else None


@runtime_checkable
class CarriesRequests(Protocol):
    """A node that follows requests until they end, such as a client."""

    @property
    def in_flight(self) -> int:
        """Requests taken and not yet ended."""
        ...

    def unfinished(self) -> Iterator[Any]:
        """The requests taken and not yet ended, in order of arrival, each with its `arrival_s`, the `worker_id` of its placement, and `first_tokens`: when the
        first token of each worker came."""
        ...

    def submit(self, asked: Any, now: float) -> None:
        """Take a request, as a workload describes it."""
        ...


@runtime_checkable
class Drainable(Protocol):
    """A node that can be told to finish the requests it has and to take no new ones."""

    def drain(self, now: float) -> None: ...


@runtime_checkable
class HasCoordinator(Protocol):
    """A node that talks to one coordinator, whose address may change."""

    coordinator: Address


@runtime_checkable
class AsksCoordinator(HasCoordinator, Protocol):
    """A node that waits for answers of its coordinator, and knows whether an answer has come."""

    @property
    def acknowledged(self) -> bool: ...


@runtime_checkable
class HasEngine(Protocol):
    """A node that serves requests with an engine (`sllm.engine.base.Engine`), such as a worker."""

    engine: Any


@runtime_checkable
class MadeOfParts(Protocol):
    """A node that is a composition, such as a worker."""

    @property
    def parts(self) -> tuple[object, ...]:
        """The objects that do the node's work and keep its tables."""
        ...


@runtime_checkable
class ReportsLoad(Protocol):
    """A node that sends load reports, such as a worker."""

    reports_sent: int


@runtime_checkable
class TracksWorkers(Protocol):
    """A node that hears load reports and keeps a table of workers (`sllm.fleet.table.Fleet`), such as a coordinator."""

    node_id: str
    config: Any  # its `worker_timeout_s`, `suspect_intervals` and `report_interval_s` say when a worker has been silent for too long
    fleet: Any
    ready: bool  # it has listened for long enough to place requests
    degraded: str  # why it holds back from calling workers dead; "": it does not
    reports_accepted: int
    reports_rejected: Counter[str]  # by reason
