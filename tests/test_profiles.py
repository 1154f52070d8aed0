"""Engine and loader profiles: what they cost against what was measured, what they change, how they are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from report_samples import RUN

from config import Config, ConfigError
from experiments import engines
from experiments.harness import Simulation, configuration
from sllm.models.catalogue import Catalog
from sllm.models.cost import load_s, prefill_s, service_s, step_cost, step_s
from sllm.models.model import DISK, GPU, HOST, REMOTE
from sllm.models.presets import HARDWARE, MODELS
from sllm.models.profiles import ENGINE_PROFILES, LOADER_PROFILES
from sllm.observe.report.table import render_table
from sllm.protocol.errors import UsageError
from sllm.run.assemble import build_catalog, profile_names

MEASURED = Path(__file__).resolve().parents[2] / "shared" / "measured"
PRESETS = Catalog(MODELS)


# --- against measurements -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "model", "hardware", "batch", "context", "measured_s", "tolerance"),
    [
        # vLLM 0.19, 2026, BF16, one request at a time (vLLM's report on FP8 KV caches): 6.44 ms + 43.70 ns for each token of context.
        ("cuda_graphs", "llama-3.1-8b", "h100-80g", 1, 1024, 0.006485, 0.05),
        ("cuda_graphs", "llama-3.1-8b", "h100-80g", 1, 32768, 0.007872, 0.05),
        ("cuda_graphs", "llama-3.1-8b", "h100-80g", 1, 100000, 0.01081, 0.05),
        # vLLM 0.20, 2026 (AccelMark): 256 tokens in, 350 out.
        ("cuda_graphs", "llama-3.1-8b", "a100-80g", 1, 431, 0.01077, 0.10),
        # vLLM 0.7.3 (AccelMark): 256 in, 350 out.
        ("vllm_v0", "llama-3.1-8b", "h100-80g", 1, 431, 0.00774, 0.05),
        ("vllm_v0", "llama-3-70b", "a100-80g-tp8", 1, 427, 0.01808, 0.10),
        # vLLM 0.5 to 0.6 (Argonne, LLM-Inference-Bench), whole batches of 1024 in, 1024 out, over 1024 steps: mean context 1536.
        # Their prefills are in the measured figures and not in these.
        ("vllm_v0", "llama-3-70b", "h100-80g-tp4", 1, 1536, 19.6098 / 1024, 0.05),
        ("vllm_v0", "llama-3-70b", "h100-80g-tp4", 16, 16 * 1536, 24.6951 / 1024, 0.15),
        ("vllm_v0", "llama-3.1-8b", "h100-80g", 16, 16 * 1536, 11.0247 / 1024, 0.15),
    ],
)
def test_a_token_takes_what_was_measured(
    profile: str, model: str, hardware: str, batch: int, context: int, measured_s: float, tolerance: float
) -> None:
    catalog = PRESETS.with_profiles(profile, "")
    cost = step_cost(catalog[model], catalog.get_hardware(hardware))
    assert step_s(cost, batch, context, batch) == pytest.approx(measured_s, rel=tolerance)


@pytest.mark.parametrize(
    ("loader", "model", "hardware", "tier", "measured_s", "tolerance"),
    [
        # ServerlessLLM, benchmarks/results: its own loader and safetensors.
        ("serverlessllm", "llama-3.1-8b", "h100-80g", DISK, 0.678, 0.08),
        ("safetensors", "llama-3.1-8b", "h100-80g", DISK, 4.437, 0.05),
        ("safetensors", "qwen3-32b", "h100-80g", DISK, 20.59, 0.10),
        ("safetensors", "qwen3-32b", "h100-80g", HOST, 12.47, 0.25),
        ("safetensors", "opt-6.7b", "a5000-24g", DISK, 5.095, 0.25),
        # vllm-startup-profiler, H100 NVL, weights in the page cache: vLLM's reading of the weights, and from its start until it is ready.
        ("safetensors", "llama-2-13b", "h100-80g", HOST, 3.16, 0.25),
        ("engine_start", "llama-2-7b", "h100-80g", HOST, 24.46, 0.05),
        ("engine_start", "llama-2-13b", "h100-80g", HOST, 29.68, 0.05),
    ],
)
def test_a_load_takes_what_was_measured(loader: str, model: str, hardware: str, tier: int, measured_s: float, tolerance: float) -> None:
    catalog = PRESETS.with_profiles("", loader)
    assert load_s(catalog[model], catalog.get_hardware(hardware), tier) == pytest.approx(measured_s, rel=tolerance)


def test_every_covered_figure_that_was_gathered() -> None:
    """The statement of docs/validation.md, where the tables are at hand."""
    if not MEASURED.exists():
        pytest.skip("put serving.csv and loading.csv, whose columns experiments/engines.py names, into ../shared/measured")
    rows = engines.read(MEASURED / "serving.csv")
    compared, reasons = engines.compare_serving(rows, PRESETS)
    before, _ = engines.compare_serving(rows, PRESETS, "splitwise")
    assert len(compared) == len(before) == 400
    assert len(compared) + sum(reasons.values()) == len(rows)
    assert sum(abs(one.error) for one in compared) / 400 <= 0.10
    assert sum(abs(one.error) for one in before) / 400 >= 0.37


# --- the costs of before --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "hardware", "cost", "loads_s", "service"),
    [
        (
            "llama-3.1-8b", "h100-80g", (0.006752154719360942, 0.005308721397262302, 2.255364565779126e-05, 4.4110451126554376e-08, 0.00832),
            (0.0, 0.35707456978967494, 0.7276371308016878, 12.898000000000001), 3.216557877734315,
        ),
        (
            "llama-3.1-8b", "a100-80g", (0.0098, 0.00546, 6.77e-05, 7.25e-08, 0.01168),
            (0.0, 0.6924, 1.3883333333333334, 12.898000000000001), 4.62540835,
        ),
        (
            "opt-6.7b", "a5000-24g", (0.024574530516431926, 0.013843799785701195, 0.00016766766766766766, 7.696354753851936e-07, 0.01168),
            (0.0, 0.5860000000000001, 1.1666666666666667, 10.770000000000001), 8.037246651878469,
        ),
        (
            "llama-2-70b", "h100-80g-tp8", (0.0084, 0.0046, 5.28e-05, 5.35e-07, 0.0208),
            (0.0, 0.38460803059273424, 5.95717299578059, 112.05), 6.3606191,
        ),
        (
            "mistral-7b", "h100-80g-tp4", (0.0015219676266554551, 0.0011966109251612409, 5.083698460847096e-06, 1.1027612781638594e-08, 0.00832),
            (0.0, 0.11921606118546846, 0.6609704641350211, 11.634), 2.0851332853792117,
        ),
    ],
)  # fmt: skip
def test_splitwise_and_serverlessllm_are_the_costs_of_the_first_edition(
    model: str, hardware: str, cost: tuple[float, ...], loads_s: tuple[float, ...], service: float
) -> None:
    """To the last bit: what was compared with splitwise-sim and ServerlessLLM stays comparable."""
    catalog = PRESETS.with_profiles("splitwise", "serverlessllm")
    one, box = catalog[model], catalog.get_hardware(hardware)
    assert step_cost(one, box) == (*cost, 0.0)
    assert tuple(load_s(one, box, tier) for tier in (GPU, HOST, DISK, REMOTE)) == loads_s
    assert service_s(one, box, 1155, 211) == service


# --- what a profile changes -----------------------------------------------------------------------------------------------------------


def test_attention_has_the_bandwidth_of_the_whole_group() -> None:
    one, eight = (step_cost(MODELS["llama-2-70b"], HARDWARE[name]) for name in ("a100-80g", "a100-80g-tp8"))
    assert eight.k_s == pytest.approx(one.k_s / 8)
    assert step_cost(MODELS["llama-2-70b"], HARDWARE["a100-80g-tp2"]).overhead_s > one.overhead_s  # all-reduces


def test_presets_have_cuda_graphs_and_serverlessllm() -> None:
    box = build_catalog(configuration()).get_hardware("h100-80g")
    assert (box.engine.name, box.loader.name) == ("cuda_graphs", "serverlessllm")


def test_names_are_those_of_the_configuration() -> None:
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(Config)}
    assert choices["engine_profile"] == ("", *ENGINE_PROFILES)
    assert choices["loader"] == ("", *LOADER_PROFILES)


# --- how it is chosen -----------------------------------------------------------------------------------------------------------------

FILE = """
[model."llama-3.1-8b"]
[model.told]
preset = "llama-3.1-8b"
step.box = { weight_floor_ms = 9, a_ms = 5, p_ms = 0.06, k_ms = 0.0003, overhead_ms = 11 }
[hardware.box]
preset = "h100-80g-tp4"
engine_profile = "splitwise"
loader = "safetensors"
[hardware.a100-80g]
layer_overhead_ms = 0.5
[hardware.numbers]
preset = "h100-80g"
loader = "engine_start"
layer_overhead_ms = 0.5
init_s = 3
"""


def catalogue(tmp_path: Path, text: str = FILE, **changes: str) -> Catalog:
    path = tmp_path / "models.toml"
    path.write_text(text, encoding="utf-8")
    return build_catalog(configuration(model_catalog=str(path), **changes))


def test_a_catalogue_chooses_and_a_flag_overrides(tmp_path: Path) -> None:
    box = catalogue(tmp_path).get_hardware("box")
    assert (box.gpus, box.engine.name, box.loader.name) == (4, "splitwise", "safetensors")
    box = catalogue(tmp_path, loader="engine_start").get_hardware("box")
    assert (box.engine.name, box.loader.name) == ("splitwise", "engine_start")
    for name in ("box", "a100-80g"):
        assert catalogue(tmp_path, engine_profile="vllm_v0").get_hardware(name).engine.name == "vllm_v0"


@pytest.mark.parametrize("engine", ENGINE_PROFILES)
@pytest.mark.parametrize("loader", LOADER_PROFILES)
def test_numbers_of_a_catalogue_win_over_any_profile(tmp_path: Path, engine: str, loader: str) -> None:
    catalog = catalogue(tmp_path, engine_profile=engine, loader=loader)
    numbers, model = catalog.get_hardware("numbers"), catalog["llama-3.1-8b"]
    assert step_cost(model, numbers).overhead_s == pytest.approx(32 * 0.5e-3)
    assert load_s(model, numbers, HOST) == pytest.approx(3 + 16.06 / min(52.3, numbers.loader.host_bytes_per_s / 1e9))
    assert step_cost(model, catalog.get_hardware("a100-80g")).overhead_s == pytest.approx(32 * 0.5e-3)  # a preset that `splitwise` has a table of
    assert step_cost(catalog["told"], catalog.get_hardware("box")) == pytest.approx((9e-3, 5e-3, 60e-6, 3e-7, 11e-3, 0.0))


@pytest.mark.parametrize(
    ("line", "needles"),
    [
        ("engine_profile = 'vllm'", ["engine_profile = 'vllm'", "cuda_graphs", "splitwise"]),
        ("engine_profile = 1", ["engine_profile = 1", "cuda_graphs"]),
        ("loader = ['safetensors']", ["loader = ['safetensors']", "engine_start"]),
        ("gpus = 0", ["gpus = 0"]),
        ("gpus = 1.5", ["gpus = 1.5", "whole"]),
    ],
)
def test_a_bad_profile_names_file_table_and_key(tmp_path: Path, line: str, needles: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        catalogue(tmp_path, f'[model."opt-6.7b"]\n[hardware.box]\npreset = "h100-80g"\n{line}\n')
    for needle in ("models.toml", "[hardware.box]", *needles):
        assert needle in str(caught.value)


@pytest.mark.parametrize("variable", ["ENGINE_PROFILE", "LOADER"])
def test_an_unknown_profile_is_wrong_usage(variable: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}='fast': must be one of"):
        Config.from_env({variable: "fast"})


def test_catalogues_know_profiles_by_name_only() -> None:
    for engine, loader in (("fast", ""), ("", "fast")):
        with pytest.raises(UsageError, match=r"unknown (engine profile|loader) 'fast': must be one of"):
            PRESETS.with_profiles(engine, loader)


# --- what is said of it ---------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_was_costed_by() -> None:
    results = Simulation(configuration(workers=1, models=1, duration_s=5.0, loader="safetensors")).complete()
    assert (results["run"]["engine_profile"], results["run"]["loader"]) == ("cuda_graphs", "safetensors")
    assert "engine cuda_graphs   loader safetensors\n" in render_table(results)
    results = Simulation(configuration(workers=1, models=1, duration_s=5.0, rate_per_s=1.0, engine="queue")).complete()
    assert (results["run"]["engine_profile"], results["run"]["loader"]) == (None, None)
    assert "loader" not in render_table(results)
    assert RUN.engine_profile is None
    kinds = [PRESETS.with_profiles(engine, "").get_hardware("h100-80g") for engine in ("cuda_graphs", "splitwise", "cuda_graphs")]
    assert profile_names(configuration(), kinds) == ("cuda_graphs, splitwise", "serverlessllm")


def test_a_first_cold_start_takes_what_the_profiles_say() -> None:
    for engine, loader in (("splitwise", "serverlessllm"), ("cuda_graphs", "safetensors"), ("vllm_v0", "engine_start")):
        config = configuration(workers=1, models=1, rate_per_s=0.01, duration_s=100.0, arrivals="deterministic", engine_profile=engine, loader=loader)
        run = Simulation(config)
        results = run.complete()
        catalog = run.system.catalog
        (model,), box = catalog.models.values(), catalog.get_hardware(config.hardware)
        assert results["requests"]["completed"] >= 1
        least_s = load_s(model, box, DISK) + prefill_s(model, box, 1)
        assert least_s < results["ttft_s"]["max"] < least_s + 0.5  # a prompt of thousands of tokens, and the network
