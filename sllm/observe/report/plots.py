"""The plots of the HTML report: the run over time, and the distribution of the time to first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sllm.observe import series
from sllm.observe.recorder import Recorder
from sllm.observe.report.svg import Axis, Bars, Line, Plot, nice_top
from sllm.observe.report.text import duration
from sllm.protocol.messages import ACTIONS

ACTION_NAMES = dict(zip(ACTIONS, ("serve", "cold start", "migrate"), strict=True))
STATE_COLOURS = {"READY": 3, "STARTING": 1, "DRAINING": 5, "SUSPECT": 2, "DEAD": 4, "LEFT": 6}
TIME_UNITS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "d"))
DOTS_MAX = 600  # completed requests that are drawn one by one; for more requests percentiles are drawn
MARKS_MAX = 12  # faults with a label on the time axis


class Mark(NamedTuple):
    """An interval shown on a time axis, in seconds after requests began to arrive. `end_s` None: to the end."""

    begin_s: float
    end_s: float | None
    text: str


def draw_plots(results: Mapping[str, Any], recorder: Recorder, began_s: float, marks: Sequence[Mark]) -> list[str]:
    """The plots as HTML; none if no request was sent. `began_s`: time of the recorder's clock at which requests began to arrive."""
    columns = results["series"]
    if not columns["at_s"]:
        return []
    bins = series.Bins(began_s, columns["bin_s"], len(columns["at_s"]))
    time = _time_axis(bins)
    over_time = [
        _ttft_plot(results, recorder, bins, time),
        _throughput_plot(columns, bins, time),
        _in_flight_plot(recorder, columns, bins, time),
        _used_plot(columns, bins, time),
        _actions_plot(recorder, bins, time),
        _states_plot(recorder, bins, time),
    ]
    kept = [plot for plot in over_time if plot is not None]
    for plot in kept:
        for row, mark in enumerate(marks[:MARKS_MAX]):
            plot.mark_span(began_s + mark.begin_s, bins.end_s if mark.end_s is None else began_s + mark.end_s, mark.text, row % 4)
    cdf = _cdf_plot(results, recorder)
    return [plot.render() for plot in ([cdf] if cdf is not None else []) + kept]


def _time_axis(bins: series.Bins) -> Axis:
    """An axis of the time since requests began to arrive; the values placed on it are times of the recorder's clock."""
    length_s, start_s = bins.end_s - bins.start_s, bins.start_s
    scale, unit = next(((scale, unit) for scale, unit in reversed(TIME_UNITS) if length_s >= 3 * scale), TIME_UNITS[0])
    axis = Axis(0.0, length_s / scale, f"time since requests began to come ({unit})", str, ticks=8)
    axis.low, axis.high, axis.ticks = start_s, bins.end_s, [start_s + tick * scale for tick in axis.ticks]
    axis.label = lambda value: f"{round((value - start_s) / scale, 9):,.6g}"
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
        if ttft[name] is None:
            continue
        plot.mark_x(ttft[name], f"{name} {duration(ttft[name])}", row)
    plot.add_line(Line("TTFT", [(points[0][0], 0.0), *points], 1, steps=len(points) < 100))
    return plot


def _ttft_plot(results: Mapping[str, Any], recorder: Recorder, bins: series.Bins, time: Axis) -> Plot | None:
    """Each request of a small run; percentiles in each bin of a large one."""
    if not recorder.ttft_s:
        return None
    slo_s, ttft = results["slo"]["ttft_s"], results["ttft_s"]
    dots = [(at - e2e_s, ttft_s) for at, e2e_s, ttft_s in zip(recorder.done_at, recorder.e2e_s, recorder.ttft_s, strict=True)]
    few = len(dots) <= DOTS_MAX
    lines = [] if few else series.ttft_percentiles(recorder, bins, (50, 90, 99))
    values = list(recorder.ttft_s) if few else [value for line in lines for _, value in line]
    y = Axis(min(values) * 0.8, max(*values, slo_s) * 1.25, "time to first token", _axis_duration, log=True)
    what = "Each completed request, by its time of arrival" if few else f"Percentiles of the requests that arrived in each {duration(bins.width_s)}"
    plot = Plot("ttft", "Time to first token over time", what, time, y)
    plot.mark_y(slo_s, f"goal {duration(slo_s)}")
    if few:
        for name in ("p50", "p99"):
            if ttft[name] is not None:  # all of them came in the warm-up
                plot.mark_y(ttft[name], name)
        plot.add_dots("a request", dots, 1)
    for name, points, colour in zip(("p99", "p90", "p50"), reversed(lines), (2, 5, 1), strict=False):
        plot.add_line(Line(name, points, colour))
    return plot


def _throughput_plot(columns: Mapping[str, Any], bins: series.Bins, time: Axis) -> Plot:
    """Counts, not rates: a bin may hold a few requests only."""
    y = Axis(0.0, nice_top([*columns["sent"], *columns["completed"]]), "requests", _plain, ticks=5)
    plot = Plot("throughput", "Arrivals and completions", f"Requests in each {duration(bins.width_s)} of the run's clock", time, y)
    for name, key, colour in (("arrived", "sent", 1), ("completed", "completed", 3), ("failed or rejected", "given_up", 4)):
        if key != "given_up" or any(columns[key]):
            counts = [float(count) for count in columns[key]]
            plot.add_line(Line(name, list(zip(bins.edges(), [*counts, counts[-1]], strict=True)), colour, filled=key == "sent", steps=True))
    return plot


def _in_flight_plot(recorder: Recorder, columns: Mapping[str, Any], bins: series.Bins, time: Axis) -> Plot:
    """Requests in flight and waiting; exact unless there are more changes than a screen can show."""
    points = series.in_flight(recorder, bins)
    waiting = columns.get("waiting", [])
    y = Axis(0.0, nice_top([*(value for _, value in points), *waiting]), "requests", _plain, ticks=5)
    plot = Plot("in-flight", "Requests in flight", "Sent and not yet completed, failed or rejected; waiting at the workers, as of the end of each bin", time, y)
    plot.add_line(Line("in flight", points, 5, filled=True, steps=True))
    if any(waiting):
        plot.add_line(Line("waiting", list(zip(bins.edges()[1:], map(float, waiting), strict=True)), 2, steps=True))
    return plot


def _used_plot(columns: Mapping[str, Any], bins: series.Bins, time: Axis) -> Plot | None:
    """Parts in use: of the workers' time, of the slots, of the KV cache."""
    if "utilisation" not in columns:
        return None
    y = Axis(0.0, 1.0, "part in use", lambda value: f"{value * 100:.0f} %", ticks=5)
    plot = Plot("used", "What was in use", f"Means over the fleet and each {duration(bins.width_s)}", time, y)
    for name, key, colour in (("time with any request", "utilisation", 6), ("slots", "slot_occupancy", 1), ("KV cache", "kv_occupancy", 2)):
        points = [(edge, value) for edge, value in zip(bins.edges(), columns[key], strict=False) if value is not None]
        if points:
            plot.add_line(Line(name, [*points, (points[-1][0] + bins.width_s, points[-1][1])], colour, filled=key == "slot_occupancy", steps=True))
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


def _states_plot(recorder: Recorder, bins: series.Bins, time: Axis) -> Plot | None:
    """Workers by state; no plot if the workers only started."""
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
