"""Workloads: arrivals, token lengths, model popularity, and traces of real requests."""

from sllm.workload.generate import generate
from sllm.workload.modelmap import ModelCounts, count_models
from sllm.workload.request import Repeat, Request
from sllm.workload.spec import WorkloadSpec
from sllm.workload.traces import FORMATS, Trace, TraceRow, open_trace, read_trace
from sllm.workload.traces.recorded import RecordedWriter, write_recorded
from sllm.workload.workload import Workload

__all__ = [
    "FORMATS",
    "ModelCounts",
    "RecordedWriter",
    "Repeat",
    "Request",
    "Trace",
    "TraceRow",
    "Workload",
    "WorkloadSpec",
    "count_models",
    "generate",
    "open_trace",
    "read_trace",
    "write_recorded",
]
