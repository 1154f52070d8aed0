"""Models, hardware and catalogue files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from sllm.models.catalogue import Catalog
from sllm.models.model import GB, KIB
from sllm.models.presets import DEMO_MODELS, HARDWARE, MODELS
from sllm.protocol.errors import UsageError

AZURE_LONGEST_TOKENS = 14_050 + 1_000  # longest prompt and longest answer of the Azure LLM 2023 conversation trace


def test_demo_names_are_presets_then_clones() -> None:
    catalog = Catalog.demo(8)
    assert catalog.names == (*DEMO_MODELS, "llama-3.1-8b-2", "opt-6.7b-2")
    assert list(catalog.models) == list(catalog.names)
    assert catalog["llama-3.1-8b-2"].size_bytes == catalog["llama-3.1-8b"].size_bytes == 16_060_000_000
    assert catalog["llama-3.1-8b-2"].name == "llama-3.1-8b-2"
    assert "opt-6.7b" in catalog
    assert "gpt" not in catalog
    with pytest.raises(KeyError):
        catalog["gpt"]
    assert len(Catalog.demo(1000).models) == 1000


@pytest.mark.parametrize("hardware_name", HARDWARE)
def test_demo_models_fit_everywhere_with_the_longest_request(hardware_name: str) -> None:
    hardware = HARDWARE[hardware_name]
    for model in Catalog.demo(12).models.values():
        assert model.size_bytes + AZURE_LONGEST_TOKENS * model.kv_bytes_per_token <= hardware.usable_gpu_bytes


def test_published_sizes() -> None:
    assert MODELS["llama-3.1-8b"].kv_bytes_per_token == 128 * KIB
    assert MODELS["llama-2-70b"].kv_bytes_per_token == MODELS["llama-3-70b"].kv_bytes_per_token == 320 * KIB
    assert MODELS["opt-6.7b"].size_bytes == 13.4 * GB
    assert MODELS["opt-30b"].size_bytes == 60 * GB
    assert MODELS["llama-2-70b"].size_bytes == 140 * GB


def test_a_whole_server_as_one_engine() -> None:
    one, eight = HARDWARE["h100-80g"], HARDWARE["h100-80g-tp8"]
    assert eight.gpu_memory_bytes == 8 * one.gpu_memory_bytes == 640 * GB
    assert eight.pcie_bytes_per_s == 8 * one.pcie_bytes_per_s
    assert eight.disk_bytes_per_s == one.disk_bytes_per_s  # one NVMe array
    assert eight.slots == one.slots == 256


def test_an_unknown_hardware_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        Catalog.demo(1).get_hardware("tpu")
    assert "'tpu'" in str(caught.value)
    assert all(name in str(caught.value) for name in HARDWARE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value", "most"), [("slots", "100001", "100000"), ("slots", "1e9", "100000"), ("disk_gb", "1e10", "1000000000")])
def test_a_bound_in_an_error_is_the_one_that_holds_and_is_written_out(key: str, value: str, most: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{key} = .*: must be a (whole )?number, .* and at most {most}$"):
        Catalog.from_file(written(tmp_path, f'[model.opt-13b]\n[hardware.box]\npreset = "a100-80g"\n{key} = {value}\n'))


def test_models_are_values() -> None:
    first, second = Catalog.demo(2)["opt-6.7b"], Catalog.demo(3)["opt-6.7b"]
    assert first == second
    assert hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(HARDWARE["a100-80g"])) == HARDWARE["a100-80g"]
    with pytest.raises(AttributeError):
        first.size_bytes = 1  # type: ignore[misc]


FILE = """
[model."llama-3.1-8b"]
[model.support-bot]
preset = "llama-3.1-8b"
count = 3
[model.mine]
size_gb = 13.4
kv_kib_per_token = 512
layers = 32
step.my-box = { weight_floor_ms = 9.3, a_ms = 5, p_ms = 0.063, k_ms = 0.00029, overhead_ms = 11.7 }
[model.big]
preset = "llama-2-70b"
size_gb = 100
[hardware.my-box]
preset = "a100-80g"
disk_gb_per_s = 5
init_s = 20
slots = 64
[hardware.scratch]
gpu_memory_gb = 48
host_memory_gb = 0
disk_gb = 100
pcie_gb_per_s = 12
disk_gb_per_s = 2
network_gb_per_s = 0.125
gpu_gb_per_s = 900
gpu_tflops = 150
layer_overhead_ms = 0.2
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file(tmp_path: Path) -> None:
    catalog = Catalog.from_file(written(tmp_path, FILE))
    assert catalog.names == ("llama-3.1-8b", "support-bot", "support-bot-2", "support-bot-3", "mine", "big")
    assert catalog["llama-3.1-8b"] == MODELS["llama-3.1-8b"]
    assert catalog["support-bot-3"].steps == MODELS["llama-3.1-8b"].steps
    mine = catalog["mine"]
    assert (mine.size_bytes, mine.kv_bytes_per_token, mine.layers) == (13_400_000_000, 512 * KIB, 32)
    (known,) = mine.steps
    assert (known.hardware, known.engine) == ("my-box", "")
    assert known.cost == pytest.approx((9.3e-3, 5e-3, 63e-6, 2.9e-7, 11.7e-3, 0.0))
    assert catalog["big"].size_bytes == 100 * GB
    assert catalog["big"].steps == ()  # the preset's measurements are not this model's
    box = catalog.get_hardware("my-box")
    assert (box.name, box.disk_bytes_per_s, box.init_s, box.slots, box.gpu_memory_bytes) == ("my-box", 5e9, 20.0, 64, 80 * GB)
    assert catalog.get_hardware("scratch").network_bytes_per_s == 125e6
    assert catalog.get_hardware("h100-80g") == HARDWARE["h100-80g"]


