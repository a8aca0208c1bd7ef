"""The folder of a run: the names of its artefacts, and writes that are whole or absent.

runs/NAME/recipe.yaml  metrics.jsonl  groups.jsonl  events.jsonl  chain.jsonl  checkpoints/000100/  adapter/
          preflight.json  check.json  merged/  gguf/NAME-Q8_0.gguf  compressed/NAME-FP8/  parity.json  evals/*.json
          audit.json

A process can be killed between any two instructions. What it leaves then has a hidden name, and `tidy` finishes or
undoes it at the next start:  .NAME.*.draft (not yet whole)  .NAME.*.retired (replaced)  .NAME.removed (being deleted)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minigrpo.errors import ArtifactError
from minigrpo.utils.paths import user_path
from minigrpo.utils.signals import is_alive

DRAFT, RETIRED, REMOVED = ".draft", ".retired", ".removed"

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
BARRED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP}
REJECTED = ".rejected"
"""Suffix of a file that failed its proof and is kept for inspection."""
SPARE = 64 * 2**20
"""Bytes that a stage leaves free on the disk; tokenizers and configs fit into them."""
REFUSALS = FULL | BARRED | {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
"""Error numbers of writes that fail for a reason the user can mend. Any other OSError is a fault of ours."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of a run's artefacts; nothing is read. Stages hand it to one another."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # in Python one writes RunDir("runs/first")

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def made(self) -> Path:
        """The version and the knobs that the run began with: sealed, so that a later change is noticed."""
        return self.path / "made.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def groups(self) -> Path:
        return self.path / "groups.jsonl"

    @property
    def chain(self) -> Path:
        """The chain of hashes from the recipe to what was trained (runs/chain.py)."""
        return self.path / "chain.jsonl"

    @property
    def events(self) -> Path:
        """When training began, went on and ended."""
        return self.path / "events.jsonl"

    @property
    def machine(self) -> Path:
        """What the run's exact bits depend on: threads, number types, tokens per pass, versions."""
        return self.path / "machine.json"

    @property
    def base(self) -> Path:
        """The hash of config and weights that the run began from."""
        return self.path / "base.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def warmup(self) -> Path:
        """The adapter after its supervised start, in PEFT's format: what GRPO began with."""
        return self.path / "warmup"

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
    def check(self) -> Path:
        """The check of the trained adapter."""
        return self.path / "check.json"

    @property
    def merged(self) -> Path:
        """Base and adapter merged: a model folder that other tools read."""
        return self.path / "merged"

    @property
    def forks(self) -> Path:
        """Counterfactual twins of the run, each a run's folder."""
        return self.path / "forks"

    @property
    def gguf(self) -> Path:
        """The merged model in llama.cpp's format: one file for each number type."""
        return self.path / "gguf"

    @property
    def compressed(self) -> Path:
        """The merged model in the formats of compressed-tensors, which vLLM reads: one folder for each."""
        return self.path / "compressed"

    @property
    def parity(self) -> Path:
        """How far each artefact is from the policy that was trained, stage by stage."""
        return self.path / "parity.json"

    @property
    def summary(self) -> Path:
        """The summary at the end of a whole run, as the screen showed it."""
        return self.path / "summary.txt"

    @property
    def reward_curve(self) -> Path:
        """The mean reward over the steps, as a picture."""
        return self.path / "reward.svg"

    @property
    def tracking(self) -> Path:
        """What trackers keep here, and by which names they know the run."""
        return self.path / "tracking"

    @property
    def report(self) -> Path:
        """The run told in one file of HTML (`minigrpo report`)."""
        return self.path / "report.html"

    @property
    def audit(self) -> Path:
        """What an audit has shown, and what it has not."""
        return self.path / "audit.json"

    @property
    def task_files(self) -> Path:
        """The files that the task's knobs name, in a run that was published to be audited."""
        return self.path / "task"

    @property
    def seals(self) -> Path:
        """The seals of the models that were made from it, in a run that was published to be audited without these."""
        return self.path / "seals"

    @property
    def evals(self) -> Path:
        return self.path / "evals"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"{step:06d}"

    def exists(self) -> bool:
        return self.recipe.is_file()


