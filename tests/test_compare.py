"""Comparisons: the same requests for all, intervals and paired differences as by hand, and a run that was interrupted gives the numbers of one that was not."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import centralized_simulation
from experiments import compare as program
from experiments.batch import Bar, Stopped, run_all
from experiments.compare import without_resume
from experiments.comparison import SHOWN, Estimate, Sample, Setting, compare, difference, quantiles
from experiments.comparison_text import show
from experiments.plan import split_policies
from sllm.placement.registry import policies
from sllm.protocol.errors import UsageError

SMALL = ["--workers", "2", "--rate", "5", "--duration", "4", "--models", "3"]


def run(*arguments: str) -> int:
    return program.main([*arguments])


def content(path: Path) -> dict[str, Any]:
    """What a file of results says, but for what depends on the machine."""
    found: dict[str, Any] = json.loads(path.read_text())
    assert "wall" in found
    return {key: value for key, value in found.items() if key != "wall"}


def sample(candidate: str, seed: int, p99_s: float, completed: float = 1.0) -> Sample:
    return Sample(candidate, Setting(5, 1.0, "", 1.0), seed, {"ttft_p99_s": p99_s, "completed": completed}, [])


def samples(candidate: str, *p99_s: float) -> list[Sample]:
    return [sample(candidate, seed, value) for seed, value in enumerate(p99_s)]


# --- figures ------------------------------------------------------------------------------------------------------------------------


def test_means_intervals_and_paired_differences_by_hand() -> None:
    """Both vary by seconds from seed to seed, and their difference by hundredths of one."""
    (group,) = compare([*samples("a", 1.0, 2.0, 6.0), *samples("b", 1.5, 2.52, 6.48)])
    first, second = group.rows
    mean, half_width = first.means["ttft_p99_s"]  # type: ignore[misc]
    assert mean == pytest.approx(3.0)
    assert half_width == pytest.approx(4.303 * 7.0**0.5 / 3.0**0.5, rel=1e-3)  # deviation sqrt(7), Student's t of two degrees of freedom
    assert first.against_first["ttft_p99_s"] is None
    mean, half_width = second.against_first["ttft_p99_s"]  # type: ignore[misc]
    assert mean == pytest.approx(0.5)
    assert half_width == pytest.approx(4.303 * 0.02 / 3.0**0.5, rel=1e-3)
    assert first.best_at == {"ttft_p99_s"}
    assert second.best_at == frozenset()


def test_nobody_is_best_where_the_interval_does_not_say_so() -> None:
    (group,) = compare([*samples("a", 1.0, 2.0, 6.0), *samples("b", 1.5, 3.0, 5.9)])
    assert [row.best_at for row in group.rows] == [frozenset(), frozenset()]
    (alone,) = compare([sample("a", 1, 1.0), sample("b", 1, 2.0)])
    assert [row.best_at for row in alone.rows] == [frozenset(), frozenset()]
    assert alone.rows[1].against_first["ttft_p99_s"] == (1.0, None)


def test_who_completes_less_does_not_win_by_the_times_of_what_it_completed() -> None:
    (group,) = compare([sample("a", seed, 1.0 + seed, 0.8) for seed in range(3)] + [sample("b", seed, 2.0 + 1.01 * seed) for seed in range(3)])
    assert group.rows[0].best_at == frozenset()


def test_differences_are_of_the_seeds_that_both_have() -> None:
    mine, others = {1: sample("b", 1, 3.0), 2: sample("b", 2, 9.0)}, {1: sample("a", 1, 1.0), 5: sample("a", 5, 0.0)}
    assert difference(mine, others, "ttft_p99_s") == (2.0, None)
    assert difference(mine, {7: sample("a", 7, 1.0)}, "ttft_p99_s") is None


def test_quantiles_lie_between_order_statistics() -> None:
    found = quantiles([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (found[0], found[25], found[50], found[60], found[-1]) == (1.0, 2.0, 3.0, 3.4, 5.0)
    assert quantiles([]) == []


def test_policies_are_split_between_their_parameters() -> None:
    assert split_policies("startup_time:sample=4,margin_s=0.5,least_loaded") == ["startup_time:sample=4,margin_s=0.5", "least_loaded"]
    assert split_policies("all", "startup_time") == ["startup_time", *(name for name in policies() if name != "startup_time")]
    with pytest.raises(UsageError, match="there twice"):
        split_policies("least_loaded,least_loaded")


# --- runs ---------------------------------------------------------------------------------------------------------------------------


def test_all_candidates_get_the_same_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    assert run("--policies", "startup_time,round_robin", *SMALL, "--rates", "5,9", "--seeds", "2", "--json", str(out), "--csv", str(tmp_path / "x.csv")) == 0
    found = content(out)
    sent = {(one["policy"], one["rate_per_s"], one["seed"]): one["figures"]["sent"] for one in found["runs"]}
    assert len(sent) == 8
    for rate_per_s in (5.0, 9.0):
        for seed in (1, 2):
            assert sent["startup_time", rate_per_s, seed] == sent["round_robin", rate_per_s, seed] > 0
    assert len({sent["startup_time", rate_per_s, seed] for rate_per_s in (5.0, 9.0) for seed in (1, 2)}) == 4
    table = capsys.readouterr().out
    assert table.count("2 workers · ") == 2
    assert table.count("round_robin") == 2
    rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert {row["candidate"] for row in rows} == {"startup_time", "round_robin"}
    p99 = next(row for row in rows if row["figure"] == "ttft_p99_s" and row["candidate"] == "round_robin" and row["rate_per_s"] == "9.0")
    (group,) = (group for group in found["groups"] if group["rate_per_s"] == 9.0)
    assert float(p99["mean"]) == group["candidates"][1]["figures"]["ttft_p99_s"]["mean"]


def test_a_signal_while_figures_are_worked_out_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def slow(samples: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return compare(samples)

    monkeypatch.setattr(program, "compare", slow)
    assert run(*SMALL, "--policies", "random,round_robin", "--seeds", "2", "--json", str(tmp_path / "all.json")) == 0
    assert "round_robin" in capsys.readouterr().out
    kept = content(tmp_path / "all.json")
    assert (len(kept["runs"]), kept["interrupted"]) == (4, False)


def test_interrupted_half_way_and_resumed_gives_the_numbers_of_one_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ["--policies", "startup_time,least_loaded", *SMALL, "--seeds", "4"]
    assert run(*what, "--json", str(tmp_path / "whole.json")) == 0
    expected = capsys.readouterr().out
    part = tmp_path / "part.json"
    steps = 0

    def step(bar: Bar, weight: float = 1.0, note: str = "") -> None:
        nonlocal steps
        steps += weight == 1.0
        if steps == 4:
            steps += 1
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Bar, "step", step)
        assert run(*what, "--json", str(part)) == 130
    table, said = capsys.readouterr()
    assert table.startswith("Interrupted: not every run was made.")
    half = content(part)
    assert half["interrupted"]
    assert 4 <= len(half["runs"]) < 8
    assert f"{len(half['runs'])} of 8 runs are done and kept in {part}" in said
    assert "--resume" in said
    made: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Bar, "step", lambda bar, weight=1.0, note="": made.append(weight))
        assert run(*what, "--json", str(part), "--resume") == 0
    assert made == [len(half["runs"]), *[1.0] * (8 - len(half["runs"]))]
    assert content(part) == content(tmp_path / "whole.json")
    assert capsys.readouterr().out == expected


def test_what_is_done_is_kept_without_an_output_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    what = ["--policies", "startup_time,least_loaded", *SMALL, "--seeds", "2", "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr(Bar, "step", lambda bar, weight=1.0, note="": os.kill(os.getpid(), signal.SIGTERM) if weight == 1.0 else None)
        patched.setattr(program, "run_all", _one_at_a_time)
        assert run(*what) == 143
    assert len(content(tmp_path / program.UNFINISHED)["runs"]) == 1
    assert run(*what, "--resume") == 0
    assert not (tmp_path / program.UNFINISHED).exists()


def _one_at_a_time(function: Any, items: Any, jobs: int, stopped: Stopped, done: Any, wait: Any) -> None:
    for place, item in enumerate(items):
        if stopped:
            return
        done(place, function(item))


def test_runs_of_other_settings_are_not_taken_over(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    assert run("--policies", "startup_time", *SMALL, "--seeds", "2", "--quiet", "--json", str(out)) == 0
    more = ["--quiet", "--json", str(tmp_path / "y.json"), "--resume", str(out)]
    assert run("--policies", "startup_time", *SMALL, "--seeds", "3", *more) == 0
    assert json.loads((tmp_path / "y.json").read_text())["wall"]["taken_over"] == 2
    assert run("--policies", "startup_time", *SMALL, "--zipf", "0.5", "--seeds", "2", *more) == 0
    assert json.loads((tmp_path / "y.json").read_text())["wall"]["taken_over"] == 0


def test_the_command_to_go_on_with_names_no_old_file() -> None:
    assert without_resume(["--seeds", "3", "--resume", "a.json", "--quiet"]) == ["--seeds", "3", "--quiet"]
    assert without_resume(["--resume", "--quiet"]) == ["--quiet"]
    assert without_resume(["--resume=a.json", "--seeds=3", "--resume"]) == ["--seeds=3"]


BARRIER = multiprocessing.get_context("fork").Barrier(2)


def _meet(item: int) -> int:
    BARRIER.wait(60.0)
    return 10 * item


def test_runs_are_spread_over_processes() -> None:
    """Each of two items waits for the other to have begun."""
    found: dict[int, int] = {}
    run_all(_meet, [1, 2], 2, Stopped(), found.__setitem__, lambda: None)
    assert found == {0: 10, 1: 20}


# --- files --------------------------------------------------------------------------------------------------------------------------


def test_two_single_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for policy in ("startup_time", "round_robin"):
        arguments = ["--virtual", "--quiet", *SMALL, "--policy", policy, "--json", str(tmp_path / f"{policy}.json")]
        assert centralized_simulation.main(arguments) == 0
    assert run("--against", str(tmp_path / "startup_time.json"), str(tmp_path / "round_robin.json")) == 0
    table = capsys.readouterr().out
    assert "startup_time against round_robin" in table
    assert "nobody is called best" in table


def test_two_comparisons_are_compared_where_they_have_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, policies_, cold in (("a", "startup_time,round_robin", "safetensors"), ("b", "startup_time", "serverlessllm")):
        arguments = ["--policies", policies_, *SMALL, "--loader", cold, "--seeds", "3", "--quiet", "--json", str(tmp_path / f"{name}.json")]
        assert run(*arguments) == 0
    out = tmp_path / "out.json"
    capsys.readouterr()
    assert run("--against", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json", str(out)) == 0
    table = capsys.readouterr().out
    assert "a.json" in table
    assert "Every candidate served the same requests" not in table, "of two files nobody knows that"
    (group,) = json.loads(out.read_text())["groups"]
    assert group["more"] == "startup_time"
    assert [one["candidate"] for one in group["candidates"]] == ["a.json", "b.json"]
    assert group["candidates"][1]["against_first"]["ttft_p99_s"]["mean"] < 0.0


def test_page_and_picture_are_well_formed_and_name_everybody(tmp_path: Path) -> None:
    page, picture = tmp_path / "x.html", tmp_path / "x.svg"
    what = ["--policies", "startup_time,round_robin", *SMALL, "--rates", "3,5", "--seeds", "2", "--quiet"]
    assert run(*what, "--html", str(page), "--svg", str(picture)) == 0
    text = page.read_text()
    assert text.count("<figure>") == 6  # four figures by rate, two distributions
    for figure in text.split("<figure>")[1:]:
        drawing = ET.fromstring("<figure>" + figure.partition("</figure>")[0].replace("&nbsp;", " ") + "</figure>")
        assert "startup_time" in "".join(drawing.itertext())
    root = ET.fromstring(picture.read_text())
    assert root.tag.endswith("svg")
    assert {"startup_time", "round_robin"} <= set(root.itertext())


def test_fleets_at_rates_of_their_own_are_plotted_by_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "x.html"
    assert run("--policies", "startup_time", "--workers", "1,2", "--duration", "4", "--seeds", "1", "--html", str(page)) == 0
    assert page.read_text().count("by workers</h3>") == 4
    assert "against" not in capsys.readouterr().out  # there is nobody else


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policies", "nobody"], "policy 'nobody' is not known"),
        (["--mix", "llama-3.1-8b"], "mix 'llama-3.1-8b': is neither NAME=SHARE,... nor a file"),
        (["--policy", "random"], "--policies A,B"),
        (["--rates", "5,x"], "--rates='x': must be a number"),
        (["--workers", "5,5"], "there twice"),
        (["--seeds", "0"], "--seeds='0': must be a whole number"),
        (["--traces", "no-such.csv", "--policies", "random", "--seeds", "1"], "no-such.csv"),
        (["--traces", "a.csv", "--rates", "5"], "--rates: --traces bring their own arrivals"),
        (["--against", "no-such.json", "other.json"], "--against no-such.json: cannot be read"),
        (["--resume", "no-such.json"], "--resume no-such.json: cannot be read"),
        (["--requests-csv", "x.csv"], "--requests-csv: is for one run"),
        (["--hardware", "h100-80g:3", "--workers", "5"], "its counts sum to 3"),
        (["--json", "-", "--csv", "-"], "both write to stdout"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert list(tmp_path.iterdir()) == []


def test_json_of_another_kind_is_said_to_be_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, text in enumerate(("{}", "[]", '{"run": 1}')):
        (tmp_path / f"{number}.json").write_text(text)
        assert run("--against", str(tmp_path / f"{number}.json"), str(tmp_path / "other.json")) == 2
        said = capsys.readouterr().err
        assert said.endswith("0.json: is neither of compare.py --json nor of centralized_simulation.py --json\n".replace("0", str(number)))


def test_figures_are_shown_with_their_units() -> None:
    times, part = SHOWN[0], SHOWN[2]
    assert show(Estimate(1.234, 0.01), times) == "1.23 s ± 10.0 ms"
    assert show(Estimate(-0.5, None), times, sign=True) == "-500 ms"
    assert show(Estimate(0.25, 0.5), times, sign=True) == "+250 ms ± 500 ms"
    assert show(Estimate(0.5, None), part) == "50 %"
    assert show(None, times) == "—"
