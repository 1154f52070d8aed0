"""The HTTP side on real sockets: every endpoint, every refusal, bounds, and that nothing is left behind."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import threading

import pytest

from sllm.errors import UsageError
from sllm.runtime import http as web
from sllm.runtime.bridge import Bridge, LoopSilent
from sllm.runtime.clock import Clock
from sllm.runtime.http import BadQuery, HttpServer, Page, Site
from sllm.runtime.udp import UdpDriver


class Answers:
    """A site whose answers a test can change."""

    def __init__(self) -> None:
        self.live = (True, "ok")
        self.ready = (True, "ready")
        self.error: Exception | None = None
        self.queries: list[dict[str, str]] = []
        self.page: Page | None = Page(b"<!doctype html><title>x</title>", "default-src 'none'")

    def state(self, query) -> dict:
        self.queries.append(dict(query))
        if self.error:
            raise self.error
        return {"total": 0}

    def metrics(self) -> str:
        if self.error:
            raise self.error
        return "# HELP a b\n# TYPE a gauge\na 1\n"

    def site(self) -> Site:
        return Site(lambda: self.live, lambda: self.ready, self.metrics, self.state, self.page)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def server(answers: Answers):
    server = HttpServer(("127.0.0.1", 0), answers.site())
    yield server
    server.close()


def ask(server: HttpServer, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def raw(server: HttpServer, data: bytes) -> bytes:
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(data)
        got = b""
        while more := connection.recv(65536):
            got += more
        return got


def test_health(server: HttpServer, answers: Answers) -> None:
    assert ask(server, "/livez")[::2] == (200, b"ok\n")
    assert ask(server, "/readyz")[::2] == (200, b"ready\n")
    answers.live, answers.ready = (False, "the loop last turned 12 s ago"), (False, "draining")
    assert ask(server, "/livez")[::2] == (503, b"the loop last turned 12 s ago\n")
    assert ask(server, "/readyz")[::2] == (503, b"draining\n")


def test_metrics_state_and_page(server: HttpServer, answers: Answers) -> None:
    status, headers, body = ask(server, "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert body.startswith(b"# HELP")
    status, headers, body = ask(server, "/state?offset=5&limit=2&q=a%20b&empty=")
    assert (status, headers["content-type"], json.loads(body)) == (200, "application/json", {"total": 0})
    assert answers.queries == [{"offset": "5", "limit": "2", "q": "a b", "empty": ""}]
    status, headers, body = ask(server, "/")
    assert (status, headers["content-security-policy"]) == (200, "default-src 'none'")
    assert body.startswith(b"<!doctype html>")
    for header, value in (("cache-control", "no-store"), ("x-content-type-options", "nosniff"), ("connection", "close")):
        assert headers[header] == value
    assert "python" not in headers["server"].lower()


def test_head_is_get_without_the_body(server: HttpServer) -> None:
    status, headers, body = ask(server, "/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])
def test_other_methods_are_refused(server: HttpServer, method: str) -> None:
    status, headers, _ = ask(server, "/state", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/nowhere", "/livez/", "/../etc/passwd", "/LIVEZ", "/state/1"])
def test_other_paths_are_not_there(server: HttpServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 404
    assert b"passwd" not in body


def test_a_site_without_a_page() -> None:
    answers = Answers()
    answers.page = None
    server = HttpServer(("127.0.0.1", 0), answers.site())
    try:
        assert ask(server, "/")[0] == 404
    finally:
        server.close()


def test_a_bad_query_and_a_silent_loop_are_said(server: HttpServer, answers: Answers) -> None:
    answers.error = BadQuery("limit=x: must be a whole number")
    assert ask(server, "/state?limit=x")[::2] == (400, b"limit=x: must be a whole number\n")
    answers.error = LoopSilent("no answer within 2 s")
    assert ask(server, "/state")[::2] == (503, b"the event loop is silent: no answer within 2 s\n")
    assert ask(server, "/metrics")[0] == 503
    assert ask(server, "/livez")[0] == 200
    assert ask(server, "/state?" + "&".join(f"a{i}=1" for i in range(50)))[0] == 400


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00\xff\xfe\r\n\r\n", b"GET /livez HTTP/1.1 x\r\n\r\n",
        b"GET http://x/ HTTP/1.1\r\n\r\n",
    ],
)
def test_malformed_requests_are_refused_or_dropped(server: HttpServer, data: bytes) -> None:
    answer = raw(server, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert ask(server, "/livez")[0] == 200


def test_a_request_too_long_is_not_read(server: HttpServer) -> None:
    try:
        answer = raw(server, b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n")
    except (ConnectionResetError, BrokenPipeError):
        answer = b""
    assert b" 200 " not in answer


def test_an_http_1_0_client_is_served(server: HttpServer) -> None:
    assert raw(server, b"GET /livez HTTP/1.0\r\n\r\n").endswith(b"ok\n")


def test_slow_clients_do_not_keep_others_out(server: HttpServer) -> None:
    slow = [socket.create_connection(server.address, timeout=10) for _ in range(20)]
    for connection in slow:
        connection.sendall(b"GET /livez HT")
    try:
        assert ask(server, "/livez")[0] == 200
    finally:
        for connection in slow:
            connection.close()


def test_a_head_that_never_ends_is_given_up(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "HEAD_S", 0.05)
    server = HttpServer(("127.0.0.1", 0), answers.site())
    try:
        assert raw(server, b"GET /livez HT") == b""
    finally:
        server.close()


def test_no_more_threads_than_allowed(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "THREADS_MAX", 2)
    server = HttpServer(("127.0.0.1", 0), answers.site())
    try:
        with socket.create_connection(server.address) as a, socket.create_connection(server.address) as b:
            a.sendall(b"GET")
            b.sendall(b"GET")
            with socket.create_connection(server.address, timeout=10) as c:
                assert c.recv(10) == b""  # closed at once
    finally:
        server.close()


def test_nothing_is_left_behind(answers: Answers) -> None:
    threads = set(threading.enumerate())
    server = HttpServer(("127.0.0.1", 0), answers.site())
    with socket.create_connection(server.address) as slow:
        slow.sendall(b"GET /livez HT")
        assert ask(server, "/livez")[0] == 200
        server.close()
    assert set(threading.enumerate()) <= threads
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(server.address)


def test_a_port_in_use_is_one_clear_line(server: HttpServer, answers: Answers) -> None:
    port = server.address[1]
    with pytest.raises(UsageError) as raised:
        HttpServer(("127.0.0.1", port), answers.site())
    assert str(raised.value) == f"cannot listen on 127.0.0.1:{port} over TCP (HEALTH_PORT): the port is in use"


# --- the bridge ---------------------------------------------------------------------------------------------------------------------


def test_the_loop_answers_other_threads() -> None:
    with UdpDriver(Clock()) as driver:
        bridge = Bridge(driver)
        where: list[threading.Thread] = []
        got: list[object] = []

        def work(answer) -> None:
            where.append(threading.current_thread())
            driver.call_at(driver.clock.now + 0.001, lambda: answer("later"))  # an answer may take some rounds

        asking = [threading.Thread(target=lambda: got.append(bridge.ask(work, 10.0))) for _ in range(5)]
        for thread in asking:
            thread.start()
        driver.run(until=lambda: len(got) == 5)
        for thread in asking:
            thread.join()
        assert got == ["later"] * 5
        assert set(where) == {threading.current_thread()}
        with pytest.raises(LoopSilent, match=r"no answer within 0\.01 s"):
            bridge.ask(work, 0.01)
        bridge.close()
        with pytest.raises(LoopSilent, match="shutting down"):
            bridge.ask(work)


def test_requests_leave_no_garbage_for_a_collector_that_is_off(server: HttpServer) -> None:
    raw(server, b"GET /livez HTTP/1.1\r\n\r\n")
    gc.collect()
    gc.disable()
    try:
        for path in (b"/livez", b"/state", b"/metrics", b"/nowhere", b"/"):
            raw(server, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        left = gc.collect()
    finally:
        gc.enable()
    assert left < 100  # a handful of cycles of the interpreter's own, not hundreds for each request
