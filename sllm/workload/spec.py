"""The specification of a workload: values that are checked when the specification is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sllm.protocol.errors import UsageError
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.sessions import SessionLaw
from sllm.workload.shares import parse_priorities
from sllm.workload.stages import Stages
from sllm.workload.traces.base import plain
from sllm.workload.traces.own import OwnColumns

TRACE_RATE_MAX = 100.0  # each copy of a trace is a file held open


@dataclass(frozen=True)
class WorkloadSpec:
    """Which requests arrive, how many and when. UsageError for values that make no workload."""

    rate_per_s: float = 1.0  # mean arrivals; not used with a trace, stages or users
    arrivals: str = "poisson"  # a name of ARRIVALS
    cv: float = 8.0  # coefficient of variation of gamma gaps
    lengths: str = "azure-conv"  # see sllm.workload.lengths; not used with a trace
    trace: str | None = None  # a trace file to replay; None or "": synthetic arrivals
    duration_s: float | None = None  # only arrivals before this time; None: the whole trace, all stages, or synthetic arrivals without end
    zipf: float = 1.1  # exponent of model popularity; 0: all models are equally popular
    models: int = 0  # requests ask for the first `models` models of the catalogue only; 0: for all models
    model_map: str | None = None  # a file that maps model names of the trace to models of the catalogue; see sllm.workload.modelmap
    mix: str = ""  # shares of the models, or a file of them, instead of the Zipf law; see sllm.workload.shares
    priorities: str = ""  # shares of the priorities; "": all normal
    sessions: str = ""  # the law of sessions, see sllm.workload.sessions; "": requests are independent
    stages: str = ""  # a rate that changes, instead of `rate_per_s`; see sllm.workload.stages
    concurrency: int = 0  # users of closed-loop load, instead of arrivals at a rate; see sllm.workload.users
    think_s: float = 0.0  # mean time between a user's requests
    trace_rate: float = 1.0  # factor on the number of the trace's requests in the same time; see sllm.workload.superpose
    columns: str = ""  # the meaning of the columns of a CSV trace; see sllm.workload.traces.own

    def __post_init__(self) -> None:
        if not self.trace:
            self._check_synthetic()
        if self.duration_s is not None and not self.duration_s >= 0:
            raise UsageError(f"duration {plain(self.duration_s)}: must be at least 0 s")
        if not 0 <= self.zipf <= 100:
            raise UsageError(f"Zipf exponent {plain(self.zipf)}: must be at least 0 and at most 100")
        if self.models < 0:
            raise UsageError(f"models {self.models}: must be at least 0")
        if not 0 < self.trace_rate <= TRACE_RATE_MAX:
            raise UsageError(f"rate of the trace {plain(self.trace_rate)}: must be above 0 and at most {TRACE_RATE_MAX:.12g} times its own")
        if self.priorities:
            parse_priorities(self.priorities, "priorities")
        if self.columns:
            OwnColumns(self.columns)

    def _check_synthetic(self) -> None:
        if self.model_map:
            raise UsageError(f"model map {self.model_map}: needs a trace")
        if not 0 < self.rate_per_s < math.inf:
            raise UsageError(f"rate {plain(self.rate_per_s)}: must be above 0 requests a second")
        if self.arrivals not in ARRIVALS:
            raise UsageError(f"arrivals {self.arrivals!r}: must be one of {', '.join(ARRIVALS)}")
        if not 1e-6 <= self.cv <= 1e3:
            raise UsageError(f"coefficient of variation {plain(self.cv)}: must be at least 0.000001 and at most 1000")
        if self.concurrency < 0 or not 0 <= self.think_s < math.inf:
            raise UsageError(f"users {self.concurrency}, think time {plain(self.think_s)}: must be at least 0")
        if self.concurrency and self.stages:
            raise UsageError("stages: closed-loop load has no rate, because each user waits for the answer to the request before")
        if self.sessions:
            SessionLaw.parse(self.sessions)
        if self.stages:
            Stages.parse(self.stages)

    @property
    def until_s(self) -> float:
        """Seconds from the begin of the workload after which no request arrives."""
        asked_s = math.inf if self.duration_s is None else self.duration_s
        return min(asked_s, Stages.parse(self.stages).duration_s) if self.stages else asked_s
