"""Start `minigrpo inspect` for a group that somebody looks at, in a process of its own, one at a time.

The view itself loads no model. The process reads the run, does a step again in a scratch folder, and is ended with the
view. What it found is kept as long as the view runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minigrpo.errors import last_words

MOST_KEPT = 64
"""Groups whose tokens are kept; of more, the oldest are measured again when somebody asks."""

Key = tuple[str, int, int]
"""Run, step, and the number of the group in it, from 1."""


def inspect_command(path: Path, step: int, group: int) -> list[str]:
    own = [sys.executable, "-m", "minigrpo", "inspect", str(path.absolute())]
    return [*own, "--step", str(step), "--group", str(group), "--json"]


class Inspections:
    """What was asked of groups, and what came of it. Safe to use from several threads."""

    def __init__(self, command: Callable[[Path, int, int], list[str]] = inspect_command) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._found: dict[Key, dict[str, Any]] = {}
        self._busy: Key | None = None
        self._process: subprocess.Popen[str] | None = None

    def start(self, key: Key, path: Path) -> Mapping[str, Any]:
        """Begin to measure a group, unless it is known or another one is at it; return its state."""
        with self._lock:
            if key in self._found and self._found[key]["state"] != "failed":
                return self._found[key]
            if self._busy is not None:
                where = "group {2} of step {1} of {0}".format(*self._busy)
                return {"state": "busy", "error": f"Wait for {where}, which is being measured."}
            command = self._command(path, key[1], key[2])
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self._busy = key
            self._found[key] = {"state": "running"}
            threading.Thread(target=self._await, args=(key, self._process), daemon=True).start()
            return self._found[key]

    def state(self, key: Key) -> Mapping[str, Any]:
        """Return {"state": none, running, done (with what was found) or failed (with the reason)}."""
        with self._lock:
            return self._found.get(key, {"state": "none"})

    def _await(self, key: Key, process: subprocess.Popen[str]) -> None:
        told, errors = process.communicate()
        try:
            found = {"state": "done", "found": json.loads(told)}
        except ValueError:
            found = {"state": "failed", "error": last_words(errors) or f"It ended with {process.returncode}."}
        with self._lock:
            self._busy, self._process = None, None
            self._found[key] = found
            while len(self._found) > MOST_KEPT:
                del self._found[next(iter(self._found))]

    def close(self) -> None:
        """End the process, if one is at work."""
        with self._lock:
            if self._process is not None:
                self._process.terminate()
