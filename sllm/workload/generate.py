"""Makes the requests of a run from a specification and a seed, one by one.

Times are those of the run's own clock; `--speedup` scales that clock elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from random import Random

from sllm.protocol.errors import UsageError
from sllm.protocol.messages import NORMAL
from sllm.protocol.seeds import rng_for
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.lengths import parse_lengths
from sllm.workload.modelmap import ModelCounts, assign, check_map, count_models, read_map
from sllm.workload.popularity import Shares, Zipf
from sllm.workload.request import Request
from sllm.workload.sessions import Draws, Laws, SessionLaw
from sllm.workload.shares import parse_priorities, read_shares
from sllm.workload.spec import WorkloadSpec
from sllm.workload.stages import Stages
from sllm.workload.superpose import superpose
from sllm.workload.traces import Trace, TraceRow, open_trace
from sllm.workload.traces.base import plain
from sllm.workload.users import Users
from sllm.workload.workload import Workload


def generate(spec: WorkloadSpec, models: Sequence[str], seed: int, counts: ModelCounts | None = None) -> Workload:
    """The requests that `spec` and `seed` make, for `models` in order of popularity. Requests are made one by one: memory does not grow with their number.

    Arrivals, lengths, models and priorities have a random number generator each, so that changing one does not change the others. A trace that names models
    is read twice, unless `counts`, the result of `count_models`, is given. UsageError for a trace that cannot be read, at once or at the row in question.
    """
    if not models:
        raise UsageError("a workload needs at least one model to ask for")
    if spec.models > len(models):
        raise UsageError(f"models {spec.models}: the catalogue has only {len(models)}")
    asked = models[: spec.models or None]
    if not spec.trace:
        return _synthetic(spec, asked, seed)
    trace = open_trace(spec.trace, spec.columns)
    try:
        return _replay(spec, spec.trace, trace, models, seed, counts)
    except BaseException:
        trace.close()
        raise


def popularity_of(spec: WorkloadSpec, asked: Sequence[str]) -> Shares[str]:
    """The share of the requests that each model gets. UsageError for a mix with a model that requests cannot ask for."""
    if not spec.mix:
        return Zipf(asked, spec.zipf)
    shares = read_shares(spec.mix, "mix")
    known = frozenset(asked)
    for name in shares:
        if name not in known:
            raise UsageError(f"mix {spec.mix}: {name!r} is not a model that requests can ask for; there are {', '.join(asked)}")
    return Shares.of(shares)


def _laws(spec: WorkloadSpec, asked: Sequence[str]) -> Laws:
    sessions = SessionLaw.parse(spec.sessions) if spec.sessions else None
    return Laws(popularity_of(spec, asked), parse_lengths(spec.lengths, spec.columns).draw, _priorities(spec), sessions)


def _priorities(spec: WorkloadSpec) -> Shares[int] | None:
    return Shares.of(parse_priorities(spec.priorities, "priorities")) if spec.priorities else None


def _mix_models(spec: WorkloadSpec, popularity: Shares[str]) -> tuple[str, ...]:
    """The models to which a mix gives requests; empty without a mix."""
    return tuple(name for name, share in popularity.items() if share) if spec.mix else ()


# --- synthetic ------------------------------------------------------------------------------------------------------------------------


def _synthetic(spec: WorkloadSpec, asked: Sequence[str], seed: int) -> Workload:
    laws = _laws(spec, asked)
    mix = _mix_models(spec, laws.popularity)
    if spec.concurrency:
        users = Users(laws, spec.concurrency, spec.think_s, spec.until_s, seed)
        return Workload(spec, users.first(), None, users=users, mix=mix)
    if laws.sessions is None:
        return Workload(spec, _independent(laws, _times(spec, seed), seed), None, mix=mix)
    begins = _times(spec, seed, laws.sessions.turns)
    before_per_s = 0.0 if spec.stages else spec.rate_per_s  # stages begin with nothing
    return Workload(spec, Draws(laws, partial(_stream, seed)).in_sessions(begins, before_per_s, spec.until_s), None, mix=mix)


def _stream(seed: int, aspect: str) -> Random:
    return rng_for(seed, f"workload/{aspect}")


def _times(spec: WorkloadSpec, seed: int, requests_each: float = 1.0) -> Iterator[float]:
    """The arrival times of requests, or of sessions with a mean of `requests_each` requests each."""
    arrive, rng = ARRIVALS[spec.arrivals], rng_for(seed, "workload/arrivals")
    if not spec.stages:
        return arrive(spec.rate_per_s / requests_each, spec.until_s, spec.cv, rng)
    stages, until_s = Stages.parse(spec.stages), spec.until_s
    counts = arrive(1.0, stages.requests / requests_each, spec.cv, rng)
    return (at for at in stages.stretch(count * requests_each for count in counts) if at < until_s)


def _independent(laws: Laws, times: Iterator[float], seed: int) -> Iterator[Request]:
    length_rng, model_rng = rng_for(seed, "workload/lengths"), rng_for(seed, "workload/models")
    draw, lengths = laws.popularity.draw, laws.lengths
    for index, (arrival_s, priority) in enumerate(zip(times, _drawn(laws.priorities, seed), strict=False)):
        prompt, output = lengths(length_rng)
        yield Request(arrival_s, f"r{index}", draw(model_rng), prompt, output, priority, None)


def _drawn(priorities: Shares[int] | None, seed: int) -> Iterator[int]:
    """The priorities of the requests, an endless iterator."""
    if priorities is None:
        return repeat(NORMAL)
    rng = rng_for(seed, "workload/priorities")
    return (priorities.draw(rng) for _ in repeat(None))


# --- traces ---------------------------------------------------------------------------------------------------------------------------


def _replay(spec: WorkloadSpec, path: str, trace: Trace, models: Sequence[str], seed: int, counts: ModelCounts | None) -> Workload:
    """The workload of an open trace."""
    asked = models[: spec.models or None]
    pairs = read_map(spec.model_map) if spec.model_map else {}
    check_map(spec.model_map or "", pairs, asked)
    if trace.format.exact:
        _check_recorded(spec, trace, asked, pairs, counts)
        return Workload(spec, _recorded(spec, trace, frozenset(asked), pairs), trace)
    popularity = popularity_of(spec, asked)
    mix = _mix_models(spec, popularity)
    if not trace.names_models:
        if spec.model_map:
            raise UsageError(f"model map {spec.model_map}: {trace.path} names no models")
        return Workload(spec, _foreign(spec, trace, popularity, {}, seed), trace, mix=mix)
    counted = counts or count_models(path, spec.until_s, spec.columns)
    if counted is None:
        raise UsageError(f"{trace.path}: names models and is therefore read twice; it must be a file, not a pipe")
    if spec.mix and not counted.unnamed:
        raise UsageError(f"mix {spec.mix}: every request of {trace.path} names its model; --model-map says which model of the catalogue it is")
    beyond = next((name for name in models[len(asked) :] if name in counted.requests and name not in pairs), None)
    if beyond is not None:
        raise UsageError(f"{trace.path}: names {beyond!r}, which is in the catalogue but not among the first {spec.models} of it that can be asked for")
    model_map = assign(trace.path, counted, asked, pairs)
    return Workload(spec, _foreign(spec, trace, popularity, model_map.models, seed), trace, model_map, mix=mix)


def _foreign(spec: WorkloadSpec, trace: Trace, popularity: Shares[str], models: Mapping[str, str], seed: int) -> Iterator[Request]:
    """The requests of a trace, with the trace's own times and lengths. Each model name of the trace is one model throughout; a request that names no model
    gets one by popularity."""
    until_s = spec.until_s
    model_rng, draw = rng_for(seed, "workload/models"), popularity.draw
    with trace:
        rows = zip(_rows(spec, trace, seed), _drawn(_priorities(spec), seed), strict=False)
        for index, ((arrival_s, prompt, output, name, _, _, _), priority) in enumerate(rows):
            if arrival_s >= until_s:
                return
            model = draw(model_rng) if name is None else models.get(name)
            if model is None:
                raise trace.error("model", f"{name!r} was not there when the models were counted: the file has changed meanwhile")
            yield Request(arrival_s, f"r{index}", model, prompt, output, priority, None)


def _rows(spec: WorkloadSpec, trace: Trace, seed: int) -> Iterable[TraceRow]:
    if spec.trace_rate == 1.0:
        return trace
    return superpose(trace, partial(open_trace, trace.path, spec.columns), spec.trace_rate, spec.until_s, seed)


def _recorded(spec: WorkloadSpec, trace: Trace, models: frozenset[str], pairs: Mapping[str, str]) -> Iterator[Request]:
    """The requests of a recording, unchanged except for models that a map file replaces."""
    until_s = spec.until_s
    with trace:
        for arrival_s, prompt, output, name, request_id, priority, repeats in trace:
            if arrival_s >= until_s:
                return
            if name is None or request_id is None or priority is None:
                raise AssertionError("a recording names the model, id and priority of every request")
            model = pairs.get(name, name)
            if model not in models:
                raise trace.error("model", _not_there(spec, model))
            yield Request(arrival_s, request_id, model, prompt, output, priority, repeats)


def _check_recorded(spec: WorkloadSpec, trace: Trace, asked: Sequence[str], pairs: Mapping[str, str], counts: ModelCounts | None) -> None:
    """UsageError for settings that a recording fixes itself; and, if the models have been counted, for a model that requests cannot ask for."""
    given = {"mix": spec.mix, "priorities": spec.priorities, "rate of the trace": plain(spec.trace_rate) if spec.trace_rate != 1.0 else ""}
    for what, value in given.items():
        if value:
            raise UsageError(f"{what} {value}: {trace.path} is a recording, which is replayed unchanged")
    models = frozenset(asked)
    for name in counts.requests if counts is not None else ():
        if pairs.get(name, name) not in models:
            raise UsageError(f"{trace.path}: model {_not_there(spec, pairs.get(name, name))}")


def _not_there(spec: WorkloadSpec, model: str) -> str:
    return f"{model!r} is not in the catalogue" + (f", or not among the first {spec.models} of it" if spec.models else "")
