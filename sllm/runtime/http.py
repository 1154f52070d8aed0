"""Health, metrics, state and the coordinator's page over HTTP: GET and HEAD only, no side effects, everything bounded.

    /livez    200 while the event loop turns; depends on nothing else
    /readyz   200, or 503 and why not
    /metrics  Prometheus text format 0.0.4
    /state    JSON, paged: ?offset=&limit=
    /         a page for people, where the site has one

One thread accepts; each request has its own for the few milliseconds it takes. A request's head must arrive within `HEAD_S` and fit
`HEAD_MAX_BYTES`, and at most `THREADS_MAX` are served at once, so that slow or hostile clients cannot starve a health check for long.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from sllm.errors import UsageError
from sllm.messages import Address
from sllm.runtime.bridge import LoopSilent
from sllm.runtime.sockets import bind_problem

HEAD_MAX_BYTES = 8192
HEAD_S = 5.0
WRITE_S = 10.0
THREADS_MAX = 64
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_log = logging.getLogger("sllm")


class BadQuery(Exception):
    """A query that makes no sense; the message goes to the client."""


@dataclass(frozen=True)
class Page:
    """A page and the Content-Security-Policy it lives under."""

    body: bytes
    policy: str


@dataclass(frozen=True)
class Site:
    """What is served. All of it is called in HTTP threads. `live` and `ready` return (yes or no, why); `metrics` and `state` may raise
    LoopSilent, `state` BadQuery too."""

    live: Callable[[], tuple[bool, str]]
    ready: Callable[[], tuple[bool, str]]
    metrics: Callable[[], str]
    state: Callable[[Mapping[str, str]], dict[str, Any]]
    page: Page | None = None


class HttpServer:
    """Serves a site from a daemon thread until `close`."""

    def __init__(self, bind: Address, site: Site, *, setting: str = "HEALTH_PORT") -> None:
        """UsageError, naming `setting`, if it cannot listen on `bind` (port 0: any free one)."""
        try:
            self._server = _Server(bind, site)
        except OSError as error:
            raise UsageError(f"cannot listen on {bind[0]}:{bind[1]} over TCP ({setting}): {bind_problem(error)}") from None
        self.address: Address = self._server.socket.getsockname()[:2]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="http", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Stop listening and end the threads; requests under way get their answer or their end."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, bind: Address, site: Site) -> None:
        self.address_family = socket.AF_INET6 if ":" in bind[0] else socket.AF_INET
        self.site = site
        self._room = threading.BoundedSemaphore(THREADS_MAX)
        self._serving: dict[threading.Thread, socket.socket] = {}
        super().__init__(bind, _Handler)

    def server_bind(self) -> None:
        """Without the look-up of our own host name that HTTPServer does: it may block for seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), name="http-request", daemon=True)
        self._serving[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._serving.pop(threading.current_thread(), None)
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("an HTTP client went away", exc_info=True)

    def server_close(self) -> None:
        """Close the port; those who are still saying what they want are cut off, and no thread is left behind."""
        self.socket.close()
        for thread, connection in list(self._serving.items()):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "sllm"
    sys_version = ""

    def _read_head(self) -> bytes:
        """The request line and headers, within their bounds of time and size; nothing if they do not come."""
        deadline = time.monotonic() + HEAD_S
        head = b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head and len(head) < HEAD_MAX_BYTES:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return b""
            self.connection.settimeout(left_s)
            try:
                more = self.connection.recv(HEAD_MAX_BYTES - len(head))
            except OSError:
                return b""
            if not more:
                break
            head += more
        return head

    def handle(self) -> None:
        """One request a connection. Its headers mean nothing to us and are not parsed: the standard library's parser leaves reference cycles
        behind, which a process that seldom collects garbage cannot afford."""
        head = self._read_head()
        self.connection.settimeout(WRITE_S)
        self.close_connection = True
        line = head.partition(b"\n")[0].decode("latin-1").strip()
        if not line:
            return
        self.requestline, self.command, self.request_version = line[:200], "GET", self.protocol_version
        words = line.split()
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
            self._reply(400, "not a request of HTTP/1\n")
        elif b"\r\n\r\n" not in head and b"\n\n" not in head:
            self._reply(431, "the head of the request is too long or not complete\n")
        else:
            self.command, self.path = words[0], words[1]
            self._route()

    def _route(self) -> None:
        if self.command not in ("GET", "HEAD"):
            self._reply(405, "only GET and HEAD\n", headers={"Allow": "GET, HEAD"})
            return
        url = urlsplit(self.path)
        route = self._ROUTES.get(url.path)
        if route is None or (url.path == "/" and self.server.site.page is None):
            self._reply(404, f"there is {', '.join(self._ROUTES)}\n")
            return
        try:
            route(self, dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=20)))
        except LoopSilent as error:
            self._reply(503, f"the event loop is silent: {error}\n")
        except (BadQuery, ValueError) as error:
            self._reply(400, f"{error}\n")

    def _live(self, query: Mapping[str, str]) -> None:
        live, why = self.server.site.live()
        self._reply(200 if live else 503, f"{why}\n")

    def _ready(self, query: Mapping[str, str]) -> None:
        ready, why = self.server.site.ready()
        self._reply(200 if ready else 503, f"{why}\n")

    def _metrics(self, query: Mapping[str, str]) -> None:
        self._reply(200, self.server.site.metrics(), METRICS_TYPE)

    def _state(self, query: Mapping[str, str]) -> None:
        self._reply(200, json.dumps(self.server.site.state(query), separators=(",", ":"), allow_nan=False), "application/json")

    def _page(self, query: Mapping[str, str]) -> None:
        page = self.server.site.page
        assert page is not None
        self._reply(200, page.body, "text/html; charset=utf-8", {"Content-Security-Policy": page.policy})

    _ROUTES = {"/livez": _live, "/readyz": _ready, "/metrics": _metrics, "/state": _state, "/": _page}  # noqa: RUF012  methods by path

    def _reply(
        self, status: int, body: str | bytes, kind: str = "text/plain; charset=utf-8", headers: Mapping[str, str] | None = None
    ) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("http: " + format, *args)
