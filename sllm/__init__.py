"""Control plane and simulator for serverless LLM serving."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

__version__ = "0.1.0"


def _is_compiled() -> bool:
    """Whether `make fast` has compiled this checkout. A source that has changed since ends the process: its compiled module would run in its place."""
    stamp = Path(__file__).with_name("compiled.json")
    if not stamp.exists():
        return False
    root = stamp.parent.parent
    for name, digest in json.loads(stamp.read_text(encoding="utf-8"))["sources"].items():
        source = root / name
        if source.exists() and hashlib.blake2b(source.read_bytes(), digest_size=16).hexdigest() != digest:
            print(f"{name} has changed since it was compiled: make fast, or make slow", file=sys.stderr)
            raise SystemExit(2)
    return True


COMPILED = _is_compiled()
"""Whether the modules that every message runs through are compiled. Results say so in `wall`."""
