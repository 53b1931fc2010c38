"""What the consumer serves over HTTP: a status page for people, metrics for Prometheus, probes for orchestrators."""

import logging
import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.resources import files
from ipaddress import ip_address
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from consumer.board import Board
from consumer.metrics import Vitals
from model.errors import UserError

log = logging.getLogger("consumer")

_TEXT = "text/plain; charset=utf-8"


@cache
def _page() -> bytes:
    return files("consumer").joinpath("status.html").read_bytes()


def _policy() -> str:
    """Return the page's Content-Security-Policy: its own script and style, its own data, nothing else."""
    parts = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for tag in (b"script", b"style"):
        (content,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), _page(), re.DOTALL)
        parts.append(f"{tag.decode()}-src 'sha256-{b64encode(sha256(content).digest()).decode()}'")
    return "; ".join([*parts, "frame-ancestors 'none'"])


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    timeout = 30  # a client that sends nothing does not keep its thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Log nothing: a scrape is no news."""


class WebServer:
    """Serves /, /status.json, /metrics, /healthz and /readyz in threads of its own.

    Args:
        metrics: for machines.
        board: for people; None where there is no page for them.
        listen: host:port; port 0 takes any free one, which `address` tells.

    Raises:
        UserError: the address cannot be had.
    """

    def __init__(self, metrics: Vitals[Any], board: Board | None, listen: str) -> None:
        self._metrics, self._board = metrics, board
        self._scrape = make_wsgi_app(metrics.registry)
        host, _, port = listen.rpartition(":")
        self._names = {host, "127.0.0.1", "localhost"} if _is_loopback(host) else None
        try:
            self._server = make_server(host, int(port), self._answer, _Server, _Silent)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"metrics.listen: {listen} cannot be had ({getattr(error, 'strerror', None) or error}); name another "
                "port, each consumer on a machine needs its own, or null for no metrics"
            ) from None
        self.address = f"{host}:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.1,), name="web", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", "/"), environ["REQUEST_METHOD"]
        # A name of somebody else's that leads here: a page of theirs in this machine's browser wants to read ours.
        name = re.sub(r":\d+$", "", environ.get("HTTP_HOST", "localhost"))
        stranger = self._names is not None and name not in self._names
        if path == "/metrics" and not stranger:
            return self._scrape(environ, start_response)
        status, kind = "200 OK", _TEXT
        if stranger:
            status = "421 Misdirected Request"
        elif method not in ("GET", "HEAD"):
            status = "405 Method Not Allowed"
        elif path == "/" and self._board:
            kind, body = "text/html; charset=utf-8", _page()
        elif path == "/status.json" and self._board:
            kind, body = "application/json", self._board.encode(_after(environ))
        else:
            probes = {"/healthz": self._metrics.lives, "/readyz": self._metrics.lives and self._metrics.ready}
            status = {True: "200 OK", False: "503 Service Unavailable", None: "404 Not Found"}[probes.get(path)]
        if kind == _TEXT:
            body = status.partition(" ")[2].encode() + b"\n"
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *_headers()])
        return [] if method == "HEAD" else [body]


@contextmanager
def serving(metrics: Vitals[Any], board: Board | None, listen: str | None) -> Iterator[None]:
    """Serve at an address as long as the context lasts; do nothing if there is none.

    Raises:
        UserError: as `WebServer`.
    """
    server = WebServer(metrics, board, listen) if listen else None
    if server:
        log.info("metrics are at http://%s/metrics%s", server.address, ", the status page is at /" if board else "")
    try:
        yield
    finally:
        if server:
            server.close()


@cache
def _headers() -> tuple[tuple[str, str], ...]:
    return (
        ("Content-Security-Policy", _policy()),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _after(environ: dict[str, Any]) -> int:
    """Return the number of the last alert that the page has; 0 if it does not say a number."""
    (text,) = parse_qs(environ.get("QUERY_STRING", "")).get("after", ["0"])[:1]
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0
