"""The coordinator's page for people: one file that loads nothing from elsewhere, with a policy that lets a browser run only the script in that file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from sllm.live.http import Page


@cache
def fleet_page() -> Page:
    """The page, and its Content-Security-Policy with the hashes of its own style and script."""
    body = Path(__file__).with_name("page.html").read_bytes()
    policy = (
        "default-src 'none'; "
        f"script-src {_hash_of(body, b'script')}; style-src {_hash_of(body, b'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(body, policy)


def _hash_of(body: bytes, tag: bytes) -> str:
    found = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", body, re.DOTALL)
    if len(found) != 1:
        raise AssertionError(f"the page must have exactly one {tag.decode()} element")
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0]).digest()).decode()}'"
