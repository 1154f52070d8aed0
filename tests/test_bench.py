"""What `make bench-check` looks at: every ratio of a benchmark, with some slack, and nothing that depends on the machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import _check, _fleet
from bench._fleet import RATIO, show, status

FOLDER = Path(_check.__file__).parent
NOT_CHECKED = {  # and why
    "memory": "bytes and milliseconds", "start_up": "seconds", "hundred_thousand": "needs two cores of its own", "flood": "compares two trees for minutes",
}  # fmt: skip


@pytest.mark.parametrize(("slack", "figure", "kept"), [(0.0, 4.0, True), (0.0, 4.1, False), (2.0, 8.0, True), (2.0, 8.1, False)])
@pytest.mark.parametrize("at_least", [False, True])
def test_a_ratio_may_miss_its_budget_by_the_slack(monkeypatch: pytest.MonkeyPatch, slack: float, figure: float, kept: bool, at_least: bool) -> None:
    monkeypatch.setattr(_fleet, "SLACK", slack)
    monkeypatch.setattr(_fleet, "_kept", [])
    show("good", 1.0, RATIO, 1.0)
    show("a ratio", 1 / figure if at_least else figure, RATIO, 0.25 if at_least else 4.0, at_least=at_least)
    show("good", 1.0, RATIO, 1.0)
    assert status() == (0 if kept else 1)


@pytest.mark.parametrize(("slack", "expected"), [(0.0, 1), (2.0, 0)])
def test_what_depends_on_the_machine_counts_only_without_slack(monkeypatch: pytest.MonkeyPatch, slack: float, expected: int) -> None:
    monkeypatch.setattr(_fleet, "SLACK", slack)
    monkeypatch.setattr(_fleet, "_kept", [])
    show("a ratio", 1.0, RATIO, 1.0)
    show("on a slow machine", 100.0, "us", 1.0)
    assert status() == expected


@pytest.mark.parametrize(("compiled", "expected"), [(False, 0), (True, 1)])
def test_compiled_modules_have_budgets_of_their_own(monkeypatch: pytest.MonkeyPatch, compiled: bool, expected: int) -> None:
    monkeypatch.setattr(_fleet, "SLACK", 0.0)
    monkeypatch.setattr(_fleet, "COMPILED", compiled)
    monkeypatch.setattr(_fleet, "_kept", [])
    show("a ratio", 5.0, RATIO, 6.0, compiled=4.0)
    assert status() == expected


def test_nothing_shown_is_not_taken_for_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fleet, "_kept", [])
    with pytest.raises(AssertionError, match="no budget that counts"):
        status()


def test_every_benchmark_is_checked_or_has_a_reason() -> None:
    files = {path.stem for path in FOLDER.glob("[!_]*.py")}
    assert _check.CHECKED.keys() | NOT_CHECKED.keys() == files
    assert not _check.CHECKED.keys() & NOT_CHECKED.keys()


@pytest.mark.parametrize(("codes", "tries"), [([0], 1), ([1, 0], 2), ([1, 1, 1], 3)])
def test_what_misses_a_budget_is_run_again(monkeypatch: pytest.MonkeyPatch, codes: list[int], tries: int) -> None:
    ran: list[str] = []

    class Done:
        @property
        def returncode(self) -> int:
            return codes[len(ran) - 1]

    def run(command: list[str], env: dict[str, str], check: bool) -> Done:
        ran.append(env["BENCH_SLACK"])
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    assert _check.is_kept("wire") is (codes[-1] == 0)
    assert ran == ["2.0"] * tries
