"""A server of this machine that speaks OpenAI's chat protocol, and says what a test tells it to say."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class JudgeServer:
    """`say` answers the words of a request, with text, or with (status, headers). `most`: answers at the same time."""

    say: Callable[[str], str | tuple[int, dict[str, str]]]
    seconds: float = 0.0
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    inside: int = 0
    most: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def answer(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        with self.lock:
            self.asked.append(body)
            self.keys.append(key)
            self.at.append(time.monotonic())
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(self.seconds)
        with self.lock:
            self.inside -= 1
        if path != "/v1/chat/completions":
            return 404, {}, b"no such path"
        said = self.say(body["messages"][-1]["content"])
        if not isinstance(said, str):
            return said[0], said[1], b"not now"
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        reply = {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": usage}
        return 200, {"Content-Type": "application/json"}, json.dumps(reply).encode()


@contextmanager
def judge_server(say: Callable[[str], str | tuple[int, dict[str, str]]], seconds: float = 0.0) -> Iterator[JudgeServer]:
    judge = JudgeServer(say, seconds)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, headers, raw = judge.answer(self.path, self.headers.get("Authorization"), body)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
