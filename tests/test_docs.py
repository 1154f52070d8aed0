"""What README and docs/ show is run as it stands there. `PYTHONPATH=. python3 tests/test_docs.py` writes outputs and examples into the documents.

A fenced block whose first line is a command is run by bash, in a folder that looks like the checkout. In a block marked `console`, lines after `$ ` are
commands and all others the output, which must be the same; a line `...` stands for any lines. A block marked with a language and a file
(```toml examples/faults.toml) is that file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from sllm.models.catalogue import _MODEL_KEYS, _PROFILE_KEYS, _STEP_KEYS, HARDWARE_KEYS
from sllm.models.profiles import ENGINE_PROFILES, LOADER_PROFILES
from sllm.workload import FORMATS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"([A-Z_]+=\S+ )*(python3|make|kubectl|docker|docker-compose|curl|\w+ +python3) ")
TIMEOUT_S = 150.0

NOT_RUN = {
    r"make test\b": "it is what runs this test",
    r"python3 experiments/saturation\.py": "a search of minutes: tests/test_saturation.py makes shorter ones",
    r"[a-z0-9]+ +python3 ": "checks against theory, days of simulated time: tests/test_validation.py runs shorter ones, and the catalogues are made by them",
}
"""Commands that are shown and not run here, and why."""
STANDS_FOR = dict.fromkeys(("AzureLLMInferenceTrace_conv.csv", "conv.csv", "code.csv"), "examples/traces/azure.csv")
"""Files that a user downloads, and the rows of ours that stand for them here."""

MADE_BY = {
    "results.json": "python3 centralized_simulation.py --virtual --quiet --json results.json",
    "before.json": "python3 experiments/compare.py --duration 5 --seeds 2 --json before.json",
    "after.json": "python3 experiments/compare.py --duration 5 --seeds 2 --policies least_loaded --json after.json",
}
"""Files that a user has from a run of their own, and such a run. Made where a block mentions the file and does not write it itself."""


class Block(NamedTuple):
    """A fenced block of a document."""

    document: Path
    line: int
    info: str  # what stands behind the opening fence
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands that it shows, each on one line."""
        lines = self.text.replace("\\\n", "").splitlines()
        if self.info == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip()] if not self.info and COMMAND.match(self.text) else []

    @property
    def file(self) -> str:
        """The file of this project that it shows."""
        return self.info.partition(" ")[2]


def blocks(document: Path) -> Iterator[Block]:
    pattern = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
    text = document.read_text(encoding="utf-8")
    for match in pattern.finditer(text):
        yield Block(document, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2])


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


def reason(command: str) -> str:
    """Why a command is not run; "" if it is."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command)), "")


def free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def checkout(folder: Path) -> Path:
    """A folder that looks like the checkout, in which files may be made."""
    for path in ROOT.iterdir():
        if path.name == "docs":  # commands write pictures there
            shutil.copytree(path, folder / path.name)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    for name, stands_for in STANDS_FOR.items():
        (folder / name).symlink_to(ROOT / stands_for)
    return folder


def run(script: str, folder: Path) -> str:
    """Run a script as a user would; its standard output. Whatever it started is ended. Ports are free ones, and what is told its duration by a variable, or
    not at all, is short."""
    for known, kind in (("HEALTH_PORT=8080", socket.SOCK_STREAM), ("127.0.0.1:8080", socket.SOCK_STREAM)):
        script = script.replace(known, f"{known.rstrip('0123456789')}{free_port(kind)}")
    script = re.sub(r"\bDURATION=\d+", "DURATION=2", re.sub(r"\bWORKER_PORT=\d+", "WORKER_PORT=0", script))
    environ = {
        "PATH": f"{folder / '.bin'}:{os.environ['PATH']}", "HOME": str(folder), "DEPLOYMENT_MODE": "local", "DURATION": "2",
        "COORDINATOR_PORT": str(free_port(socket.SOCK_DGRAM)), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    (folder / ".bin").mkdir(exist_ok=True)
    (folder / ".bin" / "python3").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / ".bin" / "python3").chmod(0o755)
    shell = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = shell.communicate(timeout=TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.communicate()
    assert shell.returncode == 0, f"{script}\n{out[-3000:]}\n{err[-3000:]}"
    return out


def outputs(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a console block and the output that stands under it."""
    for part in re.split(r"^\$ ", block.text.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def agrees(said: str, got: str) -> bool:
    return re.fullmatch(re.escape(said).replace(re.escape("...\n"), "(?:.*\n)*"), got) is not None


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands and block.info != "console"], ids=str)
def test_commands_do_what_they_should(block: Block, tmp_path: Path) -> None:
    script = "\n".join(command for command in block.commands if not reason(command))
    if script:
        run("\n".join([*(make for name, make in MADE_BY.items() if name in script and make not in script), script]), checkout(tmp_path))


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.info == "console"], ids=str)
def test_outputs_are_as_they_stand_there(block: Block, tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    for command, said in outputs(block):
        got = run(command, folder)
        assert agrees(said, got), f"{block}: {command}: run PYTHONPATH=. python3 tests/test_docs.py\n{got}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.file], ids=str)
def test_files_are_as_they_stand_there(block: Block) -> None:
    assert block.text == (ROOT / block.file).read_text(encoding="utf-8")


def test_what_is_not_run_stands_there_and_has_a_reason() -> None:
    commands = [command for block in BLOCKS for command in block.commands]
    assert len(commands) > 20
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command) for command in commands), pattern


def test_every_block_is_known_for_what_it_is() -> None:
    """Commands, an output that is compared, a file, or a picture in words; nothing that looks like a command goes unseen."""
    for block in BLOCKS:
        assert block.info in ("", "console", "toml") or block.file, block
        if not block.commands:
            assert "python3 " not in block.text.replace("python3 tests/", ""), block


def test_every_key_of_a_catalogue_and_every_format_stands_in_its_document() -> None:
    catalog, traces = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("catalog.md", "traces.md"))
    for key in (*HARDWARE_KEYS, *_MODEL_KEYS, *_PROFILE_KEYS, *_STEP_KEYS, *ENGINE_PROFILES, *LOADER_PROFILES):
        assert f"`{key}`" in catalog, key
    for name in FORMATS:
        assert f"| {name} |" in traces, name


def rewrite(document: Path) -> None:
    """Put files and outputs into a document."""
    import tempfile

    text = document.read_text(encoding="utf-8")
    for block in blocks(document):
        made = block.text
        if block.file:
            made = (ROOT / block.file).read_text(encoding="utf-8")
        elif block.info == "console":
            with tempfile.TemporaryDirectory() as folder:
                place = checkout(Path(folder))
                made = "".join(f"$ {command}\n{said if agrees(said, got) else got}" for command, said in outputs(block) for got in (run(command, place),))
        text = text.replace(f"```{block.info}\n{block.text}```\n", f"```{block.info}\n{made}```\n", 1)
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for one in DOCUMENTS:
        rewrite(one)
