"""The glossary has each term once, and names files that exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = re.findall(r"^\| (?!term |---)(.+?) \| (.+) \| (.+) \|$", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_each_term_is_there_once_with_a_meaning() -> None:
    terms = Counter(term for names, _, _ in ROWS for term in names.split(", "))
    assert len(terms) > 80
    assert [term for term, count in terms.items() if count > 1] == []
    assert [names for names, meaning, _ in ROWS if not meaning.endswith(".")] == []


def test_its_files_exist() -> None:
    named = {path for _, _, where in ROWS for path in re.findall(r"`([^`]+)`", where)}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
