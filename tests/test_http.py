"""The HTTP side on real sockets: every endpoint, every refusal, bounds, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import http.client
import itertools
import json
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sllm.live import connections as conns
from sllm.live import http as web
from sllm.live.bridge import Bridge, LoopSilent
from sllm.live.clock import Clock
from sllm.live.http import BadQuery, HttpServer, Page, Site
from sllm.live.udp import UdpDriver
from sllm.protocol.errors import UsageError


class Answers:
    """A site whose answers a test can change."""

    def __init__(self) -> None:
        self.live = (True, "ok")
        self.ready = (True, "ready")
        self.error: Exception | None = None
        self.queries: list[dict[str, str]] = []
        self.page: Page | None = Page(b"<!doctype html><title>x</title>", "default-src 'none'")

    def state(self, query: Any) -> dict[str, Any]:
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
def server(answers: Answers) -> Iterator[Any]:
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


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner)))  # fmt: skip
def test_json_in_pieces_is_json(value: object) -> None:
    for grown in (value, {"a": [value] * 250, "b": {}}, [value] * web.PIECE_ITEMS):
        assert "".join(web._pieces(grown)) == json.dumps(grown, separators=(",", ":"))


def test_head_is_get_without_the_body(server: HttpServer) -> None:
    status, headers, body = ask(server, "/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"])
def test_other_methods_are_refused(server: HttpServer, method: str) -> None:
    status, headers, _ = ask(server, "/state", method)
    assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_refusal_reaches_a_client_that_still_speaks(server: HttpServer) -> None:
    """Closing with something unread would reset the connection, and the answer with it."""
    answer = raw(server, b"POST /state HTTP/1.1\r\nContent-Length: 300000\r\n\r\n" + b"x" * 300_000)
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.endswith(b"only GET and HEAD\n")


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


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(60_000):
        if holds():
            return
        time.sleep(0.001)
    raise AssertionError("it never held")


@contextlib.contextmanager
def connected(server: HttpServer, count: int, says: bytes) -> Iterator[list[socket.socket]]:
    """Clients that say something and then neither speak nor read."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(talker(server, says)) for _ in range(count)]


def talker(server: HttpServer, says: bytes) -> socket.socket:
    connection = socket.create_connection(server.address, timeout=10)
    connection.sendall(says)
    return connection