Artefact = Literal["run", "adapter", "model", "merged", "warmup", "gguf", "gguf file", "checkpoint", "other"]
"""Kind of a path in a run. gguf: the folder of the GGUF files. other: a path in the run that is none of these."""


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run, and which of its artefacts a path names."""

    run: RunDir
    artefact: Artefact


def find_run(place: str | Path | RunDir) -> FoundRun | None:
    """Find the run that a path belongs to, by names alone: the artefact itself may be missing.

    Looks at the folder itself, the one above, and the one above gguf/ and checkpoints/. The run's path is spelled as
    the user spelled it.
    """
    path = place.path if isinstance(place, RunDir) else user_path(place)
    names: list[str] = []
    while not RunDir(path).exists():
        if len(names) == 2:
            return None
        if path.name in ("", ".."):  # of ".", say, the folder above does not stand in the text
            path = Path(os.path.abspath(path))
        names.insert(0, path.name)
        path = path.parent
    artefact = _artefact(names)
    return FoundRun(RunDir(path), artefact) if artefact else None


def enclosing_run(path: Path) -> RunDir | None:
    """Find the run in whose folder a path lies, at any depth; links are followed.

    A folder that holds a recipe.yaml of the user's and nothing that a run leaves is none.
    """
    place = user_path(path).resolve()
    runs = (RunDir(each) for each in (place, *place.parents) if RunDir(each).exists())
    return next((run for run in runs if any(each.exists() for each in _traces(run))), None)


def _traces(run: RunDir) -> tuple[Path, ...]:
    return run.made, run.metrics, run.groups, run.checkpoints, run.adapter, run.model


def _artefact(names: list[str]) -> Artefact | None:
    """Name the artefact at this place below a run's folder."""
    match names:
        case []:
            return "run"
        case [("adapter" | "model" | "merged" | "warmup" | "gguf") as folder]:
            return folder
        case [_]:
            return "other"
        case ["gguf", file]:
            return "gguf file" if file.endswith(".gguf") else "other"
        case ["checkpoints", step]:
            return "checkpoint" if step.isdigit() else "other"
    return None


_staying: list[Path] = []
"""Folders in use, as absolute paths: they were there, and are never made again."""


@contextmanager
def staying(*folders: Path) -> Iterator[None]:
    """Report a folder that somebody moves or removes in the block, in which nothing is made in its place.

    Raise ArtifactError that names it, whatever else the loss led to. What is missing at the beginning does not count.
    """
    there = [folder.absolute() for folder in folders if folder.is_dir()]
    _staying.extend(there)
    try:
        yield
    except Exception as fault:
        _require_there(there, fault)
        raise
    finally:
        for folder in there:
            _staying.remove(folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raise ArtifactError where one that is in use was moved or removed."""
    _require_there([folder for folder in _staying if path.absolute().is_relative_to(folder)])
    path.mkdir(parents=True, exist_ok=True)


def _require_there(folders: Sequence[Path], fault: Exception | None = None) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise ArtifactError(
                f"{folder} was moved or removed while it was in use, so this cannot go on. If it was moved, what had "
                "been saved is in it: put it back, or name it where it is now, and give the same command (--resume "
                "where it trains). If it was removed, begin again."
            ) from fault


@contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to fill; it gets the name `target` when the block ends well, and then survives a power cut.

    Raise ArtifactError where the disk is full or does not let us write.
    """
    with writing(target):
        make_folder(target.parent)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=DRAFT, dir=target.parent))
        try:
            yield draft
            draft.chmod(0o755)  # mkdtemp makes private folders; artefacts are meant to be read
            for path in (*draft.rglob("*"), draft):
                sync(path)
            _put(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        sync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file at once: a reader, or a crash, sees the old content or the new, never half of it."""
    with writing(path):
        make_folder(path.parent)
        draft = path.with_name(f".{path.name}.{os.getpid()}{DRAFT}")
        try:
            draft.write_text(text, encoding="utf-8", newline="\n")
            sync(draft)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder: its name at once, then its content."""
    with writing(path):
        hidden = path.with_name(f".{path.name}{REMOVED}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def tidy(run: RunDir) -> None:
    """Finish or undo what killed processes left half done. The caller must hold the run's lock."""
    for folder in (run.path, run.checkpoints, run.gguf, run.compressed, run.evals):
        for path in sorted(folder.glob(".*")) if folder.is_dir() else ():
            with writing(path):
                _settle(path)


def _put(draft: Path, target: Path) -> None:
    """Give the draft its name. Between the two renames the target is missing: `_settle` brings it back."""
    if not target.exists():
        draft.rename(target)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=RETIRED, dir=target.parent))
    try:
        target.rename(retired / target.name)
        draft.rename(target)
    finally:
        _settle(retired)


