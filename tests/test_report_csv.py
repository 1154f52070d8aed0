import csv
from pathlib import Path
from typing import Any

import pytest
from report_samples import events
from roles import tell

from sllm.observe.report.csv import COLUMNS, RequestsCsv
from sllm.observe.report.files import OutputFile
from sllm.protocol.errors import OutputError, UsageError
from sllm.protocol.events import RequestCompleted, RequestFailed, RequestRejected


def read(path: Any) -> Any:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_rows_hold_what_the_events_said(tmp_path: Path) -> None:
    told = events(500)
    path = tmp_path / "requests.csv"
    with RequestsCsv(str(path)) as out:
        for event in told:
            tell(out, event)
        assert not path.exists()
    assert [item.name for item in tmp_path.iterdir()] == ["requests.csv"]
    rows = read(path)
    ended = [event for event in told if isinstance(event, RequestCompleted | RequestFailed | RequestRejected)]
    assert len(rows) == len(ended)
    assert tuple(rows[0]) == COLUMNS
    for row, event in zip(rows, ended, strict=True):
        assert row["request_id"] == event.request_id
        assert row["model"] == event.model
        assert float(row["arrival_s"]) == pytest.approx(event.arrival_s, rel=1e-8)
        if isinstance(event, RequestCompleted):
            assert row["outcome"] == "completed"
            assert row["reason"] == ""
            for name in ("worker_id", "action", "prompt_tokens", "output_tokens", "placements", "retries"):
                assert row[name] == str(getattr(event, name))
            for name in ("ttft_s", "e2e_s", "tpot_s", "queue_wait_s", "load_s"):
                assert float(row[name]) == pytest.approx(getattr(event, name), rel=1e-8)
        elif isinstance(event, RequestFailed):
            assert (row["outcome"], row["reason"], row["ttft_s"]) == ("failed", event.reason, "")
        else:
            assert (row["outcome"], row["reason"]) == ("rejected", event.code)


def test_awkward_names_survive(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    with RequestsCsv(str(path)) as out:
        tell(out, RequestFailed(1.0, 'a,"b"\nc', "modèle", 0.5, "line\nbreak"))
    [row] = read(path)
    assert (row["request_id"], row["model"], row["reason"]) == ('a,"b"\nc', "modèle", "line\nbreak")


def interrupted(path: Any) -> None:
    with RequestsCsv(str(path)) as out:
        tell(out, RequestRejected(1.0, "r0", "m", 0.5, "SATURATED"))
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    with pytest.raises(KeyboardInterrupt):
        interrupted(path)
    assert len(read(path)) == 1


def test_a_path_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no" / "where.csv", "No such file"), (tmp_path, "is a directory")):
        with pytest.raises(UsageError) as caught:
            RequestsCsv(str(path))
        assert str(caught.value).startswith(f"--requests-csv {path}: cannot write: {reason}")
    with pytest.raises(UsageError, match="--html"):
        OutputFile("--html", "a\0b")
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    out = OutputFile("--html", str(path))
    out.write("new")
    out.discard()
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("report.html", "old")]
    out = OutputFile("--html", str(path))
    out.write("new")
    out.commit()
    out.discard()
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [("report.html", "new")]


def test_a_device_is_written_directly() -> None:
    with RequestsCsv("/dev/null") as out:
        tell(out, RequestRejected(1.0, "r0", "m", 0.5, "SATURATED"))
    assert Path("/dev/null").is_char_device(), "no file has taken its place"


def test_a_full_disk_is_one_clear_line() -> None:
    out = OutputFile("--json", "/dev/full")
    out.write("x" * 1_000_000)
    with pytest.raises(OutputError, match="--json /dev/full: cannot write: No space left"):
        out.commit()
    out.discard()
