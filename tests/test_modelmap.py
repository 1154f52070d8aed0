"""The models that a trace names: each is one model of the catalogue for the whole run, and the run says which."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sllm.workload.traces.base as base
from experiments.harness import configuration, silent
from sllm.models.catalogue import Catalog
from sllm.observe.report.html import render_html
from sllm.observe.report.json import to_json, validate_results
from sllm.observe.report.table import render_table
from sllm.protocol.errors import UsageError
from sllm.run.assemble import demo_models_needed
from sllm.run.system import System
from sllm.run.virtual import VirtualRun
from sllm.workload import FORMATS, ModelCounts, Request, WorkloadSpec, count_models, generate, write_recorded
from sllm.workload.modelmap import TooFewModels, assign, read_map

MODELS = ["alpha", "beta", "gamma"]
NAMES = ["x", "beta", "x", "y", "x", "y", "z z"]  # of seven requests: three x, two y, one "z z" and one model of the catalogue


def csv(names: list[str], column: str = "Model") -> str:
    return f"arrived_at,num_prefill_tokens,num_decode_tokens,{column}\n" + "".join(f"{i},10,5,{name}\n" for i, name in enumerate(names))


def put(folder: Path, text: str, name: str = "trace.dat") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def models_of(path: str, **changes: Any) -> list[str]:
    return [request.model for request in generate(WorkloadSpec(trace=path, **changes), [*MODELS, "delta"], 1)]


def refusal(path: str, catalogue: list[str], **changes: Any) -> str:
    with pytest.raises(UsageError) as caught:
        generate(WorkloadSpec(trace=path, **changes), catalogue, 1)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(path, "TRACE")


# --- the rule -------------------------------------------------------------------------------------------------------------------------


def test_a_name_is_its_own_model_or_else_the_next_by_count(tmp_path: Path) -> None:
    assert models_of(put(tmp_path, csv(NAMES))) == ["alpha", "beta", "alpha", "gamma", "alpha", "gamma", "delta"]


def test_of_names_with_as_many_requests_the_first_comes_first(tmp_path: Path) -> None:
    assert models_of(put(tmp_path, csv(["q", "p", "p", "q", "r", "r", "r"]))) == ["beta", "gamma", "gamma", "beta", "alpha", "alpha", "alpha"]


def test_neither_seed_nor_zipf_matters(tmp_path: Path) -> None:
    path = put(tmp_path, csv(NAMES))
    first = list(generate(WorkloadSpec(trace=path), [*MODELS, "delta"], 1))
    assert list(generate(WorkloadSpec(trace=path, zipf=3.0), [*MODELS, "delta"], 2)) == first


@given(st.lists(st.sampled_from(["a", "b", "c", "alpha", "gamma", "d"]), max_size=30), st.integers(0, 6))
def test_every_name_has_one_model_and_no_two_share_it(names: list[str], extra: int) -> None:
    counts = ModelCounts(dict(Counter(names)), 0)
    catalogue = [*MODELS, *(f"m{i}" for i in range(extra))]
    if len(counts.requests) > len(catalogue):
        with pytest.raises(TooFewModels):
            assign("TRACE", counts, catalogue, {})
        return
    made = assign("TRACE", counts, catalogue, {})
    assert set(made.models) == set(names)
    assert len(set(made.models.values())) == len(made.models)
    assert all(made.models[name] == name for name in made.models if name in catalogue)
    others = [name for name in made.models if name not in catalogue]
    assert list(made.replaced) == others == sorted(others, key=lambda name: (-counts.requests[name], list(counts.requests).index(name)))
    assert [made.models[name] for name in others] == [model for model in catalogue if model not in counts.requests][: len(others)]


def test_too_few_models_are_refused_with_both_counts(tmp_path: Path) -> None:
    text = refusal(put(tmp_path, csv(NAMES)), MODELS)
    assert text == "TRACE: names 4 models, but only 3 of the catalogue can be asked for; names can share a model by --model-map"


def test_only_the_first_models_stand_for_names_where_the_user_says_so(tmp_path: Path) -> None:
    path = put(tmp_path, csv(["x", "y", "x"]))
    assert models_of(path, models=2) == ["alpha", "beta", "alpha"]
    assert "names 2 models, but only 1 " in refusal(path, MODELS, models=1)
    other = put(tmp_path, csv(["x", "gamma"]), "other.dat")
    assert refusal(other, MODELS, models=2) == "TRACE: names 'gamma', which is in the catalogue but not among the first 2 of it that can be asked for"


def test_what_counts_is_what_will_be_replayed(tmp_path: Path) -> None:
    path = put(tmp_path, csv(["x", "y", "y", "z", "z", "z"]))
    assert models_of(path) == ["gamma", "beta", "beta", "alpha", "alpha", "alpha"]
    assert models_of(path, duration_s=3.0) == ["beta", "alpha", "alpha"]
    assert count_models(path, 3.0) == ModelCounts({"x": 1, "y": 2}, 0)


def test_a_request_without_a_name_gets_a_model_by_popularity(tmp_path: Path) -> None:
    path = put(tmp_path, csv(["x", ""] * 200))
    workload = generate(WorkloadSpec(trace=path, zipf=0.0), MODELS, 1)
    models = [request.model for request in workload]
    assert set(models[::2]) == {"alpha"}
    assert set(models[1::2]) == set(MODELS)
    assert workload.describe()["unnamed"] == 200
    assert "requests that name no model: 200" in workload.warnings[1]


# --- every format ---------------------------------------------------------------------------------------------------------------------


def sample(name: str, names: list[str | None]) -> str:
    """A file of this format with a request a second for each of the names."""
    if name in ("bailian", "mooncake"):
        scale, extra = (1, {"chat_id": 7}) if name == "bailian" else (1000, {})
        rows = [{**extra, "timestamp": i * scale, "input_length": 10, "output_length": 5, "model": model} for i, model in enumerate(names)]
        return "".join(json.dumps(row) + "\n" for row in rows)
    header, time = {
        "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:{:02d}"),
        "burstgpt": ("Timestamp,Request tokens,Response tokens", "{}"),
        "splitwise-sim": ("arrival_timestamp,prompt_size,token_size", "{}"),
        "vidur": ("arrived_at,num_prefill_tokens,num_decode_tokens", "{}"),
    }[name]
    return f"{header},Model\n" + "".join(f"{time.format(i)},10,5,{model or ''}\n" for i, model in enumerate(names))


FOREIGN = sorted(set(FORMATS) - {"recorded"})


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("spelling", ["model", "Model", "MODEL"])
def test_every_format_may_name_models(name: str, spelling: str, tmp_path: Path) -> None:
    text = sample(name, ["x", None, "y", "x"])
    text = text.replace('"model"', f'"{spelling}"') if text.startswith("{") else text.replace(",Model\n", f",{spelling}\n")
    with generate(WorkloadSpec(trace=put(tmp_path, text)), MODELS, 1) as workload:
        requests = list(workload)
    assert [(request.arrival_s, request.model) for request in requests if request.request_id != "r1"] == [(0.0, "alpha"), (2.0, "beta"), (3.0, "alpha")]
    assert workload.describe()["trace_models"] == [{"name": "x", "model": "alpha", "requests": 2}, {"name": "y", "model": "beta", "requests": 1}]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_trace_without_names_goes_by_popularity(name: str, tmp_path: Path) -> None:
    text = sample(name, [None] * 40)
    text = text.replace(', "model": null', "") if text.startswith("{") else text.replace(",Model", "").replace(",\n", "\n")
    workload = generate(WorkloadSpec(trace=put(tmp_path, text), zipf=0.0), MODELS, 1)
    assert {request.model for request in workload} == set(MODELS)
    assert workload.warnings == []
    assert "trace_models" not in workload.describe()


@pytest.mark.parametrize("name", ["bailian", "mooncake"])
def test_a_name_that_comes_only_later_is_refused(name: str, tmp_path: Path) -> None:
    text = sample(name, ["x", "y"]).replace(', "model": "x"', "")
    with pytest.raises(UsageError, match="line 2, column model: names a model, the first request of the file does not"):
        list(generate(WorkloadSpec(trace=put(tmp_path, text)), MODELS, 1))


@pytest.mark.parametrize(
    ("value", "said"),
    [("7", "'7' is not the name of a model"), ('["x"]', "is not the name of a model"), (json.dumps("x" * 129), "1 to 128 bytes"),
     ('"a\\u0007"', "printable"), ('"\\ud800"', "printable")],
)  # fmt: skip
def test_what_is_no_name(value: str, said: str, tmp_path: Path) -> None:
    text = sample("bailian", ["x", "y"]).replace('"y"', value)
    refused = refusal(put(tmp_path, text), MODELS)
    assert refused.startswith("TRACE, line 2, column model: ")
    assert said in refused
    assert len(refused) < 200


def test_too_many_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MODELS_MAX", 3)
    assert "TRACE, line 5, column Model: more than 3 different models" in refusal(put(tmp_path, csv(["a", "b", "c", "d"])), MODELS)


def test_a_bad_row_is_said_before_the_run_begins(tmp_path: Path) -> None:
    assert refusal(put(tmp_path, csv(["x"]) + "1,many,5,x\n"), MODELS).startswith("TRACE, line 3, column num_prefill_tokens: ")


def test_a_pipe_cannot_be_read_twice(tmp_path: Path) -> None:
    for text, readable in ((csv(NAMES), False), (csv(NAMES).replace("Model", "Tenant"), True)):
        path = tmp_path / f"pipe-{readable}"
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_text, args=(text,), daemon=True)
        writer.start()
        if readable:
            assert len(models_of(str(path))) == len(NAMES)
        else:
            assert refusal(str(path), MODELS) == "TRACE: names models and is therefore read twice; it must be a file, not a pipe"
        writer.join(10)


def test_a_file_that_changes_between_its_two_readings(tmp_path: Path) -> None:
    path = put(tmp_path, csv(["x", "x"]))
    counts = count_models(path, math.inf)
    put(tmp_path, csv(["x", "new"]))
    with pytest.raises(UsageError, match="line 3, column model: 'new' was not there when the models were counted"):
        list(generate(WorkloadSpec(trace=path), MODELS, 1, counts))


# --- a map file -----------------------------------------------------------------------------------------------------------------------


def test_a_map_file_goes_before_the_rule_and_names_may_share_a_model(tmp_path: Path) -> None:
    path = put(tmp_path, csv(NAMES))
    model_map = put(tmp_path, 'x = "beta"\n"z z" = "gamma"\nbeta = "gamma"\n', "map.toml")
    assert models_of(path, model_map=model_map) == ["beta", "gamma", "beta", "alpha", "beta", "alpha", "gamma"]
    with generate(WorkloadSpec(trace=path, model_map=model_map), MODELS, 1) as workload:
        assert workload.warnings == [f"{path}: model names not in the catalogue: 1 of 4; each was mapped to a model of it: y as alpha (--model-map)"]
        assert workload.describe()["model_map"] == model_map


def test_a_name_of_the_map_file_that_the_trace_has_not_is_said(tmp_path: Path) -> None:
    path, model_map = put(tmp_path, csv(["alpha"])), put(tmp_path, 'alhpa = "beta"\n', "map.toml")
    with generate(WorkloadSpec(trace=path, model_map=model_map), MODELS, 1) as workload:
        assert workload.warnings == [f"model map {model_map}: 'alhpa': not named by {path}"]


def test_a_recording_takes_a_map_file_but_no_rule(tmp_path: Path) -> None:
    path = str(tmp_path / "w.jsonl")
    write_recorded(path, [Request(0.0, "r0", "old", 1, 1), Request(1.0, "r1", "beta", 1, 1)])
    model_map = put(tmp_path, 'old = "gamma"\n', "map.toml")
    assert models_of(path, model_map=model_map) == ["gamma", "beta"]
    with pytest.raises(UsageError, match="column model: 'old' is not in the catalogue"):
        models_of(path)
    with pytest.raises(UsageError, match="column model: 'beta' is not in the catalogue, or not among the first 1 of it"):
        list(generate(WorkloadSpec(trace=path, models=1, model_map=put(tmp_path, 'old = "alpha"\n', "map.toml")), MODELS, 1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('x = "nope"', "'x' = 'nope': not a model that requests can ask for; there are alpha, beta, gamma"),
        ("x = 3", "'x' = '3': must be the name of a model, in quotes"),
        ('gpt-4.1 = "alpha"', "'gpt-4' is a table; a name with a point in it needs quotes"),
        ("x = y", "(at line 1, column 5)"),
        ('x = "alpha"\nx = "beta"\n', "(at line 2, column 11)"),
    ],
)
def test_a_bad_map_file_names_file_and_key(content: str, said: str, tmp_path: Path) -> None:
    model_map = put(tmp_path, content, "map.toml")
    text = refusal(put(tmp_path, csv(NAMES)), MODELS, model_map=model_map)
    assert text.startswith(f"model map {model_map}: ")
    assert said in text


def test_a_map_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'"\xff" = "alpha"\n')
    for path, said in ((tmp_path / "missing.toml", "No such file"), (tmp_path, "directory"), (tmp_path / "latin.toml", "not UTF-8"), ("a\0b", "null")):
        with pytest.raises(UsageError, match=said):
            read_map(str(path))


def test_a_map_file_without_effect_is_refused(tmp_path: Path) -> None:
    model_map = put(tmp_path, 'x = "alpha"\n', "map.toml")
    assert refusal(put(tmp_path, csv(NAMES, "Tenant")), MODELS, model_map=model_map) == f"model map {model_map}: TRACE names no models"
    with pytest.raises(UsageError, match="needs a trace"):
        WorkloadSpec(model_map=model_map)


def test_an_exponent_without_effect_is_said(tmp_path: Path) -> None:
    with generate(WorkloadSpec(trace=put(tmp_path, csv(["alpha"])), zipf=2.0), MODELS, 1) as workload:
        assert workload.warnings == [f"Zipf exponent 2 (--zipf) has no effect: every request of {workload.spec.trace} names its model"]


# --- a whole run ----------------------------------------------------------------------------------------------------------------------


def test_the_demonstration_catalogue_grows_with_the_trace(tmp_path: Path) -> None:
    path = put(tmp_path, csv([f"name-{i}" for i in range(20)]))
    config = configuration(workers=2, trace=path)
    assert len(System(config, wire=False).catalog) == 20
    assert len(System(dataclasses.replace(config, models=25), wire=False).catalog) == 25
    assert len(System(dataclasses.replace(config, trace=put(tmp_path, csv(["x"]), "one.dat")), wire=False).catalog) == 8
    with pytest.raises(TooFewModels, match="names 20 models, but only 5 of"):
        System(dataclasses.replace(config, models=5), wire=False).workload()


def test_a_name_of_the_demonstration_catalogue_is_that_model_however_far_down(tmp_path: Path) -> None:
    names = Catalog.demo(40).names
    assert [demo_models_needed(ModelCounts({name: 1}, 0)) for name in names] == list(range(1, 41))
    for name in ("llama-2-7b-1", "llama-2-7b-02", "llama-2-7b-0", "llama-2-7b-x", "llama-2-7b-", "llama-2-7b-999999", "mine-2"):
        assert demo_models_needed(ModelCounts({name: 1}, 0)) == 1
    run = VirtualRun(configuration(workers=2, trace=put(tmp_path, csv([names[30], "x"]))), silent(virtual=True), io.StringIO())
    assert [request.model for request in run.workload] == [names[30], names[0]]
    run.close()


def test_a_recording_of_a_grown_catalogue_needs_no_further_flag(tmp_path: Path) -> None:
    names = Catalog.demo(20).names
    path = str(tmp_path / "w.jsonl")
    write_recorded(path, [Request(0.0, "r0", names[19], 1, 1), Request(1.0, "r1", names[0], 1, 1)])
    config = configuration(workers=2, trace=path)
    system = System(config, wire=False)
    assert len(system.catalog) == 20
    assert [request.model for request in system.workload()] == [names[19], names[0]]
    with pytest.raises(UsageError, match=rf"w\.jsonl: model '{names[19]}' is not in the catalogue, or not among the first 3 of it"):
        System(dataclasses.replace(config, models=3), wire=False).workload()


def test_the_mapping_is_in_the_results_and_in_every_report(tmp_path: Path) -> None:
    path = put(tmp_path, csv(["GPT-4", "Chat<GPT>", "Chat<GPT>", *(f"rare-{i}" for i in range(9))]))
    run = VirtualRun(configuration(workers=2, trace=path), silent(virtual=True), io.StringIO())
    try:
        run.conduct()
    finally:
        run.close()
    results = run.results()
    assert validate_results(results) == []
    rows = json.loads(to_json(results))["run"]["workload"]["trace_models"]
    assert rows[:2] == [{"name": "Chat<GPT>", "model": "llama-3.1-8b", "requests": 2}, {"name": "GPT-4", "model": "opt-6.7b", "requests": 1}]
    assert sum(row["requests"] for row in rows) == results["requests"]["sent"] == 12
    assert "model names not in the catalogue: 11 of 11" in run.warnings[0]
    line = next(line for line in render_table(results).splitlines() if line.startswith("Models"))
    assert "Chat<GPT> as llama-3.1-8b: 2   GPT-4 as opt-6.7b: 1" in line
    assert "and 6 more" in render_table(results)
    assert "Chat&lt;GPT&gt;" in render_html(results, run.recorder)
