"""Record which recipe a run's folder belongs to, what each artefact in it was made from, and how long stages took.

An artefact carries `made`: verb, versions, and the hash of everything it was made from. Where these hashes still agree,
the stage need not run again; where they do not, the artefact is stale. Files that a resumed run must be able to trust
are sealed: they carry the hash of their own text, and the number of their format.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from minigrpo.config.load import dump_recipe, load_recipe
from minigrpo.config.schema import Recipe, TrainConfig
from minigrpo.errors import ArtifactError, RecipeError, command_line
from minigrpo.runs.rundir import DRAFT, RunDir, digest, read_json, write_json, write_whole, writing
from minigrpo.versions import installed, this_version

FORMAT = 1
"""The format of a run's folder. It rises when a version can no longer resume what an earlier version began."""


def check_folder(recipe: Recipe, run: RunDir, resume: bool) -> None:
    """Raise ArtifactError where this recipe may not begin, or not go on, in this folder. Write nothing into it."""
    if run.path.exists() and not run.path.is_dir():
        raise ArtifactError(f"{run.path} is a file, so no run can be kept there. Name a folder: --run runs/NAME")
    if run.exists() and not resume:
        raise ArtifactError(f"{run.path} already holds a run. Go on with it: --resume. Or another: --run runs/NAME")
    if run.exists():
        refuse_other_recipe(recipe, run)
        _refuse_misplaced_files(run)
    # A preflight that was asked for on its own leaves its verdict first; a start that was killed leaves its drafts.
    elif run.path.exists() and any(not _may_be_first(path, run) for path in run.path.iterdir()):
        raise ArtifactError(f"{run.path} already holds files that are no run. Name a new folder: --run runs/NAME")
    if run.path.exists():
        with writing(run.path), TemporaryFile(dir=run.path) as stream:
            stream.write(b"?")


def _may_be_first(path: Path, run: RunDir) -> bool:
    own = (run.preflight.name, run.made.name, run.lock.name)
    drafts = tuple(f".{file.name}." for file in (run.preflight, run.made, run.recipe))
    return path.name in own or (path.name.startswith(drafts) and path.suffix == DRAFT)


def _refuse_misplaced_files(run: RunDir) -> None:
    for folder in (run.checkpoints, run.warmup, run.adapter, run.model, run.evals):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} is a file, where the run keeps a folder. Move it away.")
    for file in (run.recipe, run.made, run.machine, run.metrics, run.groups, run.chain):
        if file.exists() and not file.is_file():
            raise ArtifactError(f"{file} is a folder, where the run keeps a file. Move it away.")


def create_run(recipe: Recipe, run: RunDir) -> None:
    """Make the folder a run, unless it is one. Call it when the recipe's parts are open: a mistake leaves nothing."""
    if not run.exists():
        text = dump_recipe(recipe)
        knobs = flat(recipe.model_dump(mode="json", exclude={"about"}))
        # First: the folder is a run as soon as it has a recipe.
        write_sealed(run.made, {"verb": "begin", "sha256": _sum(text), "recipe": knobs})
        write_whole(run.recipe, text)


def settle_base(run: RunDir, base: str, sha256: str) -> None:
    """Keep the hash of the base that the run begins from; later, raise ArtifactError where the base is another.

    `base`: its folder or Hub id, for the message.
    """
    if not run.base.is_file():
        write_sealed(run.base, {"base": base, "sha256": sha256})
    elif (then := read_sealed(run.base))["sha256"] != sha256:
        where = base if base == then["base"] else f"{base} (it was {then['base']})"
        raise ArtifactError(
            f"The base {where} is not the one that {run.path} began from: its weights or its config.json are others. "
            "Put those back; or, if they are elsewhere now, name them where it is merged: --base FOLDER",
            entry="the-base-is-another-one",
        )


