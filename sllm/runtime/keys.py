"""Cluster keys: where they are kept, how they are made, and how they are rotated.

A key file has one key a line, `<id> <64 hexadecimal digits>`, ids 1 to 255; `#` begins a comment. The first key signs, all are accepted, so that keys rotate
without downtime: add the new one below everywhere, then move it to the top everywhere, then drop the old one. `CLUSTER_KEY_FILE` may name a folder, as a
mounted Secret is one: then its file `cluster.key` counts.

    python3 -m sllm.runtime.keys FILE            makes FILE with a new key if it is missing
    python3 -m sllm.runtime.keys FILE --add      adds a new key, accepted from now on
    python3 -m sllm.runtime.keys FILE --rotate   makes the last key of the file the one that signs
    python3 -m sllm.runtime.keys FILE --drop 1   removes key 1, which must not be the one that signs
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from config import Config
from sllm.errors import UsageError
from sllm.wire import KEY_BYTES, Keyring

FILE_NAME = "cluster.key"
_LINE = re.compile(r"\s*(\d{1,3})\s+([0-9a-fA-F]{%d})\s*(#.*)?" % (2 * KEY_BYTES))  # noqa: UP031


def ephemeral_keyring() -> Keyring:
    """A ring with one new key, for a run whose nodes all live in this process."""
    return Keyring(1, {1: secrets.token_bytes(KEY_BYTES)})


def key_path(config: Config, environ_home: str | None = None) -> Path:
    """Where this process's keys are: `CLUSTER_KEY_FILE`, or this user's file when it runs locally. UsageError in a container without one."""
    if config.cluster_key_file:
        path = Path(config.cluster_key_file)
        return path / FILE_NAME if path.is_dir() else path
    if config.in_container:
        raise UsageError("CLUSTER_KEY_FILE is not set: in a container the cluster key must be mounted as a file (python3 -m sllm.runtime.keys FILE makes one)")
    home = Path(environ_home) if environ_home else Path.home()
    return home / ".cache" / "sllm" / FILE_NAME


def load_keyring(config: Config) -> Keyring:
    """The process's keys. Locally the user's own file is made on first use; a file that is named must exist.

    UsageError names file, line and column, never a key.
    """
    path = key_path(config)
    if not config.cluster_key_file:
        create_key_file(path)
    return read_keyring(path, private=not config.in_container)


def read_keyring(path: Path, *, private: bool) -> Keyring:
    """Parse a key file. `private`: refuse one that others on this machine may read."""
    text = _read(path)
    if private and path.stat().st_mode & 0o077:
        raise UsageError(f"cluster key {path}: others may read it; chmod 600 {path}")
    keys: dict[int, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None or not 0 < int(match[1]) < 256:
            raise UsageError(f"cluster key {path}, line {number}, column 1: must be an id from 1 to 255 and {2 * KEY_BYTES} hexadecimal digits")
        if int(match[1]) in keys:
            raise UsageError(f"cluster key {path}, line {number}, column 1: id {int(match[1])} is there twice")
        keys[int(match[1])] = bytes.fromhex(match[2])
    if not keys:
        raise UsageError(f"cluster key {path}: has no key; python3 -m sllm.runtime.keys FILE makes a new file")
    return Keyring(next(iter(keys)), keys)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError as error:
        raise UsageError(f"cluster key {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"cluster key {path}: is not a text file") from None


def create_key_file(path: Path) -> bool:
    """Make a key file (mode 0600) unless it is there; says whether it did. Of two processes that try at once, one makes it and both use it."""
    if path.exists():
        return False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        _write_private(part, f"# cluster key: whoever has it can speak to the fleet\n1 {secrets.token_hex(KEY_BYTES)}\n")
        try:
            os.link(part, path)  # fails if somebody was quicker, and never shows a file half written
        except FileExistsError:
            return False
        finally:
            part.unlink()
    except OSError as error:
        raise UsageError(f"cluster key {path}: cannot be made: {error.strerror}") from None
    return True


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)


def _rewrite(path: Path, lines: list[str]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    mode = path.stat().st_mode & 0o777
    _write_private(part, "\n".join(lines) + "\n")
    part.chmod(mode)
    part.replace(path)


def add_key(path: Path) -> int:
    """Append a new key; returns its id."""
    ids = [int(match[1]) for line in _read(path).splitlines() if (match := _LINE.fullmatch(line))]
    free = next((number for number in range(1, 256) if number not in ids), None)
    if free is None:
        raise UsageError(f"cluster key {path}: has 255 keys already")
    _rewrite(path, [*_read(path).splitlines(), f"{free} {secrets.token_hex(KEY_BYTES)}"])
    return free


def rotate(path: Path) -> int:
    """Move the last key to the top, so that it signs; returns its id."""
    lines = _read(path).splitlines()
    keys = [index for index, line in enumerate(lines) if _LINE.fullmatch(line)]
    if not keys:
        raise UsageError(f"cluster key {path}: has no key")
    line = lines.pop(keys[-1])
    lines.insert(keys[0] if len(keys) > 1 else keys[-1], line)
    _rewrite(path, lines)
    return int(line.split()[0])


def drop(path: Path, key_id: int) -> None:
    """Remove a key that does not sign. UsageError for the one that does, or if there is none of that id."""
    lines = _read(path).splitlines()
    keys = {int(match[1]): index for index, line in enumerate(lines) if (match := _LINE.fullmatch(line))}
    if key_id not in keys:
        raise UsageError(f"cluster key {path}: has no key {key_id}")
    if keys[key_id] == min(keys.values()):
        raise UsageError(f"cluster key {path}: key {key_id} signs; let another sign first (--rotate)")
    del lines[keys[key_id]]
    _rewrite(path, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. It never prints a key."""
    parser = argparse.ArgumentParser(prog="python3 -m sllm.runtime.keys", description="Makes and rotates cluster keys; never prints one.")
    parser.add_argument("file", type=Path, help="the key file")
    parser.add_argument("--add", action="store_true", help="add a new key, accepted but not signing yet")
    parser.add_argument("--rotate", action="store_true", help="let the last key of the file sign")
    parser.add_argument("--drop", type=int, metavar="ID", help="remove key ID; the one that signs stays")
    arguments = parser.parse_args(argv)
    path: Path = arguments.file
    try:
        if arguments.add:
            print(f"{path}: added key {add_key(path)}")
        if arguments.rotate:
            print(f"{path}: key {rotate(path)} signs")
        if arguments.drop is not None:
            drop(path, arguments.drop)
            print(f"{path}: dropped key {arguments.drop}")
        if not arguments.add and not arguments.rotate and arguments.drop is None:
            print(f"{path}: {'made' if create_key_file(path) else 'is there already'}")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
