"""The requests of a run, and what is to be said of them."""

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
    """The requests of a run, in order of arrival: iterate, once. A context manager for those who stop early while a trace is open.

    Of closed-loop load these are the first requests of the users; each further one is what `following` returns when a request has ended.
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
        self.model_map = model_map  # None: the trace names no models, or what it names is binding
        self.users = users  # None: requests come at times of their own, whatever becomes of others
        self.mix = mix  # models that a mix names; empty: there is no mix
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests

    def __next__(self) -> Request:
        return next(self._requests)

    def following(self, request_id: str, ended_s: float) -> Request | None:
        """The request that comes because this one has ended, so long after the start of the run; None if there is none."""
        return self.users.following(request_id, ended_s) if self.users is not None else None

    def asked_for(self, models: Sequence[str]) -> Sequence[str]:
        """Those of the catalogue's models that requests may be for, as far as is known beforehand: nothing is known of a recording."""
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
        """What a user should know before the figures are believed."""
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
        """Some request of the trace names no model."""
        if self.model_map is not None:
            return self.model_map.counts.unnamed > 0
        return self.trace is not None and not self.trace.format.exact

    def describe(self) -> dict[str, Any]:
        """What it is, for the results of a run; of a trace also how many rows have been skipped so far."""
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
