"""Serve the page and its questions on this machine alone, to whoever has the token.

Listens on 127.0.0.1. The page's own files are open: they hold nothing of a run. Every question needs the token in the
header Authorization. The page gets it in the part of the address behind #, which no browser sends to anybody, and keeps
it for its own origin. A cookie would not do: browsers send it to every port of 127.0.0.1, so to other users' servers.

A page of another origin cannot ask: it has no token, browsers say where it comes from (Origin, Sec-Fetch-Site), and a
name that was pointed at this machine (DNS rebinding) is refused by Host. What is sent may be read by this page only,
which may load, and connect to, nothing but this server (Content-Security-Policy).

Not covered: whoever may read this process's memory or the terminal reads the token.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from minigrpo.errors import MinigrpoError
from minigrpo.utils.json_values import json_ready
from minigrpo.view.api import QUESTIONS, QueryError, inspection
from minigrpo.view.inspections import Inspections
from minigrpo.view.library import Library

HOST = "127.0.0.1"
PAGE_FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' blob: data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MOST_ASKED = 4096
"""Bytes of the body of a POST."""
IDLE_SECONDS = 75
"""Seconds after which a connection on which nobody asks is closed: longer than a page waits for news."""


class ViewServer(ThreadingHTTPServer):
    """Answers a page's questions about a library until it is shut down."""

    daemon_threads = True

    def __init__(self, library: Library, port: int = 0) -> None:
        """Listen; port 0 takes any that is free. Raise MinigrpoError where the port is taken."""
        self.library = library
        self.token = secrets.token_urlsafe(24)
        self.inspections = Inspections()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as fault:
            raise MinigrpoError(f"Port {port} cannot be used: {fault.strerror}. Name another: --port 0") from None
        self.port: int = self.server_address[1]
        self.hosts = {f"{HOST}:{self.port}", f"localhost:{self.port}"}

    @property
    def url(self) -> str:
        """The address to open, with the token."""
        return f"http://{HOST}:{self.port}/#token={self.token}"

    def server_close(self) -> None:
        """Close the socket, and end what was started."""
        self.inspections.close()
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent where a page went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @contextmanager
    def running(self) -> Iterator[ViewServer]:
        """Serve in a thread while the block runs."""
        thread = Thread(target=partial(self.serve_forever, poll_interval=0.05), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "minigrpo", ""
    timeout = IDLE_SECONDS
    server: ViewServer

    def do_GET(self) -> None:
        if refusal := self._refusal():
            self._send_json({"error": refusal}, HTTPStatus.FORBIDDEN)
            return
        address = urlsplit(self.path)
        if address.path.startswith("/api/"):
            self._answer(address.path.removeprefix("/api/"), address.query)
        else:
            self._send_file(address.path)

    def do_POST(self) -> None:
        """Start an inspection: the only thing that is ever begun from the page."""
        self.close_connection = True  # of a question that is refused, the body is not read
        if refusal := self._refusal():
            self._send_json({"error": refusal}, HTTPStatus.FORBIDDEN)
        elif urlsplit(self.path).path != "/api/inspect":
            self._send_json({"error": "Nothing can be changed here."}, HTTPStatus.METHOD_NOT_ALLOWED)
        elif self._has_token():
            self._reply(lambda: self.server.inspections.start(*inspection(self.server.library, self._body())))

    def _body(self) -> dict[str, str]:
        """Read the question of a POST, of at most MOST_ASKED bytes. Raise QueryError for anything else."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal() or int(size) > MOST_ASKED or self.headers.get("Content-Type") != "application/json":
            raise QueryError("A question is JSON, and short.")
        try:
            asked = json.loads(self.rfile.read(int(size)))
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            raise QueryError("A question is a JSON object.")
        return {str(name): str(value) for name, value in asked.items()}

    def _refusal(self) -> str | None:
        """Return why a request is refused that this page cannot have made; None for one that it may have."""
        if self.headers.get("Host", "") not in self.server.hosts:
            return f"Open http://{HOST}:{self.server.port}: no other name is answered."
        origin = self.headers.get("Origin")
        if origin is not None and origin.removeprefix("http://") not in self.server.hosts:
            return "Another page may not ask."
        # "none": typed in, or a bookmark.
        own = self.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
        return None if own or self._follows_link() else "Another page may not ask."

    def _follows_link(self) -> bool:
        """Return whether somebody clicked on the page's address, in a terminal that is itself a web page, say."""
        how = self.headers.get("Sec-Fetch-Mode"), self.headers.get("Sec-Fetch-Dest")
        return self.path == "/" and how == ("navigate", "document")

    def _has_token(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), self.server.token.encode()):
            self._send_json({"error": "The token is missing or old."}, HTTPStatus.UNAUTHORIZED)
            return False
        return True

    def _answer(self, name: str, query: str) -> None:
        if not self._has_token():
            return
        asked, library = dict(parse_qsl(query)), self.server.library
        question = QUESTIONS.get(name)
        if name == "inspected":
            self._reply(lambda: self.server.inspections.state(inspection(library, asked)[0]))
        elif question is None:
            self._send_json({"error": f"There is no question {name!r}."}, HTTPStatus.NOT_FOUND)
        else:
            self._reply(lambda: question(library, asked))

    def _reply(self, answer_of: Callable[[], Any]) -> None:
        """Send an answer, or why there is none."""
        try:
            answer = answer_of()
        except QueryError as fault:
            self._send_json({"error": str(fault)}, HTTPStatus.BAD_REQUEST)
        except (MinigrpoError, OSError) as fault:  # a file that is moved or damaged while it is read
            self._send_json({"error": str(fault)}, HTTPStatus.CONFLICT)
        else:
            self._send_json(answer)

    def _send_file(self, path: str) -> None:
        name = path.removeprefix("/") or "index.html"
        files = page_files()
        if name not in files:
            self._send_json({"error": "There is no such file."}, HTTPStatus.NOT_FOUND)
            return
        self._send(files[name].read_bytes(), TYPES[files[name].suffix])

    def _send_json(self, data: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        # ASCII: a model's lone surrogates are no UTF-8.
        self._send(json.dumps(json_ready(data), allow_nan=False).encode("ascii"), TYPES[".json"], status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: the terminal is the user's."""


def page_files() -> dict[str, Path]:
    """Return the files that the page consists of, by the name under which they are served."""
    found = (path for path in PAGE_FOLDER.rglob("*") if path.suffix in TYPES)
    return {path.relative_to(PAGE_FOLDER).as_posix(): path for path in found}


def serve(folder: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve the runs of a folder until Ctrl-C. `tell`: called with the address to open."""
    server = ViewServer(Library(folder), port)
    tell(server.url)
    with suppress(KeyboardInterrupt):
        # Waking up costs time even when nobody asks; Windows hears Ctrl-C only when it wakes up.
        server.serve_forever(poll_interval=0.5 if os.name == "nt" else 60)
    server.server_close()
