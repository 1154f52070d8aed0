"""What validation stands on: the exact values themselves, the judgement of a claim, the table that is written, the parity of live and virtual."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any

import pytest

from experiments import parity, theory, validate
from experiments.claims import Claim, claims
from experiments.harness import configuration, replace_section, silent
from sllm.run.virtual import VirtualRun

# --- exact values -------------------------------------------------------------------------------------------------------------------


def test_queues_have_their_textbook_waits() -> None:
    assert theory.mmc_wait(10, 0.9) == pytest.approx(0.6687315241, abs=1e-10)
    assert theory.mmc_wait(1, 0.7) == pytest.approx(theory.mg1_wait(0.7, 1.0))
    assert theory.mg1_wait(0.9, 0.0) == pytest.approx(4.5)
    assert theory.mg1_wait(0.9, 1.0) == pytest.approx(9.0)


def test_a_server_that_never_forgets_and_one_that_always_does() -> None:
    wait, cold = theory.keep_alive(0.5, 1e6, 3.0)
    assert wait == pytest.approx(1.0)
    assert cold == 0.0
    _, cold = theory.keep_alive(0.5, 0.0, 3.0)
    assert cold == pytest.approx(0.5 / 2.5)
    q = exp(-1.0)
    wait, cold = theory.keep_alive(0.5, 2.0, 3.0)
    assert wait == pytest.approx(1.0 + q * (6.0 + 4.5) / (2.0 * (1.0 + 1.5 * q)))
    assert cold == pytest.approx(q * 0.5 / (1.0 + 1.5 * q))


def test_two_choices_among_infinitely_many_servers() -> None:
    assert theory.two_choices_time(0.9, 1e12) == pytest.approx(2.614057, abs=1e-6)
    assert theory.two_choices_time(0.9, 200.0) > theory.two_choices_time(0.9, 1e12)


def test_the_shortest_of_two_queues_beats_two_queues_and_not_one_of_two_servers() -> None:
    assert theory.mmc_wait(2, 0.8) < theory.jsq2_wait(0.8, requests_max=120, difference_max=20) < theory.mg1_wait(0.8, 1.0) / 2.0


def test_an_older_board_is_worth_less() -> None:
    perfect = sum(0.8 ** (2.0**k - 2.0) for k in range(1, 12))
    new, old = (theory.stale_two_choices_time(0.8, interval, depth=20) for interval in (0.5, 2.0))
    assert perfect < new < 1.1 * perfect
    assert new < old < 5.0


def test_a_cache_of_models() -> None:
    popularity = theory.zipf(100, 1.0)
    assert theory.che_hit_ratio(popularity, 10) == pytest.approx(0.39762886, abs=1e-8)
    assert theory.lru_hit_ratio([0.25] * 4, 1) == pytest.approx(0.25, abs=1e-6)
    assert theory.lru_hit_ratio([0.7, 0.3], 1) == pytest.approx(0.7**2 + 0.3**2, abs=1e-6)


def test_batching_without_end_of_slots_is_the_familiar_limit() -> None:
    assert theory.batching_limit(0.01, 5e-5, 5e-5, 500, 101, 1e12) == pytest.approx(1.0 / (100 * 5e-5 + 500 * 5e-5))


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (9, 2.26216), (11, 2.20099), (23, 2.06866)])
def test_students_t_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert theory.student_t(freedom) == pytest.approx(quantile, abs=1e-4)


def test_an_interval_of_two_values() -> None:
    mean, half_width = theory.interval([1.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(12.7062, abs=1e-3)


# --- judging a claim ----------------------------------------------------------------------------------------------------------------


def claim(exact: float | None, figure: Any) -> Claim:
    return Claim("key", "a figure", "a book", None if exact is None else lambda: exact, figure, "python3 some.py")


def judged(monkeypatch: pytest.MonkeyPatch, made: Claim) -> validate.Verdict:
    monkeypatch.setattr(validate, "claims", lambda: [made])
    (verdict,) = validate.validate([made], 1.0, jobs=1, seeds=10)
    return verdict


def test_a_true_claim_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(monkeypatch, claim(5.0, lambda seed, scale: 5.0 + (-1) ** seed))
    assert verdict.inside
    assert not verdict.again
    assert verdict.seeds == 10
    assert "inside" in verdict.row()


def test_a_false_claim_is_outside_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(monkeypatch, claim(9.0, lambda seed, scale: 5.0 + (-1) ** seed))
    assert not verdict.inside
    assert verdict.again
    assert verdict.seeds == 20
    assert "**OUTSIDE**" in verdict.row()


def test_an_unlucky_claim_is_judged_by_new_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(monkeypatch, claim(5.0, lambda seed, scale: (5.0 if seed > 1000 else 50.0) + (-1) ** seed))
    assert verdict.inside
    assert verdict.again
    assert "second run" in verdict.row()


def test_a_figure_without_an_exact_value_is_only_told(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(monkeypatch, claim(None, lambda seed, scale: float(seed)))
    assert verdict.inside
    assert "inside" not in verdict.row()


@pytest.mark.parametrize(("exact", "status"), [(5.0, 0), (9.0, 1)])
def test_the_exit_status_tells_of_a_claim_that_is_outside(
    exact: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = claim(exact, lambda seed, scale: 5.0 + (-1) ** seed)
    monkeypatch.setattr(validate, "claims", lambda: [made])
    assert validate.main(["--only", "key", "--jobs", "1"]) == status
    assert "| `key` | a figure |" in capsys.readouterr().out


def test_the_page_has_the_rows_of_claims_that_hold() -> None:
    page = validate.DOCUMENT.read_text(encoding="utf-8")
    keys = [made.key for made in claims()]
    assert len(set(keys)) == len(keys)
    rows = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert rows == [key for key in keys if key in rows]
    assert len(rows) > 0, "make validate writes them"
    for key in keys:
        assert f"\n{key} " in page, f"{key}: make validate writes its command"
    assert "OUTSIDE" not in page


def test_writing_some_rows_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n<!-- end of table -->\n<!-- commands -->\n<!-- end of commands -->\n", encoding="utf-8")
    made = [claim(5.0, None)._replace(key=key) for key in ("a", "b")]
    monkeypatch.setattr(validate, "DOCUMENT", page)
    monkeypatch.setattr(validate, "claims", lambda: made)
    validate.write([validate.Verdict(made[1], 5.0, 5.5, 1.0, 10, False)])
    validate.write([validate.Verdict(made[0], 5.0, 7.0, 1.0, 10, False)])
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [(row.split("`")[1], "inside" in row) for row in rows] == [("a", False), ("b", True)]


@pytest.mark.parametrize("key", ["mm1", "jsq2", "keep", "cold"])
def test_a_claim_measures_something_near_its_value(key: str) -> None:
    """One short run, far from an interval: that the pieces fit, not that the value is right."""
    made = next(made for made in claims() if made.key == key)
    assert made.exact is not None
    measured = made.figure(1, 0.1)
    assert measured == pytest.approx(made.exact(), rel=0.5)
    assert made.figure(1, 0.1) == measured


# --- the page -----------------------------------------------------------------------------------------------------------------------


def test_a_section_is_replaced_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n", encoding="utf-8")
    replace_section(page, "table", "new")
    replace_section(page, "table", "newer")
    assert page.read_text(encoding="utf-8") == "before\n<!-- table -->\n\nnewer\n\n<!-- end of table -->\nafter\n"
    with pytest.raises(ValueError, match="the markers <!-- other -->"):
        replace_section(page, "other", "text")


# --- parity -------------------------------------------------------------------------------------------------------------------------


def outcome(ttft_s: float) -> parity.Outcome:
    figures = {"ttft_s": {"p50": ttft_s, "p99": 1.0}, "e2e_s": {"p50": 3.0, "p99": 9.0}, "actions": {"serve": 1, "cold_start": 1, "migrate": 0}}
    return parity.Outcome(figures, {"r0": "worker-0", "r1": "worker-1"}, [])


@pytest.mark.parametrize(("live_s", "why"), [(1.05, "within 10 %"), (1.15, "within two report intervals"), (1.25, "**APART**")])
def test_figures_may_differ_by_a_tenth_or_two_reports(live_s: float, why: str) -> None:
    line, *others = parity.compare(outcome(live_s), outcome(1.0), 0.1)
    assert line.name == "TTFT p50, s"
    assert line.why == why
    assert line.inside == (live_s < 1.2)
    assert all(other.inside for other in others)


def test_the_same_virtual_run_twice_is_on_a_par() -> None:
    config = configuration(workers=2, rate_per_s=4.0, duration_s=5.0, models=2, report_interval_s=0.1)
    first, second = (parity.measure(VirtualRun(config, silent())) for _ in range(2))
    assert first.served_by == second.served_by
    lines = parity.compare(first, second, config.report_interval_s)
    assert all(line.difference_s == 0.0 for line in lines)
    count = len(first.served_by)
    assert f"{count} requests, {count} of them served by the same worker" in parity.table(config, first, second, lines)
