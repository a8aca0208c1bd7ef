"""Send one JSON request over HTTP. What a refusal means is for the caller to say."""

from __future__ import annotations

import json
from typing import Any
from urllib import error, request

DIRECT = request.build_opener(request.ProxyHandler({}))
"""Opens a URL without any proxy, which would not find a server of this machine."""


class StatusError(Exception):
    """A server's refusal of a request: the status code, and its own message as bytes.

    `retry_after`: seconds after which it wants to be asked again, where it says so.
    """

    def __init__(self, code: int, raw: bytes, retry_after: float | None = None) -> None:
        super().__init__(f"HTTP status {code}")
        self.code, self.raw, self.retry_after = code, raw, retry_after


def exchange(
    url: str,
    body: dict[str, Any] | None = None,
    *,
    timeout: float | None = None,
    key: str | None = None,
    direct: bool = False,
) -> bytes:
    """Send one request, a POST of JSON where it has a body, and return the answer.

    `timeout`: seconds without an answer; None waits for ever. `key`: sent as a bearer token, and not to where the
    server may point instead. `direct`: without the proxy that the environment names.
    Raise StatusError where the server refuses, OSError where it does not answer, ValueError for a malformed URL.
    """
    data = None if body is None else json.dumps(body).encode()
    message = request.Request(url, data, {"Content-Type": "application/json"})
    if key:
        message.add_unredirected_header("Authorization", f"Bearer {key}")
    opened = DIRECT.open if direct else request.urlopen
    try:
        with opened(message, timeout=timeout) as answer:
            raw: bytes = answer.read()
            return raw
    except error.HTTPError as fault:
        seconds = str(fault.headers.get("Retry-After") or "")
        raise StatusError(fault.code, fault.read(), float(seconds) if seconds.isdecimal() else None) from None
