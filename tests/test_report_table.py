import io
from typing import Any

import pytest
from report_samples import recorded, results_of

from sllm.observe.recorder import Recorder
from sllm.observe.report.table import print_table, render_table
from sllm.observe.report.text import count, duration, percent, rate, span


class Terminal(io.StringIO):
    def isatty(self) -> Any:
        return True


def ascii_stream() -> Any:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0.0, "0 s"), (1.2e-5, "12.0 µs"), (9.9996e-4, "1.00 ms"), (0.2124, "212 ms"), (0.99949, "999 ms"), (0.9996, "1.00 s"), (1.94, "1.94 s"),
     (12.34, "12.3 s"), (1234.5, "1,234 s")],
)  # fmt: skip
def test_durations(value: Any, text: str) -> None:
    assert duration(value) == text


def test_spans_rates_percentages_and_counts() -> None:
    assert [span(value) for value in (0.4, 45, 200, 7500, 360_000)] == ["0 s", "45 s", "3 min 20 s", "2 h 05 min", "4 d 04 h"]
    assert [rate(value) for value in (0.0, 0.123, 9.84, 15203.4)] == ["0/s", "0.12/s", "9.84/s", "15,203/s"]
    assert [percent(value) for value in (None, 0.0, 0.0001, 0.5, 0.9999, 1.0)] == ["—", "0 %", "< 0.1 %", "50 %", "> 99.9 %", "100 %"]
    assert [count(value, "cold start") for value in (0, 1, 1204)] == ["0 cold starts", "1 cold start", "1,204 cold starts"]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_no_line_is_wider_than_the_terminal_and_no_figure_is_lost(width: Any) -> None:
    recorder = recorded()
    results = results_of(recorder, ("conservation: " + "a long story " * 20,))
    results["run"] |= {"interrupted": True, "duration_asked_s": 3600.0}
    text = render_table(results, width=width)
    assert "interrupted:" in text
    assert max(map(len, text.splitlines())) <= width
    for figure in ("2,000 sent", "19 × SATURATED", "1 rejected: replayed", "time to first token", "p99", "max", "1 violation"):
        assert figure in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_figures_of_the_table_are_those_of_the_results() -> None:
    recorder = recorded()
    results = results_of(recorder)
    text = render_table(results)
    row = next(line for line in text.splitlines() if line.startswith("time to first token"))
    assert row.split("token")[1].split("  ") != []
    for name in ("mean", "p50", "p90", "p95", "p99", "max"):
        assert duration(results["ttft_s"][name]) in row
    assert f"{results['requests']['completed']:,} completed" in text
    assert "12 checks, all held" in text


def test_an_empty_run_has_a_table() -> None:
    text = render_table(results_of(Recorder()))
    assert "0 sent" in text
    assert "time to first token" not in text


def test_a_stream_that_only_takes_ascii_gets_ascii() -> None:
    stream = ascii_stream()
    recorder = recorded()
    print_table(results_of(recorder), stream)
    text = stream.buffer.getvalue().decode("ascii")
    assert "19.7 us" in text
    assert "x SATURATED" in text
    assert "?" not in text


@pytest.mark.parametrize(("stream", "no_color", "coloured"), [(Terminal(), False, True), (Terminal(), True, False), (io.StringIO(), False, False)])
def test_colours_are_for_terminals_that_want_them(stream: Any, no_color: Any, coloured: Any) -> None:
    print_table(results_of(recorded(), ("broken",)), stream, no_color=no_color)
    assert ("\x1b[" in stream.getvalue()) is coloured
