"""Why a run cannot become, or did not become, what its user asked for, in a line that names the flag to change."""

from __future__ import annotations

from config import Config
from sllm.models.catalogue import Catalog
from sllm.observe.results import ReportFigures
from sllm.protocol.errors import UsageError
from sllm.run.assemble import check_models_fit
from sllm.run.command_line import Options
from sllm.workload import Workload


def check_workload(config: Config, options: Options, catalog: Catalog, workload: Workload) -> list[str]:
    """Warnings of what has no effect on the requests, or not the whole effect. UsageError if nothing can come of them."""
    check_models_fit(config, catalog, workload)
    warnings = list(workload.warnings)
    if "--zipf" in options.given and workload.trace is not None and workload.trace.format.exact:
        warnings.append("--zipf: has no effect: a recording says which model each request is for")
    asked_s = workload.spec.duration_s
    if asked_s and config.warmup_s >= asked_s:
        raise UsageError(f"--warmup {config.warmup_s:.12g}: requests come for {asked_s:.12g} s, so none would be in the statistics (--duration)")
    return warnings


def why_nothing_came(config: Config, workload: Workload, within_s: float) -> str:
    """Of a run in which no request came."""
    if workload.trace is not None:
        return f"{config.trace} has none before {within_s:.12g} s (--duration)"
    if config.stages or config.concurrency:
        return f"none came within {within_s:.12g} s"
    rate = "--rate" if config.rate_per_s else "the default rate, half of what this fleet can serve (--rate, --catalog)"
    return f"none came within {within_s:.12g} s at {rate}: one in {1.0 / workload.spec.rate_per_s:,.0f} s"


def why_not_started(config: Config, books: ReportFigures) -> str:
    """Of a fleet in virtual time whose workers did not all become ready: what became of their reports."""
    refused = ", ".join(f"{number:,} were refused ({reason.replace('_', ' ')})" for reason, number in sorted(books.rejected.items()))
    what = f"of {books.sent:,} reports {books.lost:,} were lost and {books.under_way:,} still under way" + (f", {refused}" if refused else "")
    flags = [f"--loss {config.loss:.12g}"] if config.loss > 0.0 else []
    if refused or not flags:
        flags.append(f"--latency-ms {config.latency_ms:.12g}")
    return f"{what} ({', '.join(flags)})"