@pytest.mark.parametrize("says", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("count", [66, 2 * conns.CONNECTIONS_MAX])
def test_a_health_check_is_answered_whatever_slow_clients_do(server: HttpServer, count: int, says: bytes) -> None:
    with connected(server, count, says):
        for _ in range(20):
            assert ask(server, "/livez")[0] == 200
            assert ask(server, "/readyz")[0] == 200
        assert len(server._connections._open) <= conns.CONNECTIONS_MAX


def test_answers_that_nobody_reads_have_a_bound(answers: Answers) -> None:
    size = 6 << 20  # of which the system's own buffers take some
    answers.page = Page(b"x" * size, "default-src 'none'")
    server = HttpServer(("127.0.0.1", 0), answers.site())
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(talker(server, b"GET / HTTP/1.1\r\n\r\n"))
                assert ask(server, "/livez")[0] == 200
                assert server._connections._unsent_bytes <= conns.UNSENT_MAX_BYTES
            assert len(ask(server, "/")[2]) == size
        wait_until(lambda: not server._connections._open)
        assert server._connections._unsent_bytes == 0
    finally:
        server.close()


def test_a_loop_that_is_silent_keeps_no_health_check_waiting(answers: Answers) -> None:
    """100 scrapes that wait for the loop: the first few wait, the others are told so, and no thread is started for any of them."""
    asked, go_on = threading.Semaphore(0), threading.Event()

    def metrics() -> str:
        asked.release()
        go_on.wait(60)
        return "a 1\n"

    server = HttpServer(("127.0.0.1", 0), Site(lambda: (True, "ok"), lambda: (True, "ready"), metrics, answers.state))
    try:
        before = threading.active_count()
        with connected(server, 100, b"GET /metrics HTTP/1.1\r\n\r\n") as scrapes:
            for _ in range(conns.WORKERS):
                assert asked.acquire(timeout=60)
            assert ask(server, "/livez")[0] == 200
            assert ask(server, "/metrics")[::2] == (503, b"too many ask for metrics and state at once\n")
            assert threading.active_count() == before
            go_on.set()
            said = [connection.makefile("rb").readline() for connection in scrapes]
        assert said.count(b"HTTP/1.1 200 OK\r\n") == conns.JOBS_MAX
        assert said.count(b"HTTP/1.1 503 Service Unavailable\r\n") == 100 - conns.JOBS_MAX
    finally:
        go_on.set()
        server.close()


def test_who_makes_answers_rests_as_long_as_that_took(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scrapes one after the other leave the event loop half of the interpreter."""
    monkeypatch.setattr(conns, "WORKERS", 1)
    worked: list[tuple[float, float]] = []

    def metrics() -> str:
        began, until = time.monotonic(), time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        worked.append((began, time.monotonic()))
        return "a 1\n"

    server = HttpServer(("127.0.0.1", 0), Site(lambda: (True, "ok"), lambda: (True, "ready"), metrics, answers.state))
    try:
        for _ in range(4):
            assert ask(server, "/metrics")[0] == 200
    finally:
        server.close()
    for (_, ended), (began, _) in itertools.pairwise(worked):
        assert began - ended >= 0.05


def test_no_thread_is_started_for_a_request(server: HttpServer, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    for _ in range(3 * conns.JOBS_MAX):
        assert ask(server, "/metrics")[0] == ask(server, "/livez")[0] == 200
    with pytest.raises(UsageError, match=r"cannot serve HTTP \(HEALTH_PORT\): can't start new thread"):
        HttpServer(("127.0.0.1", 0), answers.site())


def test_health_is_told_even_without_a_file_descriptor(server: HttpServer) -> None:
    """Accepting neither fails nor spins when there is no descriptor left: one is kept for it, and when that is gone accepting pauses."""
    inside = server._connections
    clients = [socket.socket() for _ in range(4)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    filled: list[int] = []
    try:
        ask(server, "/livez")
        wait_until(lambda: not inside._open and inside._spare is not None)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fd.fileno() for fd in clients) + 50, hard))
        fill(filled)
        for client in clients[:2]:
            client.settimeout(60)
            client.connect(server.address)
            client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")  # and stays: the next one takes its place
        clients[0].close()
        clients[1].close()
        wait_until(lambda: not inside._open)
        fill(filled)
        assert inside._spare is None
        clients[2].connect(server.address)
        clients[2].sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        wait_until(lambda: inside._accept_again_at is not None and inside._listener not in inside._selector.get_map())
        os.close(filled.pop())
        clients[2].settimeout(60)
        assert clients[2].recv(100).startswith(b"HTTP/1.1 200 ")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filled:
            os.close(fd)
        for client in clients:
            client.close()
    assert ask(server, "/livez")[0] == 200
    assert inside._spare is not None, "and another is kept for the next time"


def fill(filled: list[int]) -> None:
    """Take every file descriptor there is."""
    with contextlib.suppress(OSError):
        while True:
            filled.append(os.dup(0))


@pytest.mark.parametrize("says", [b"GET /livez HT", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_client_that_does_nothing_is_given_up(answers: Answers, monkeypatch: pytest.MonkeyPatch, says: bytes) -> None:
    answers.page = Page(b"x" * (8 << 20), "default-src 'none'")
    for state in conns.PATIENCE_S:
        monkeypatch.setitem(conns.PATIENCE_S, state, 0.05)
    server = HttpServer(("127.0.0.1", 0), answers.site())
    try:
        with talker(server, says):
            wait_until(lambda: bool(server._connections._open))
            wait_until(lambda: not server._connections._open)
    finally:
        server.close()


@pytest.mark.parametrize("target", ["//[x", "//", "/[", "/%5b", "/?[", "/#[", "//[::1]:x/livez", "/livez?" + "&" * 100, "/state?%ff=\udcff"])
def test_every_target_gets_an_answer(server: HttpServer, target: str) -> None:
    answer = raw(server, f"GET {target} HTTP/1.1\r\n\r\n".encode("utf-8", "surrogateescape"))
    assert re.match(rb"HTTP/1\.1 (200|400|404) ", answer), answer


def test_a_fault_of_ours_is_an_answer_too(server: HttpServer, answers: Answers, caplog: pytest.LogCaptureFixture) -> None:
    answers.error = KeyError("oh")
    assert ask(server, "/state")[0] == 500
    answers.ready = None  # type: ignore[assignment]
    assert ask(server, "/readyz")[0] == 500
    answers.error = None
    assert ask(server, "/state")[0] == ask(server, "/livez")[0] == 200


HOSTS_SERVED = [
    "localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1", "127.0.0.1:8080", "10.1.2.3:8080", "[::1]", "[::1]:8080", "fd00::17", "[fe80::1%25eth0]:8080",
    "coordinator.example", "Coordinator.Example.:80", "",
]  # fmt: skip
HOSTS_REFUSED = [
    "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "xcoordinator.example", "[", "[]", "1.2.3.4.5", "a b", ":80",
]  # fmt: skip


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/state", "/"])
def test_only_hosts_of_ours_are_served(answers: Answers, path: str) -> None:
    server = HttpServer(("127.0.0.1", 0), answers.site(), hosts=["coordinator.example"])
    try:
        for host in HOSTS_SERVED:
            assert raw(server, f"GET {path} HTTP/1.1\r\nhost :  {host} \r\nX: y\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 "), host
        for host in HOSTS_REFUSED:
            answer = raw(server, f"GET {path} HTTP/1.1\r\nX: y\r\nHost: {host}\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 421 "), host
            assert b"HTTP_HOSTS" in answer
        assert raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n".encode()).startswith(b"HTTP/1.1 400 ")
    finally:
        server.close()


def test_every_host_is_served_when_that_is_wished(answers: Answers) -> None:
    server = HttpServer(("127.0.0.1", 0), answers.site(), hosts=["*"])
    try:
        for host in (*HOSTS_SERVED, *HOSTS_REFUSED):
            assert raw(server, f"GET /livez HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).startswith(b"HTTP/1.1 200 "), host
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

        def work(answer: Any) -> None:
            where.append(threading.current_thread())
            driver.call_at(driver.clock.now + 0.001, lambda: answer("later"))  # an answer may take some rounds

        asking = [threading.Thread(target=lambda: got.append(bridge.ask(work, 10.0))) for _ in range(5)]
        for thread in asking:
            thread.start()
        driver.run_until(lambda: len(got) == 5)
        for thread in asking:
            thread.join()
        assert got == ["later"] * 5
        assert set(where) == {threading.current_thread()}
        with pytest.raises(LoopSilent, match=r"no answer within 0\.01 s"):
            bridge.ask(work, 0.01)
        driver.step(0.0)
        assert len(where) == 5, "what nobody waits for any more is not done"
        bridge.close()
        with pytest.raises(LoopSilent, match="shutting down"):
            bridge.ask(work)


def test_what_fails_in_the_loop_fails_where_it_was_asked() -> None:
    with UdpDriver(Clock()) as driver:
        bridge = Bridge(driver)
        failed: list[str] = []

        def ask_it() -> None:
            try:
                bridge.ask(lambda answer: answer(1 // 0), 60.0)
            except ZeroDivisionError as error:
                failed.append(str(error))

        thread = threading.Thread(target=ask_it)
        thread.start()
        driver.run_until(lambda: bool(failed))
        thread.join()
        bridge.close()


def test_who_waits_is_told_when_the_loop_ends() -> None:
    with UdpDriver(Clock()) as driver:
        bridge = Bridge(driver)
        said: list[str] = []

        def ask_it() -> None:
            try:
                bridge.ask(lambda answer: None, 60.0)
            except LoopSilent as error:
                said.append(str(error))

        thread = threading.Thread(target=ask_it)
        thread.start()
        wait_until(lambda: bool(bridge._asked))
        bridge.close()
        thread.join()
        assert said == ["shutting down"]


def test_requests_leave_no_garbage_for_a_collector_that_is_off(server: HttpServer) -> None:
    raw(server, b"GET /livez HTTP/1.1\r\n\r\n")
    gc.collect()
    gc.disable()
    try:
        for path in (b"/livez", b"/state", b"/metrics", b"/nowhere", b"/"):
            raw(server, b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
        left = gc.collect()
    finally:
        gc.enable()
    assert left < 100  # a handful of cycles of the interpreter's own, not hundreds for each request