def refuse_other_recipe(recipe: Recipe, run: RunDir) -> None:
    """Raise ArtifactError, naming the knobs, where the run's recipe differs from this one or was changed."""
    begun = read_sealed(run.made) if run.made.exists() else {}
    try:
        own = load_recipe(str(run.path))
    except RecipeError as fault:
        if begun and begun["minigrpo"] == this_version():
            raise ArtifactError(
                f"{run.recipe} is damaged. The knobs that the run began with stand in {run.made}. {fault}"
            ) from None
        # Where another version began the run, the fault names both; without made.json nobody knows which it was.
        unknown = f"{run.path} was begun by another version of minigrpo, or damaged; this is {this_version()}. "
        raise ArtifactError(f"{'' if begun else unknown}{fault}") from None
    if begun and _sum(run.recipe.read_text(encoding="utf-8")) != begun["sha256"]:
        now = flat(own.model_dump(mode="json", exclude={"about"}))
        if changed := _differences(begun["recipe"], now):
            raise ArtifactError(
                f"{run.recipe} was changed since the run began ({changed}). Put that back, or begin another run: "
                "--run runs/NAME"
            )
    if changed := _differences(*(flat(each.model_dump(exclude={"about"})) for each in (own, recipe))):
        raise ArtifactError(
            f"{run.path} was begun with another recipe ({changed}). Go on with its own: {run.recipe}. Or "
            "begin another: --run runs/NAME"
        )


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the knobs that differ. One that only one side knows is no difference: a default stands in for it."""
    names = [name for name in now if name in then and then[name] != now[name]]
    return "; ".join(f"{name} was {then[name]}, is {now[name]}" for name in names)


def write_sealed(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with its format, the version that wrote it, and the hash of its own text.

    Data that was read from a sealed file is sealed anew.
    """
    facts = {name: value for name, value in data.items() if name != "seal"}
    write_whole(path, _sealed({"format": FORMAT, "minigrpo": this_version(), **facts}))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote. Raise ArtifactError where a byte has changed or the format is another."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} is damaged: it is not what was saved.")
    if data.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} is damaged or from another version: it says minigrpo {data.get('minigrpo')}, format "
            f"{data.get('format')}; this is minigrpo {this_version()}, format {FORMAT}. Go on with the version that "
            "made it, or begin another run: --run runs/NAME"
        )
    data.pop("seal", None)
    if _sealed(data).encode() != path.read_bytes():
        raise ArtifactError(f"{path} is damaged: it is not what was saved.")
    return data


def _sealed(data: Mapping[str, Any]) -> str:
    return json.dumps({**data, "seal": _sum(json.dumps(data, default=str))}, indent=2, default=str) + "\n"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten sections to {"lora.rank": 64, ...}; a table of names and numbers stays one value."""
    values: dict[str, Any] = {}
    for name, value in section.items():
        deeper = isinstance(value, dict) and not prefix
        values |= flat(value, f"{name}.") if deeper else {prefix + name: value}
    return values


def result_path(run: RunDir, config: TrainConfig) -> Path:
    """Return the folder in which training leaves its result."""
    return run.model if config.full else run.adapter


def existing_result(run: RunDir) -> Path:
    """Return the folder of what the run trained. Raise ArtifactError where training has not ended yet."""
    for path in (run.adapter, run.model):
        if path.exists():
            return path
    again = command_line("minigrpo", "train", run.recipe, "--run", run.path, "--resume")
    raise ArtifactError(f"{run.path} has trained nothing yet. Go on with it: {again}")


def stamp(verb: str, recipe: Recipe, *sources: Path) -> dict[str, Any]:
    """Return the stamp of an artefact that is made now: the verb, the versions, and the hashes of its sources."""
    text = dump_recipe(recipe).encode()
    versions = {name: installed(name) for name in ("minigrpo", "torch", "transformers", "peft")}
    made_from = {"recipe": hashlib.sha256(text).hexdigest(), **{path.name: digest(path) for path in sources}}
    return {"verb": verb, "versions": versions, "from": made_from}


def hash_files(folder: Path) -> dict[str, str]:
    """Take the SHA-256 of each of the `kept_files`, by name."""
    return {name: digest(file) for name, file in kept_files(folder).items()}


def kept_files(folder: Path) -> dict[str, Path]:
    """List a folder's files by name: all but made.json and hidden ones, which desktops and file servers leave."""
    files = {file.relative_to(folder): file for file in sorted(folder.rglob("*")) if file.is_file()}
    shown = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): file for name, file in shown.items() if name.as_posix() != "made.json"}


def fits(file: Path, made: dict[str, Any]) -> bool:
    """Return whether an artefact exists and was made from the current sources. Raise ArtifactError if damaged."""
    if not file.exists():
        return False
    content = read_json(file)
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} is damaged. Remove it and run the stage that makes it again.")
    then = content.get("made")
    return isinstance(then, dict) and then.get("from") == made["from"]


def seconds_of(run: RunDir) -> dict[str, float]:
    """Return how many seconds each stage took so far. Raise ArtifactError where the record is damaged."""
    file = run.path / "seconds.json"
    seconds = read_json(file) if file.exists() else {}
    if not isinstance(seconds, dict) or not all(isinstance(value, int | float) for value in seconds.values()):
        raise ArtifactError(f"{file} is damaged. Remove it; only the time taken so far is lost.")
    return seconds


@contextmanager
def timed(run: RunDir, name: str) -> Iterator[None]:
    """Add the block's duration to the stage's seconds, if the run has begun; interrupted attempts count, too."""
    before, start = seconds_of(run), time.monotonic()

    def keep() -> None:
        if run.exists():
            total = before.get(name, 0.0) + time.monotonic() - start
            write_json(run.path / "seconds.json", before | {name: total})

    try:
        yield
    except BaseException:
        with suppress(ArtifactError):  # report what ended the stage, not that this could not be written either
            keep()
        raise
    keep()


def slug(name: str) -> str:
    """Turn a name into one that a file may have."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")
