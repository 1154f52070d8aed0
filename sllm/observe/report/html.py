"""The HTML report of a run, one file without external parts: figures, plots, tables, parameters and the command that repeats the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sllm.observe.recorder import Recorder
from sllm.observe.report.plots import ACTION_NAMES, Mark, draw_plots
from sllm.observe.report.style import STYLE
from sllm.observe.report.table import cut_short, distributions, targets
from sllm.observe.report.text import count, duration, percent, rate, span
from sllm.observe.statistics import STATISTICS

ROWS_MAX = 100  # models, and workers, with a row of their own


def render_html(
    results: Mapping[str, Any],
    recorder: Recorder,
    *,
    began_s: float = 0.0,
    marks: Sequence[Mark] = (),
    command: str = "",
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The HTML report. `began_s`: when requests began to arrive, by the recorder's clock; `marks` are drawn on the time axes; `command` repeats the run;
    `parameters` are shown by group and name."""
    run = results["run"]
    title = f"{run['policy']} · {count(run['workers'], 'worker')} · {run['mode']}"
    if run["warmup_s"]:
        marks = [Mark(0.0, run["warmup_s"], "warm-up"), *marks]
    plots = draw_plots(results, recorder, began_s, marks)
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(results))}</p></header>\n",
        f'<section class="cut" role="alert"><p>{escape(cut_short(results["run"]))}</p></section>\n' if results["run"]["interrupted"] else "",
        _violations(results["invariants"]),
        _missed(results["slo"].get("thresholds", ())),
        _tiles(results),
        f'<section aria-label="Plots" class="plots">\n{"".join(plots)}</section>\n' if plots else "<p>No request was sent: there is nothing to plot.</p>\n",
        '<section class="tables">\n',
        _latency_table(results),
        _figures_tables(results),
        _rows_table("Models", "model", results["models"]),
        _rows_table("Workers", "worker", results["workers"]),
        "</section>\n",
        _parameters_section(results, parameters or {}),
        f"<section><h2>Repeat this run</h2><pre><code>{escape(command)}</code></pre></section>\n" if command else "",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _subtitle(results: Mapping[str, Any]) -> str:
    run, wall = results["run"], results["wall"]
    speed = f"{rate(wall['requests_per_wall_s']).removesuffix('/s')} requests/s"
    what = f"sllm {run['version']}, {run['architecture']}" if run["version"] else run["architecture"]
    return f"{what}, seed {run['seed']}; arrivals for {span(run['duration_s'])}, run in {duration(wall['wall_s'])} of wall time ({speed})"


def _missed(thresholds: Sequence[Mapping[str, Any]]) -> str:
    missed = [(one["fail_if"], "not known" if one["value"] is None else format(one["value"], ".6g")) for one in thresholds if one["missed"]]
    items = "".join(f"<li>{escape(text)}: it is {value}</li>" for text, value in missed)
    return f'<section class="bad" role="alert"><h2>Thresholds missed</h2><ul>{items}</ul></section>\n' if items else ""


def _violations(invariants: Mapping[str, Any]) -> str:
    if not invariants["violations"]:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in invariants["violations"])
    return f'<section class="bad" role="alert"><h2>Invariants broken</h2><ul>{items}</ul></section>\n'


def _tiles(results: Mapping[str, Any]) -> str:
    requests, ttft, fleet, slo = results["requests"], results["ttft_s"], results["fleet"], results["slo"]
    tiles = (
        ("requests completed", f"{requests['completed']:,}", f"of {requests['sent']:,} sent"),
        ("TTFT, median", duration(ttft["p50"]), f"mean {duration(ttft['mean'])}"),
        ("TTFT, 99th percentile", duration(ttft["p99"]), f"maximum {duration(ttft['max'])}"),
        ("targets met", percent(slo["attainment"]), targets(slo)),
        ("cold starts", percent(fleet["cold_start_rate"]), f"{results['actions']['cold_start']:,} placements"),
        ("slots in use", percent(fleet["slot_occupancy"]), f"KV cache {percent(fleet['kv_occupancy'])}, busy {percent(fleet['utilisation'])}"),
    )
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>" for name, value, note in tiles)
    return f'<dl class="tiles">{cells}</dl>\n'


# --- tables -------------------------------------------------------------------------------------------------------------------------


def _latency_table(results: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in STATISTICS)
    rows = "".join(
        f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{escape(duration(values[name]))}</td>" for name in STATISTICS) + "</tr>\n"
        for label, values in distributions(results)
    )
    return f'<div class="wide"><h2>Latencies</h2><table><thead><tr><td></td>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'


