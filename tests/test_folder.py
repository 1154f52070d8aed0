"""Folders that are listed: a broken file takes nothing from the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllm.inputs.folder import read_folder
from sllm.protocol.errors import UsageError
from sllm.workload import FORMATS, open_trace, traces


def test_a_format_that_cannot_be_imported_takes_nothing_from_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text("FORMAT = (\n")
    monkeypatch.setattr(traces, "__path__", [*traces.__path__, str(tmp_path)])
    found, broken = read_folder(traces, traces._format_of)
    assert found == FORMATS
    assert "sllm/workload/traces/halfway.py, line 1: SyntaxError" in broken["halfway"]
    monkeypatch.setattr(traces, "BROKEN", broken)
    path = tmp_path / "strange.csv"
    path.write_text("a,b,c\n")
    with pytest.raises(UsageError, match=r"no known format.*not readable: sllm/workload/traces/halfway\.py"):
        open_trace(str(path))
