"""Two checkouts held against each other: a planted difference is found in each kind of output, and what depends on wall time is no difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import centralized_simulation
from experiments.identical import CONFIGURATIONS, LIVE, REPORT, RESULTS, ROOT, ROWS, STATUS, STDERR, STDOUT, WORKLOAD, compare, main, run_one, table

Change = Callable[[str], str]
Plant = Callable[[str, Change], Path]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outputs of one small run."""
    work = tmp_path_factory.mktemp("outputs")
    run_one(ROOT, ["--virtual", "--duration", "5"], ROOT, work / "run", work / "bytecode")
    assert (work / "run" / STATUS).read_text() == "0"
    return work / "run"


@pytest.fixture
def plant(outputs: Path, tmp_path: Path) -> Plant:
    """Makes a copy of those outputs in which one file is another."""

    def change_copy(name: str, change: Change) -> Path:
        folder = shutil.copytree(outputs, tmp_path / "changed")
        before = (folder / name).read_bytes().decode()
        assert change(before) != before
        (folder / name).write_bytes(change(before).encode())
        return folder

    return change_copy


def replace(old: str, new: str) -> Change:
    return lambda text: text.replace(old, new, 1)


def put(section: str, key: str | int, value: object) -> Change:
    """Another value in the results."""

    def change(text: str) -> str:
        results = json.loads(text)
        results[section][key] = value
        return json.dumps(results)

    return change


def reverse_sections(text: str) -> str:
    return json.dumps(dict(reversed(json.loads(text).items())))


def change_last_digit(text: str) -> str:
    at = max(map(text.rfind, "0123456789"))
    return f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (RESULTS, put("requests", "sent", 1), "results.requests.sent: "),
        (RESULTS, put("requests", "duplicates", 0.0), "results.requests.duplicates: 0 here, 0.0 there"),
        (RESULTS, put("requests", "new", 1), "results.requests.new only there"),
        (RESULTS, put("models", 0, {}), "results.models[0]."),
        (RESULTS, put("run", "seed", 2), "run.seed: 1 here, 2 there"),
        (RESULTS, reverse_sections, "results: keys in another order"),
        (ROWS, change_last_digit, "line "),
        (ROWS, replace("\n", "\r\n"), "line 1: "),
        (WORKLOAD, change_last_digit, "line "),
        (WORKLOAD, lambda text: text + "\n", "lines here"),
        (REPORT, replace("<svg", "<svg "), "line "),
        (REPORT, replace("<dt>--seed</dt><dd>1<", "<dt>--seed</dt><dd>2<"), "parameters.--seed[1]: '1' here, '2' there"),
        (REPORT, replace("<h3>Coordinator</h3>", "<h3>Others</h3>"), "parameters.WORKER_TIMEOUT[0]: "),
        (STDOUT, replace("Requests ", "requests "), "line 5: "),
        (STDERR, lambda text: text + "a warning\n", "0 lines here, 1 there"),
        (STATUS, lambda text: "1", "exit status 0 here, 1 there"),
    ],
)
def test_a_planted_difference_is_found(name: str, change: Change, says: str, outputs: Path, plant: Plant) -> None:
    verdict = compare(outputs, plant(name, change))
    assert says in verdict.difference
    assert verdict.file == (STDERR if name == STATUS else name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (RESULTS, put("wall", "wall_s", 1e9)),
        (RESULTS, put("run", "version", "9.9.9")),
        (STDOUT, replace("wall time ", "wall time 3 min ")),
        (STDOUT, replace("placement decision", "placement decision  9.99 s")),
        (STDERR, lambda text: "75 % · 9 s of 12 s simulated · 1,116 done · 30 in flight · TTFT p50 37.9 ms, p99 769 ms · 5 ready\n" + text),
        (REPORT, replace(", run in ", ", run in 3 min ")),
        (REPORT, replace("<p>sllm ", "<p>sllm 9.9.")),
        (REPORT, replace('placement decision</th><td>', 'placement decision</th><td>1')),
    ],
)  # fmt: skip
def test_wall_time_and_version_are_no_difference(name: str, change: Change, outputs: Path, plant: Plant) -> None:
    assert compare(outputs, plant(name, change)) == ("", "", ())


