"""Key files: made once, private, checked line by line, rotated without downtime, never shown."""

from __future__ import annotations

import itertools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from roles import configuration
from wire_samples import SAMPLES, envelope

from sllm.deploy import keys, keywatch
from sllm.deploy.keys import add_key, create_key_file, drop, ephemeral_keyring, key_path, key_stamp, load_keyring, read_keyring, rotate
from sllm.deploy.keywatch import KeyWatch
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import ReportAck
from sllm.wire.frame import FrameCodec

ROOT = Path(__file__).parent.parent
HEX = "0123456789abcdef" * 4


def understands(listener: FrameCodec, speaker: FrameCodec) -> bool:
    return bool(listener.decode(speaker.encode(envelope(SAMPLES[ReportAck]))).message == SAMPLES[ReportAck])


def codec(path: Path) -> FrameCodec:
    return FrameCodec(read_keyring(path, private=True))


def test_a_file_is_made_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cluster.key"
    assert create_key_file(path)
    text = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert not create_key_file(path)
    assert path.read_text() == text
    assert [p.name for p in path.parent.iterdir()] == ["cluster.key"]
    assert understands(codec(path), codec(path))


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    command = [sys.executable, "-m", "sllm.deploy.keys", str(path)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0] * 6
    assert sum("made" in text for text in said) == 1
    assert not any(re.search("[0-9a-f]{64}", text) for text in said)
    assert [p.name for p in tmp_path.iterdir()] == ["cluster.key"]


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    create_key_file(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="chmod 600"):
        read_keyring(path, private=True)
    assert read_keyring(path, private=False)  # a mounted secret belongs to the container


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no key"), ("# nothing\n", "has no key"),
        (f"1 {HEX}\n2 {HEX[:-2]}\n", "line 2, column 1"), (f"0 {HEX}\n", "line 1"), (f"256 {HEX}\n", "line 1"),
        (f"1 {HEX}\n\n1 {HEX}\n", "line 3"), (HEX, "line 1"), (f"1 {HEX[:-1]}g\n", "line 1"),
        *((f"1 {HEX}\n2 {constant * (64 // len(constant))}\n", "key 2 is not random") for constant in ("00", "ab", "ff", "dead", "deadbeef")),
        (f"1 {HEX}\n" + "#" * 70_000, "longer than 65536 bytes"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_one_clear_line_without_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "cluster.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(UsageError) as caught:
        read_keyring(path, private=True)
    message = str(caught.value)
    assert says in message
    assert str(path) in message
    assert "abab" not in message
    assert "abcdef" not in message


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        read_keyring(tmp_path / "nowhere", private=True)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a text file"):
        read_keyring(tmp_path / "binary", private=False)


def a_key(folder: Path, name: str = "cluster.key") -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / name
    create_key_file(path)
    return path


@pytest.mark.parametrize("mode", ["docker", "kubernetes", "local"])
def test_who_else_may_read_a_key_is_looked_at_whatever_the_mode_is_called(tmp_path: Path, mode: str) -> None:
    path = a_key(tmp_path)
    settings = configuration(cluster_key_file=str(path), deployment_mode=mode)
    assert load_keyring(settings).ids == (1,)
    path.chmod(0o644)
    with pytest.raises(UsageError, match="others may read it; chmod 600"):
        load_keyring(settings)
    assert load_keyring(settings, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}).ids == (1,), "a pod has no others: there it is as it was mounted"


def test_a_key_belongs_to_us_or_to_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_key(tmp_path / "ours")
    if os.getuid() == 0:
        os.chown(path, 4242, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4243)
    with pytest.raises(UsageError, match=r"cluster\.key belongs to user \d+, neither to this process's user nor to root; chown \d+ "):
        read_keyring(path, private=True)
    assert read_keyring(path, private=False).ids == (1,)


def test_a_key_of_root_may_be_shown_to_a_group_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() != 0:
        pytest.skip("run as root, in a container for instance: it needs a file of root's")
    path = a_key(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 4243)
    for mode, says in ((0o600, ""), (0o640, ""), (0o440, ""), (0o660, "chmod 640"), (0o644, "chmod 640")):
        path.chmod(mode)
        if says:
            with pytest.raises(UsageError, match=says):
                read_keyring(path, private=True)
        else:
            assert read_keyring(path, private=True).ids == (1,)


def test_nobody_else_may_exchange_a_key(tmp_path: Path) -> None:
    """Neither in its own folder nor in that of a link to it. In a folder with the sticky bit everybody moves his own files only."""
    path = a_key(tmp_path / "keys")
    link = tmp_path / "links" / "cluster.key"
    link.parent.mkdir(mode=0o700)
    link.symlink_to(path)
    for folder in (path.parent, link.parent):
        for mode, allowed in ((0o777, False), (0o770, False), (0o1777, True), (0o755, True)):
            folder.chmod(mode)
            if allowed:
                assert read_keyring(link, private=True).ids == (1,)
            else:
                with pytest.raises(UsageError, match="others may replace it, because they may write to its folder; chmod go-w "):
                    read_keyring(link, private=True)
        assert read_keyring(link, private=False).ids == (1,)


def test_a_change_goes_through_a_link(tmp_path: Path) -> None:
    path = a_key(tmp_path / "keys")
    link = tmp_path / "cluster.key"
    link.symlink_to(path)
    assert (add_key(link), rotate(link)) == (2, 2)
    drop(link, 1)
    assert link.is_symlink()
    assert codec(link).keyring.ids == codec(path).keyring.ids == (2,)
    assert os.listdir(path.parent) == ["cluster.key"]


