"""Whose a run's folder is, what each artefact in it was made from, and how long its stages took.

An artefact carries `made`: verb, versions, and the hash of everything it was made from. Where these still agree the
stage need not run again; where they do not, what is there is stale.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from minigrpo.config import Recipe
from minigrpo.errors import ArtifactError
from minigrpo.recipefile import dump_recipe, load_recipe
from minigrpo.rundir import RunDir, digest, read_json, write_json, write_whole


def check_folder(recipe: Recipe, run: RunDir, resume: bool) -> None:
    """Raises ArtifactError where this recipe may not begin, or not go on, in this folder. Writes nothing."""
    if run.exists() and resume:
        return refuse_other_recipe(recipe, run)
    if run.path.exists() and not run.path.is_dir():
        raise ArtifactError(f"{run.path} is a file, so no run can be kept there. Name a folder: --run runs/NAME")
    if run.exists():
        raise ArtifactError(f"{run.path} already holds a run. Go on with it: --resume. Or another: --run runs/NAME")
    # A preflight that was asked for on its own leaves its verdict first.
    if run.path.exists() and {path.name for path in run.path.iterdir()} - {run.preflight.name}:
        raise ArtifactError(f"{run.path} already holds files that are no run. Name a new folder: --run runs/NAME")


def begin(recipe: Recipe, run: RunDir) -> None:
    """From here on the folder is a run. To be called when the recipe's parts are open: a slip in it leaves nothing."""
    if not run.exists():
        write_whole(run.recipe, dump_recipe(recipe))


def refuse_other_recipe(recipe: Recipe, run: RunDir) -> None:
    then, now = (flat(each.model_dump(exclude={"about"})) for each in (load_recipe(str(run.path)), recipe))
    changed = [f"{name} was {then[name]}, is {now[name]}" for name in now if then[name] != now[name]]
    if changed:
        raise ArtifactError(
            f"{run.path} was begun with another recipe ({'; '.join(changed)}). Go on with its own: {run.recipe}. Or "
            "begin another: --run runs/NAME"
        )


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora.rank": 64, ...}; a table of names and numbers stays one value."""
    knobs: dict[str, Any] = {}
    for name, value in section.items():
        deeper = isinstance(value, dict) and not prefix
        knobs |= flat(value, f"{name}.") if deeper else {prefix + name: value}
    return knobs


def trained(run: RunDir, recipe: Recipe) -> Path:
    """Where the run's training leaves its result."""
    return run.model if recipe.train.full else run.adapter


def finished(run: RunDir) -> Path:
    """What the run trained; raises ArtifactError where it has not come so far."""
    for path in (run.adapter, run.model):
        if path.exists():
            return path
    raise ArtifactError(
        f"{run.path} has trained nothing yet. Go on with it: minigrpo train {run.recipe} --run {run.path} --resume"
    )


def stamp(verb: str, recipe: Recipe, *sources: Path) -> dict[str, Any]:
    """By what and from what an artefact is made, at this moment."""
    text = dump_recipe(recipe).encode()
    versions = {name: installed(name) for name in ("minigrpo", "torch", "transformers", "peft")}
    made_from = {"recipe": hashlib.sha256(text).hexdigest(), **{path.name: digest(path) for path in sources}}
    return {"verb": verb, "versions": versions, "from": made_from}


def fits(file: Path, made: dict[str, Any]) -> bool:
    """Whether an artefact is there and was made from what is there now."""
    return file.exists() and read_json(file).get("made", {}).get("from") == made["from"]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # minigrpo itself, run from its source folder
        return None


def seconds_of(run: RunDir) -> dict[str, float]:
    """How long each stage took so far."""
    file = run.path / "seconds.json"
    return read_json(file) if file.exists() else {}


@contextmanager
def timed(run: RunDir, name: str) -> Iterator[None]:
    """Keep how long a stage takes, once the run has begun; an interrupted and a resumed stage add up."""
    start = time.monotonic()
    try:
        yield
    finally:
        seconds = seconds_of(run)
        total = seconds.get(name, 0.0) + time.monotonic() - start
        if run.exists():
            write_json(run.path / "seconds.json", seconds | {name: total})


def slug(name: str) -> str:
    """A name that a file may have."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")