MINE = "[model.m]\nsize_gb = 1\nkv_kib_per_token = 1\nlayers = 1\n"


@pytest.mark.parametrize(
    ("text", "needles"),
    [
        ("[model.m\n", ["line 1", "column 9"]),
        ("", ["no [model.NAME] table"]),
        ("[models.m]\n", ["'models'", "model or hardware"]),
        ("model = 3\n", ["[model]", "table"]),
        ("[model]\nm = 3\n", ["[model.m]", "3"]),
        ("[model.m]\n", ["[model.m]", "size_gb is missing"]),
        ("[model.m]\nsize_gb = 1\nlayers = 2\n", ["[model.m]", "kv_kib_per_token is missing"]),
        ("[model.m]\npreset = 'gpt'\n", ["[model.m]", "preset = 'gpt'", "opt-6.7b"]),
        (MINE.replace("1\nkv", "-1\nkv"), ["[model.m]", "size_gb = -1"]),
        (MINE.replace("1\nkv", "'1'\nkv"), ["[model.m]", "size_gb = '1'"]),
        (MINE.replace("1\nkv", "nan\nkv"), ["[model.m]", "size_gb = nan"]),
        (MINE.replace("1\nkv", "true\nkv"), ["[model.m]", "size_gb = True"]),
        (MINE.replace("layers = 1", "layers = 1.5"), ["[model.m]", "layers = 1.5", "whole"]),
        (MINE + "colour = 1\n", ["[model.m]", "'colour'", "size_gb"]),
        (MINE + "count = 0\n", ["[model.m]", "count = 0"]),
        (MINE + "step = 1\n", ["[model.m]", "step"]),
        (MINE + "step.tpu = {}\n", ["[model.m.step.tpu]", "h100-80g"]),
        (MINE + "step.h100-80g = { a_ms = 1 }\n", ["[model.m.step.h100-80g]", "weight_floor_ms is missing"]),
        (MINE + "step.h100-80g = { weight_floor_ms = 1, a_ms = 1, p_ms = 1, k_ms = 'x', overhead_ms = 1 }\n", ["[model.m.step.h100-80g]", "k_ms = 'x'"]),
        (MINE + "[model.x]\npreset = 'opt-6.7b'\ncount = 2\n[model.x-2]\npreset = 'opt-6.7b'\n", ["[model.x-2]", "'x-2'"]),
        (MINE + "[hardware.'box:2']\npreset = 'h100-80g'\n", ["[hardware]", "'box:2'", "--hardware"]),
        (MINE + "[hardware.'box,box']\npreset = 'h100-80g'\n", ["[hardware]", "'box,box'", "--hardware"]),
        (MINE + "[hardware.box]\ninit_s = 1\n", ["[hardware.box]", "gpu_memory_gb is missing"]),
        (MINE + "[hardware.box]\npreset = 'h100-80g'\nslots = 0\n", ["[hardware.box]", "slots = 0"]),
        (MINE + "[hardware.box]\npreset = 'h100-80g'\nram = 0\n", ["[hardware.box]", "'ram'"]),
    ],
)
def test_a_bad_file_names_file_table_and_key(tmp_path: Path, text: str, needles: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        Catalog.from_file(path)
    message = str(caught.value)
    assert message.startswith(f"catalogue {path}: ")
    assert "\n" not in message
    for needle in needles:
        assert needle in message


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: cannot be read: No such file"):
        Catalog.from_file(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b"[model.\xe9]\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        Catalog.from_file(tmp_path / "latin.toml")
