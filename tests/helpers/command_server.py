"""Run commands of minigrpo with any standard streams, each in a process of its own that need not import torch again.

A server loads the libraries once and forks a process for each command. The process gets its handles 0, 1 and 2 as a
shell makes them (opened, duplicated or closed, by number), its standard streams are made of them as the interpreter
makes them at its start, and it ends as any Python process ends, with the interpreter's own flush of both. What the
environment decides before the first line of Python (encodings) is decided for a whole server: one for each environment.

What libraries keep of `sys.stderr` while they are imported would be the server's. A command imports them after `main`
has put lenient streams there, so `Later` stands in: it is whatever `sys.stderr` is when it is used.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

Place = str | None
"""A file, None for a closed handle, GONE or HUNG_UP."""
GONE = "a pipe whose reader leaves after the first line"
HUNG_UP = "a terminal that goes away after its first bytes"
FULL = "/dev/full"
MODULES = (
    "torch transformers transformers.models.auto.modeling_auto transformers.models.qwen2.modeling_qwen2 peft datasets "
    "minigrpo.cli.main minigrpo.pipeline.stages minigrpo.delivery.gguf.export minigrpo.delivery.hub.publish "
    "minigrpo.delivery.merge.merge minigrpo.delivery.verify minigrpo.delivery.serve.serve"
)
LIMIT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """`left`: whether the command left a process behind."""

    code: int
    left: bool


class CommandServer:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, *words: str, out: Place, err: Place, folder: Path) -> Ended:
        """Run a command in a folder, killed after two minutes (code -9)."""
        asks, answers = self.process.stdin, self.process.stdout
        assert asks
        assert answers
        print(json.dumps({"words": words, "out": out, "err": err, "folder": str(folder)}), file=asks, flush=True)
        return Ended(**json.loads(answers.readline()))


@contextmanager
def command_server(**environment: str) -> Iterator[CommandServer]:
    command = [sys.executable, str(Path(__file__).resolve())]
    environment = {**os.environ, **environment}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        yield CommandServer(process)
        assert process.stdin
        process.stdin.close()


# In the server


class Later:
    """The standard stream of that name at the moment when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self._name), name)


def serve() -> None:
    asks, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    streams = [(stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)]
    kept = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Later("__stdout__"), Later("__stderr__")  # type: ignore[assignment]
    for name in MODULES.split():
        importlib.import_module(name)
    sys.stdout, sys.stderr = kept
    gc.collect()
    gc.freeze()  # else each process copies the libraries' pages when it looks for garbage at its end: a second
    while line := asks.readline():
        job = json.loads(line)
        reading, writing = os.openpty() if HUNG_UP in job.values() else os.pipe()
        pid = os.fork()
        if pid == 0:
            asks.close()
            answers.close()
            os.close(reading)
            become(job, writing, streams)
            return
        os.close(writing)
        print(json.dumps(follow(pid, reading)), file=answers, flush=True)


def become(job: Mapping[str, Any], pipe: int, streams: list[tuple[str, str]]) -> None:
    """Be the command: never returns."""
    os.setsid()
    os.chdir(os.fsencode(job["folder"]) if sys.getfilesystemencoding() == "utf-8" else job["folder"].encode())
    for handle, place in enumerate((os.devnull, job["out"], job["err"])):
        connect(handle, place, pipe)
    os.close(pipe)
    sys.stdin, sys.stdout, sys.stderr = (standard_stream(handle, *streams[handle]) for handle in range(3))
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    from minigrpo.cli.main import main

    main([os.fsdecode(word.encode()) for word in job["words"]])  # as the interpreter reads its own arguments
    sys.exit()


def connect(handle: int, place: Place, pipe: int) -> None:
    if place is None:
        os.close(handle)
    elif place in (GONE, HUNG_UP):
        os.dup2(pipe, handle)
    else:
        opened = os.open(place.encode(), os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, handle)
        os.close(opened)


def standard_stream(handle: int, encoding: str, errors: str) -> IO[str]:
    """Return what the interpreter makes of a handle when it starts: None where it is closed."""
    try:
        raw: Any = open(handle, "rb" if handle == 0 else "wb", closefd=False)  # noqa: SIM115
    except OSError:
        return None  # type: ignore[return-value]
    return io.TextIOWrapper(
        raw, encoding, errors, newline=None if handle == 0 else "\n", line_buffering=handle == 2 or raw.isatty()
    )


def follow(pid: int, pipe: int) -> dict[str, Any]:
    """Read one line of the pipe or terminal and leave; wait for the command, and look for what it left running."""
    with open(pipe, "rb", buffering=0) as reader, contextlib.suppress(OSError):  # a terminal that nobody has open
        reader.readline()
    end = time.monotonic() + LIMIT_S
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    left = False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
        left = True
    return {"code": os.waitstatus_to_exitcode(found[1]), "left": left}


if __name__ == "__main__":
    serve()
