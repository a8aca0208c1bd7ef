"""A stage for trials: the device guard, built once for this torch, and a process that plays them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import build_model, build_tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

Play = Callable[..., Any]
"""play(trial, card, **options) -> what the trial found."""


@pytest.fixture(scope="session")
def guard(request: pytest.FixtureRequest) -> Path:
    """The library of guard.cpp, kept in pytest's cache for as long as source, torch and compiler are the same."""
    import torch

    source, installed = HERE / "guard.cpp", Path(torch.__file__).parent
    compiler = str(shutil.which("c++"))
    made_from = f"{torch.__version__}{compiler}".encode() + source.read_bytes()
    cache: Path = request.config.cache.mkdir("rehearsal")  # type: ignore[union-attr]
    library = cache / f"guard-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
    if not library.is_file():
        draft = library.with_suffix(f".{os.getpid()}")  # two sessions may build it at once
        command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", str(source), "-o", str(draft)]
        command += [f"-I{installed / 'include'}", f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}"]
        built = subprocess.run([*command, "-lc10", "-ltorch_cpu"], capture_output=True, text=True, timeout=120)
        assert built.returncode == 0, built.stderr
        draft.rename(library)
    return library


@pytest.fixture(scope="session")
def play(guard: Path) -> Iterator[Play]:
    stage = subprocess.Popen(
        [sys.executable, "-m", "tests.rehearsal.stage", str(guard)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", ".", os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert stage.stdin is not None
    assert stage.stdout is not None

    def ask(trial: str, card: str, **options: Any) -> Any:
        stage.stdin.write(json.dumps({"trial": trial, "card": card, "options": options}) + "\n")
        stage.stdin.flush()
        answer = json.loads(stage.stdout.readline())
        assert "fault" not in answer, answer["fault"]
        return answer["found"]

    yield ask
    stage.stdin.close()
    stage.stdout.close()
    stage.wait(timeout=60)


def saved(folder: Path, arch: str, **overrides: Any) -> Path:
    """Save a tiny model of other sizes than tiny_folder's."""
    build_model(arch, **overrides).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
