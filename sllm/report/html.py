"""A report of a run as one HTML file that needs nothing else: figures, plots, parameters and the command that repeats it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sllm.messages import ACTIONS
from sllm.report import series
from sllm.report.style import STYLE
from sllm.report.svg import Axis, Bars, Line, Plot, nice_top
from sllm.report.table import ROWS, cut_short
from sllm.report.text import count, duration, percent, rate, span
from sllm.results import STATISTICS, Recorder

ACTION_NAMES = dict(zip(ACTIONS, ("serve", "cold start", "migrate"), strict=True))
STATE_COLOURS = {"READY": 3, "STARTING": 1, "DRAINING": 5, "SUSPECT": 2, "DEAD": 4, "LEFT": 6}
TIME_UNITS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "d"))
MODELS_SHOWN = 30  # of a trace, those with the most requests


def render_html(results: Mapping[str, Any], recorder: Recorder, *, command: str = "", parameters: Mapping[str, Any] | None = None) -> str:
    """The report. `command` repeats the run; `parameters` are shown by name, all as they are."""
    run = results["run"]
    title = f"{run['policy']} · {count(run['workers'], 'worker')} · {run['mode']}"
    plots = _plots(results, recorder)
    body = [
        f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(results))}</p></header>\n",
        f'<section class="cut" role="alert"><p>{escape(cut_short(results["run"]))}</p></section>\n' if results["run"]["interrupted"] else "",
        _violations(results["invariants"]),
        _tiles(results),
        f'<section aria-label="Plots" class="plots">\n{"".join(plots)}</section>\n' if plots else "<p>No request was sent: there is nothing to plot.</p>\n",
        '<section class="tables">\n',
        _latency_table(results),
        _figures_tables(results, recorder),
        _pairs_table("Parameters", _parameters(results, parameters or {})),
        "</section>\n",
        f"<section><h2>Repeat this run</h2><pre><code>{escape(command)}</code></pre></section>\n" if command else "",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n'
        f"{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _subtitle(results: Mapping[str, Any]) -> str:
    run = results["run"]
    speed = f"{rate(run['requests_per_wall_s']).removesuffix('/s')} requests/s"
    return f"{run['architecture']}, seed {run['seed']}; arrivals for {span(run['duration_s'])}, run in {duration(run['wall_s'])} of wall time ({speed})"


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
        ("first token in time", percent(slo["attainment"]), f"within {duration(slo['ttft_s'])}"),
        ("cold starts", percent(fleet["cold_start_rate"]), f"{results['actions']['cold_start']:,} placements"),
        ("workers busy", percent(fleet["utilisation"]), f"{fleet['ready']:,} of {results['run']['workers']:,} ready"),
    )
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>" for name, value, note in tiles)
    return f'<dl class="tiles">{cells}</dl>\n'


# --- plots --------------------------------------------------------------------------------------------------------------------------


def _plots(results: Mapping[str, Any], recorder: Recorder) -> list[str]:
    bins = series.make_bins(recorder)
    if bins is None:
        return []
    time = _time_axis(bins)
    plots = [
        _cdf_plot(results, recorder),
        _ttft_plot(recorder, bins, time, results["slo"]["ttft_s"]),
        _throughput_plot(recorder, bins, time),
        _in_flight_plot(recorder, bins, time),
        _actions_plot(recorder, bins, time),
        _busy_plot(recorder, bins, time, results["run"]["workers"]),
        _states_plot(recorder, bins, time),
    ]
    return [plot.render() for plot in plots if plot is not None]


def _time_axis(bins: series.Bins) -> Axis:
    scale, unit = next(((scale, unit) for scale, unit in reversed(TIME_UNITS) if bins.end_s >= 3 * scale), TIME_UNITS[0])
    axis = Axis(bins.start_s / scale, bins.end_s / scale, f"time of the run ({unit})", lambda value: f"{value * 1.0:,.6g}", ticks=8)
    axis.low, axis.high, axis.ticks = axis.low * scale, axis.high * scale, [tick * scale for tick in axis.ticks]
    axis.label = lambda value: f"{value / scale:,.6g}"
    return axis


def _axis_duration(value: float) -> str:
    """A tick of a time axis: 50 ms, 0.2 would be 200 ms, 2 s."""
    if value == 0.0:
        return "0"
    for scale, unit in ((1e6, "µs"), (1e3, "ms"), (1.0, "s")):
        if value * scale < 999.5 or unit == "s":
            return f"{value * scale:,.{4 if unit != 's' else 9}g} {unit}"
    return ""


def _plain(value: float) -> str:
    return f"{value:,.4g}" if value < 10000 else f"{value:,.0f}"


def _cdf_plot(results: Mapping[str, Any], recorder: Recorder) -> Plot | None:
    if not recorder.ttft_s:
        return None
    points = series.cdf(recorder.ttft_s)
    ttft, slo_s = results["ttft_s"], results["slo"]["ttft_s"]
    x = Axis(points[0][0] * 0.95, max(points[-1][0], slo_s) * 1.1, "time to first token", _axis_duration, log=True)
    y = Axis(0.0, 1.0, "part of requests", lambda value: f"{value * 100:.0f} %", ticks=5)
    plot = Plot("cdf", "Time to first token", "Part of the completed requests whose first token came within a time", x, y)
    plot.mark_x(slo_s, f"goal {duration(slo_s)}", 3)
    for row, name in enumerate(("p50", "p95", "p99")):
        plot.mark_x(ttft[name], f"{name} {duration(ttft[name])}", row)
    plot.add_line(Line("TTFT", [(points[0][0], 0.0), *points], 1, steps=len(points) < 100))
    return plot


def _ttft_plot(recorder: Recorder, bins: series.Bins, time: Axis, slo_s: float) -> Plot | None:
    if not recorder.ttft_s:
        return None
    lines = series.ttft_percentiles(recorder, bins, (50, 90, 99))
    values = [value for line in lines for _, value in line]
    y = Axis(min(values) * 0.8, max(*values, slo_s) * 1.25, "time to first token", _axis_duration, log=True)
    plot = Plot("ttft", "Time to first token over time", "Percentiles of the requests that arrived in each interval", time, y)
    plot.mark_y(slo_s, f"goal {duration(slo_s)}")
    for name, points, colour in zip(("p99", "p90", "p50"), reversed(lines), (2, 5, 1), strict=True):
        plot.add_line(Line(name, points, colour))
    return plot


def _throughput_plot(recorder: Recorder, bins: series.Bins, time: Axis) -> Plot:
    arrived, completed = series.rates(recorder.sent_at, bins), series.rates(recorder.done_at, bins)
    given_up = series.rates(recorder.given_up_at, bins) if recorder.given_up_at else []
    y = Axis(0.0, nice_top([value for _, value in (*arrived, *completed)]), "requests per second", _plain, ticks=5)
    plot = Plot("throughput", "Throughput", f"Requests per second of the run's clock, in intervals of {duration(bins.width_s)}", time, y)
    plot.add_line(Line("arrived", arrived, 1, filled=True))
    plot.add_line(Line("completed", completed, 3))
    plot.add_line(Line("failed or rejected", given_up, 4))
    return plot


def _in_flight_plot(recorder: Recorder, bins: series.Bins, time: Axis) -> Plot:
    points = series.in_flight(recorder, bins)
    y = Axis(0.0, nice_top([value for _, value in points]), "requests", _plain, ticks=5)
    plot = Plot("in-flight", "Requests in flight", "Sent and not yet completed, failed or rejected", time, y)
    plot.add_line(Line("in flight", points, 5, filled=True))
    return plot


def _actions_plot(recorder: Recorder, bins: series.Bins, time: Axis) -> Plot | None:
    if not recorder.routed_at:
        return None
    counts = series.actions(recorder, bins)
    totals = [sum(column) for column in zip(*counts, strict=True)]
    y = Axis(0.0, nice_top(totals), "placements", _plain, ticks=5)
    plot = Plot("actions", "Placements by action", f"In intervals of {duration(bins.width_s)}", time, y)
    order = (ACTIONS.index("cold_start"), ACTIONS.index("migrate"), ACTIONS.index("serve"))  # the rare ones at the floor, where they can be compared
    plot.add_bars(bins.edges(), [Bars(ACTION_NAMES[ACTIONS[index]], counts[index], (3, 2, 5)[index]) for index in order])
    return plot


def _busy_plot(recorder: Recorder, bins: series.Bins, time: Axis, workers: int) -> Plot | None:
    if not recorder.done_at or not workers:
        return None
    points = [(at, busy / workers) for at, busy in series.busy_workers(recorder, bins)]
    y = Axis(0.0, 1.0, "part of workers", lambda value: f"{value * 100:.0f} %", ticks=5)
    plot = Plot("busy", "Fleet utilisation", "Mean part of the workers that had a request in service, from the completed requests", time, y)
    plot.add_line(Line("busy", points, 1, filled=True))
    return plot


def _states_plot(recorder: Recorder, bins: series.Bins, time: Axis) -> Plot | None:
    """Workers by state, if anything but their start happened."""
    points = recorder.fleet.points
    states = [state for state in STATE_COLOURS if any(counts.get(state) for _, counts in points)]
    if not set(states) & {"DRAINING", "SUSPECT", "DEAD", "LEFT"}:
        return None
    y = Axis(0.0, nice_top([max(counts.values()) for _, counts in points if counts]), "workers", _plain, ticks=5)
    plot = Plot("states", "Workers by state", "As the coordinator knows them", time, y)
    for state in states:
        line = [(at, float(counts.get(state, 0))) for at, counts in points]
        plot.add_line(Line(state.lower(), [*line, (bins.end_s, line[-1][1])], STATE_COLOURS[state], steps=True))
    return plot


# --- tables -------------------------------------------------------------------------------------------------------------------------


def _latency_table(results: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in STATISTICS)
    rows = "".join(
        f'<tr><th scope="row">{label}</th>' + "".join(f"<td>{escape(duration(results[key][name]))}</td>" for name in STATISTICS) + "</tr>\n"
        for key, label in ROWS
        if results[key]["max"] is not None
    )
    return f'<div class="wide"><h2>Latencies</h2><table><thead><tr><td></td>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>\n'


def _figures_tables(results: Mapping[str, Any], recorder: Recorder) -> str:
    requests, actions, fleet, reports = (results[name] for name in ("requests", "actions", "fleet", "reports"))
    imbalance = fleet["load_imbalance"]
    reasons = [(f"{kind}: {reason}", f"{number:,}") for kind in ("failed", "rejected", "retried") for reason, number in sorted(getattr(recorder, kind).items())]
    groups = (
        ("Requests", [*((name.replace("_", " "), f"{value:,}") for name, value in requests.items()), *reasons]),
        (
            "Placement",
            [
                *((ACTION_NAMES[name], f"{value:,}") for name, value in actions.items()),
                ("cold start rate", percent(fleet["cold_start_rate"])),
                ("model hit rate", percent(fleet["model_hit_rate"])),
                ("model loads", f"{recorder.loads:,}"),
                ("mean load", duration(recorder.mean_load_s)),
            ],
        ),
        (
            "Fleet",
            [
                ("workers ready", f"{fleet['ready']:,}"),
                ("utilisation", percent(fleet["utilisation"])),
                ("busiest worker / mean", f"{imbalance:.2f}" if imbalance is not None else "—"),
                *((f"reports {name.replace('_', ' ')}", f"{reports[name]:,}") for name in ("sent", "accepted", "lost", "under_way")),
                *((f"reports rejected: {reason.replace('_', ' ')}", f"{number:,}") for reason, number in reports["rejected"].items()),
                ("invariants checked", f"{results['invariants']['checked']:,}"),
            ],
        ),
    )
    return "".join(_pairs_table(title, rows) for title, rows in groups)


def _parameters(results: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    run = results["run"]
    names = ("mode", "architecture", "workers", "policy", "engine_profile", "loader", "seed", "duration_s", "duration_asked_s", "interrupted")
    known = {name: run[name] for name in names if run[name] is not None}
    known["hardware"] = ", ".join(f"{number:,} × {name}" for name, number in run["hardware"].items())
    workload = dict(run["workload"])
    models = [(f"model {row['name']}", f"{row['model']}, {count(row['requests'], 'request')}") for row in workload.pop("trace_models", [])[:MODELS_SHOWN]]
    return [*((str(name), str(value)) for name, value in {**known, **workload, **parameters}.items()), *models]


def _pairs_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in rows)
    return f"<div><h2>{escape(title)}</h2><table><tbody>\n{body}</tbody></table></div>\n"
