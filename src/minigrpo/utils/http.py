"""One exchange of JSON over HTTP, for all who ask a server; what a refusal means is for them to say."""

from __future__ import annotations

import json
from typing import Any
from urllib import error, request

DIRECT = request.build_opener(request.ProxyHandler({}))
"""Asks past any proxy, which would not find a server of this machine."""


class StatusError(Exception):
    """Holds what a server says when it refuses a request: the status code, and its own words as bytes."""

    def __init__(self, code: int, raw: bytes) -> None:
        super().__init__(f"HTTP status {code}")
        self.code, self.raw = code, raw


def exchange(
    url: str, body: dict[str, Any] | None = None, *, timeout: float | None = None, direct: bool = False
) -> bytes:
    """Send one request, a POST of JSON where it has a body, and return the answer.

    `timeout`: seconds of silence; None waits. `direct`: past the proxy that the environment names.
    Raises StatusError where the server refuses, OSError where it does not answer, ValueError where the URL is none.
    """
    data = None if body is None else json.dumps(body).encode()
    asked = request.Request(url, data, {"Content-Type": "application/json"})
    opened = DIRECT.open if direct else request.urlopen
    try:
        with opened(asked, timeout=timeout) as answer:
            raw: bytes = answer.read()
            return raw
    except error.HTTPError as fault:
        raise StatusError(fault.code, fault.read()) from None
