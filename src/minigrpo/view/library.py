"""The runs below a folder, each opened once: its figures, its groups, and what its stages left. Nothing is written."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.lock import Holder, holder
from minigrpo.runs.logger import read_events
from minigrpo.runs.manifest import flat
from minigrpo.runs.rundir import RunDir, find_run, read_json
from minigrpo.utils.signals import is_alive
from minigrpo.view.group_index import GroupIndex
from minigrpo.view.metrics_log import Mark, MetricsLog

DEPTH = 2
"""Folders below the runs' folder in which runs are looked for: runs/NAME, runs/SWEEP/NAME."""
LOOK_AGAIN = 3.0
"""Seconds after which the folder is searched for new runs, when somebody asks."""
LARGEST_JSON = 64 * 2**20
"""Bytes of a JSON file beyond which it is not read: an evaluation of 100,000 answers has fewer."""

State = str
"""running, killed (its process is gone and noted no end), or idle."""


class OpenRun:
    """A run that somebody looks at. Its logs are read when they are first asked for."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.run = RunDir(path)

    @cached_property
    def recipe(self) -> Recipe | None:
        """The recipe, or None where this version cannot read it."""
        try:
            return load_recipe(str(self.run.path))
        except (MinigrpoError, OSError):
            return None

    @cached_property
    def metrics(self) -> MetricsLog:
        dtype = self.read(self.run.machine).get("dtype")
        return MetricsLog(self.run.metrics, self.recipe, None if dtype is None else dtype != "torch.float32")

    @cached_property
    def groups(self) -> GroupIndex:
        return GroupIndex(self.run.groups)

    def knobs(self) -> dict[str, Any]:
        """Return the recipe that the run began with, flat; {} where nothing tells it."""
        kept = self.read(self.run.made).get("recipe")
        if isinstance(kept, dict):
            return kept
        return flat(self.recipe.model_dump(mode="json", exclude={"about"})) if self.recipe else {}

    def read(self, path: Path) -> dict[str, Any]:
        """Read a JSON object; {} where there is none. A damaged one is {"damaged": why}."""
        try:
            if not path.is_file():
                return {}
            if path.stat().st_size > LARGEST_JSON:
                return {"damaged": f"{path.name} is larger than {LARGEST_JSON // 2**20} MiB: it is not read here."}
            content = read_json(path)
        except (ArtifactError, OSError) as fault:
            return {"damaged": str(fault)}
        return content if isinstance(content, dict) else {"damaged": f"{path.name} is not what a stage writes."}

    def state(self) -> State:
        """Return whether a process works on the run now, as far as its lock's text tells."""
        if not self.run.lock.is_file():
            return "idle"
        found = holder(self.run)
        return "running" if found is None or _lives(found) else "killed"

    def signature(self) -> tuple[object, ...]:
        """Return what changes when the run does; costs a few calls of stat."""
        return tuple(map(_stamp, self._watched))

    @cached_property
    def _watched(self) -> tuple[str, ...]:
        run = self.run
        return tuple(map(str, (run.metrics, run.groups, run.events, run.lock, run.evals, run.parity)))

    def marks(self) -> list[Mark]:
        """Return alarms, beginnings, ends, kills and resumes, in the order of their steps."""
        marks = [*self.metrics.refresh().alarms(), *self._events()]
        return sorted(marks, key=lambda mark: int(mark["step"]))

    def _events(self) -> Iterator[Mark]:
        open_since: int | None = None
        for event in read_events(self.run):
            kind, step = str(event["event"]), int(event["step"]) if isinstance(event["step"], int) else 0
            if kind in ("began", "resumed"):
                if open_since is not None:
                    yield {"step": step, "kind": "killed", "text": f"Its process was killed; kept up to step {step}."}
                open_since = step
            else:
                open_since = None
            told = " ".join(filter(None, (EVENT_TEXTS.get(kind, kind), str(event.get("text", "")))))
            yield {"step": step, "kind": kind, "text": told, "time": str(event.get("time", ""))}
        if open_since is not None and self.state() != "running" and len(self.metrics):
            yield {"step": int(self.metrics.steps[-1]), "kind": "killed", "text": "Its process was killed."}


EVENT_TEXTS = {
    "began": "Training began.",
    "resumed": "Training went on from here.",
    "ended": "Training ended.",
    "stopped": "Somebody stopped it.",
    "failed": "Training failed.",
}


def _lives(found: Holder) -> bool:
    return found.host != socket.gethostname() or is_alive(found.pid)


def _stamp(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Library:
    """All runs below one folder, or one run, and their forks. Names are paths below it, with slashes."""

    def __init__(self, folder: Path) -> None:
        """Raise ArtifactError where there is no such folder."""
        folder = folder.expanduser()
        if not folder.is_dir():
            raise ArtifactError(f"{folder} is no folder. Name the one that your runs are in: minigrpo view runs")
        found = find_run(folder)
        self.folder = found.run.path.absolute().parent if found else folder.absolute()
        self.first = found.run.path.absolute().name if found else None
        """The run that was named itself, if one was."""
        self._lock = threading.Lock()
        self._open: dict[str, OpenRun] = {}
        self._looked = -LOOK_AGAIN

    def runs(self) -> list[OpenRun]:
        """Return all runs, by name."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_AGAIN:
                found = dict(_runs_below(self.folder, DEPTH))
                self._open = {name: self._open.get(name) or OpenRun(name, path) for name, path in found.items()}
                self._looked = time.monotonic()
            return list(self._open.values())

    def run(self, name: str) -> OpenRun:
        """Return the run of that name. Raise ArtifactError where there is none: no other path is ever opened."""
        known = {run.name: run for run in self.runs()}
        if name not in known:
            raise ArtifactError(f"There is no run {name!r} in {self.folder}.")
        return known[name]

    def signature(self) -> tuple[object, ...]:
        return tuple((run.name, run.signature()) for run in self.runs())


def _runs_below(folder: Path, depth: int, prefix: str = "") -> Iterator[tuple[str, Path]]:
    try:
        below = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return
    for name in below:
        path = folder / name
        if is_run(path):
            yield prefix + name, path
            yield from _runs_below(RunDir(path).forks, 1, f"{prefix}{name}/forks/")
        elif depth > 1:
            yield from _runs_below(path, depth - 1, f"{prefix}{name}/")


def is_run(path: Path) -> bool:
    """Return whether a folder holds a recipe, as every run does, or logs alone, as somebody may have copied them."""
    run = RunDir(path)
    return run.exists() or run.metrics.is_file() or run.groups.is_file()


def describe(run: OpenRun) -> Mapping[str, Any]:
    """Return what the list of runs shows of one."""
    log = run.metrics.refresh()
    knobs = run.knobs()
    return {
        "name": run.name,
        "state": run.state(),
        "steps": int(log.steps[-1]) if len(log) else 0,
        "of": knobs.get("train.steps"),
        "model": knobs.get("model.path"),
        "task": knobs.get("task.name"),
        "reward": log.last("reward"),
        "accuracy": log.last("accuracy"),
        "changed": run.run.metrics.stat().st_mtime if run.run.metrics.is_file() else None,
    }
