"""Send one JSON request over HTTP. What a refusal means is for the caller to say."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any
from urllib import error, request


class _KeepsBody(request.HTTPRedirectHandler):
    """Follows a server that points elsewhere only for what has no body: urllib would send a POST there as a GET."""

    def redirect_request(self, req: request.Request, *where: Any) -> request.Request | None:
        return super().redirect_request(req, *where) if req.data is None else None


def _opener(*handlers: Any) -> Any:
    return request.build_opener(_KeepsBody, *handlers)


DIRECT = _opener(request.ProxyHandler({}))
"""Opens a URL without any proxy, which would not find a server of this machine."""


class StatusError(Exception):
    """A server's refusal of a request: the status code, and its own message as bytes.

    `retry_after`: seconds after which it wants to be asked again, where it says so.
    """

    def __init__(self, code: int, raw: bytes, retry_after: float | None = None) -> None:
        super().__init__(f"HTTP status {code}")
        self.code, self.raw, self.retry_after = code, raw, retry_after


class Connections:
    """The connections of requests that wait for an answer, so that another thread can break them off.

    A server sees the client go and stops working for it; the request ends with an OSError.
    """

    def __init__(self) -> None:
        self._open: set[HTTPConnection] = set()
        self._lock = threading.Lock()

    def add(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._open.add(connection)

    def discard(self, connection: HTTPConnection) -> None:
        with self._lock:
            self._open.discard(connection)

    def break_off(self) -> None:
        """Break off every request that has been sent and waits."""
        with self._lock:
            sockets = [connection.sock for connection in self._open]
        for each in filter(None, sockets):
            with suppress(OSError):  # it has just ended
                each.shutdown(socket.SHUT_RDWR)


class _Noting(request.AbstractHTTPHandler):
    """A handler of urllib that notes its connection while it waits."""

    connections: Connections

    def do_open(self, http_class: Any, req: Any, **options: Any) -> Any:
        made: list[HTTPConnection] = []

        def connect(host: str, **more: Any) -> HTTPConnection:
            made.append(http_class(host, **more))
            self.connections.add(made[-1])
            return made[-1]

        try:
            return super().do_open(connect, req, **options)
        finally:
            for connection in made:
                self.connections.discard(connection)


class _NotingHttp(_Noting, request.HTTPHandler):
    pass


class _NotingHttps(_Noting, request.HTTPSHandler):
    pass


def _opener_noting(connections: Connections) -> Any:
    handlers = _NotingHttp(), _NotingHttps()
    for handler in handlers:
        handler.connections = connections
    return _opener(*handlers)


def exchange(
    url: str,
    body: dict[str, Any] | None = None,
    *,
    timeout: float | None = None,
    key: str | None = None,
    direct: bool = False,
    connections: Connections | None = None,
) -> bytes:
    """Send one request, a POST of JSON where it has a body, and return the answer.

    `timeout`: seconds without an answer; None waits for ever. `key`: sent as a bearer token, and not to where the
    server may point instead. `direct`: without the proxy that the environment names. `connections`: by which the
    request may be broken off; not together with `direct`.
    A GET follows where the server points. Raise StatusError where it refuses, or points a POST elsewhere, OSError where
    it does not answer, ValueError for a malformed URL.
    """
    data = None if body is None else json.dumps(body).encode()
    message = request.Request(url, data, {"Content-Type": "application/json"})
    if key:
        message.add_unredirected_header("Authorization", f"Bearer {key}")
    opener = DIRECT if direct else _opener_noting(connections) if connections else _opener()
    try:
        with opener.open(message, timeout=timeout) as answer:
            raw: bytes = answer.read()
            return raw
    except error.HTTPError as fault:
        seconds = str(fault.headers.get("Retry-After") or "")
        said = fault.read()
        if 300 <= fault.code < 400:
            said += f" It points to {fault.headers.get('Location')}".encode()
        raise StatusError(fault.code, said, float(seconds) if seconds.isdecimal() else None) from None
