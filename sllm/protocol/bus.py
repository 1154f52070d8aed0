"""The event bus: it hands each event of a node to every handler subscribed to that kind of event, in live runs and in virtual time alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

RECENT_EVENTS = 60  # events kept, to be shown when something turns out to be wrong

Handler = Callable[[Any, Any], object]
"""handler(node, event): the node that told the event, and the event. Metrics, logs, recorder, CSV, pages and checkers all have this form."""


class EventBus:
    """The handlers of each kind of event, in the order of subscription. `recent` has the last `RECENT_EVENTS` events."""

    __slots__ = ("_handlers", "_of_all", "recent")

    def __init__(self) -> None:
        self.recent: deque[Any] = deque(maxlen=RECENT_EVENTS)
        self._handlers: dict[type, tuple[Handler, ...]] = {}
        self._of_all: tuple[Handler, ...] = ()

    def subscribe(self, handler: Handler, *kinds: type) -> None:
        """Call handler(node, event) with events of these kinds; with events of every kind if none is named."""
        if not kinds:
            self._of_all += (handler,)
        for kind in kinds or tuple(self._handlers):
            self._handlers[kind] = (*self.handlers_of(kind), handler)

    def subscribe_all(self, handlers: Mapping[type, Handler]) -> None:
        """Call each handler with events of the kind it stands under."""
        for kind, handler in handlers.items():
            self.subscribe(handler, kind)

    def handlers_of(self, kind: type) -> tuple[Handler, ...]:
        """The handlers called with events of this kind."""
        found = self._handlers.get(kind)
        if found is None:
            found = self._handlers[kind] = self._of_all
        return found

    def publish(self, node: Any, events: Iterable[Any], failed: Callable[[Exception], None] | None = None) -> None:
        """Call the handlers of each event that `node` told, in order. An exception of a handler goes to failed(error), and the next handler is called;
        without `failed` the exception goes to the caller."""
        self.recent.extend(events)
        known = self._handlers
        for event in events:
            handlers = known.get(type(event))
            if handlers is None:
                handlers = self.handlers_of(type(event))
            for handler in handlers:
                try:
                    handler(node, event)
                except Exception as error:
                    if failed is None:
                        raise
                    failed(error)
