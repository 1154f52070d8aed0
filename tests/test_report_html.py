import itertools
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from report_samples import events, recorded, results_of
from roles import tell

from sllm.observe import series
from sllm.observe.recorder import Recorder
from sllm.observe.report.html import ROWS_MAX, render_html
from sllm.observe.report.plots import Mark
from sllm.observe.report.svg import Axis, nice_top
from sllm.protocol.events import WorkerStateChanged
from sllm.run.command_line import grouped, parse, settings_of

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Parses a page and holds that every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: Any, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: Any, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: Any) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: Any) -> None:
        self.words.append(data)


def page_of(recorder: Any, violations: Any=(), **options: Any) -> Any:
    text = render_html(results_of(recorder, violations), recorder, **options)
    return text, Page(text)


@pytest.mark.parametrize("count", [0, 1, 2, 30, 3000])
def test_the_page_parses_and_refers_to_nothing_outside(count: int) -> None:
    text, page = page_of(recorded(count), command="python3 centralized_simulation.py --virtual")
    assert not re.search(r"https?:|//|@import|url\(|\bsrc=|\bhref=|<script", text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for word in ("nan", "inf", "None"):
        assert word not in " ".join(value or "" for _, name, value in page.attributes if name in ("d", "x", "y", "cx", "cy")).split()
    assert not re.search(r"[\"L ](nan|inf)", text)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {part for _, name, value in page.attributes if name == "aria-labelledby" for part in value.split()}
    assert referred <= set(ids)
    assert page.tags.count("svg") == (0 if count == 0 else 5 if count > 2 else page.tags.count("figure"))


def test_everything_shown_is_escaped_and_there() -> None:
    recorder = recorded(200)
    recorder.failed['<script>alert("x")</script>'] = 1
    _, page = page_of(recorder, ("broken: <b>1 < 2</b>",), command="sim --trace 'a&b.csv'", parameters={"<group>": {"<name>": "<value>"}})
    words = " ".join(page.words)
    for text in ('<script>alert("x")</script>', "broken: <b>1 < 2</b>", "sim --trace 'a&b.csv'", "<name>", "<value>", "Repeat this run", "poisson"):
        assert text in words
    assert "script" not in page.tags


def test_member_states_are_plotted_when_something_happened() -> None:
    recorder = recorded(200)
    assert "Workers by state" not in page_of(recorder)[0]
    tell(recorder, WorkerStateChanged(30.0, "worker-1", 1, "READY", "SUSPECT", "silent"))
    assert "Workers by state" in page_of(recorder)[0]


def test_the_page_is_small_and_the_same_for_the_same_run() -> None:
    first, second = (page_of(recorded(30_000))[0] for _ in range(2))
    assert first == second
    assert len(first) < 100_000


def test_the_curve_of_ttft_is_the_distribution() -> None:
    values = [((index * 7919) % 10_007) / 100.0 for index in range(10_007)]
    curve = series.cdf(values)
    ordered = sorted(values)
    assert len(curve) <= series.CURVE_POINTS + 1
    assert curve[-1] == (ordered[-1], 1.0)
    for value, part in curve:
        assert sum(number <= value for number in values) / len(values) == pytest.approx(part, abs=1e-3)
    assert series.cdf([2.0, 1.0]) == [(1.0, 0.5), (2.0, 1.0)]


def test_series_agree_with_the_columns() -> None:
    recorder = recorded(2000)
    bins = series.make_bins(recorder)
    assert bins is not None
    assert sum(bins.counts(recorder.sent_at)) == 2000
    assert sum(map(sum, series.actions(recorder, bins))) == len(recorder.routed_at)
    level = series.in_flight(recorder, bins)
    assert level[0][1] == 0.0
    assert level[-1][1] == recorder.glance().in_flight
    assert min(value for _, value in level) >= 0.0


def test_ttft_over_time_is_by_arrival() -> None:
    recorder = Recorder()
    for event in events(1000, trouble=False):
        tell(recorder, event)
    bins = series.make_bins(recorder)
    assert bins is not None
    [median, tail] = series.ttft_percentiles(recorder, bins, (50, 99))
    assert len(median) == len(tail)
    assert all(low <= high for (_, low), (_, high) in zip(median, tail, strict=True))


def test_axes_have_round_ticks() -> None:
    assert Axis(0.0, 60.0, "", str).ticks == [0, 10, 20, 30, 40, 50, 60]
    assert Axis(0.03, 4.0, "", str, log=True).ticks == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert Axis(5.0, 5.0, "", str).high == 6.0
    assert [nice_top([value]) for value in (0.0, 1.0, 9.9, 118.0, 230.0)] == [1.0, 1.2, 12.0, 150.0, 250.0]


def test_requests_in_flight_are_exact_step_by_step() -> None:
    recorder = recorded(200)
    bins = series.make_bins(recorder)
    assert bins is not None
    points = series.in_flight(recorder, bins)
    assert len(points) == 2 + len(recorder.sent_at) + len(recorder.done_at) + len(recorder.given_up_at)
    for at, level in points[1:-1]:
        gone = sum(done <= at for column in (recorder.done_at, recorder.given_up_at) for done in column)
        assert level == sum(sent <= at for sent in recorder.sent_at) - gone
    many = recorded(5000)
    bins = series.make_bins(many)
    assert bins is not None
    thinned = series.in_flight(many, bins)
    assert len(thinned) <= series.STEPS_MAX + 2
    changes = sorted([(at, 1) for at in many.sent_at] + [(at, -1) for column in (many.done_at, many.given_up_at) for at in column])
    assert max(level for _, level in thinned) == max(itertools.accumulate(change for _, change in changes))
    assert thinned[-1][1] == many.glance().in_flight


def test_faults_and_the_warm_up_are_bands_on_every_time_axis() -> None:
    recorder = recorded(100)
    results = results_of(recorder)
    results["run"]["warmup_s"] = 5.0
    text = render_html(results, recorder, marks=[Mark(10.0, 20.0, "crash"), Mark(30.0, None, "slow <link>")])
    plots = text.count("<figure>") - 1  # the distribution has no time
    assert text.count('class="span"') == 3 * plots
    assert text.count(">warm-up</text>") == text.count(">crash</text>") == text.count(">slow &lt;link&gt;</text>") == plots


def test_models_and_workers_have_their_rows_and_many_are_cut() -> None:
    recorder = recorded(300)
    results = results_of(recorder)
    words = " ".join(Page(render_html(results, recorder)).words)
    for row in (*results["models"], *results["workers"]):
        assert row.get("model", row.get("worker")) in words
    results["workers"] = [{**results["workers"][0], "worker": f"one-{number}"} for number in range(ROWS_MAX + 7)]
    text = render_html(results, recorder)
    assert f"one-{ROWS_MAX - 1}<" in text
    assert f"one-{ROWS_MAX}<" not in text
    assert "and 7 more" in text


def test_each_setting_stands_there_once_in_its_group() -> None:
    config, options = parse(["--virtual", "--rate", "3", "--catalog", "/a/long/path/" + "x" * 200], {"DEPLOYMENT_MODE": "local", "QUEUE_MAX": "77"}, "p", "")
    groups = grouped({"run": {"settings": settings_of(config, options)}})
    names = [name for pairs in groups.values() for name in pairs]
    assert len(names) == len(set(names))
    assert groups["The run"]["--rate"] == "3 req/s"
    assert groups["The run"]["--virtual"] is True
    assert groups["Workers"]["QUEUE_MAX"] == 77
    words = page_of(recorded(50), parameters=groups)[1].words
    assert all(words.count(name) == 1 for name in names)
