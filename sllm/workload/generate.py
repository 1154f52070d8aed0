"""From a specification and a seed to the requests of a run, one by one.

Nothing here scales time: how fast a run's clock goes is the run's matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from sllm.errors import UsageError
from sllm.messages import NORMAL
from sllm.node import new_tuple
from sllm.streams import stream
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.lengths import LengthSampler, parse_lengths
from sllm.workload.modelmap import ModelCounts, ModelMap, assign, check_map, count_models, read_map
from sllm.workload.popularity import Zipf
from sllm.workload.request import Request
from sllm.workload.traces import Trace, open_trace
from sllm.workload.traces.base import plain


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
    models: int = 0  # only the first models of the catalogue are asked for, as many as this says; 0: all of them
    model_map: str | None = None  # a file that says which model of the catalogue each model of the trace is; see sllm.workload.modelmap

    def __post_init__(self) -> None:
        if not self.trace:
            if self.model_map:
                raise UsageError(f"model map {self.model_map}: goes with a trace only")
            if not 0 < self.rate_per_s < math.inf:
                raise UsageError(f"rate {plain(self.rate_per_s)}: must be above 0 requests a second")
            if self.arrivals not in ARRIVALS:
                raise UsageError(f"arrivals {self.arrivals!r}: must be one of {', '.join(ARRIVALS)}")
            if not 1e-6 <= self.cv <= 1e3:
                raise UsageError(f"coefficient of variation {plain(self.cv)}: must be at least 0.000001 and at most 1000")
        if self.duration_s is not None and not self.duration_s >= 0:
            raise UsageError(f"duration {plain(self.duration_s)}: must be at least 0 s")
        if not 0 <= self.zipf <= 100:
            raise UsageError(f"Zipf exponent {plain(self.zipf)}: must be at least 0 and at most 100")
        if self.models < 0:
            raise UsageError(f"models {self.models}: must be at least 0")


class Workload(Iterator[Request]):
    """The requests of a run, in order of arrival: iterate, once. A context manager for those who stop early while a trace is open."""

    def __init__(self, spec: WorkloadSpec, requests: Iterator[Request], trace: Trace | None, model_map: ModelMap | None = None) -> None:
        self.spec = spec
        self.trace = trace  # the open file; None: synthetic
        self.model_map = model_map  # None: the trace names no models, or what it names is binding
        self._requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self._requests

    def __next__(self) -> Request:
        return next(self._requests)

    def asked_for(self, models: Sequence[str]) -> Sequence[str]:
        """Those of the catalogue's models that requests may be for, as far as is known beforehand: nothing is known of a recording."""
        if self.trace is not None and self.trace.format.exact:
            return ()
        drawn = models[: self.spec.models or None]
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
            return []
        model_map, zipf = self.model_map, self.spec.zipf
        said = model_map.warnings(self.trace.path, self.spec.model_map) if model_map is not None else []
        drawn = model_map.counts.unnamed if model_map is not None else not self.trace.format.exact
        if not drawn and zipf != WorkloadSpec.zipf:
            said.append(f"Zipf exponent {plain(zipf)} (--zipf) has no effect: every request of {self.trace.path} names its model")
        return said

    def describe(self) -> dict[str, Any]:
        """What it is, for the results of a run; of a trace also how many rows have been skipped so far."""
        spec = self.spec
        if self.trace is not None:
            made: dict[str, Any] = {"trace": self.trace.path, "format": self.trace.format_name, "skipped": self.trace.skipped}
            if spec.model_map:
                made["model_map"] = spec.model_map
            if not self.trace.format.exact and (self.model_map is None or self.model_map.counts.unnamed):
                made["zipf"] = spec.zipf
            return made if self.model_map is None else made | self.model_map.describe()
        made = {"arrivals": spec.arrivals, "rate_per_s": spec.rate_per_s, "lengths": spec.lengths, "zipf": spec.zipf}
        return made | {"cv": spec.cv} if spec.arrivals == "gamma" else made


