"""One exchange over HTTP, with a server that does as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from minigrpo.utils.http import Connections, StatusError, exchange


class Echo(BaseHTTPRequestHandler):
    """Answers with what it was sent; under /refuse with a status that refuses; /moved points to /."""

    def do_GET(self) -> None:
        self.answer(b"nothing was sent")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, data: bytes) -> None:
        self.send_response({"/refuse": 418, "/moved": 302}.get(self.path, 200))
        if self.path == "/moved":
            self.send_header("Location", "/")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Echo) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_body_is_sent_as_json_and_no_body_is_a_get(url: str) -> None:
    assert json.loads(exchange(url, {"ids": [1, 2]}, direct=True)) == {"ids": [1, 2]}
    assert exchange(url, direct=True) == b"nothing was sent"


def test_a_refusal_keeps_its_status_and_the_servers_own_words(url: str) -> None:
    with pytest.raises(StatusError) as told:
        exchange(f"{url}/refuse", {"why": "tea"}, direct=True)
    assert (told.value.code, json.loads(told.value.raw)) == (418, {"why": "tea"})


@pytest.mark.parametrize("way", [{}, {"direct": True}, {"connections": Connections()}])
def test_who_is_pointed_elsewhere_goes_there_with_nothing_and_never_without_its_body(url: str, way: Any) -> None:
    assert exchange(f"{url}/moved", **way) == b"nothing was sent"
    with pytest.raises(StatusError) as told:
        exchange(f"{url}/moved", {"a": 1}, **way)
    assert told.value.code == 302
    assert told.value.raw.endswith(b" It points to /")


def test_who_asks_directly_asks_past_the_proxy(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen reads the environment once in a process
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert exchange(url, direct=True)
    with pytest.raises(OSError, match="refused"):
        exchange(url)


def test_a_request_that_waits_is_broken_off_and_its_server_sees_the_client_go(url: str) -> None:
    connections, faults = Connections(), list[OSError]()

    def ask(port: int) -> None:
        try:
            exchange(f"http://127.0.0.1:{port}", {"a": 1}, timeout=30, connections=connections)
        except OSError as fault:
            faults.append(fault)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        thread = threading.Thread(target=ask, args=(silent.getsockname()[1],), daemon=True)
        thread.start()
        client, _ = silent.accept()
        with client:
            client.settimeout(10)
            while not client.recv(4096).endswith(b"}"):
                pass
            start = time.monotonic()
            connections.break_off()
            assert client.recv(1) == b""
            thread.join(10)
    assert len(faults) == 1
    assert time.monotonic() - start < 5
    connections.break_off()  # nothing is left to break off
    assert exchange(url, {"a": 2}, connections=connections) == b'{"a": 2}'
