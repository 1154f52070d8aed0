"""Shares by name, as users write them: `NAME=SHARE,NAME=SHARE`, or a TOML file of such pairs. Shares are weights, whose sum may be any number above 0."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sllm.inputs import toml
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import HIGH, LOW, NORMAL

PRIORITIES = {"high": HIGH, "normal": NORMAL, "low": LOW}


def read_shares(text: str, label: str) -> dict[str, float]:
    """The shares in `text`; if `text` has no `=`, the shares in the TOML file of that name. UsageError names `label`."""
    path = share_file(text)
    if path and not Path(path).exists():
        raise UsageError(f"{label} {text!r}: is neither NAME=SHARE,... nor a file")
    return read_share_file(path, label) if path else parse_shares(text, label)


def share_file(text: str) -> str:
    """`text` if it names a file of shares; "" if it has the shares itself."""
    return "" if "=" in text else text


def parse_shares(text: str, label: str) -> dict[str, float]:
    """The shares of `NAME=SHARE,NAME=SHARE`, in order. UsageError, naming `label`, for a part of another form, a name given twice, and no share above 0."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name:
            raise UsageError(f"{label}={text!r}: {part.strip()!r} is not NAME=SHARE")
        if name in shares:
            raise UsageError(f"{label}={text!r}: {name!r} is named twice")
        shares[name] = _share(number, f"{label}={text!r}: {name}={number}")
    return _check_sum(shares, f"{label}={text!r}")


def read_share_file(path: str, label: str) -> dict[str, float]:
    """The shares of a TOML file of pairs, `"llama-3.1-8b" = 3`. UsageError names `label`, the file and the key."""
    pairs = toml.read_pairs(path, label, '"llama-3.1-8b" = 3')
    shares = {name: _share(value, f"{label} {path}: {name!r} = {value!r}") for name, value in pairs.items()}
    return _check_sum(shares, f"{label} {path}")


def _share(value: Any, where: str) -> float:
    try:
        share = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0.0 <= share < math.inf:
        raise UsageError(f"{where}: a share must be a number of at least 0")
    return share


def _check_sum(shares: dict[str, float], where: str) -> dict[str, float]:
    if not 0.0 < sum(shares.values()) < math.inf:
        raise UsageError(f"{where}: at least one share must be above 0")
    return shares


def parse_priorities(text: str, label: str) -> dict[int, float]:
    """Shares by priority, of a text such as `high=1,normal=8,low=1`. UsageError names `label` and the unknown priority."""
    shares = parse_shares(text, label)
    for name in shares:
        if name not in PRIORITIES:
            raise UsageError(f"{label}={text!r}: {name!r} is no priority; there are {', '.join(PRIORITIES)}")
    return {PRIORITIES[name]: share for name, share in shares.items()}
