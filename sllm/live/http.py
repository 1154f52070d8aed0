"""Health, metrics, state and the coordinator's page over HTTP: GET and HEAD only, no side effects, everything bounded.

    /livez    200 while the event loop turns; depends on nothing else
    /readyz   200, or 503 and why not
    /metrics  Prometheus text format 0.0.4
    /state    JSON, paged: ?offset=&limit=
    /         a page for people, where the site has one

Health checks are answered at once by the thread that holds the connections (`sllm.live.connections`); two other threads make metrics and state. A request with
a foreign name in its Host header is refused: otherwise a web page elsewhere could give its own name our address and read the answers (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from sllm.live.bridge import LoopSilent
from sllm.live.connections import Connections, Work
from sllm.live.sockets import bind_problem
from sllm.protocol.errors import UsageError
from sllm.protocol.messages import Address

BACKLOG = 128
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TEXT_TYPE = "text/plain; charset=utf-8"
ANY_HOST = "*"
PIECE_ITEMS = 100  # items of a list that are turned into JSON in one call
_dumps = partial(json.dumps, separators=(",", ":"), allow_nan=False)
_HOST_HEADER = re.compile(rb"^host[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)

Made = TypeVar("Made", bytes, bytes | Work)

_log = logging.getLogger("sllm")


class BadQuery(Exception):
    """The query of a request is invalid; the message goes to the client."""


@dataclass(frozen=True)
class Page:
    """A page and its Content-Security-Policy."""

    body: bytes
    policy: str


@dataclass(frozen=True)
class Site:
    """The functions behind the paths. All are called in HTTP threads. `live` and `ready` return (yes or no, reason), at once; `metrics` and `state` may raise
    LoopSilent, `state` BadQuery too."""

    live: Callable[[], tuple[bool, str]]
    ready: Callable[[], tuple[bool, str]]
    metrics: Callable[[], str]
    state: Callable[[Mapping[str, str]], dict[str, Any]]
    page: Page | None = None


class HttpServer:
    """Serves a site from daemon threads until `close`."""

    def __init__(self, bind: Address, site: Site, *, hosts: Collection[str] = (), setting: str = "HEALTH_PORT") -> None:
        """`hosts`: names under which the site is served, beside `localhost` and every literal address; "*": any. UsageError, naming `setting`, if it cannot
        listen on `bind` (port 0: any free one)."""
        self._site = site
        self._hosts = frozenset(name.lower().rstrip(".") for name in hosts)
        self._routes: dict[str, Callable[[bool, str], bytes | Work]] = {
            "/livez": self._live, "/readyz": self._ready, "/metrics": self._metrics, "/state": self._state,
        }  # fmt: skip
        if site.page is not None:
            self._routes["/"] = self._page
        try:
            listener = _listen(bind)
        except OSError as error:
            raise UsageError(f"cannot listen on {bind[0]}:{bind[1]} over TCP ({setting}): {bind_problem(error)}") from None
        self.address: Address = listener.getsockname()[:2]
        try:
            self._connections = Connections(listener, self._respond, _reply(False, 503, "too many ask for metrics and state at once\n"))
        except RuntimeError as error:
            raise UsageError(f"cannot serve HTTP ({setting}): {error}: the limit of threads or processes is too low") from None

    @property
    def url(self) -> str:
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Stop listening and end the threads; requests under way are cut off."""
        self._connections.close()

    # --- requests ---------------------------------------------------------------------------------------------------------------------

    def _respond(self, head: bytes, whole: bool) -> bytes | Work:
        """The answer to a request, or a function that makes the answer. Only the header Host is read. The standard library's parser is not used, because it
        leaves reference cycles behind, which a process that seldom collects garbage cannot afford."""
        line = head.partition(b"\n")[0].decode("latin-1").strip()
        words = line.split()
        if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[1].startswith("/"):
            return _reply(False, 400, "not a request of HTTP/1\n")
        method, target, _ = words
        bodiless = method == "HEAD"
        if not whole:
            return _reply(bodiless, 431, "the head of the request is too long or not complete\n")
        if method not in ("GET", "HEAD"):
            return _reply(False, 405, "only GET and HEAD\n", headers={"Allow": "GET, HEAD"})
        hosts = [value.strip() for value in _HOST_HEADER.findall(head)]
        if len(hosts) > 1:
            return _reply(bodiless, 400, "more than one Host\n")
        if hosts and not self._serves(hosts[0].decode("latin-1")):
            return _reply(bodiless, 421, "this process does not go by that name; HTTP_HOSTS lists the names it is served under\n")
        path, _, query = target.partition("#")[0].partition("?")
        route = self._routes.get(path)
        if route is None:
            return _reply(bodiless, 404, f"there is {', '.join(self._routes)}\n")
        _log.debug("http: %s %s", method, target[:200])
        return _guarded(bodiless, lambda: route(bodiless, query))

    def _serves(self, host: str) -> bool:
        """Whether a Host header names this server. A literal address always does, because DNS rebinding needs a name."""
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        name = name.rstrip(".")
        if ANY_HOST in self._hosts or not host or name == "localhost" or name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _live(self, bodiless: bool, query: str) -> bytes:
        live, why = self._site.live()
        return _reply(bodiless, 200 if live else 503, f"{why}\n")

    def _ready(self, bodiless: bool, query: str) -> bytes:
        ready, why = self._site.ready()
        return _reply(bodiless, 200 if ready else 503, f"{why}\n")

    def _page(self, bodiless: bool, query: str) -> bytes:
        page = self._site.page
        assert page is not None
        return _reply(bodiless, 200, page.body, "text/html; charset=utf-8", {"Content-Security-Policy": page.policy})

    def _metrics(self, bodiless: bool, query: str) -> Work:
        return lambda: _guarded(bodiless, lambda: _reply(bodiless, 200, self._site.metrics(), METRICS_TYPE))

    def _state(self, bodiless: bool, query: str) -> Work:
        def make() -> bytes:
            try:
                fields = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=20))
            except ValueError as error:
                raise BadQuery(str(error)) from None
            return _reply(bodiless, 200, "".join(_pieces(self._site.state(fields))), "application/json")

        return lambda: _guarded(bodiless, make)