def _settle(path: Path) -> None:
    """Put a replaced folder back where nothing took its place; remove drafts and what was being deleted."""
    if path.suffix == RETIRED:
        for old in path.iterdir():
            if not path.with_name(old.name).exists():
                old.rename(path.with_name(old.name))
    if path.suffix == DRAFT and path.is_file():
        # Evaluate, which only adds a file of its own to a run, holds no lock: it may be writing that file now.
        pid = path.name.split(".")[-2]
        if not pid.isdigit() or int(pid) == os.getpid() or not is_alive(int(pid)):
            path.unlink(missing_ok=True)
    elif path.suffix in (DRAFT, RETIRED, REMOVED) and path.is_dir():
        shutil.rmtree(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a write that the disk or its permissions refuse into an ArtifactError: what, how much room, what next."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as fault:
        refusal = _refusal(fault, path.parent)
        if refusal is None:
            raise
        raise ArtifactError(
            f"{path} could not be written: {os.strerror(refusal)}. {_next_step(path, refusal)}"
        ) from fault


@contextmanager
def report_full_disk(words: Callable[[str], str]) -> Iterator[None]:
    """Report a disk that fills up in the block in the stage's own words; `words` is given the system's message."""
    try:
        yield
    except ArtifactError as fault:
        number = getattr(fault.__cause__, "errno", None)
        if number not in FULL:
            raise
        with suppress(OSError):  # the words may ask the disk how much is left
            raise ArtifactError(words(os.strerror(number))) from fault
        raise


def _refusal(fault: BaseException | None, folder: Path) -> int | None:
    """Return the disk's error number. Libraries wrap it: torch keeps it as the context, safetensors in the text."""
    while fault is not None:
        wrapped = re.search(r"\(os error (\d+)\)", str(fault))
        number = fault.errno if isinstance(fault, OSError) else int(wrapped[1]) if wrapped else None
        # A missing file may be anybody's, except in the folder where we write: that folder was removed.
        ours = number == errno.ENOENT and str(getattr(fault, "filename", "")).startswith(str(folder))
        if ours or number in REFUSALS:
            return number
        fault = fault.__cause__ or fault.__context__
    return None


def _next_step(path: Path, refusal: int) -> str:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    cure = f"See to it that {there} may be written to"
    if refusal in FULL:
        cure = f"{there} has {shutil.disk_usage(there).free / 2**20:,.0f} MiB left: make room"
    run = next((run for run in map(RunDir, path.parents) if run.exists()), None)
    if run is None:
        return f"{cure}, or name another folder: --run runs/NAME"
    # By name alone: a checkpoint has its name only when it is whole.
    steps = [int(p.name) for p in run.checkpoints.iterdir() if p.name.isdigit()] if run.checkpoints.is_dir() else []
    kept = f" up to checkpoint {max(steps)}" if steps else "" if run.adapter.exists() else ", but has no checkpoint yet"
    return f"The run is intact{kept}. {cure}, then go on: the same command (with --resume where it trains)"


def write_json(path: Path, data: Any) -> None:
    write_whole(path, json.dumps(data, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raise ArtifactError where it is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing.") from None
    except OSError as fault:
        raise ArtifactError(f"{path} cannot be read: {fault.strerror or fault}.") from None
    except (ValueError, RecursionError) as fault:  # not JSON, not UTF-8, or numbers without end
        raise ArtifactError(f"{path} is damaged ({fault}). Remove it and run the stage that makes it again.") from None


def sync(path: Path) -> None:
    """Push a file or folder to the disk itself."""
    windows = os.name == "nt"  # it opens no folders, and syncs nothing that may not be written to
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's file names and contents in sorted order."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                total.update(block)
    return total.hexdigest()
