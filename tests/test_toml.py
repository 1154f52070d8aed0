"""TOML files of users: whatever is in one is tables or one line that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sllm.models.catalogue import Catalog
from sllm.protocol.errors import UsageError
from sllm.virtual.faults import load_schedule
from sllm.workload.modelmap import read_map

READERS: dict[str, Callable[[str], object]] = {"catalogue": Catalog.from_file, "fault file": lambda path: load_schedule(path, 1), "model map": read_map}
GOOD = {"catalogue": "[model.opt-13b]\n", "fault file": '[[fault]]\nat = 1\nkind = "crash"\nhosts = ["worker-1"]\n', "model map": 'a = "b"\n'}
INSANE = {
    "digits": (b"x = " + b"9" * 5000, "too many digits"),
    "hexadecimal": (b"x = 0x" + b"f" * 5000, "too many digits"),
    "sixty-five bits": (b"x = 1_000_000_000_000_000_000_000", "too many digits"),
    "in an array": (b"x = [[{y = 0x" + b"f" * 5000 + b"}]]", "too many digits"),
    "brackets": (b"x = " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    "braces": (b"x = " + b"{a = " * 5000 + b"1" + b"}" * 5000, "nested too deeply"),
    "points": (b".".join([b"x"] * 5000) + b" = 1", "nested too deeply"),
    "latin-1": (b'x = "\xe9"', "not UTF-8"),
    "no TOML": (b"x = ", "Invalid value"),
}


@pytest.mark.parametrize("what", INSANE)
@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_cannot_be_used_is_one_line(kind: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    content, problem = INSANE[what]
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem) as caught:
        READERS[kind](str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize("kind", READERS)
def test_a_byte_order_mark_is_passed_over(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text(GOOD[kind], encoding="utf-8-sig")
    assert READERS[kind](str(path))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("path", ["/nowhere/file.toml", "a\0b", "/"])
def test_a_file_that_cannot_be_read_says_which_and_why(kind: str, path: str) -> None:
    with pytest.raises(UsageError, match=f"^{kind} .*cannot be read: "):
        READERS[kind](path)
