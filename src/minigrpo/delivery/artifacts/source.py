"""What was trained, where it lies and what it began from: the same answer for every stage of delivery.

    from a run's folder      adapter (or model), base, recipe, task and logged completions are all there
    from a PEFT adapter      its own config names the base; texts to prove it with are its own answers

A merged folder carries the hashes of what it was made from and of its own files (made.json, sealed): `merged_of` gives
it to later stages only while both still hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError
from minigrpo.models.adapter import Adapter, read_adapter, read_adapter_config
from minigrpo.models.model_files import BaseFiles, find_base, open_base
from minigrpo.runs.lock import hold
from minigrpo.runs.manifest import existing_result, hash_files, read_sealed, stamp, write_sealed
from minigrpo.runs.rundir import RunDir, digest, find_run, tidy


@dataclass(frozen=True, slots=True)
class TrainedSource:
    """`folder`: the adapter, or the model where every parameter was trained (`full`). `run`: None outside of one."""

    folder: Path
    recipe: Recipe
    base: str
    revision: str | None
    full: bool
    run: RunDir | None

    @property
    def command(self) -> str:
        """What the user names it by."""
        return str(self.run.path if self.run else self.folder)

    def open(self) -> tuple[BaseFiles, Adapter]:
        """The base's files, and what is to be changed in them; of a full-parameter run that is every tensor."""
        adapter = None if self.full else read_adapter(self.folder)
        base = find_base(self.base, revision=self.revision, seed=self.recipe.seed)
        if adapter is None:
            trained = open_base(self.folder)
            return base, Adapter(self.folder, {}, {}, trained.tensors)
        return base, adapter

    def made(self, verb: str, base: BaseFiles) -> dict[str, Any]:
        made = stamp(verb, self.recipe, self.folder)
        made["from"]["base"] = base.fingerprint()
        return made


def source_of(path: Path | RunDir, *, base: str | None = None) -> TrainedSource:
    """`base`: another place than the one that was trained on. Raises ArtifactError where there is nothing trained."""
    found = find_run(path)
    if found and found.artefact in ("run", "adapter", "model"):
        run = found.run
        recipe, folder = load_recipe(str(run.path)), existing_result(run)
        revision = None if base else recipe.model.revision
        return TrainedSource(folder, recipe, base or recipe.model.path, revision, folder == run.model, run)
    # A warm-up's or a checkpoint's adapter is none of the run's results: it is taken for itself.
    folder = path.path if isinstance(path, RunDir) else Path(path).expanduser()
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not there. Give a run's folder (runs/NAME) or the folder of an adapter.")
    config = read_adapter_config(folder)
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise ArtifactError(f"{folder / 'adapter_config.json'} names no base model. Say which: --base MODEL")
    revision = None if base else config.get("revision")
    return TrainedSource(folder, Recipe(model={"path": named}), named, revision, False, None)  # type: ignore[arg-type]


def seal_folder(folder: Path, made: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Put made.json into a folder that is complete but for it."""
    write_sealed(folder / "made.json", {"made": made, **facts, "sha256": hash_files(folder)})


def read_seal(folder: Path) -> dict[str, Any]:
    """made.json of a folder whose every file is as it was sealed. Raises ArtifactError, naming the file, if not."""
    if not (folder / "made.json").is_file():
        raise ArtifactError(f"{folder} holds no made.json, so nothing tells what it was made from.")
    sealed = read_sealed(folder / "made.json")
    then, now = sealed["sha256"], hash_files(folder)
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            what = "is missing" if name not in now else "was added" if name not in then else "was changed"
            raise ArtifactError(f"{folder / name} {what} after the folder was made, so nothing is proved about it.")
    return sealed


@contextmanager
def alone(run: RunDir) -> Iterator[None]:
    """The run's folder for this process, rid of what killed processes left in it."""
    with hold(run, lambda remark: Console(stderr=True).print(Text(remark), soft_wrap=True)):
        tidy(run)
        yield


def merged_of(run: RunDir) -> Path:
    """The run's merged model, for the stages after it. Raises ArtifactError where it is missing, changed or stale."""
    again = f"Merge again: minigrpo merge {run.path}"
    if not run.merged.is_dir():
        raise ArtifactError(f"{run.merged} is missing. Merge first: minigrpo merge {run.path}")
    try:
        sealed = read_seal(run.merged)
    except ArtifactError as fault:
        raise ArtifactError(f"{fault} {again} --force") from None
    trained = existing_result(run)
    if sealed["made"]["from"].get(trained.name) != digest(trained):
        raise ArtifactError(f"{run.merged} is stale: it was made from another {trained}. {again}")
    return run.merged


def refuse_changed(path: Path) -> None:
    """Raises ArtifactError where a merged model or a GGUF file of a run is not what was proved. Others are not ours."""
    found = find_run(path)
    if found is None:
        return
    run, made = found.run, found.run.gguf / "made.json"
    if found.artefact == "merged":
        merged_of(run)
    known = read_sealed(made)["files"].get(path.name) if found.artefact == "gguf file" and made.is_file() else None
    if known is not None and digest(path) != known["sha256"]:
        raise ArtifactError(
            f"{path} was changed after it was proved. Export again: minigrpo export {run.path} --format "
            f"{known['format']} --force"
        )
