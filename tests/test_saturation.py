"""The search for saturation: what is held, what is not, and where the border is."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import cast

import pytest

from experiments import saturation
from experiments.saturation import Observation, Verdict, judge, search, waiting
from sllm.observe.recorder import Recorder
from sllm.protocol.errors import UsageError


def verdict_at(border_per_s: float) -> tuple[list[float], object]:
    asked: list[float] = []

    def ask(rate_per_s: float) -> Verdict:
        asked.append(rate_per_s)
        return Verdict(rate_per_s, 1.0, 0.0, 0.0, rate_per_s <= border_per_s)

    return asked, ask


@pytest.mark.parametrize("border_per_s", [0.7, 9.9, 10.0, 10.4, 130.0])
def test_the_border_is_found_within_five_percent(border_per_s: float) -> None:
    asked, ask = verdict_at(border_per_s)
    found = search(10.0, ask)  # type: ignore[arg-type]
    assert found is not None
    low, high = found
    assert low <= border_per_s < high <= low * 1.05
    assert len(asked) == len(set(asked))


def test_a_border_that_is_nowhere_near_is_an_error() -> None:
    with pytest.raises(UsageError, match="no saturation between"):
        search(10.0, verdict_at(1e9)[1])  # type: ignore[arg-type]


def test_an_interrupted_search_has_found_nothing() -> None:
    assert search(10.0, lambda rate_per_s: None) is None


def test_a_rate_is_held_by_what_is_completed_and_by_the_queue() -> None:
    steady = Observation(1000, 1000, 2.0, 2.1, 50.0)
    assert judge(1.0, [steady] * 3).held
    assert not judge(1.0, [steady, steady, steady._replace(completed=960)]).held
    assert judge(1.0, [steady, steady, steady._replace(completed=975)]).held
    assert not judge(1.0, [steady, steady, steady._replace(last=20.0)]).held
    assert judge(1.0, [steady._replace(last=3.5)] * 3).held  # one request, and a hundredth of fifty in service, is chance
    assert not judge(1.0, [steady._replace(last=3.6)] * 3).held


def test_the_queue_is_the_time_that_requests_waited_in_it() -> None:
    recorder = Recorder()
    # Sent at 10 and 12, begun at 11 and 17, first tokens half a second later, done at 13 and 20.
    recorder.done_at, recorder.e2e_s = array("d", [13.0, 20.0]), array("d", [3.0, 8.0])
    recorder.ttft_s, recorder.queue_wait_s = array("d", [1.5, 5.5]), array("d", [1.0, 5.0])
    assert waiting(recorder, 10.0, 20.0) == pytest.approx((0.6, 0.5))
    assert waiting(recorder, 12.0, 14.0) == pytest.approx((1.0, 0.5))


def test_a_fleet_of_queues_saturates_where_its_servers_are_all_busy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two servers of 0.2 s a request can do ten a second."""
    path = tmp_path / "found.json"
    fleet = ["--engine", "queue", "--service", "deterministic", "--service-mean", "0.2", "--workers", "2"]
    assert saturation.main([*fleet, "--quiet", "--json", str(path)]) == 0
    found = cast(dict[str, float], json.loads(path.read_text()))
    assert 8.5 < found["saturation_per_s"] < 10.3
    assert found["formula_per_s"] == pytest.approx(10.0)
    assert "saturation of 2 workers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "5"], "--rate: has no meaning here"),
        (["--measure", "x"], "--measure='x': must be a whole number"),
        (["--record", "x.jsonl"], "--record: is for one run"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert saturation.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
