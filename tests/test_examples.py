"""The files of examples/ do what they say, and a policy may be a file of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_centralized_simulation import results, run

from sllm.models.catalogue import Catalog
from sllm.placement.registry import make_policy
from sllm.protocol.errors import UsageError
from sllm.workload.traces import FORMATS, open_trace

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TRACES = {path.stem: path for path in (EXAMPLES / "traces").iterdir()}
OWN = "arrival=start,prompt=tokens in,output=tokens out,model=llm"

USED = {
    "policy.py": ["--policy", "{}", "--rate", "5"], "catalog.toml": ["--catalog", "{}", "--hardware", "our-box:2,h100-80g:1"], "fleet.toml": ["--fleet", "{}"],
    "mix.toml": ["--mix", "{}"], "faults.toml": ["--faults", "{}", "--duration", "60", "--rate", "3"],
    "model-map.toml": ["--trace", str(TRACES["burstgpt"]), "--model-map", "{}"],
}  # fmt: skip


def test_every_example_is_used_here() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == set(USED)
    assert set(TRACES) == {*FORMATS, "own"}


@pytest.mark.parametrize("name", USED)
def test_an_example_runs(name: str) -> None:
    content = results("--virtual", "--quiet", *(part.format(EXAMPLES / name) for part in USED[name]))
    assert content["requests"]["sent"] > 20
    assert content["requests"]["completed"] >= 0.9 * content["requests"]["sent"]
    assert content["invariants"]["violations"] == []


@pytest.mark.parametrize("name", [*FORMATS, "own"])
def test_a_few_rows_of_each_trace_format_run(name: str) -> None:
    with open_trace(str(TRACES[name]), OWN if name == "own" else "") as trace:
        assert trace.format_name == (name if name != "own" else "columns")
    content = results("--virtual", "--quiet", "--trace", str(TRACES[name]), *(["--columns", OWN] if name == "own" else []))
    assert content["requests"]["sent"] == content["requests"]["completed"] == 24


def test_the_example_catalogue_has_what_it_says() -> None:
    assert list(Catalog.from_file(EXAMPLES / "catalog.toml").models) == ["llama-3.1-8b", "support-bot", *(f"support-bot-{i}" for i in range(2, 7)), "in-house"]


# --- a policy of one's own ----------------------------------------------------------------------------------------------------------------

HEAD = "from dataclasses import dataclass\nfrom sllm.placement.base import Policy\n"
POLICY = "@dataclass\nclass {0}(Policy):\n    name = '{0}'\n    most: int = 1\n    def place(self, query, fleet):\n        return None\n"


def policy_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "dir.d" / "mine.py"
    path.parent.mkdir()
    path.write_text(text)
    return str(path)


def test_a_policy_is_found_in_a_file(tmp_path: Path) -> None:
    path = policy_file(tmp_path, HEAD + POLICY.format("one"))
    assert [make_policy(f"{path}{rest}").most for rest in ("", ":most=3", ":one", ":one:most=4")] == [1, 3, 1, 4]  # type: ignore[attr-defined]
    assert type(make_policy(path)) is type(make_policy(f"{path}:one"))  # every coordinator's life has the same class


@pytest.mark.parametrize(
    ("text", "rest", "said"),
    [
        (HEAD + POLICY.format("a") + POLICY.format("b"), "", "several policies: say which"), (HEAD + POLICY.format("a"), ":b", "no policy 'b'; there are a"),
        (HEAD + POLICY.format("a"), ":most=x", "must be a whole number"), (HEAD + POLICY.format("a"), ":least=1", "not one of its parameters"),
        ("x = 1\n", "", "has no policy"), ("x = 1\n1 / 0\n", "", "mine.py, line 2: ZeroDivisionError"), ("x = (\n", "", "mine.py, line 1: SyntaxError"),
        ("import nothing_of_that_name\n", "", "line 1: ModuleNotFoundError"), ("raise SystemExit(0)\n", "", "line 1: SystemExit"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_policy_file_is_one_line(text: str, rest: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        make_policy(policy_file(tmp_path, text) + rest)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_file_that_is_not_there_is_one_line() -> None:
    done = run("--virtual", "--policy", "nowhere/mine.py", expect=2)
    assert done.stderr == "centralized_simulation.py: error: policy nowhere/mine.py: cannot be read: No such file or directory\n"
