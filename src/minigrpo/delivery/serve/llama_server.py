"""Run llama.cpp's server from xllamacpp behind a door that decides who may ask it.

    python -P serve/llama_server.py JSON

llama.cpp itself lets every web page that the user visits read its answers, and knows no check of the name by which it
was called. So it listens on a port of its own, with a key that nobody is told, and the door on the public port refuses

    401   a request without the key, where one is set (/health stays open)
    403   a browser's request from a page of another origin, unless that was allowed
    403   a request by a name that is not this machine's, where the door listens on loopback and no key is set: a page
          whose name was pointed at this machine (DNS rebinding) counts as our own page for the browser

and passes everything else on, streams as they come. Not covered: the door speaks plain HTTP, and it limits neither how
often nor how much is asked. Started by path, so this file imports nothing of the package.
"""

from __future__ import annotations

import hmac
import http.client
import ipaddress
import json
import os
import secrets
import select
import signal
import socket
import sys
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

API_KEY = "MINIGRPO_API_KEY"
"""Environment variable that holds the key: a command line would show it to everybody on the machine."""
LOOPBACK = "127.0.0.1"
SMALL_MODEL_BYTES = 1 << 26
"""Size of a file below which one thread is used: its layers are so small that threads would only wait for one
another."""
IDLE_TIMEOUT_S = 60.0
"""Seconds that a client may take between two packets of its request, or of taking its answer."""
OPEN_PATHS = ("/health", "/v1/health")
_GGML_F32 = 0
"""ggml's number of float32."""
# What belongs to one connection, or is the door's own to say.
_OWN_HEADERS = (
    "host",
    "connection",
    "keep-alive",
    "transfer-encoding",
    "expect",
    "authorization",
    "x-api-key",
    "origin",
)


@dataclass(frozen=True, slots=True)
class Gate:
    """Who may ask: `key` that clients must send, `cors` the foreign origin that may, too (`*`: all). `upstream`,
    `inner_key`: where llama.cpp listens, and what it asks for."""

    local: bool
    key: str | None = field(default=None, repr=False)
    cors: str | None = None
    upstream: int = 0
    inner_key: str = field(default="", repr=False)

    def refusal(self, method: str, path: str, headers: Any) -> tuple[int, str, str] | None:
        """Return (status, code, sentence) for a request that is refused; None where it may pass."""
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if self.local and self.key is None and not is_loopback(_host_name(host)):
            sentence = "This server answers to localhost only. Start it with a key to reach it by another name."
            return HTTPStatus.FORBIDDEN, "foreign_host", sentence
        if origin is not None and not self.allows(origin) and origin.partition("://")[2].lower() != host.lower():
            sentence = "Pages of this origin may not ask. To allow them: minigrpo serve ... --cors ORIGIN"
            return HTTPStatus.FORBIDDEN, "foreign_origin", sentence
        if self.key is None or path.partition("?")[0] in OPEN_PATHS or (method == "OPTIONS" and origin is not None):
            return None
        sent = headers.get("Authorization", "").encode()
        if hmac.compare_digest(sent, f"Bearer {self.key}".encode()):
            return None
        return HTTPStatus.UNAUTHORIZED, "invalid_api_key", "Send the server's key: Authorization: Bearer KEY"

    def allows(self, origin: str) -> bool:
        return self.cors == "*" or (self.cors is not None and origin == self.cors)