def _figures_tables(results: Mapping[str, Any]) -> str:
    requests, actions, fleet, reports, through, slo = (results[name] for name in ("requests", "actions", "fleet", "reports", "throughput", "slo"))
    imbalance = fleet["load_imbalance"]
    groups = (
        (
            "Requests",
            [
                *((name.replace("_", " "), f"{value:,}") for name, value in requests.items()),
                *((f"{kind}: {reason}", f"{number:,}") for kind, reasons in results["reasons"].items() for reason, number in reasons.items()),
                ("completed a second", rate(through["requests_per_s"] or 0.0)),
                ("goodput", rate(slo["goodput"] or 0.0)),
                ("prompt tokens a second", rate(through["prompt_tokens_per_s"] or 0.0)),
                ("output tokens a second", rate(through["output_tokens_per_s"] or 0.0)),
            ],
        ),
        (
            "Placement",
            [
                *((ACTION_NAMES[name], f"{value:,}") for name, value in actions.items()),
                ("cold start rate", percent(fleet["cold_start_rate"])),
                ("model hit rate", percent(fleet["model_hit_rate"])),
                ("model loads", f"{fleet['loads']:,}"),
                *((f"from {tier}", f"{number:,}") for tier, number in fleet["loads_by_tier"].items()),
                ("mean load", duration(fleet["load_mean_s"])),
            ],
        ),
        (
            "Fleet",
            [
                ("workers ready", f"{fleet['ready']:,} of {results['run']['workers']:,}"),
                ("slots in use", percent(fleet["slot_occupancy"])),
                ("KV cache in use", percent(fleet["kv_occupancy"])),
                ("time with any request", percent(fleet["utilisation"])),
                ("busiest worker / mean", f"{imbalance:.2f}" if imbalance is not None else "—"),
                *((f"reports {name.replace('_', ' ')}", f"{reports[name]:,}") for name in ("sent", "accepted", "lost", "under_way")),
                *((f"reports rejected: {reason.replace('_', ' ')}", f"{number:,}") for reason, number in reports["rejected"].items()),
                ("invariants checked", f"{results['invariants']['checked']:,}"),
            ],
        ),
    )
    return "".join(_pairs_table(title, rows) for title, rows in groups)


def _cell(key: str, value: Any) -> str:
    """A figure of a row as text, in the unit that its key names."""
    if isinstance(value, str):
        return value
    if key.endswith("_s"):
        return duration(value)
    if key.endswith("occupancy") or key == "utilisation":
        return percent(value)
    return f"{value:,}"


def _rows_table(title: str, first: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows of the results; the column `first` has the name of each row."""
    if not rows:
        return ""
    keys = [key for key in rows[0] if key != first and any(row[key] not in (0, None) for row in rows)]
    words = {"ttft_p50_s": "TTFT p50", "ttft_p99_s": "TTFT p99", "utilisation": "busy", "slot_occupancy": "slots", "kv_occupancy": "KV cache"}
    head = "".join(f'<th scope="col">{escape(words.get(key, key.replace("_", " ")))}</th>' for key in keys)
    lines = []
    for row in rows[:ROWS_MAX]:
        cells = "".join(f"<td>{escape(_cell(key, row[key]))}</td>" for key in keys)
        lines.append(f'<tr><th scope="row">{escape(row[first])}</th>{cells}</tr>\n')
    body = "".join(lines)
    more = f"<p>and {len(rows) - ROWS_MAX:,} more</p>" if len(rows) > ROWS_MAX else ""
    return f'<div class="wide"><h2>{title}</h2><table><thead><tr><td></td>{head}</tr></thead><tbody>\n{body}</tbody></table>{more}</div>\n'


def _pairs_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f"<div><h2>{escape(title)}</h2><table><tbody>\n{body}</tbody></table></div>\n"


def _parameters_section(results: Mapping[str, Any], parameters: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings by group, then further facts about the workload, and the models that stand for the names of a trace."""
    said = {name for pairs in parameters.values() for name in pairs}
    workload = {name: value for name, value in results["run"]["workload"].items() if f"--{name}" not in said}
    models = {row["name"]: f"{row['model']}, {count(row['requests'], 'request')}" for row in workload.pop("trace_models", [])[:ROWS_MAX]}
    groups = {**parameters, "Workload": workload, "Models of the trace": models}
    lists = ""
    for title, pairs in groups.items():
        items = "".join(f"<div><dt>{escape(str(name))}</dt><dd>{escape(_value(value))}</dd></div>" for name, value in pairs.items())
        lists += f"<div><h3>{escape(title)}</h3><dl>{items}</dl></div>\n" if items else ""
    return f'<section class="parameters"><h2>Parameters</h2>\n<div class="groups">\n{lists}</div></section>\n' if lists else ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return f"{value:.6g}" if isinstance(value, float) else "none" if value in ("", None) else str(value)
