"""Plays trials, each in a child process of its own: `python -m tests.rehearsal.stage LIBRARY`.

A line of JSON on standard input is a trial: {"trial": name, "card": name, "options": {...}}. A line of JSON on standard
output is its outcome: {"found": ...}, or {"fault": traceback}. torch and the other large libraries are loaded once, and
the process is copied for each trial (fork): so each begins with a torch that knows no GPU yet, for a tenth of the time.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main(library: Path) -> None:
    ctypes.CDLL(str(library))  # before torch, which asks once whether there is a GPU
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from tests.rehearsal import trials

    for line in sys.stdin:
        wanted = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what a trial prints is none of its outcome
            _write(write, _outcome(trials.TRIALS[wanted["trial"]], wanted["card"], library, wanted["options"]))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            text = stream.read()
        status = os.waitpid(child, 0)[1]
        print(text or json.dumps({"fault": f"the trial's process ended with status {status}"}), flush=True)


def _outcome(trial: Any, card: str, library: Path, options: dict[str, Any]) -> str:
    from benchmarks.cards import CARDS

    try:
        return json.dumps({"found": trial(CARDS[card], library, **options)})
    except BaseException:
        return json.dumps({"fault": traceback.format_exc()})


def _write(descriptor: int, text: str) -> None:
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
