"""The requests of a run, with their description and warnings for the user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from sllm.workload.modelmap import ModelMap
from sllm.workload.request import Request
from sllm.workload.sessions import SessionLaw
from sllm.workload.spec import WorkloadSpec
from sllm.workload.traces import Trace
from sllm.workload.traces.base import plain
from sllm.workload.users import Users


class Workload(Iterator[Request]):
    """The requests of a run, in order of arrival; can be iterated once. A context manager, which closes the trace when the iteration stops early.

    Of closed-loop load the iteration gives the first request of each user; `following` returns the further ones.
    """

    def __init__(
        self,
        spec: WorkloadSpec,
        requests: Iterator[Request],
        trace: Trace | None,
        model_map: ModelMap | None = None,
        users: Users | None = None,
        mix: Sequence[str] = (),
    ) -> None:
        self.spec = spec
        self.trace = trace  # the open file; None: synthetic
        self.model_map = model_map  # None: the trace names no models, or is a recording
        self.users = users  # None: arrivals do not depend on the ends of other requests
        self.mix = mix  # models to which a mix gives requests; empty: there is no mix
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests

    def __next__(self) -> Request:
        return next(self._requests)

    def following(self, request_id: str, ended_s: float) -> Request | None:
        """The request of a closed-loop user that follows `request_id`, which ended `ended_s` seconds after the start of the run; None if there is none."""
        return self.users.following(request_id, ended_s) if self.users is not None else None

    def asked_for(self, models: Sequence[str]) -> Sequence[str]:
        """The models of the catalogue that requests may ask for, as far as known before the run; empty for a recording, of which nothing is known."""
        if self.trace is not None and self.trace.format.exact:
            return ()
        drawn = self.mix or models[: self.spec.models or None]
        if self.model_map is None:
            return drawn
        named = tuple(dict.fromkeys(self.model_map.models.values()))
        return tuple(dict.fromkeys((*named, *drawn))) if self.model_map.counts.unnamed else named

    def close(self) -> None:
        if self.trace is not None:
            self.trace.close()

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def warnings(self) -> list[str]:
        """Warnings about settings that have no effect or make the figures mean something else."""
        if self.trace is None:
            if not self.spec.sessions:
                return []
            return ["--sessions: prompts repeat earlier turns, but no engine has a prefix cache yet: what a prompt repeats is computed again"]
        model_map, zipf = self.model_map, self.spec.zipf
        said = model_map.warnings(self.trace.path, self.spec.model_map) if model_map is not None else []
        if not self._draws_models and zipf != WorkloadSpec.zipf:
            said.append(f"Zipf exponent {plain(zipf)} (--zipf) has no effect: every request of {self.trace.path} names its model")
        return said

    @property
    def _draws_models(self) -> bool:
        """Whether models are drawn by popularity for some requests of the trace, because those name no model."""
        if self.model_map is not None:
            return self.model_map.counts.unnamed > 0
        return self.trace is not None and not self.trace.format.exact

    def describe(self) -> dict[str, Any]:
        """The description of the workload for the results of a run; for a trace with the number of rows skipped so far."""
        spec = self.spec
        made = self._describe_synthetic() if self.trace is None else self._describe_trace(self.trace)
        if spec.mix and self.mix:
            del made["zipf"]
            made["mix"] = spec.mix
        return made | ({"priorities": spec.priorities} if spec.priorities else {})

    def _describe_trace(self, trace: Trace) -> dict[str, Any]:
        spec = self.spec
        made: dict[str, Any] = {"trace": trace.path, "format": trace.format_name, "skipped": trace.skipped}
        if spec.columns:
            made["columns"] = spec.columns
        if spec.trace_rate != 1.0:
            made["trace_rate"] = spec.trace_rate
            made["trace_rate_by"] = "superposition" if spec.trace_rate > 1.0 else "thinning"
        if spec.model_map:
            made["model_map"] = spec.model_map
        if self._draws_models:
            made["zipf"] = spec.zipf
        return made if self.model_map is None else made | self.model_map.describe()

    def _describe_synthetic(self) -> dict[str, Any]:
        spec = self.spec
        made: dict[str, Any] = {}
        if spec.concurrency:
            made |= {"concurrency": spec.concurrency, "think_s": spec.think_s}
        else:
            made |= {"arrivals": spec.arrivals} | ({"stages": spec.stages} if spec.stages else {"rate_per_s": spec.rate_per_s})
        made |= {"lengths": spec.lengths, "zipf": spec.zipf}
        if spec.arrivals == "gamma" and not spec.concurrency:
            made["cv"] = spec.cv
        if spec.sessions:
            law = SessionLaw.parse(spec.sessions)
            made["sessions"] = {"turns": law.turns, "gap_s": law.gap, "longest_tokens": law.longest, "prefix_cache": False}
        return made
