"""The event bus: what nodes tell reaches everybody who asked for it, in live runs and in virtual time alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

RECENT_EVENTS = 60  # kept for whoever finds something wrong

Handler = Callable[[Any, Any], object]
"""handler(node, event): the node that told, and what it told. Metrics, logs, recorder, CSV, pages and checkers all have this form."""


class EventBus:
    """Who hears a kind of event, in the order in which they asked. `recent` has the last events told."""

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
        """Each handler with the events of its kind."""
        for kind, handler in handlers.items():
            self.subscribe(handler, kind)

    def handlers_of(self, kind: type) -> tuple[Handler, ...]:
        """Who hears events of this kind."""
        found = self._handlers.get(kind)
        if found is None:
            found = self._handlers[kind] = self._of_all
        return found

    def publish(self, node: Any, events: Iterable[Any], failed: Callable[[Exception], None] | None = None) -> None:
        """Hand events that `node` told to those who hear them, in order. What a handler raises goes to failed(error), and the next handler has its turn;
        without `failed` it goes to the caller."""
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
