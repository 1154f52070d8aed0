"""Cluster keys: their files, how keys are made, and how keys are rotated.

A key file has one key per line, `<id> <64 hexadecimal digits>`, ids 1 to 255; `#` begins a comment. The first key signs, and all keys are accepted, so that
keys rotate without downtime: add the new key at the end of every file, then move it to the top of every file, then drop the old key. `CLUSTER_KEY_FILE` may
name a folder, such as a mounted Secret; the key file is then `cluster.key` in that folder.

On a machine with other accounts a key file must belong to the account of the process or to root, be readable by no other account, and lie in a folder where
no other account can replace the file. In a container these conditions are not checked.

    python3 -m sllm.deploy.keys FILE            makes FILE with a new key if it is missing
    python3 -m sllm.deploy.keys FILE --add      adds a new key, accepted from now on
    python3 -m sllm.deploy.keys FILE --rotate   makes the last key of the file the one that signs
    python3 -m sllm.deploy.keys FILE --drop 1   removes key 1, which must not be the one that signs
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from config import Config, detect_mode
from sllm.protocol.errors import UsageError
from sllm.wire.keys import KEY_BYTES, Keyring

FILE_NAME = "cluster.key"
FILE_MAX_BYTES = 1 << 16  # 255 keys have 18 KB
_LINE = re.compile(r"\s*(\d{1,3})\s+([0-9a-fA-F]{%d})\s*(#.*)?" % (2 * KEY_BYTES))  # noqa: UP031
_PART = re.compile(r"\d+(\.[0-9a-f]{8})?")  # middle of the name of a file being written: process id, and random digits


def ephemeral_keyring() -> Keyring:
    """A keyring with one new key, for a run whose nodes all live in this process."""
    return Keyring(1, {1: secrets.token_bytes(KEY_BYTES)})


def key_path(config: Config, environ_home: str | None = None) -> Path:
    """The path of this process's key file: `CLUSTER_KEY_FILE`, or the user's own file if the process runs locally. UsageError in a container without one."""
    if config.cluster_key_file:
        path = Path(config.cluster_key_file)
        return path / FILE_NAME if path.is_dir() else path
    if config.in_container:
        raise UsageError("CLUSTER_KEY_FILE is not set: in a container the cluster key must be mounted as a file (python3 -m sllm.deploy.keys FILE makes one)")
    home = Path(environ_home) if environ_home else Path.home()
    return home / ".cache" / "sllm" / FILE_NAME


def load_keyring(config: Config, environ: Mapping[str, str] | None = None) -> Keyring:
    """The process's keys. Locally the user's own file is made on first use; a file that is named must exist. Who else may touch the file is looked at
    wherever we really are on a machine of others, whatever DEPLOYMENT_MODE says.

    UsageError names file, line and column, never a key.
    """
    path = key_path(config)
    if not config.cluster_key_file:
        create_key_file(path)
    return read_keyring(path, private=detect_mode(environ or {}) == "local")


def key_stamp(path: Path) -> tuple[int, ...] | None:
    """A value that changes whenever the file's content, owner or mode may have changed; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size, found.st_mode, found.st_uid, found.st_gid


