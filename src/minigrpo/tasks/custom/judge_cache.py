"""Keep a judge's answers on the disk, in one SQLite file that several processes may use at once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.errors import TaskError
from minigrpo.utils.cache_dir import cache_dir
from minigrpo.utils.paths import user_path

_BUSY_S = 30.0  # how long one process waits for another that writes


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """A judge's answer. `read` and `written`: the tokens of question and answer, 0 where the server does not count."""

    text: str
    read: int = 0
    written: int = 0


def request_key(body: Mapping[str, Any]) -> str:
    """Return the hash of a request: model, messages and options."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class JudgeCache:
    """Answers by the hash of their request. Raise TaskError where the file cannot be used.

    `path`: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._opened: sqlite3.Connection | None = None

    @classmethod
    def of(cls, name: str | None) -> JudgeCache:
        """Open the file of that name; "default": in the package's cache."""
        path = cache_dir() / "judge.sqlite" if name == "default" else user_path(name) if name else None
        return cls(path)

    def get(self, key: str) -> JudgeReply | None:
        rows = self._do("SELECT text, read, written FROM answers WHERE key = ?", (key,))
        return JudgeReply(*rows[0]) if rows else None

    def put(self, key: str, reply: JudgeReply) -> None:
        self._do("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", (key, reply.text, reply.read, reply.written))

    def _do(self, order: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if self.path is None:
            return []
        try:
            with self._lock:
                self._opened = self._opened or self._open(self.path)
                with self._opened:
                    return self._opened.execute(order, values).fetchall()
        except (sqlite3.Error, OSError) as fault:
            raise TaskError(
                f"The judge's cache {self.path} cannot be used: {fault}. Name another file as its `cache`, or null."
            ) from fault

    def _open(self, path: Path) -> sqlite3.Connection:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
        opened.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT, read INT, written INT)")
        return opened
