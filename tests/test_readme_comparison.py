"""The README opens with what its first command prints and draws. `PYTHONPATH=. python3 tests/test_readme_comparison.py` writes both anew."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from experiments.harness import ROOT, replace_section

README, PICTURE = ROOT / "README.md", ROOT / "docs" / "compare.svg"


def command() -> list[str]:
    """The words of the README's first command."""
    return shlex.split(re.findall(r"^python3 (.*)", README.read_text(encoding="utf-8"), re.MULTILINE)[0])


def produce(picture: Path) -> str:
    """Run the command, its picture going elsewhere; returns what it prints."""
    words = [str(picture) if word == "docs/compare.svg" else word for word in command()]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, encoding="utf-8", env={"PYTHONIOENCODING": "utf-8"}, check=True, timeout=300)
    return done.stdout.strip()


def drawing(picture: Path) -> str:
    """The picture but for its style, which the report's page shares."""
    return re.sub(r"<style>.*</style>", "", picture.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_command_prints_and_draws_what_the_readme_shows(tmp_path: Path) -> None:
    shown = re.findall(r"<!-- comparison -->\n\n```\n(.*?)\n```\n\n<!-- end", README.read_text(encoding="utf-8"), re.DOTALL)
    assert [produce(tmp_path / "picture.svg")] == shown
    assert drawing(tmp_path / "picture.svg") == drawing(PICTURE)


if __name__ == "__main__":
    replace_section(README, "comparison", f"```\n{produce(PICTURE)}\n```")