def read_keyring(path: Path, *, private: bool) -> Keyring:
    """Parse a key file. `private`: refuse a file that other accounts of this machine may read or replace."""
    text = _read(path, private=private)
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
        raise UsageError(f"cluster key {path}: has no key; python3 -m sllm.deploy.keys FILE makes a new file")
    for key_id, key in keys.items():
        if any(key == key[:size] * (KEY_BYTES // size) for size in (1, 2, 4)):
            raise UsageError(f"cluster key {path}: key {key_id} is not random, anybody could guess it; python3 -m sllm.deploy.keys FILE --add makes one")
    return Keyring(next(iter(keys)), keys)


def _read(path: Path, *, private: bool = False) -> str:
    try:
        with open(path, "rb") as file:
            if private:
                _check_file(path, os.fstat(file.fileno()))
            data = file.read(FILE_MAX_BYTES + 1)
        if private:
            for folder in {path.absolute().parent, path.resolve().parent}:
                _check_folder(path, folder)
    except OSError as error:
        raise UsageError(f"cluster key {path}: cannot be read: {error.strerror}") from None
    if len(data) > FILE_MAX_BYTES:
        raise UsageError(f"cluster key {path}: is longer than {FILE_MAX_BYTES} bytes, so it is no key file")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        raise UsageError(f"cluster key {path}: is not a text file") from None


def _check_file(path: Path, found: os.stat_result) -> None:
    """UsageError unless the file is ours, or root's and shown to a group of ours, and nobody else's."""
    _check_owner(path, f"cluster key {path}", found)
    mode = 0o600 if found.st_uid == os.getuid() else 0o640
    if found.st_mode & 0o177 & ~mode:
        raise UsageError(f"cluster key {path}: others may read it; chmod {mode:o} {path}")


def _check_folder(path: Path, folder: Path) -> None:
    """UsageError if another account may replace the key file."""
    found = folder.stat()
    _check_owner(folder, f"cluster key {path}: its folder {folder}", found)
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise UsageError(f"cluster key {path}: others may replace it, because they may write to its folder; chmod go-w {folder}")


def _check_owner(path: Path, what: str, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.getuid()):
        raise UsageError(f"{what} belongs to user {found.st_uid}, neither to this process's user nor to root; chown {os.getuid()} {path}")


def create_key_file(path: Path) -> bool:
    """Make a key file (mode 0600) unless it exists; returns whether it was made. Of two processes that try at once, one makes the file and both use it."""
    if path.exists():
        return False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        real = path.resolve()  # if the path is a link to a missing file, that file is made
        with _alone(real), _written(real, f"# cluster key: whoever has it can speak to the fleet\n1 {secrets.token_hex(KEY_BYTES)}\n") as part:
            try:
                os.link(part, real)  # fails if another process was faster; other processes never see a half-written file
            except FileExistsError:
                return False
    except OSError as error:
        raise UsageError(f"cluster key {path}: cannot be made: {error.strerror}") from None
    return True


@contextlib.contextmanager
def _alone(real: Path) -> Iterator[None]:
    """Nobody else changes the key file meanwhile; parts that somebody left who was ended in the middle of it are removed: they hold keys."""
    folder = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        for left in real.parent.glob(f".{real.name}.*"):
            if _PART.fullmatch(left.name.removeprefix(f".{real.name}.")):
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(folder)


@contextlib.contextmanager
def _written(real: Path, text: str) -> Iterator[Path]:
    """A file of its own beside `real` with `text` in it, safely on the disk; gone afterwards, unless it has another name by then."""
    part = real.with_name(f".{real.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield part
    finally:
        part.unlink(missing_ok=True)


def _rewrite(path: Path, change: Callable[[list[str]], int]) -> int:
    """Let `change` change the file's lines, in one step for whoever reads it; returns what `change` returns. A link stays a link, to the same file; owner and
    mode stay."""
    real = path.resolve()
    try:
        with _alone(real):
            lines = _read(real).splitlines()
            result = change(lines)
            before = real.stat()
            with _written(real, "\n".join(lines) + "\n") as part:
                if (before.st_uid, before.st_gid) != (os.getuid(), os.getgid()):
                    os.chown(part, before.st_uid, before.st_gid)
                part.chmod(stat.S_IMODE(before.st_mode))
                part.replace(real)
    except OSError as error:
        raise UsageError(f"cluster key {path}: cannot be changed: {error.strerror}") from None
    return result


def add_key(path: Path) -> int:
    """Append a new key; returns the key's id."""

    def change(lines: list[str]) -> int:
        ids = [int(match[1]) for line in lines if (match := _LINE.fullmatch(line))]
        free = next((number for number in range(1, 256) if number not in ids), None)
        if free is None:
            raise UsageError(f"cluster key {path}: has 255 keys already")
        lines.append(f"{free} {secrets.token_hex(KEY_BYTES)}")
        return free

    return _rewrite(path, change)


def rotate(path: Path) -> int:
    """Move the last key to the top, so that this key signs; returns the key's id."""

    def change(lines: list[str]) -> int:
        keys = [index for index, line in enumerate(lines) if _LINE.fullmatch(line)]
        if not keys:
            raise UsageError(f"cluster key {path}: has no key")
        line = lines.pop(keys[-1])
        lines.insert(keys[0], line)
        return int(line.split()[0])

    return _rewrite(path, change)


def drop(path: Path, key_id: int) -> None:
    """Remove a key that does not sign. UsageError for the key that signs, and for an unknown id."""

    def change(lines: list[str]) -> int:
        keys = {int(match[1]): index for index, line in enumerate(lines) if (match := _LINE.fullmatch(line))}
        if key_id not in keys:
            raise UsageError(f"cluster key {path}: has no key {key_id}")
        if keys[key_id] == min(keys.values()):
            raise UsageError(f"cluster key {path}: key {key_id} signs; let another sign first (--rotate)")
        del lines[keys[key_id]]
        return key_id

    _rewrite(path, change)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status. Never prints a key."""
    parser = argparse.ArgumentParser(prog="python3 -m sllm.deploy.keys", description="Makes and rotates cluster keys; never prints one.")
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
