"""The command that makes the key's Secret, and the one that waits for it, against servers of our own on loopback."""

from __future__ import annotations

import base64
import json
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import inf
from pathlib import Path

import pytest

from config import Config
from sllm.deploy import key_secret
from sllm.deploy.keys import FILE_NAME, create_key_file, load_keyring, read_keyring
from sllm.deploy.shell import await_key_file
from sllm.protocol.errors import UsageError


class ApiServer(HTTPServer):
    """Answers with the statuses it was given, the last one for ever, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses = [201]
        self.asked: list[tuple[str, str, dict[str, object]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        assert self.path == "/livez"
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("a-token\n")
    (tmp_path / "namespace").write_text("sllm-system")
    return tmp_path


def command(api: ApiServer, account: Path, *more: str) -> int:
    return key_secret.main([f"--api-server={api.url}", f"--account-dir={account}", *more])


def test_it_asks_for_a_secret_that_holds_a_key_file(api: ApiServer, account: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(api, account) == 0
    [(path, authorization, body)] = api.asked
    assert (path, authorization) == ("/api/v1/namespaces/sllm-system/secrets", "Bearer a-token")
    assert body["kind"] == "Secret"
    data = body["data"]
    assert isinstance(data, dict)
    file = tmp_path / "cluster.key"
    file.write_bytes(base64.b64decode(data["cluster.key"]))
    assert read_keyring(file, private=False).signer == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["message"].endswith(": made")
    assert file.read_text().split()[1] not in said.out + said.err, "no key is ever printed"


def test_each_key_is_another(api: ApiServer, account: Path) -> None:
    command(api, account)
    command(api, account)
    assert api.asked[0][2]["data"] != api.asked[1][2]["data"]


def test_a_secret_that_is_there_is_left_alone(api: ApiServer, account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.statuses = [409]
    assert command(api, account) == 0
    assert json.loads(capsys.readouterr().out)["message"].endswith(": is there already")


@pytest.mark.parametrize("status", [401, 403, 404, 422])
def test_a_no_is_taken_for_a_no(api: ApiServer, account: Path, capsys: pytest.CaptureFixture[str], status: int) -> None:
    api.statuses = [status]
    assert command(api, account) == 1
    assert len(api.asked) == 1
    assert str(status) in json.loads(capsys.readouterr().out)["message"]


def test_a_busy_server_is_asked_again() -> None:
    clock, answers = [0.0], iter([OSError("busy"), OSError("busy"), None])

    def attempt() -> bool:
        answer = next(answers)
        if answer is not None:
            raise answer
        return True

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    assert key_secret.ensure_patiently(attempt, try_for_s=60.0, now=lambda: clock[0], sleep=sleep)
    assert clock[0] == 2 * key_secret.RETRY_S


def test_it_gives_up_in_time() -> None:
    clock = [0.0]

    def attempt() -> bool:
        raise OSError("nobody there")

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    with pytest.raises(OSError, match="nobody there"):
        key_secret.ensure_patiently(attempt, try_for_s=10.0, now=lambda: clock[0], sleep=sleep)
    assert clock[0] <= 10.0


def test_a_server_in_trouble_is_an_error(api: ApiServer, account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.statuses = [500]
    assert command(api, account, "--try-for=0") == 1
    assert "500" in json.loads(capsys.readouterr().out)["message"]


def test_outside_a_pod_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert key_secret.main([f"--account-dir={tmp_path / 'nothing'}"]) == 2
    assert "meant for a pod" in capsys.readouterr().err


def test_the_api_server_is_found_by_its_address() -> None:
    assert key_secret._api_server({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "6443"}) == "https://10.0.0.1:6443"
    assert key_secret._api_server({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}) == "https://[fd00::1]:443"


def test_a_worker_waits_until_a_coordinator_answers_with_yes(api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    api.statuses = [503, 503, 200]
    pauses: list[float] = []
    key_secret.await_answer("127.0.0.1", api.server_address[1], pauses.append)
    assert pauses == [key_secret.LOOK_S] * 2
    monkeypatch.setenv("COORDINATOR_HOST", "127.0.0.1")
    monkeypatch.setenv("HEALTH_PORT", str(api.server_address[1]))
    assert key_secret.main(["--wait-for=coordinator"]) == 0


def test_a_worker_goes_on_waiting_when_nobody_is_there(api: ApiServer, capsys: pytest.CaptureFixture[str]) -> None:
    port = api.server_address[1]
    api.server_close()

    class Enough(Exception):
        pass

    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 40:
            raise Enough

    with pytest.raises(Enough):
        key_secret.await_answer("127.0.0.1", port, sleep)
    said = [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()]
    assert len(said) == 2, "at first, and every quarter of a minute"
    assert f"127.0.0.1:{port}" in said[0]


@pytest.fixture
def mounted(tmp_path: Path) -> Config:
    """The configuration of a pod whose key's Secret is mounted and has not been made."""
    return Config.from_env({"DEPLOYMENT_MODE": "kubernetes", "CLUSTER_KEY_FILE": str(tmp_path)})


def test_a_role_waits_for_a_mounted_secret_that_is_still_to_come(mounted: Config, tmp_path: Path) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            create_key_file(tmp_path / FILE_NAME)

    await_key_file(mounted, sleep=sleep)
    assert len(pauses) == 3


def test_a_role_does_not_wait_for_ever_and_the_missing_file_is_named(mounted: Config, tmp_path: Path) -> None:
    await_key_file(mounted, 0.0)
    with pytest.raises(UsageError, match=re.escape(str(tmp_path / FILE_NAME))):
        load_keyring(mounted)


def test_a_file_that_is_named_is_not_waited_for(tmp_path: Path) -> None:
    def sleep(seconds: float) -> None:
        pytest.fail("it is waited for")

    for mode, path in (("docker", tmp_path / "missing.key"), ("local", tmp_path)):
        await_key_file(Config.from_env({"DEPLOYMENT_MODE": mode, "CLUSTER_KEY_FILE": str(path)}), inf, sleep=sleep)


def test_a_signal_ends_the_wait(mounted: Config) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        await_key_file(mounted, sleep=lambda seconds: signal.raise_signal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
