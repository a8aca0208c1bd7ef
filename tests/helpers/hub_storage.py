"""What a stand-in Hub remembers, and its storage of large files: the other half of hub_server.py."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_a-token-that-may-write-0123456789"
READER = "hf_a-token-that-may-only-read-0123"


def blob_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository. `files`: (content, whether it is stored as a large file) by name."""

    private: bool
    files: dict[str, tuple[bytes, bool]] = field(
        default_factory=lambda: {".gitattributes": (b"*.gguf filter=lfs", False)}
    )
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"first").hexdigest()])

    @property
    def head(self) -> str:
        return self.commits[-1]


@dataclass
class StandIn:
    users: dict[str, str] = field(default_factory=lambda: {TOKEN: "me", READER: "reader"})
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    part_size: int = 40_000
    cut_after: int | None = None
    broken: bool = False
    refuse: list[tuple[str, str, int, str]] = field(default_factory=list)
    forget: set[str] = field(default_factory=set)
    spoil: set[str] = field(default_factory=set)
    full: bool = False
    silent: str = ""
    uploaded: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    seen: list[bytes] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""
    quit: threading.Event = field(default_factory=threading.Event)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def mend(self) -> None:
        self.cut_after, self.broken = None, False


class Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(30)

    def note(self) -> None:
        """Remember the request, without the header that carries the token."""
        with self.hub.lock:
            self.hub.asked.append((self.command, self.path))
            headers = "\n".join(f"{k}: {v}" for k, v in self.headers.items() if k.lower() != "authorization")
            self.hub.seen.append(f"{self.command} {self.path}\n{headers}".encode())

    def body(self) -> bytes:
        data = b"".join(self.pieces())
        self.hub.seen.append(data)
        return data

    def pieces(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left and (piece := self.rfile.read1(min(left, 8192))):
            left -= len(piece)
            yield piece

    def answer(self, data: Any = None, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_all(self) -> None:
        self.note()
        if self.hub.silent and re.search(self.hub.silent, self.path):
            self.hub.quit.wait()
        if self.hub.broken:
            self.close_connection = True
            return None
        for method, pattern, status, words in self.hub.refuse:
            if self.command == method and re.search(pattern, self.path):
                self.body()
                return self.answer({"error": words}, status, X_Error_Message=words)
        self.route()
        return None

    do_GET = do_HEAD = do_POST = do_PUT = handle_all

    def route(self) -> None:
        raise NotImplementedError


class Storage(Handler):
    """The storage of large files. Its addresses are keys themselves, so it must never receive a token."""

    def route(self) -> None:
        if self.headers.get("Authorization"):
            self.hub.stray.append(self.path)
        _, oid, *part = urlsplit(self.path).path.strip("/").split("/")
        if self.command == "PUT":
            return self.take(oid, int(part[0]) if part else None)
        data = self.hub.objects[oid.removesuffix("-spoilt")]
        if oid.endswith("-spoilt"):
            data = bytes([data[0] ^ 1]) + data[1:]
        return self.give(data)

    def take(self, oid: str, part: int | None) -> None:
        got = b""
        for piece in self.pieces():
            with self.hub.lock:
                self.hub.uploaded += len(piece)
                got += piece
                if self.hub.cut_after is not None and self.hub.uploaded >= self.hub.cut_after:
                    self.hub.broken = self.close_connection = True
                    return None
        self.hub.seen.append(got)
        if self.hub.full:
            return self.answer({"error": "storage quota exceeded"}, 403, X_Error_Message="storage quota exceeded")
        if part is not None:
            self.hub.parts[oid, part] = got
        elif hashlib.sha256(got).hexdigest() == oid:
            self.hub.objects[oid] = got
        return self.answer(None, ETag=f'"{hashlib.md5(got).hexdigest()}"')

    def give(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')
        start = int(wanted[1])
        return self.answer(data[start:], 206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
