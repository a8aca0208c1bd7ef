"""Shared by the tests of serving: an exported run, its server, and whether anything is left running."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minigrpo.delivery.gguf.export import export
from minigrpo.delivery.serve.commands import (
    LOCALHOST,
    ServerCommand,
    VllmModel,
    docker_command,
    reserve_port,
    vllm_command,
)
from minigrpo.runs.rundir import RunDir
from tests.helpers.exported import merged_run

ASKED = ({"role": "user", "content": "What is '12' + 7?"},)


def exported_run(folder: Path) -> RunDir:
    """Make an exported run. Read only, except for its log."""
    run = merged_run(folder / "mine", "qwen2")
    assert export(run, ("F32", "Q8_0"), writer="own", quiet=True).ok
    return run


def file_of(run: RunDir, kind: str = "Q8_0") -> Path:
    return run.gguf / f"{run.path.name}-{kind}.gguf"


def program(tmp_path: Path, text: str, port: int | None = None) -> ServerCommand:
    """Return the command of a fake server, for faults that real ones rarely show."""
    script = tmp_path / "server.py"
    script.write_text(text)
    port = port or reserve_port("127.0.0.1", 0)
    return ServerCommand("llama.cpp", (sys.executable, str(script), str(port)), "127.0.0.1", port, "m", "a model", None)


def told_of(model: VllmModel) -> list[Any]:
    """Return the overrides that the command line and the container's command give to vLLM."""
    command = vllm_command(model, python=Path("python"), host=LOCALHOST, port=1, name="m")
    told = [json.loads(said) for said in after("--hf-overrides", command.program)]
    line = shlex.split(docker_command(command, model, 1.0))
    assert [json.loads(said) for said in after("--hf-overrides", line)] == told
    return told


def after(option: str, line: Sequence[str]) -> list[str]:
    return [then for word, then in pairwise(line) if word == option]


def children(pid: int) -> list[int]:
    """Return the ids of all processes that a process started, directly or not."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def gone(pids: list[int], seconds: float = 30.0) -> bool:
    import psutil

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False
