"""Synthetic workloads: arrivals, token lengths, popularity, and the streams they draw from."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from sllm.protocol.errors import UsageError
from sllm.protocol.seeds import rng_for
from sllm.workload import Request, WorkloadSpec, generate
from sllm.workload.arrivals import ARRIVALS
from sllm.workload.lengths import (
    AZURE_CONV_OUTPUT,
    AZURE_CONV_PROMPT,
    clamped_mean,
    fit_lognormal,
    lognormal,
    parse_lengths,
)
from sllm.workload.popularity import Zipf

ROOT = Path(__file__).resolve().parent.parent
MODELS = [f"model-{i}" for i in range(8)]


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def cv(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


def interval(samples: list[float]) -> tuple[float, float]:
    """99.9 % confidence interval of the mean over seeds (normal approximation)."""
    half = 3.29 * statistics.stdev(samples) / math.sqrt(len(samples))
    return statistics.fmean(samples) - half, statistics.fmean(samples) + half


# --- arrivals -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_stay_in_the_duration_and_go_forward(name: str) -> None:
    for seed in range(20):
        times = list(ARRIVALS[name](5.0, 40.0, 8.0, Random(seed)))
        assert times == sorted(times), f"seed {seed}"
        assert all(0 <= t < 40.0 for t in times), f"seed {seed}"


@pytest.mark.parametrize(("name", "spread"), [("poisson", 1.0), ("gamma", 8.0), ("gamma", 0.5), ("deterministic", 0.0)])
def test_expected_number_is_rate_times_duration_even_in_a_short_run(name: str, spread: float) -> None:
    counts = [float(len(list(ARRIVALS[name](10.0, 30.0, spread, Random(seed))))) for seed in range(1500)]
    low, high = interval(counts)
    assert low <= 300 <= high


def test_poisson_gaps_have_cv_one() -> None:
    values = gaps(list(ARRIVALS["poisson"](100.0, 1000.0, 8.0, Random(1))))
    # The standard error of an exponential's CV is about 1 / sqrt(n) = 0.003.
    assert cv(values) == pytest.approx(1.0, abs=0.012)
    assert statistics.fmean(values) == pytest.approx(0.01, rel=0.012)


@pytest.mark.parametrize("wanted", [0.5, 2.0, 8.0])
def test_gamma_gaps_have_the_cv_asked_for(wanted: float) -> None:
    measured = [cv(gaps(list(ARRIVALS["gamma"](100.0, 1000.0, wanted, Random(seed))))) for seed in range(8)]
    low, high = interval(measured)
    assert low - 0.01 * wanted <= wanted <= high + 0.01 * wanted  # the CV of a finite sample is a little too small


def test_deterministic_arrivals_are_evenly_spaced_without_drift() -> None:
    times = list(ARRIVALS["deterministic"](3.0, 1000.0, 8.0, Random(1)))
    assert times == [i / 3.0 for i in range(3000)]


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_without_end_can_be_taken_one_by_one(name: str) -> None:
    times = list(itertools.islice(ARRIVALS[name](2.0, math.inf, 1.0, Random(3)), 1000))
    assert len(times) == 1000
    assert times[-1] == pytest.approx(500, rel=0.2)


# --- lengths --------------------------------------------------------------------------------------------------------------------------


def test_lognormal_lengths_have_the_mean_median_and_largest_of_the_trace() -> None:
    sample = lognormal()
    rng = Random(1)
    pairs = [sample(rng) for _ in range(200_000)]
    for values, law, mean, median in (
        ([p for p, _ in pairs], AZURE_CONV_PROMPT, 1154.7, 1020),
        ([o for _, o in pairs], AZURE_CONV_OUTPUT, 211.1, 129),
    ):
        error = statistics.pstdev(values) / math.sqrt(len(values))
        assert abs(statistics.fmean(values) - mean) < 4 * error + 0.1
        # The standard error of a lognormal's median is sigma * sqrt(pi / 2) / sqrt(n), relative to it.
        assert abs(statistics.median(values) / median - 1) < 4 * law.sigma * math.sqrt(math.pi / 2 / len(values)) + 0.5 / median
        assert min(values) >= 1
        assert max(values) <= law.maximum


def test_fit_without_a_cut_is_the_closed_form() -> None:
    law = fit_lognormal(mean=200.0, median=100.0, maximum=10**12)
    assert law.sigma == pytest.approx(math.sqrt(2 * math.log(2)), rel=1e-6)
    assert clamped_mean(AZURE_CONV_OUTPUT) == pytest.approx(211.1, rel=1e-9)


def test_a_mean_that_no_lognormal_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no lognormal"):
        fit_lognormal(mean=50.0, median=100.0, maximum=1000)


def test_fixed_lengths() -> None:
    assert parse_lengths("fixed:512:128").draw(Random(1)) == (512, 128)


def test_empirical_lengths_are_rows_of_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,1\n1,20,2\n2,30,3\n")
    sample = parse_lengths(f"empirical:{path}").draw
    rng = Random(7)
    counts = Counter(sample(rng) for _ in range(30_000))
    assert set(counts) == {(10, 1), (20, 2), (30, 3)}
    assert all(abs(count - 10_000) < 4 * math.sqrt(30_000 * 2 / 9) for count in counts.values())


@pytest.mark.parametrize(
    "text",
    ["", "fixed", "fixed:1", "fixed:0:5", "fixed:5:-1", "fixed:a:b", "fixed:1:2:3", "fixed:1:99999999", "empirical:", "azure-conv:x", "nope"],
)
def test_bad_lengths_are_named(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_lengths(text)
    assert repr(text) in str(caught.value)


# --- popularity -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.2])
def test_zipf_draws_as_often_as_the_law_says(exponent: float) -> None:
    names = [f"m{i}" for i in range(20)]
    zipf = Zipf(names, exponent)
    rng = Random(11)
    draws = 100_000
    counts = Counter(zipf.draw(rng) for _ in range(draws))
    norm = sum((i + 1) ** -exponent for i in range(20))
    chi_square = 0.0
    for rank, name in enumerate(names):
        expected = (rank + 1) ** -exponent / norm
        assert zipf.probability(rank) == pytest.approx(expected)
        chi_square += (counts[name] - draws * expected) ** 2 / (draws * expected)
    assert chi_square < 43.8  # 99.9 % of 19 degrees of freedom


def test_zipf_of_one_model_and_of_a_steep_exponent() -> None:
    assert Zipf(["only"], 1.1).draw(Random(1)) == "only"
    steep = Zipf([f"m{i}" for i in range(10_000)], 100.0)
    assert {steep.draw(Random(seed)) for seed in range(50)} == {"m0"}


def test_zipf_stays_inside_when_rounding_reaches_the_total() -> None:
    class Highest(Random):
        def random(self) -> float:
            return 1.0 - 2.0**-53

    for count in range(1, 200):
        names = [str(i) for i in range(count)]
        assert Zipf(names, 1.1).draw(Highest()) in names


# --- generate -------------------------------------------------------------------------------------------------------------------------


def test_requests_are_numbered_in_order_of_arrival() -> None:
    requests = list(generate(WorkloadSpec(rate_per_s=20, duration_s=30), MODELS, 1))
    assert [r.request_id for r in requests] == [f"r{i}" for i in range(len(requests))]
    assert requests == sorted(requests, key=lambda r: r.arrival_s)
    assert {r.model for r in requests} <= set(MODELS)
    assert all(isinstance(r, Request) and r.priority == 1 and r.prompt_tokens >= 1 and r.output_tokens >= 1 for r in requests)


def test_one_seed_gives_one_workload_and_another_seed_another() -> None:
    spec = WorkloadSpec(rate_per_s=20, duration_s=30)
    assert list(generate(spec, MODELS, 1)) == list(generate(spec, MODELS, 1))
    assert list(generate(spec, MODELS, 1)) != list(generate(spec, MODELS, 2))


def test_changing_one_part_leaves_the_others_as_they_were() -> None:
    def columns(**changes: object) -> tuple[list[float], list[tuple[int, int]], list[str]]:
        spec = WorkloadSpec(**({"rate_per_s": 20, "duration_s": None} | changes))  # type: ignore[arg-type]
        rows = list(itertools.islice(generate(spec, MODELS, 5), 200))
        return [r.arrival_s for r in rows], [(r.prompt_tokens, r.output_tokens) for r in rows], [r.model for r in rows]

    times, lengths, models = columns()
    assert columns(arrivals="gamma")[1:] == (lengths, models)
    assert columns(lengths="fixed:5:5")[::2] == (times, models)
    assert columns(zipf=0.0)[:2] == (times, lengths)


def test_only_the_first_models_are_asked_for() -> None:
    assert {r.model for r in generate(WorkloadSpec(rate_per_s=50, duration_s=30, models=2), MODELS, 1)} == set(MODELS[:2])


def test_a_duration_of_zero_has_no_requests() -> None:
    assert list(generate(WorkloadSpec(rate_per_s=5, duration_s=0.0, arrivals="deterministic"), MODELS, 1)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rate_per_s": 0.0}, "rate 0:"),
        ({"rate_per_s": math.nan}, "rate nan"),
        ({"rate_per_s": -1e16}, "rate -10000000000000000:"),
        ({"duration_s": -1e-05}, "duration -0.00001:"),
        ({"arrivals": "nope"}, "poisson, gamma, deterministic"),
        ({"cv": 0.0}, "variation 0:"),
        ({"duration_s": -1.0}, "duration -1:"),
        ({"zipf": -1.0}, "exponent -1:"),
        ({"models": -1}, "models -1"),
    ],
)
def test_values_that_make_no_workload_are_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        WorkloadSpec(**changes)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_models_must_be_there() -> None:
    with pytest.raises(UsageError, match="at least one model"):
        generate(WorkloadSpec(), [], 1)
    with pytest.raises(UsageError, match="only 8"):
        generate(WorkloadSpec(models=9), MODELS, 1)


def test_description_for_the_results() -> None:
    assert generate(WorkloadSpec(rate_per_s=2, arrivals="gamma"), MODELS, 1).describe() == {
        "arrivals": "gamma", "rate_per_s": 2, "cv": 8.0, "lengths": "azure-conv", "zipf": 1.1,
    }  # fmt: skip
    assert "cv" not in generate(WorkloadSpec(rate_per_s=2), MODELS, 1).describe()


# --- streams --------------------------------------------------------------------------------------------------------------------------


def test_streams_differ_by_name_and_seed_and_repeat() -> None:
    assert rng_for(1, "a").random() == rng_for(1, "a").random()
    assert len({rng_for(seed, name).random() for seed in range(30) for name in ("a", "b", "c")}) == 90


def test_streams_do_not_depend_on_the_hash_seed() -> None:
    program = "from sllm.protocol.seeds import rng_for; print(rng_for(7, 'workload/arrivals').random().hex())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": value}, capture_output=True, text=True, check=True
        ).stdout
        for value in ("1", "2")
    }
    assert outputs == {rng_for(7, "workload/arrivals").random().hex() + "\n"}