def _guarded(bodiless: bool, make: Callable[[], Made]) -> Made | bytes:
    """The answer that `make` makes, or an error answer."""
    try:
        return make()
    except LoopSilent as error:
        return _reply(bodiless, 503, f"the event loop is silent: {error}\n")
    except BadQuery as error:
        return _reply(bodiless, 400, f"{error}\n")
    except Exception:  # a bug of this program
        _log.exception("an HTTP request could not be answered")
        return _reply(bodiless, 500, "an error of this program; its log says more\n")


def _pieces(value: Any) -> Iterator[str]:
    """`value` as JSON, made in pieces: a single call would hold the interpreter, and so stop the event loop, until all of the JSON is made."""
    if isinstance(value, dict):
        for number, (name, inner) in enumerate(value.items()):
            yield ("," if number else "{") + _dumps(name) + ":"
            yield from _pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        for begin in range(0, len(value), PIECE_ITEMS):
            yield ("," if begin else "[") + _dumps(value[begin : begin + PIECE_ITEMS])[1:-1]
        yield "]"
    else:
        yield _dumps(value)


def _reply(bodiless: bool, status: int, body: str | bytes, kind: str = TEXT_TYPE, headers: Mapping[str, str] | None = None) -> bytes:
    data = body.encode(errors="replace") if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Server: sllm", f"Date: {formatdate(usegmt=True)}", f"Content-Type: {kind}",
        f"Content-Length: {len(data)}", "Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Referrer-Policy: no-referrer",
        *(f"{name}: {value}" for name, value in (headers or {}).items()), "Connection: close", "\r\n",
    ]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1") + (b"" if bodiless else data)


def _listen(bind: Address) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in bind[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(bind)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