def test_settings_that_one_side_alone_has_are_told(outputs: Path, plant: Plant) -> None:
    folder = plant(RESULTS, put("run", "new", 1))
    page = (folder / REPORT).read_text(encoding="utf-8")
    (folder / REPORT).write_text(page.replace("<div><dt>--seed</dt><dd>1</dd></div>", ""), encoding="utf-8")
    assert compare(outputs, folder) == ("", "", ("run.new only there", "parameters.--seed only here"))


def test_what_one_side_did_not_write_is_a_difference(outputs: Path, plant: Plant) -> None:
    folder = plant(RESULTS, put("wall", "wall_s", 1e9))
    (folder / ROWS).unlink()
    assert compare(outputs, folder) == ("written only here", ROWS, ())


def test_of_live_runs_the_counts_are_compared_alone(outputs: Path, plant: Plant) -> None:
    folder = plant(RESULTS, put("requests", "duplicates", 7))
    (folder / STDOUT).write_text("another")
    assert compare(outputs, folder, live=True) == ("", "", ())
    results = json.loads((folder / RESULTS).read_text())
    results["requests"]["completed"] -= 1
    (folder / RESULTS).write_text(json.dumps(results))
    assert "requests.completed: " in compare(outputs, folder, live=True).difference


def test_a_run_that_fails_on_both_sides_is_not_the_same(outputs: Path) -> None:
    assert "fails, exit status 0" in compare(outputs, outputs, expected=2).difference


def test_every_trace_scenario_and_policy_has_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(table()) >= 20
    assert centralized_simulation.main(["--list", "policies"]) == 0
    policies = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    assert "startup_time" in policies
    files = [f"inputs/examples/traces/{path.name}" for path in ROOT.glob("examples/traces/*")]
    files += [f"inputs/scenarios/{path.name}" for path in ROOT.glob("experiments/scenarios/*.toml")]
    words = {word.partition(":")[0] for arguments in table().values() for word in arguments}
    assert [needed for needed in (*files, *policies) if needed not in words] == []
    assert [name for name, arguments in table().items() if "--virtual" not in arguments] == [LIVE]


def test_a_checkout_is_the_same_as_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--against", str(ROOT), "--only", "trace-azure,own-policy"]) == 0
    assert capsys.readouterr().out.splitlines() == ["own-policy   same", "trace-azure  same"]


def test_saved_outputs_are_compared_later(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    saved, arguments = tmp_path / "saved", ["--only", "trace-vidur"]
    assert main(["--save", str(saved), *arguments]) == 0
    monkeypatch.setitem(CONFIGURATIONS, "trace-vidur", "--duration 1")  # the commands are the saved ones
    assert main(["--against", str(saved), *arguments]) == 0
    assert not list(tmp_path.glob("identical-*")), "nothing to look at is left"
    rows = saved / "trace-vidur" / ROWS
    rows.write_text(change_last_digit(rows.read_text()))
    capsys.readouterr()
    assert main(["--against", str(saved)]) == 1
    kept = next(tmp_path.glob("identical-*/here/trace-vidur")) / ROWS
    line = capsys.readouterr().out.strip()
    assert line.startswith("trace-vidur  differs: requests.csv: line ")
    assert line.endswith(f"({kept} {rows})")
    assert kept.is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "say what to hold"),
        (["--against", "/nowhere"], "neither a checkout nor outputs"),
        (["--against", str(ROOT), "--only", "queue,nothing"], "--only nothing: there are"),
        (["--against", str(ROOT), "--pure"], "give one of them"),
        (["--save", str(ROOT)], "is not an empty folder"),
        (["--tree", "/nowhere", "--save", "/nowhere/else"], "no checkout"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err