def test_leftovers_are_in_nobody_s_way_and_do_not_stay(tmp_path: Path) -> None:
    path = a_key(tmp_path)
    lost = [tmp_path / f".cluster.key.{os.getpid()}", tmp_path / ".cluster.key.1.0123abcd"]
    other = tmp_path / ".cluster.key.bak"
    for left in (*lost, other):
        left.write_text("of somebody who was ended")
    assert add_key(path) == 2
    assert not any(left.exists() for left in lost)
    assert other.exists()


def test_changes_at_once_are_all_made(tmp_path: Path) -> None:
    path = a_key(tmp_path)
    command = [sys.executable, "-m", "sllm.deploy.keys", str(path), "--add"]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(6)]
    for process in started:
        process.communicate(timeout=60)
    assert codec(path).keyring.ids == tuple(range(1, 8))
    assert os.listdir(tmp_path) == ["cluster.key"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_key(tmp_path)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    before = path.read_text()
    monkeypatch.setattr(os, "fsync", refuse)
    assert keys.main([str(path), "--add"]) == 2
    assert capsys.readouterr().err == f"error: cluster key {path}: cannot be changed: Permission denied\n"
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["cluster.key"]


def test_the_stamp_of_a_file_tells_every_change(tmp_path: Path) -> None:
    path = a_key(tmp_path)
    times = path.stat()
    stamps = [key_stamp(path)]
    path.chmod(0o640)
    stamps.append(key_stamp(path))
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    copy.chmod(0o640)
    copy.replace(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    stamps.append(key_stamp(path))
    path.unlink()
    stamps.append(key_stamp(path))
    assert len(set(stamps)) == 4
    assert stamps[-1] is None


def test_where_the_keys_are(tmp_path: Path) -> None:
    assert key_path(configuration(), str(tmp_path)) == tmp_path / ".cache" / "sllm" / "cluster.key"
    assert key_path(configuration(cluster_key_file=str(tmp_path))) == tmp_path / "cluster.key"  # a mounted folder
    assert key_path(configuration(cluster_key_file=str(tmp_path / "my.key"))) == tmp_path / "my.key"
    with pytest.raises(UsageError, match="CLUSTER_KEY_FILE"):
        key_path(configuration(deployment_mode="docker"))
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "my.key"))):
        load_keyring(configuration(cluster_key_file=str(tmp_path / "my.key")))  # a file that is named must exist


def test_the_key_is_made_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first, second = load_keyring(configuration()), load_keyring(configuration())
    assert understands(FrameCodec(first), FrameCodec(second))
    assert (tmp_path / ".cache" / "sllm" / "cluster.key").exists()


def test_keys_rotate_without_downtime(tmp_path: Path) -> None:
    """At every step, who has the file as it was and who has it as it is now understand each other."""
    path = tmp_path / "cluster.key"
    create_key_file(path)
    stages = [codec(path)]
    assert add_key(path) == 2
    stages.append(codec(path))
    assert rotate(path) == 2
    stages.append(codec(path))
    drop(path, 1)
    stages.append(codec(path))
    assert stages[-1].keyring.ids == (2,)
    for before, after in itertools.pairwise(stages):
        assert understands(before, after)
        assert understands(after, before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_only_a_key_that_does_not_sign_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    create_key_file(path)
    add_key(path)
    before = path.read_text()
    with pytest.raises(UsageError, match="key 1 signs"):
        drop(path, 1)
    with pytest.raises(UsageError, match="has no key 3"):
        drop(path, 3)
    assert path.read_text() == before
    drop(path, 2)
    assert codec(path).keyring.ids == (1,)
    assert path.read_text().startswith("# "), "comments stay"


def test_the_command_never_shows_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.key"
    assert [keys.main([str(path)]), keys.main([str(path)]), keys.main([str(path), "--add"]), keys.main([str(path), "--rotate"])] == [0, 0, 0, 0]
    assert [keys.main([str(path), "--drop", "1"]), keys.main([str(path), "--drop", "2"])] == [0, 2]
    assert keys.main([str(tmp_path / "nowhere"), "--add"]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{path}: made", f"{path}: is there already", f"{path}: added key 2", f"{path}: key 2 signs", f"{path}: dropped key 1"]
    assert "nowhere" in err
    assert not re.search("[0-9a-f]{32}", out + err)


def test_rings_of_two_runs_are_strangers() -> None:
    assert understands(*[FrameCodec(ephemeral_keyring())] * 2)
    one, other = FrameCodec(ephemeral_keyring()), FrameCodec(ephemeral_keyring())
    with pytest.raises(Exception, match="tag"):
        understands(one, other)


def test_a_volume_that_went_and_came_back_as_it_was_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = a_key(tmp_path)
    watch = KeyWatch(configuration(cluster_key_file=str(path)), {})
    log = logging.getLogger("test")
    with caplog.at_level("INFO", "test"), monkeypatch.context() as patch:
        assert not watch.look(log)
        patch.setattr(keywatch, "key_stamp", lambda _: None)
        assert not watch.look(log)
        assert not watch.look(log)
    with caplog.at_level("INFO", "test"):
        assert not watch.look(log)
        assert not watch.look(log)
    assert [record.getMessage() for record in caplog.records] == [
        f"cluster key {path}: is gone; the keys in use stay", f"the key file {path} can be read again, and has the same keys",
    ]  # fmt: skip
