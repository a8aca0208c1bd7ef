"""Who may ask a server: the key that its clients send, and the web pages that may read its answers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from minigrpo.delivery.serve.llama_server import API_KEY, is_loopback
from minigrpo.errors import MinigrpoError

KEY_VARIABLES = (API_KEY, "VLLM_API_KEY", "LLAMA_API_KEY")
"""Environment variables of the key: ours, vLLM's and llama-server's. A child gets the key by all three, or none."""
_KEY = re.compile(r"[!-+\--~]+")  # printable, and no comma, which llama-server takes for the end of a key
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,*]+")


@dataclass(frozen=True, slots=True)
class Access:
    """`key`: without it clients are refused, None lets everybody in. `cors`: the origin whose pages may read answers
    (`*`: every page), None for none."""

    key: str | None = field(default=None, repr=False)
    cors: str | None = None

    def __post_init__(self) -> None:
        """Raises MinigrpoError for a key or an origin that no client could send. It does not repeat the key."""
        if self.key is not None and not _KEY.fullmatch(self.key):
            raise MinigrpoError(
                "The key (--api-key) must be of letters, digits and signs, without spaces and commas. For a good one: "
                "openssl rand -hex 32"
            )
        if self.cors not in (None, "*") and not _ORIGIN.fullmatch(self.cors or ""):
            raise MinigrpoError(
                f"--cors {self.cors} is no origin. An origin has a scheme and a host, and no path: --cors "
                "http://localhost:3000; or --cors '*' for every page."
            )

    def environment(self) -> dict[str, str]:
        """Return the environment for a server's process, the only place that holds the key."""
        inherited = {name: value for name, value in os.environ.items() if name not in KEY_VARIABLES}
        keys = dict.fromkeys(KEY_VARIABLES, self.key) if self.key else {}
        # An llama-server too old to know the variable lets every page read its answers.
        return {**inherited, **keys, "LLAMA_ARG_CORS_ORIGINS": self.cors or "localhost"}

    def warning(self, host: str) -> str | None:
        """Return the sentence for a server that everybody can ask; None where nobody else can."""
        if self.key or is_loopback(host):
            return None
        return (
            f"WARNING: no key is set, so whoever reaches {host or '0.0.0.0'} over the network can ask this model. Set "
            f"one: {API_KEY}=... minigrpo serve ..."
        )


OPEN = Access()
"""Everybody who reaches the server may ask it, and no web page."""
