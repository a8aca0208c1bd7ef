"""Find what was trained and the base that it began from: the same answer for every stage of delivery.

    from a run's folder      adapter (or model), base, recipe, task and logged completions
    from a PEFT adapter      its config names the base; the model's own answers serve as texts for the proof

A merged folder carries the hashes of what it was made from and of its own files (made.json, sealed): `require_merged`
returns it to later stages only while both still match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, command_line
from minigrpo.models.adapter import Adapter, read_adapter, read_adapter_config
from minigrpo.models.model_files import BaseFiles, find_base, open_base
from minigrpo.runs.manifest import existing_result, hash_files, read_sealed, settle_base, stamp, write_sealed
from minigrpo.runs.rundir import RunDir, digest, find_run
from minigrpo.utils.paths import user_path


@dataclass(frozen=True, slots=True)
class TrainedSource:
    """What was trained. `folder`: the adapter, or the model where every parameter was trained (`full`). `run`: None for
    an adapter outside of a run."""

    folder: Path
    recipe: Recipe
    base: str
    revision: str | None
    full: bool
    run: RunDir | None

    @property
    def named(self) -> Path:
        """Return the path by which the user names it on the command line."""
        return self.run.path if self.run else self.folder

    def open(self) -> tuple[BaseFiles, Adapter]:
        """Return the base's files and the adapter. For a full-parameter run the adapter replaces every tensor.

        Raises ArtifactError where the base is not the one that the run began from.
        """
        adapter = None if self.full else read_adapter(self.folder)
        base = find_base(self.base, revision=self.revision, seed=self.recipe.seed)
        if self.run is not None and self.run.base.is_file():
            settle_base(self.run, self.base, base.fingerprint())
        if adapter is None:
            trained = open_base(self.folder)
            return base, Adapter(self.folder, {}, {}, trained.tensors)
        return base, adapter

    def made(self, verb: str, base: BaseFiles) -> dict[str, Any]:
        """Return the entry for made.json: the command, its versions, and the hashes of what it started from."""
        made = stamp(verb, self.recipe, self.folder)
        made["from"]["base"] = base.fingerprint()
        return made


def source_of(path: Path | RunDir, *, base: str | None = None) -> TrainedSource:
    """Find what was trained in a run's folder or an adapter's. `base`: where the base lies now, if it was moved.

    Raises ArtifactError where nothing was trained.
    """
    found = find_run(path)
    if found and found.artefact in ("run", "adapter", "model"):
        run = found.run
        recipe, folder = load_recipe(str(run.path)), existing_result(run)
        revision = None if base else recipe.model.revision
        return TrainedSource(folder, recipe, base or recipe.model.path, revision, folder == run.model, run)
    # A warm-up's or a checkpoint's adapter is none of the run's results: it is taken for itself.
    folder = path.path if isinstance(path, RunDir) else user_path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not there. Give a run's folder (runs/NAME) or the folder of an adapter.")
    config = read_adapter_config(folder)
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise ArtifactError(f"{folder / 'adapter_config.json'} names no base model. Say which: --base MODEL")
    revision = None if base else config.get("revision")
    return TrainedSource(folder, Recipe(model={"path": named}), named, revision, False, None)  # type: ignore[arg-type]


def seal_folder(folder: Path, made: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Put made.json into a folder that is otherwise complete."""
    write_sealed(folder / "made.json", {"made": made, **facts, "sha256": hash_files(folder)})


def read_seal(folder: Path) -> dict[str, Any]:
    """Read made.json of a folder and compare every file with its hash. Raises ArtifactError, naming the file, where one
    was changed, added or removed."""
    if not (folder / "made.json").is_file():
        raise ArtifactError(f"{folder} holds no made.json, so nothing tells what it was made from.")
    sealed = read_sealed(folder / "made.json")
    then, now = sealed["sha256"], hash_files(folder)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            what = "is missing" if name not in now else "was added" if name not in then else "was changed"
            raise ArtifactError(f"{folder / name} {what} after the folder was made, so nothing is proved about it.")
    return sealed


def require_replaceable(folder: Path, verb: str) -> None:
    """Raise ArtifactError unless the folder carries our own seal of this command: nothing else is ever replaced, not
    even where the user forces it."""
    if made_by(folder) != verb or RunDir(folder).exists():
        what = "is a run" if RunDir(folder).exists() else f"was not made by minigrpo {verb}"
        raise ArtifactError(
            f"{folder} {what}, so it is not replaced. Move it away, or name another place: --out FOLDER"
        )


def made_by(folder: Path) -> str | None:
    """Return the command that a folder's made.json names; None where there is none."""
    try:
        verb = json.loads((folder / "made.json").read_text(encoding="utf-8"))["made"]["verb"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return verb if isinstance(verb, str) else None


def require_merged(run: RunDir) -> Path:
    """Return the run's merged model for later stages. Raises ArtifactError where it is missing, changed or stale."""
    words = ("minigrpo", "merge", run.path)
    merge = command_line(*words)
    if not run.merged.is_dir():
        raise ArtifactError(f"{run.merged} is missing. Merge first: {merge}")
    if not (run.merged / "made.json").is_file():
        raise ArtifactError(
            f"{run.merged} holds no made.json, so nothing tells what it was made from. Move it away, then merge again: "
            + merge
        )
    try:
        sealed = read_seal(run.merged)
    except ArtifactError as fault:
        raise ArtifactError(f"{fault} Merge again: {command_line(*words, '--force')}") from None
    trained = existing_result(run)
    if sealed["made"]["from"].get(trained.name) != digest(trained):
        raise ArtifactError(f"{run.merged} is stale: it was made from another {trained}. Merge again: {merge}")
    return run.merged


@dataclass(frozen=True, slots=True)
class ExportableModel:
    """A model folder that can be exported. `name`: of what is made from it. `run`: None for a folder of no run."""

    folder: Path
    name: str
    run: RunDir | None


def find_exportable(path: RunDir | Path) -> ExportableModel:
    """Find a run's merged model, named by either, or a model folder. Raises ArtifactError where it is neither, or where
    the merged model is missing, changed or stale."""
    found = find_run(path)
    if found and found.artefact in ("run", "merged"):
        return ExportableModel(require_merged(found.run), found.run.path.absolute().name, found.run)
    given = path.path if isinstance(path, RunDir) else user_path(path)
    here = given.absolute()
    if not (here / "config.json").is_file():
        raise ArtifactError(f"{given} is neither a run's folder nor a model's. Merge first: minigrpo merge RUN")
    return ExportableModel(here, here.name, None)


def refuse_changed(path: Path) -> None:
    """Raise ArtifactError where a run's merged model or GGUF file differs from what was proved; other files pass."""
    found = find_run(path)
    if found is None:
        return
    run, made = found.run, found.run.gguf / "made.json"
    if found.artefact == "merged":
        require_merged(run)
    known = read_sealed(made)["files"].get(path.name) if found.artefact == "gguf file" and made.is_file() else None
    if known is not None and digest(path) != known["sha256"]:
        export = command_line("minigrpo", "export", run.path, "--format", known["format"], "--force")
        raise ArtifactError(f"{path} was changed after it was proved. Export again: {export}")
