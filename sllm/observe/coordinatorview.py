"""What a coordinator serves over HTTP: health, the fleet page, /state and /metrics. The coordinator's own process and a live run of a whole fleet use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sllm.fleet.states import STATES
from sllm.live.bridge import Answer
from sllm.observe.fleetview import FleetPicture, History, Photographer, cells_of, page_of, summary_of
from sllm.observe.metrics import CoordinatorMetrics
from sllm.protocol.bus import EventBus
from sllm.protocol.events import CoordinatorReady


class CoordinatorView:
    """The coordinator's answers to HTTP requests. All methods are called in the loop's thread, except `page_state` and `ready`, which any thread may call."""

    def __init__(
        self,
        policy: str,
        coordinator: Callable[[], Any],
        now: Callable[[], float],
        later: Callable[[Callable[[], None]], Any],
        kernel_drops: Callable[[], int],
        started_wall_s: float,
    ) -> None:
        """`policy`: the name that the page shows. coordinator() returns the present life of the coordinator. later(function) lets the loop call the function
        in one of its next rounds."""
        self._policy = policy
        self._coordinator = coordinator
        self._kernel_drops = kernel_drops
        self.metrics = CoordinatorMetrics(started_wall_s)
        self._history = History()
        self._ready_at = 0.0  # when the listening time was over
        self._photographer = Photographer(lambda: coordinator().fleet, now, later)

    def ready(self) -> tuple[bool, str]:
        node = self._coordinator()
        if not node.ready:
            return False, "listening for reports after a start"
        if node.rival:
            return False, "workers say that another coordinator answers under this address: stop one of them"
        if not node.fleet.rows:
            return True, "ready, no worker has reported yet"
        return True, f"ready, degraded: {node.degraded}" if node.degraded else "ready"

    def subscribe(self, bus: EventBus) -> None:
        """Subscribe to the events that the page and the metrics need."""
        bus.subscribe_all(self.metrics.handlers)
        bus.subscribe_all(self._history.handlers)
        bus.subscribe(self._on_ready, CoordinatorReady)

    def _on_ready(self, node: object, event: CoordinatorReady) -> None:
        self._ready_at = event.at

    def tick(self) -> None:
        """To be called once a second."""
        self._history.tick()

    def collect(self, answer: Callable[[], None]) -> None:
        """Bring the metrics up to date, then call `answer`."""

        def take(picture: FleetPicture) -> None:
            states = {state: self._coordinator().fleet.states[state] for state in STATES}
            self.metrics.collect_fleet(states, picture.running, picture.waiting, picture.pending)
            answer()

        self._photographer.take(take)

    def state(self, answer: Answer) -> None:
        """Call `answer` with the state that `page_state` needs."""

        def take(picture: FleetPicture) -> None:
            if picture.at < self._ready_at:  # the picture is older than the coordinator's readiness and may lack workers heard until then
                self._photographer.latest = None
                self._photographer.take(take)
            else:
                answer((picture, self._figures(picture)))

        self._photographer.take(take)

    def _figures(self, picture: FleetPicture) -> dict[str, Any]:
        node, history = self._coordinator(), self._history
        return {
            "policy": self._policy,
            "degraded": node.degraded,
            "summary": summary_of(picture),
            "requests": {"routed": dict(history.routed), "refused": dict(history.refused)},
            "reports": {"accepted": node.reports_accepted, "rejected": dict(node.reports_rejected)},
            "datagrams": {"rejected": dict(node.rejected), "kernel_drops": self._kernel_drops()},
            "models": [
                {"name": name, "gpu": gpu, "loading": loading, "host": in_host, "routed": history.by_model[name]}
                for name, gpu, loading, in_host in picture.models
            ],
            "history": history.as_columns(),
        }

    def page_state(self, state: Any, query: Mapping[str, str]) -> dict[str, Any]:
        """The answer of `/state` to this query. Raises BadQuery."""
        picture, figures = state
        grid = {"grid": cells_of(picture)} if query.get("view") == "page" else {}
        return {**figures, **grid, **page_of(picture, query)}
