#!/usr/bin/env python3
"""Compile the modules that every message runs through, in place, with mypyc: the same source and the same results, in about a third of the time.

    python3 tools/compile.py             compile (make fast); needs mypy, setuptools and a C compiler
    python3 tools/compile.py --remove    remove what was compiled (make slow)
    python3 tools/compile.py --list      show the modules and exit

What is made is listed in sllm/compiled.json, with a digest of each source: a compiled module whose source has changed since is refused at the next start.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

PATTERNS = (
    "coordinator.py", "worker.py", "client.py", "sllm/fleet/*.py", "sllm/routing/*.py", "sllm/service/*.py", "sllm/requests/*.py", "sllm/engine/*.py",
    "sllm/placement/base.py", "sllm/placement/costs.py", "sllm/observe/recorder.py", "sllm/observe/timeline.py",
    *(f"sllm/protocol/{name}.py" for name in ("bus", "events", "fitting", "messages", "node", "recent", "record", "replay", "rivals", "rules", "timers")),
    *(f"sllm/virtual/{name}.py" for name in ("carrier", "datagram", "feed", "host", "hostclock", "network", "target", "world")),
)  # fmt: skip
"""The modules in which a run spends its time. Others stay as they are: files that people add (policies, codecs, checkers, trace formats), what runs once,
and what is bound by the system. bench/README.md has the figures."""

STAMP = "sllm/compiled.json"
GROUP = "sllm_compiled"
REFUSED = "generator comprehension"  # in what mypyc says: an endless generator would be made into a list, and a lazy one is not lazy any more


def sources(root: Path) -> list[Path]:
    """The modules to compile, relative to the root."""
    found = [path.relative_to(root) for pattern in PATTERNS for path in sorted(root.glob(pattern)) if path.name != "__init__.py"]
    if not found:
        raise SystemExit(f"compile: {root}: no module of this project is there")
    return found


def problem() -> str:
    """What keeps this machine from compiling; "" if nothing does."""
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        return "there is no C compiler: install gcc"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "the headers of Python are missing: install python3-dev"
    return ""


def compile_all(root: Path) -> None:
    """Compile every module. What was compiled before is removed first, so that a build that fails leaves plain Python."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    remove(root)
    names = sources(root)
    said = io.StringIO()
    with redirect_stdout(said):
        extensions = mypycify([str(name) for name in names], opt_level="1", debug_level="0", multi_file=True, group_name=GROUP, target_dir="build")
    if REFUSED in said.getvalue():
        raise SystemExit(f"compile: write generator expressions as list comprehensions or as functions that yield:\n{said.getvalue()}")
    command = Distribution({"name": GROUP, "ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib, command.build_temp, command.parallel = "build/lib", "build/temp", 2
    command.ensure_finalized()
    command.run()
    made = sorted(path.relative_to(root / "build/lib") for path in (root / "build/lib").rglob("*") if path.is_file())
    digests = {str(name): hashlib.blake2b((root / name).read_bytes(), digest_size=16).hexdigest() for name in names}
    (root / STAMP).write_text(json.dumps({"made": [str(name) for name in made], "sources": digests}, indent=1), encoding="utf-8")
    for name in made:
        shutil.copy2(root / "build/lib" / name, root / name)
    shutil.rmtree(root / "build")
    print(f"compiled {len(names)} modules; make slow takes it back")


def remove(root: Path) -> None:
    """Remove what was compiled, and nothing else."""
    stamp = root / STAMP
    made = json.loads(stamp.read_text(encoding="utf-8"))["made"] if stamp.exists() else []
    for name in made:
        (root / name).unlink(missing_ok=True)
    stamp.unlink(missing_ok=True)
    shutil.rmtree(root / "build", ignore_errors=True)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compile the project's hot modules in place with mypyc.", allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout [this one]")
    parser.add_argument("--remove", action="store_true", help="remove what was compiled")
    parser.add_argument("--list", action="store_true", help="show the modules and exit")
    arguments = parser.parse_args(argv)
    root = arguments.root.resolve()
    if arguments.list:
        print(*sources(root), sep="\n")
    elif arguments.remove:
        remove(root)
    elif why := problem():
        print(f"compile: {why}", file=sys.stderr)
        return 1
    else:
        os.chdir(root)  # mypyc names modules by their path from here
        os.environ["MYPY_CACHE_DIR"] = os.devnull  # nothing but what is compiled stays behind
        compile_all(root)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
