"""The folder that a run leaves: names of artefacts, writes that are whole or absent, stamps of what was made from what.

runs/NAME/recipe.yaml  metrics.jsonl  groups.jsonl  checkpoints/000100/  adapter/  preflight.json  evals/*.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.errors import ArtifactError


@dataclass(frozen=True, slots=True)
class RunDir:
    """Names only; nothing is read until asked for. It is the one thing that verbs hand to one another."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # in Python one writes RunDir("runs/first")

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def groups(self) -> Path:
        return self.path / "groups.jsonl"

    @property
    def machine(self) -> Path:
        """What the run's last bits depend on: threads, number types, tokens per pass, versions."""
        return self.path / "machine.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's format (a LoRA run)."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The trained model (a full-parameter run)."""
        return self.path / "model"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight.json"

    @property
    def evals(self) -> Path:
        return self.path / "evals"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{step:06d}"

    def exists(self) -> bool:
        return self.recipe.is_file()


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it appears as `target` only when the block ends well, and survives a power cut from then on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes private folders; artefacts are meant to be read
        for path in draft.rglob("*"):
            if path.is_file():
                sync(path)
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(retired / target.name)
            draft.rename(target)
            shutil.rmtree(retired)
        else:
            draft.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    write_whole(path, json.dumps(data, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Raises ArtifactError where the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ArtifactError(f"{path} is damaged ({fault}). Remove it and run the stage that makes it again.") from None


def sync(path: Path) -> None:
    """Push a file or folder to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents in sorted order."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()