def is_loopback(host: str) -> bool:
    """Tell whether a name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host_name(host: str) -> str:
    """Return a Host header's name, without its port; empty where it has none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Door(BaseHTTPRequestHandler):
    """Passes one request on. `gate` is set for each server (`open_door`)."""

    gate: Gate
    timeout = IDLE_TIMEOUT_S
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        refused = self.gate.refusal(self.command, self.path, self.headers)
        try:
            if refused:
                self._refuse(*refused)
            elif self.command == "OPTIONS":
                self._answer_preflight()
            else:
                self._pass_on()
        except (ConnectionError, TimeoutError):  # the client is gone, and whatever is wrong upstream is in its log
            self.close_connection = True

    do_POST = do_DELETE = do_OPTIONS = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: llama.cpp logs requests, and a header may hold a key."""

    def _refuse(self, status: int, code: str, sentence: str) -> None:
        kind = "invalid_request_error"
        raw = json.dumps({"error": {"message": sentence, "type": kind, "param": None, "code": code}}).encode()
        self._begin(status)
        self.send_header("Content-Type", "application/json")
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _answer_preflight(self) -> None:
        self._begin(HTTPStatus.NO_CONTENT)
        self.send_header("Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS")
        asked = self.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
        self.send_header("Access-Control-Allow-Headers", asked)
        self.end_headers()

    def _begin(self, status: int, reason: str | None = None) -> None:
        """Send the status and what every answer has. One request a connection: a refused body is never read."""
        self.send_response(status, reason)
        self.close_connection = True
        self.send_header("Connection", "close")
        self.send_header("Vary", "Origin")
        origin = self.headers.get("Origin")
        if origin is not None and self.gate.allows(origin):
            self.send_header("Access-Control-Allow-Origin", origin)

    def _pass_on(self) -> None:
        if "Transfer-Encoding" in self.headers or not self.headers.get("Content-Length", "0").isdecimal():
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "length_required", "Send the length of the body: Content-Length")
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        kept = {name: value for name, value in self.headers.items() if name.lower() not in _OWN_HEADERS}
        upstream = http.client.HTTPConnection(LOOPBACK, self.gate.upstream)
        try:
            upstream.request(self.command, self.path, body, {**kept, "Authorization": f"Bearer {self.gate.inner_key}"})
            if self._client_waits(upstream.sock):
                self._return(upstream.getresponse())
        finally:
            upstream.close()  # llama.cpp stops what it computes for a client that has gone

    def _client_waits(self, upstream: socket.socket) -> bool:
        """Wait for the answer to begin; return False where the client goes first."""
        ready, _, _ = select.select([self.connection, upstream], [], [])
        return upstream in ready or bool(self.connection.recv(1, socket.MSG_PEEK))

    def _return(self, reply: http.client.HTTPResponse) -> None:
        self._begin(reply.status, reply.reason)
        for name, value in reply.getheaders():
            if name.lower() not in (*_OWN_HEADERS, "vary") and not name.lower().startswith("access-control-"):
                self.send_header(name, value)
        self.end_headers()
        while part := reply.read1(1 << 16):
            self.wfile.write(part)
            self.wfile.flush()


def open_door(gate: Gate, host: str, port: int) -> ThreadingHTTPServer:
    """Return a door that listens, for `serve_forever`. Raises OSError where it cannot."""
    family = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
    # Many requests may come at once, and none of them ends with its thread when the server is asked to end.
    kind = {"address_family": family, "daemon_threads": True, "request_queue_size": 128}
    server: type[ThreadingHTTPServer] = type("_Server", (ThreadingHTTPServer,), kind)
    return server((host, port), type("_Door", (Door,), {"gate": gate}))


def serve_llama(options: dict[str, Any], key: str | None) -> int:
    """Serve until killed. Sampling defaults are neutral: nothing is truncated or reweighted."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import xllamacpp

    inner_key = secrets.token_urlsafe(32)
    params = xllamacpp.CommonParams()
    params.model.path = options["file"]
    params.model_alias = {options["model"]}
    params.hostnames, params.port = [LOOPBACK], 0
    params.api_keys = [inner_key]
    slots = options.get("parallel") or 1
    params.n_parallel = slots
    params.n_ctx = slots * options["context"]  # llama.cpp divides it among the slots
    params.ctx_shift = False
    if options["exact"]:
        params.cache_type_k = params.cache_type_v = _GGML_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if Path(options["file"]).stat().st_size < SMALL_MODEL_BYTES:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # No repacking of weights for matrix instructions, which some virtual machines announce but lack.
    params.no_extra_bufts = True
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    params.sampling.temp = options["temperature"]
    params.sampling.top_k, params.sampling.top_p, params.sampling.min_p = 0, 1.0, 0.0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        return 1  # the log says why
    upstream = urlsplit(server.listening_address).port
    host, port = options["host"], options["port"]
    gate = Gate(is_loopback(host), key, options.get("cors"), upstream or 0, inner_key)
    with open_door(gate, host, port) as door:
        print(f"listening on http://{host}:{port}", flush=True)
        door.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(serve_llama(json.loads(sys.argv[1]), os.environ.get(API_KEY) or None))
