"""The README's tables say what the configuration says, word for word. `PYTHONPATH=. python3 tests/test_readme.py` prints them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from config import OUTPUTS, SWITCHES, Config
from sllm.run.command_line import flag_fields

ROOT = Path(__file__).resolve().parent.parent


def described(field: dataclasses.Field[Any]) -> str:
    """What it means, with the values it can have unless they are any."""
    choices = [choice for choice in field.metadata["choices"] or () if choice]
    meaning: str = field.metadata["meaning"]
    return meaning + (f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else "")


def default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value == "":
        return ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def row(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else "  " for cell in cells) + "|"


def option_rows() -> list[str]:
    rows = [row(f"`{f.metadata['flag']}`", f"`{f.metadata['env']}`", default(f), f.metadata["unit"], described(f)) for f in flag_fields()]
    rows += [row(f"`{flag} {value.replace('|', chr(92) + '|')}`", f"`{env}`", "", "", meaning) for flag, env, value, meaning in OUTPUTS]
    return rows + [row(f"`{flag}`", f"`{env}=1`", "", "", meaning) for flag, env, meaning in SWITCHES]


def variable_rows() -> list[str]:
    fields = [field for field in dataclasses.fields(Config) if not field.metadata["flag"]]
    return [row(f"`{f.metadata['env']}`", default(f), f.metadata["unit"], f.metadata["group"], described(f)) for f in fields]


def rows_under(heading: str) -> list[str]:
    section = re.split(r"^## ", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(heading)]
    return [line for line in text.splitlines() if line.startswith("| `")]


def test_every_option_stands_there_as_it_is() -> None:
    assert rows_under("Options") == option_rows()


def test_every_variable_stands_there_as_it_is() -> None:
    assert rows_under("Variables without a flag") == variable_rows()


if __name__ == "__main__":
    print("\n".join([*option_rows(), "", *variable_rows()]))
