"""From a specification and a seed to the requests of a run, one by one.

Nothing here scales time: how fast a run's clock goes is the run's matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sllm.errors import UsageError
from sllm.messages import NORMAL
from sllm.node import new_tuple
from sllm.streams import stream
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.lengths import LengthSampler, parse_lengths
from sllm.workload.popularity import Zipf
from sllm.workload.request import Request
from sllm.workload.traces import Trace, open_trace


@dataclass(frozen=True)
class WorkloadSpec:
    """What kind of requests come, how many and when. UsageError for values that make no workload."""

    rate_per_s: float = 1.0  # mean arrivals; not used with a trace
    arrivals: str = "poisson"  # a name of ARRIVALS
    cv: float = 8.0  # coefficient of variation of gamma gaps
    lengths: str = "azure-conv"  # see sllm.workload.lengths; not used with a trace
    trace: str | None = None  # a trace file to replay; None or "": synthetic arrivals
    duration_s: float | None = None  # only arrivals before it; None: the whole trace, and synthetic arrivals without end
    zipf: float = 1.1  # exponent of model popularity; 0: all alike
    models: int = 0  # the first so many models are asked for; 0: all of them

    def __post_init__(self) -> None:
        if not self.trace:
            if not 0 < self.rate_per_s < math.inf:
                raise UsageError(f"rate {self.rate_per_s}: must be above 0 requests a second")
            if self.arrivals not in ARRIVALS:
                raise UsageError(f"arrivals {self.arrivals!r}: must be one of {', '.join(ARRIVALS)}")
            if not 1e-6 <= self.cv <= 1e3:
                raise UsageError(f"coefficient of variation {self.cv}: must be at least 0.000001 and at most 1000")
        if self.duration_s is not None and not self.duration_s >= 0:
            raise UsageError(f"duration {self.duration_s}: must be at least 0 s")
        if not 0 <= self.zipf <= 100:
            raise UsageError(f"Zipf exponent {self.zipf}: must be at least 0 and at most 100")
        if self.models < 0:
            raise UsageError(f"models {self.models}: must be at least 0")


class Workload(Iterator[Request]):
    """The requests of a run, in order of arrival: iterate, once. A context manager for those who stop early while a trace is open."""

    def __init__(self, spec: WorkloadSpec, requests: Iterator[Request], trace: Trace | None) -> None:
        self.spec = spec
        self.trace = trace  # the open file; None: synthetic
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests

    def __next__(self) -> Request:
        return next(self._requests)

    def close(self) -> None:
        if self.trace is not None:
            self.trace.close()

    def __enter__(self) -> Workload:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """What it is, for the results of a run; of a trace also how many rows have been skipped so far."""
        spec = self.spec
        if self.trace is not None:
            made: dict[str, Any] = {"trace": self.trace.path, "format": self.trace.format_name, "skipped": self.trace.skipped}
            return made if self.trace.format.exact else made | {"zipf": spec.zipf}
        made = {"arrivals": spec.arrivals, "rate_per_s": spec.rate_per_s, "lengths": spec.lengths, "zipf": spec.zipf}
        return made | {"cv": spec.cv} if spec.arrivals == "gamma" else made


def generate(spec: WorkloadSpec, models: Sequence[str], seed: int) -> Workload:
    """The requests that `spec` and `seed` make, for `models` in order of popularity. Streams: memory does not grow with their number.

    Arrivals, lengths and models have a random stream each, so that changing one leaves the others as they were. UsageError for a trace
    that cannot be read, at once or at the row in question.
    """
    if not models:
        raise UsageError("a workload needs at least one model to ask for")
    if spec.models > len(models):
        raise UsageError(f"models {spec.models}: the catalogue has only {len(models)}")
    popularity = Zipf(models[: spec.models or None], spec.zipf)
    if not spec.trace:
        return Workload(spec, _synthetic(spec, popularity, parse_lengths(spec.lengths), seed), None)
    trace = open_trace(spec.trace)
    replay = _recorded if trace.format.exact else _replayed
    return Workload(spec, replay(spec, trace, popularity, frozenset(models), seed), trace)


def _synthetic(spec: WorkloadSpec, popularity: Zipf, lengths: LengthSampler, seed: int) -> Iterator[Request]:
    until_s = math.inf if spec.duration_s is None else spec.duration_s
    times = ARRIVALS[spec.arrivals](spec.rate_per_s, until_s, spec.cv, stream(seed, "workload/arrivals"))
    length_rng, model_rng = stream(seed, "workload/lengths"), stream(seed, "workload/models")
    draw = popularity.draw
    for index, arrival_s in enumerate(times):
        prompt, output = lengths(length_rng)
        yield new_tuple(Request, (arrival_s, f"r{index}", draw(model_rng), prompt, output, NORMAL))


def _replayed(spec: WorkloadSpec, trace: Trace, popularity: Zipf, models: frozenset[str], seed: int) -> Iterator[Request]:
    """A foreign trace: times and lengths are its own, a model that we do not have is replaced by one of ours."""
    until_s = math.inf if spec.duration_s is None else spec.duration_s
    model_rng = stream(seed, "workload/models")
    draw = popularity.draw
    with trace:
        for index, (arrival_s, prompt, output, model, _, _) in enumerate(trace):
            if arrival_s >= until_s:
                return
            drawn = draw(model_rng)  # for every row, so that one row's model does not shift those of all that follow
            yield new_tuple(Request, (arrival_s, f"r{index}", model if model in models else drawn, prompt, output, NORMAL))


def _recorded(spec: WorkloadSpec, trace: Trace, popularity: Zipf, models: frozenset[str], seed: int) -> Iterator[Request]:
    """Our own recording: every request as it was."""
    until_s = math.inf if spec.duration_s is None else spec.duration_s
    with trace:
        for arrival_s, prompt, output, model, request_id, priority in trace:
            if arrival_s >= until_s:
                return
            if model is None or request_id is None or priority is None:
                raise AssertionError("a recording names the model, id and priority of every request")
            if model not in models:
                raise trace.error("model", f"{model!r} is not in the catalogue")
            yield Request(arrival_s, request_id, model, prompt, output, priority)
