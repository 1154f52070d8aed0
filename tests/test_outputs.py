"""Where a run writes: closed streams, full disks, pipes that nobody reads, one path for two things. Nothing half-written stays."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_centralized_simulation import ROOT, environment, run

from sllm.observe.report.files import OutputFile, check_distinct
from sllm.observe.report.json import validate_results
from sllm.observe.report.outputs import Outputs
from sllm.protocol.errors import OutputError, UsageError

FLAGS = ("--json", "--requests-csv", "--html", "--record")
SHORT = ("--virtual", "--duration", "5", "--rate", "5")


def shell(*arguments: str, streams: str = "", expect: int = 0) -> subprocess.CompletedProcess[str]:
    """A short run with its streams redirected as a shell would."""
    command = f"{shlex.join([sys.executable, str(ROOT / 'centralized_simulation.py'), *SHORT, *arguments])} {streams}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=environment(), timeout=100, check=False)
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr + done.stdout
    return done


@pytest.mark.parametrize("flag", FLAGS)
def test_any_output_can_go_to_stdout(flag: str, tmp_path: Path) -> None:
    written = tmp_path / "file"
    text = shell(flag, "-", "--quiet").stdout
    shell(flag, str(written), "--quiet")
    assert text.splitlines()[0] == written.read_text().splitlines()[0] != ""
    assert not (Path.cwd() / "-").exists()


@pytest.mark.parametrize("flag", FLAGS)
def test_a_full_disk_is_status_3_and_one_line(flag: str, tmp_path: Path) -> None:
    others = [text for other in FLAGS if other != flag for text in (other, str(tmp_path / other))]
    done = shell(flag, "/dev/full", *others, "--quiet", expect=3)
    assert done.stderr == f"centralized_simulation.py: error: {flag} /dev/full: cannot write: No space left on device\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(other for other in FLAGS if other != flag), "the others are there, whole"
    done = shell(flag, "-", "--quiet", streams=">/dev/full", expect=3)
    assert done.stderr == f"centralized_simulation.py: error: {flag}: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("flag", FLAGS)
def test_a_pipe_that_nobody_reads_is_no_error(flag: str) -> None:
    done = shell(flag, "-", "--quiet", streams="| true")
    assert done.stderr == ""


def test_a_pipe_of_stderr_that_nobody_reads_is_no_error() -> None:
    shell("--json", "-", streams="2> >(true)")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_closed_stdout_is_said_where_it_is_wanted(flag: str) -> None:
    done = shell(flag, "-", "--quiet", streams=">&-", expect=3)
    assert done.stderr == f"centralized_simulation.py: error: {flag}: cannot write to stdout: it is closed\n"
    shell("--quiet", streams=">&-")


@pytest.mark.parametrize("streams", [">&-", ">/dev/full"])
def test_a_table_that_stdout_does_not_take_is_status_3_and_the_rest_is_written(streams: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    (line,) = shell("--json", str(path), streams=streams, expect=3).stderr.splitlines()
    assert line.startswith("centralized_simulation.py: error: stdout: cannot write: ")
    assert validate_results(json.loads(path.read_text())) == []
    shell("--json", str(path), "--quiet", streams=streams)
    assert shell(streams="| true").stderr == "", "nobody reads it, which is nobody's fault"


@pytest.mark.parametrize("streams", ["2>&-", "2>/dev/full"])
def test_a_table_that_cannot_be_written_is_status_3_and_the_rest_is_written(streams: str, tmp_path: Path) -> None:
    """Results on stdout leave the table stderr."""
    path = tmp_path / "rows.csv"
    assert validate_results(json.loads(shell("--json", "-", "--requests-csv", str(path), streams=streams, expect=3).stdout)) == []
    assert path.read_text().startswith("request_id,")
    shell("--json", "-", "--quiet", streams=streams)


def test_a_run_with_every_stream_closed_does_its_work(tmp_path: Path) -> None:
    for mode in ((), ("--wire",)):
        shell("--json", str(tmp_path / "results.json"), "--quiet", *mode, streams="<&- >&- 2>&-")
        assert validate_results(json.loads((tmp_path / "results.json").read_text())) == []


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_that_cannot_be_written_is_status_3(flag: str) -> None:
    for streams in (">/dev/full", ">&-"):
        assert shell(flag, streams=streams, expect=3).stderr.count("\n") == 1
    shell(flag, streams="| true")


@pytest.mark.parametrize("wrong", [["--faults", "/nowhere"], ["--policy", "fastest"], ["--trace", "bad.csv"], ["--html", "/nowhere/x"]], ids=" ".join)
def test_a_run_that_cannot_be_leaves_nothing_behind(wrong: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,many,109\n")
    folder = tmp_path / "out"
    folder.mkdir()
    outputs = [text for flag in FLAGS if flag not in wrong for text in (flag, str(folder / flag))]
    run("--virtual", *outputs, *(str(bad) if text == "bad.csv" else text for text in wrong), expect=2)
    assert list(folder.iterdir()) == []


# --- one file for two things ----------------------------------------------------------------------------------------------------------


def spellings(folder: Path) -> dict[str, Callable[[], tuple[str, str]]]:
    """Two paths of one file."""
    plain = folder / "file"

    def linked(make: Callable[[Path], None], exists: bool = True) -> tuple[str, str]:
        if exists:
            plain.write_text("there")
        make(folder / "other")
        return str(plain), str(folder / "other")

    return {
        "itself": lambda: (str(plain), str(plain)),
        "by way of the parent": lambda: (str(plain), str(folder / ".." / folder.name / "file")),
        "relative": lambda: (str(plain), os.path.relpath(plain)),
        "symbolic link": lambda: linked(lambda other: other.symlink_to(plain)),
        "symbolic link to what is not there yet": lambda: linked(lambda other: other.symlink_to(plain), exists=False),
        "hard link": lambda: linked(lambda other: other.hardlink_to(plain)),
        "stdout": lambda: ("-", "-"),
        "stdout by name": lambda: ("-", "/dev/stdout"),
    }


@pytest.mark.parametrize("how", list(spellings(Path())))
def test_two_outputs_in_one_file_are_refused_with_both_flags(how: str, tmp_path: Path) -> None:
    first, second = spellings(tmp_path)[how]()
    with pytest.raises(UsageError, match="--json and --html: both"):
        check_distinct({"--json": first, "--html": second, "--record": str(tmp_path / "different")}, {})


def test_an_output_over_an_input_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("x")
    (tmp_path / "link").symlink_to(trace)
    with pytest.raises(UsageError, match="--trace and --record: both mean the file"):
        check_distinct({"--record": str(tmp_path / "link")}, {"--trace": str(trace), "--catalog": ""})
    done = run("--trace", str(trace), "--json", str(tmp_path / "link"), expect=2)
    assert "--trace and --json" in done.stderr
    assert trace.read_text() == "x"


def test_what_is_not_the_same_may_be_given() -> None:
    check_distinct({"--json": "/dev/null", "--html": "/dev/null", "--record": "", "--requests-csv": "-"}, {"--trace": "", "--catalog": ""})


# --- one file -------------------------------------------------------------------------------------------------------------------------


def test_a_link_goes_on_pointing_to_the_file_and_the_file_keeps_its_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    output = OutputFile("--json", str(link))
    output.write("new")
    output.commit()
    assert link.is_symlink()
    assert (real.read_text(), real.stat().st_mode & 0o777) == ("new", 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_longest_name_a_file_can_have_is_no_longer_while_it_is_written(tmp_path: Path) -> None:
    output = OutputFile("--json", str(tmp_path / ("n" * 255)))
    output.write("text")
    output.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


def test_a_path_that_says_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        OutputFile("--json", f"{tmp_path / 'results'}/")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_by_the_end_is_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    output = OutputFile("--json", str(folder / "results.json"))
    output.write("text")
    (part,) = folder.iterdir()
    part.unlink()
    folder.rmdir()
    with pytest.raises(OutputError, match=r"--json .*results.json: cannot write: No such file"):
        output.commit()


def test_a_pipe_that_was_made_non_blocking_gets_everything() -> None:
    """By whoever has the other end."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = subprocess.Popen(
        [sys.executable, "-c", "from sllm.observe.report.files import OutputFile as O; o = O('--json', '-'); o.write('x' * 1_000_000); o.commit()"],
        stdout=writing, cwd=ROOT, env=environment(),
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert len(pipe.read()) == 1_000_000
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("name", "reason"), [("a" * 300, "File name too long"), ("é" * 200, "File name too long"), ("loop", "Too many levels of symbolic links")]
)  # fmt: skip
def test_a_path_that_can_never_work_is_found_before_the_run(flag: str, name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match=rf"^{flag} .*: cannot write: {reason}$"), Outputs({flag: str(tmp_path / name)}, {}):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
