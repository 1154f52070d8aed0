"""The table of results at the end of a run, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any, TextIO

from sllm.observe.report.text import BOLD, DIM, GREEN, RED, YELLOW, can_encode, columns_of, count, duration, is_terminal, paint, percent, rate, span, to_ascii
from sllm.observe.statistics import STATISTICS

WIDTH_MAX = 100
LABEL_WIDTH = 11
ROWS = (
    ("ttft_s", "time to first token"),
    ("e2e_s", "end to end"),
    ("tpot_s", "per further token"),
    ("queue_wait_s", "wait at the worker"),
    ("stall_s", "stall in mid-stream"),
    ("decision_s", "placement decision"),
)
REASONS_SHOWN = 5  # the most frequent reasons of failures
MODELS_SHOWN = 5  # the models of a trace with the most requests
VIOLATIONS_SHOWN = 10


def print_table(results: Mapping[str, Any], stream: TextIO, *, no_color: bool = False) -> None:
    """Write the table to a stream, in the width and characters that the stream can show. `no_color`: no colours on a terminal either."""
    colour = is_terminal(stream) and not no_color
    width = min(WIDTH_MAX, columns_of(stream)) if is_terminal(stream) else WIDTH_MAX
    text = render_table(results, colour=colour, width=width)
    stream.write(text if can_encode(stream) else to_ascii(text))
    stream.flush()


def render_table(results: Mapping[str, Any], *, colour: bool = False, width: int = WIDTH_MAX) -> str:
    """The table as text, no line of it longer than `width` columns."""
    head = [*_run(results), *_models(results["run"]["workload"]), *_sessions(results["run"]["workload"])]
    lines = [*head, "", *_requests(results), "", *_times(results, width), *_slo(results), *_fleet(results), *_invariants(results)]
    painter = _Painter(colour, width)
    return "".join(line + "\n" for entry in lines for line in painter.lines(entry))


class _Line:
    """A label and parts that are kept whole when the line is broken; a part with code None has no colour."""

    def __init__(self, label: str, parts: Iterable[tuple[str, str | None]]) -> None:
        self.label = label
        self.parts = [(text, code) for text, code in parts if text]


class _Painter:
    def __init__(self, colour: bool, width: int) -> None:
        self._colour = colour
        self._width = width

    def lines(self, entry: _Line | str) -> list[str]:
        """The lines of an entry; parts go on the next line, under the first, when they do not fit."""
        if isinstance(entry, str):
            return [entry[: self._width].rstrip()]
        label = paint(entry.label.ljust(LABEL_WIDTH), BOLD, self._colour)
        indent = " " * LABEL_WIDTH
        lines, current, used = [], label, LABEL_WIDTH
        room = self._width - LABEL_WIDTH
        for text, code in ((piece, code) for whole, code in entry.parts for piece in wrap(whole, room)):
            if used > LABEL_WIDTH and used + 2 + len(text) > self._width:
                lines.append(current.rstrip())
                current, used = indent, LABEL_WIDTH
            gap = "" if used == LABEL_WIDTH else "   " if used + 3 + len(text) <= self._width else "  "
            current += gap + (paint(text, code, self._colour) if code else text)
            used += len(gap) + len(text)
        return [*lines, current.rstrip()]


def _plain(*parts: str) -> list[tuple[str, str | None]]:
    return [(part, None) for part in parts]


def _run(results: Mapping[str, Any]) -> list[_Line | str]:
    run, wall = results["run"], results["wall"]
    clock = "simulated" if run["mode"] == "virtual" else "of the run's clock"
    fleet = f"{count(run['workers'], 'worker')} of {' and '.join(_kinds(run))}" if run["hardware"] else count(run["workers"], "worker")
    what = f"{run['architecture']} · {run['mode']} · {fleet} · {run['policy']} · seed {run['seed']}"
    speed = _plain(f"wall time {_wall(wall['wall_s'])}: {rate(wall['requests_per_wall_s']).removesuffix('/s')} requests/s")
    costs = [f"engine {run['engine_profile']}", f"loader {run['loader']}"] if run["engine_profile"] else []
    lines: list[_Line | str] = [_Line("Run", _plain(what))]
    if costs:
        lines.append(_Line("", _plain(*costs)))
    lines.append(_Line("", [*_plain(f"arrivals for {span(run['duration_s'])} {clock}"), *speed]))
    if run["warmup_s"]:
        lines.append(_Line("", _plain(f"warm-up: what came in the first {duration(run['warmup_s'])} is counted, and left out of times, rates and parts")))
    return [*lines, _Line("", [(cut_short(run), YELLOW)])] if run["interrupted"] else lines


def cut_short(run: Mapping[str, Any]) -> str:
    """The note of an interrupted run about the time that its figures cover."""
    asked_s = run["duration_asked_s"]
    missing = f" of the {span(asked_s)} asked for" if asked_s is not None and asked_s > run["duration_s"] else ""
    return f"interrupted: requests came for {span(run['duration_s'])}{missing}; figures up to then"


def _kinds(run: Mapping[str, Any]) -> list[str]:
    """The hardware of a fleet; with several kinds of hardware, also the number of workers of each."""
    kinds = run["hardware"]
    return list(kinds) if len(kinds) == 1 else [f"{number:,} × {name}" for name, number in kinds.items()]


def _models(workload: Mapping[str, Any]) -> list[_Line | str]:
    """The models of the catalogue that stand for the model names of a trace."""
    rows = workload.get("trace_models", [])
    if not rows:
        return []
    shown = [row["name"] if row["name"] == row["model"] else f"{row['name']} as {row['model']}" for row in rows[:MODELS_SHOWN]]
    parts = _plain(*(f"{text}: {row['requests']:,}" for text, row in zip(shown, rows, strict=False)))
    more = len(rows) - MODELS_SHOWN
    return [_Line("Models", [*parts, (f"and {more:,} more" if more > 0 else "", DIM)])]


def _sessions(workload: Mapping[str, Any]) -> list[_Line | str]:
    """A note on prompts that repeat earlier turns."""
    law = workload.get("sessions")
    if law is None or law["prefix_cache"]:
        return []
    return [_Line("Sessions", [*_plain(f"{law['turns']:.12g} turns in the mean"), ("no prefix cache: what a prompt repeats is computed again", YELLOW)])]


def _wall(value: float) -> str:
    return span(value) if value >= 120 else duration(value)


def _requests(results: Mapping[str, Any]) -> list[_Line | str]:
    requests, actions, fleet, through = results["requests"], results["actions"], results["fleet"], results["throughput"]
    all_done = requests["sent"] == requests["completed"] > 0
    lines: list[_Line | str] = [
        _Line(
            "Requests",
            [
                (f"{requests['sent']:,} sent", None),
                (f"{requests['completed']:,} completed", GREEN if all_done else None),
                *((f"{requests[key]:,} {key}", RED if requests[key] else None) for key in ("failed", "rejected")),
                (f"{requests['in_flight']:,} in flight", YELLOW if requests["in_flight"] else None),
                (count(requests["duplicates"], "duplicate") if requests["duplicates"] else "", YELLOW),
            ],
        )
    ]
    for label, reasons in results["reasons"].items():
        frequent = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        more = len(frequent) - REASONS_SHOWN
        if frequent:
            shown = _plain(f"{label}:", *(f"{number:,} × {reason}" for reason, number in frequent[:REASONS_SHOWN]))
            lines.append(_Line("", [*shown, (f"and {more} other reasons" if more > 0 else "", DIM)]))
    if through["requests_per_s"]:
        tokens = [f"{rate(through[f'{kind}_tokens_per_s'])} {words}" for kind, words in (("prompt", "tokens in"), ("output", "tokens out"))]
        lines.append(_Line("Throughput", _plain(f"{rate(through['requests_per_s'])} completed", *tokens, f"over {duration(through['over_s'])}")))
    served = _plain(f"{actions['serve']:,} serve", count(actions["cold_start"], "cold start"), count(actions["migrate"], "migration"))
    rates = _plain(f"cold start rate {percent(fleet['cold_start_rate'])}", f"model hit rate {percent(fleet['model_hit_rate'])}")
    lines.append(_Line("Actions", [*served, *rates]))
    if fleet["loads"]:
        tiers = [f"{number:,} from {tier}" for tier, number in fleet["loads_by_tier"].items()]
        lines.append(_Line("Loads", _plain(f"{count(fleet['loads'], 'load')}, mean {duration(fleet['load_mean_s'])}", *tiers)))
    return lines


def distributions(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """The label and the statistics of each distribution that has values."""
    found = [(label, results["wall"][key] if key == "decision_s" else results[key]) for key, label in ROWS]
    return [(label, values) for label, values in found if values["max"] is not None]


def _times(results: Mapping[str, Any], width: int) -> list[_Line | str]:
    """One row for each distribution. Narrow terminals lose columns from the left, the mean first: the tail matters most."""
    if not results["requests"]["completed"]:
        return []
    labels = max(len(label) for _, label in ROWS)
    columns = list(STATISTICS)
    while labels + 9 * len(columns) > width and len(columns) > 2:
        columns.pop(0)
    lines: list[_Line | str] = [" " * labels + "".join(f"{name:>9}" for name in columns)]
    for label, values in distributions(results):
        lines.append(f"{label:<{labels}}" + "".join(f"{duration(values[name]):>9}" for name in columns))
    return [*lines, ""]


def targets(slo: Mapping[str, Any]) -> str:
    """The targets of a request as text."""
    more = f", further ones {duration(slo['tpot_s'])} each" if slo["tpot_s"] is not None else ""
    return f"first token within {duration(slo['ttft_s'])}{more}"


def _slo(results: Mapping[str, Any]) -> list[_Line | str]:
    slo = results["slo"]
    if slo["attainment"] is None:
        return []
    lines: list[_Line | str] = [_Line("SLO", _plain(f"{targets(slo)}: {percent(slo['attainment'])} of requests", f"goodput {rate(slo['goodput'] or 0.0)}"))]
    for one in slo.get("thresholds", ()):
        value = "not known" if one["value"] is None else f"{one['value']:.6g}"
        lines.append(_Line("", [(f"fail if {one['fail_if']}: {value}, {'missed' if one['missed'] else 'held'}", RED if one["missed"] else GREEN)]))
    return lines


def _fleet(results: Mapping[str, Any]) -> list[_Line | str]:
    fleet, reports, run = results["fleet"], results["reports"], results["run"]
    imbalance = fleet["load_imbalance"]
    ready = (f"{fleet['ready']:,} of {count(run['workers'], 'worker')} ready", YELLOW if fleet["ready"] < run["workers"] else None)
    parts = (("slot_occupancy", "of the slots in use"), ("kv_occupancy", "of the KV cache in use"), ("utilisation", "of the time with any request"))
    used = _plain(*(f"{percent(fleet[key])} {words}" for key, words in parts if fleet[key] is not None))
    uneven = _plain(f"the busiest {imbalance:.2f} × the mean" if imbalance is not None else "")
    heard = _plain(f"{reports['sent']:,} sent", f"{reports['accepted']:,} accepted")
    lost = (f"{reports['lost']:,} lost", YELLOW if reports["lost"] else None)
    rejected = [(f"{number:,} rejected: {reason.replace('_', ' ')}", YELLOW) for reason, number in reports["rejected"].items()]
    under_way = _plain(f"{reports['under_way']:,} under way") if reports["under_way"] else []
    return [_Line("Fleet", [ready, *used, *uneven]), _Line("Reports", [*heard, lost, *under_way, *(rejected or _plain("0 rejected"))])]


def _invariants(results: Mapping[str, Any]) -> list[_Line | str]:
    invariants = results["invariants"]
    violations = invariants["violations"]
    if not violations:
        if not invariants["checked"]:
            return []
        return [_Line("Invariants", [(f"{count(invariants['checked'], 'check')}, all held", GREEN)])]
    lines: list[_Line | str] = [_Line("Invariants", [(f"{count(len(violations), 'violation')} in {count(invariants['checked'], 'check')}", RED)])]
    lines += [_Line("", [(text, RED)]) for text in violations[:VIOLATIONS_SHOWN]]
    more = len(violations) - VIOLATIONS_SHOWN
    return [*lines, _Line("", [(f"and {more} more", RED)])] if more > 0 else lines