def generate(spec: WorkloadSpec, models: Sequence[str], seed: int, counts: ModelCounts | None = None) -> Workload:
    """The requests that `spec` and `seed` make, for `models` in order of popularity. Streams: memory does not grow with their number.

    Arrivals, lengths and models have a random stream each, so that changing one leaves the others as they were. A trace that names models is read twice,
    unless its caller has counted them: `counts` is what `count_models` returned. UsageError for a trace that cannot be read, at once or at the row in
    question.
    """
    if not models:
        raise UsageError("a workload needs at least one model to ask for")
    if spec.models > len(models):
        raise UsageError(f"models {spec.models}: the catalogue has only {len(models)}")
    asked = models[: spec.models or None]
    popularity = Zipf(asked, spec.zipf)
    if not spec.trace:
        return Workload(spec, _synthetic(spec, popularity, parse_lengths(spec.lengths), seed), None)
    pairs = read_map(spec.model_map) if spec.model_map else {}
    check_map(spec.model_map or "", pairs, asked)
    trace = open_trace(spec.trace)
    try:
        if trace.format.exact:
            _check_recorded(spec, trace, asked, pairs, counts)
            return Workload(spec, _recorded(spec, trace, frozenset(asked), pairs), trace)
        if not trace.names_models:
            if spec.model_map:
                raise UsageError(f"model map {spec.model_map}: {trace.path} names no models")
            return Workload(spec, _unnamed(spec, trace, popularity, seed), trace)
        counted = counts or count_models(spec.trace, until(spec))
        if counted is None:
            raise UsageError(f"{trace.path}: names models and is read twice for that; it must be a file, not a pipe")
        beyond = next((name for name in models[len(asked) :] if name in counted.requests and name not in pairs), None)
        if beyond is not None:
            raise UsageError(f"{trace.path}: names {beyond!r}, which is in the catalogue but not among the first {spec.models} of it that can be asked for")
        model_map = assign(trace.path, counted, asked, pairs)
        return Workload(spec, _named(spec, trace, popularity, model_map.models, seed), trace, model_map)
    except BaseException:
        trace.close()
        raise


def until(spec: WorkloadSpec) -> float:
    """Seconds from its begin at which a workload ends, if not before."""
    return math.inf if spec.duration_s is None else spec.duration_s


def _synthetic(spec: WorkloadSpec, popularity: Zipf, lengths: LengthSampler, seed: int) -> Iterator[Request]:
    times = ARRIVALS[spec.arrivals](spec.rate_per_s, until(spec), spec.cv, stream(seed, "workload/arrivals"))
    length_rng, model_rng = stream(seed, "workload/lengths"), stream(seed, "workload/models")
    draw = popularity.draw
    for index, arrival_s in enumerate(times):
        prompt, output = lengths(length_rng)
        yield new_tuple(Request, (arrival_s, f"r{index}", draw(model_rng), prompt, output, NORMAL))


def _unnamed(spec: WorkloadSpec, trace: Trace, popularity: Zipf, seed: int) -> Iterator[Request]:
    """A foreign trace that names no models: times and lengths are its own, models are drawn by popularity."""
    until_s = until(spec)
    model_rng = stream(seed, "workload/models")
    draw = popularity.draw
    with trace:
        for index, (arrival_s, prompt, output, _, _, _) in enumerate(trace):
            if arrival_s >= until_s:
                return
            yield new_tuple(Request, (arrival_s, f"r{index}", draw(model_rng), prompt, output, NORMAL))


def _named(spec: WorkloadSpec, trace: Trace, popularity: Zipf, models: Mapping[str, str], seed: int) -> Iterator[Request]:
    """A foreign trace that names models: each name is one model throughout. A request without a name gets a model by popularity."""
    until_s = until(spec)
    model_rng = stream(seed, "workload/models")
    with trace:
        for index, (arrival_s, prompt, output, name, _, _) in enumerate(trace):
            if arrival_s >= until_s:
                return
            model = popularity.draw(model_rng) if name is None else models.get(name)
            if model is None:
                raise trace.error("model", f"{name!r} was not there when the models were counted: the file has changed meanwhile")
            yield new_tuple(Request, (arrival_s, f"r{index}", model, prompt, output, NORMAL))


def _recorded(spec: WorkloadSpec, trace: Trace, models: frozenset[str], pairs: Mapping[str, str]) -> Iterator[Request]:
    """Our own recording: every request as it was, but for models that a map file replaces."""
    until_s = until(spec)
    with trace:
        for arrival_s, prompt, output, name, request_id, priority in trace:
            if arrival_s >= until_s:
                return
            if name is None or request_id is None or priority is None:
                raise AssertionError("a recording names the model, id and priority of every request")
            model = pairs.get(name, name)
            if model not in models:
                raise trace.error("model", _not_there(spec, model))
            yield Request(arrival_s, request_id, model, prompt, output, priority)


def _check_recorded(spec: WorkloadSpec, trace: Trace, asked: Sequence[str], pairs: Mapping[str, str], counts: ModelCounts | None) -> None:
    """UsageError for a recording with a model that cannot be asked for, before the run begins if the models have been counted."""
    models = frozenset(asked)
    for name in counts.requests if counts is not None else ():
        if pairs.get(name, name) not in models:
            raise UsageError(f"{trace.path}: model {_not_there(spec, pairs.get(name, name))}")


def _not_there(spec: WorkloadSpec, model: str) -> str:
    return f"{model!r} is not in the catalogue" + (f", or not among the first {spec.models} of it" if spec.models else "")
