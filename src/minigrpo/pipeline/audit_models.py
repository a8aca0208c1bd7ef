"""Hold model files to a run: each file by its hash in the run's seals, and every weight of a merged model again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigrpo.delivery.artifacts.source import source_of
from minigrpo.errors import ArtifactError, MinigrpoError, command_line
from minigrpo.pipeline.audit_chain import Findings
from minigrpo.pipeline.evidence import WEIGHTS
from minigrpo.runs.manifest import existing_result, hash_files, kept_files, read_sealed
from minigrpo.runs.rundir import RunDir, digest
from minigrpo.utils.paths import user_path


@dataclass(frozen=True, slots=True)
class SealedModels:
    """The hashes of what was made of a run: of its result, its merged model, its GGUF files; each with its name."""

    names: dict[str, str]
    merged: dict[str, Any] | None

    def is_merged(self, folder: Path) -> bool:
        """Tell whether a folder holds every file of the merged model."""
        return self.merged is not None and self.merged["sha256"].items() <= hash_files(folder).items()


def read_seals(run: RunDir) -> SealedModels:
    """Read what the run's seals name. Raises ArtifactError where one was changed, or is of another model."""
    trained = existing_result(run)
    names = {sha256: f"{trained.name}/{name}" for name, sha256 in hash_files(trained).items()}
    merged, gguf = (_seal(run, folder) for folder in (run.merged, run.gguf))
    if merged is not None:
        if merged["made"]["from"].get(trained.name) != digest(trained):
            raise ArtifactError(f"The seal of {run.merged.name}/ is of another {trained.name} than the run's.")
        names |= {sha256: f"{run.merged.name}/{name}" for name, sha256 in merged["sha256"].items()}
    for name, entry in (gguf or {"files": {}})["files"].items():
        if merged is None or entry["from"]["model"] != merged["sha256"]:
            raise ArtifactError(f"The seal of {run.gguf.name}/ says that {name} is of another merged model.")
        names[entry["sha256"]] = f"{run.gguf.name}/{name}"
    return SealedModels(names, merged)


def _seal(run: RunDir, folder: Path) -> dict[str, Any] | None:
    places = (folder / "made.json", run.seals / f"{folder.name}.json")
    return next((read_sealed(place) for place in places if place.is_file()), None)


def check_models(run: RunDir, models: Sequence[Path], found: Findings) -> list[Path]:
    """Hold files, and the files of folders, to the run's seals. Return the folders that are the merged model.

    Raises ArtifactError where one of `models` is not there.
    """
    paths = [user_path(each) for each in models]
    if gone := [path for path in paths if not path.exists()]:
        raise ArtifactError(f"{gone[0]} is not there, so it cannot be held to {run.path}.")
    if not paths:
        _say_what_is_elsewhere(run, found)
        return []
    try:
        seals = read_seals(run)
    except ArtifactError as fault:
        found.faults.append(str(fault))
        return []
    for path in paths:
        _check_model(run, path, seals, found)
    return [path for path in paths if path.is_dir() and seals.is_merged(path)]


def _check_model(run: RunDir, path: Path, seals: SealedModels, found: Findings) -> None:
    files = {path.name: path} if path.is_file() else kept_files(path)
    known, faults, others = list[str](), list[str](), list[str]()
    for name, file in files.items():
        if own := seals.names.get(digest(file)):
            known.append(own)
        elif file.suffix in (*WEIGHTS, ".gguf"):
            faults.append(f"{file} is no file of {run.path}: none of its seals has this hash.")
        else:
            others.append(name)
    if not known and not faults:
        faults.append(f"{path} holds no file of {run.path}.")
    found.check(f"{path} is of this run: the same bytes as {', '.join(sorted(known))}.", iter(faults))
    if others:
        found.unshown.append(f"{path}: the run's seals do not name {', '.join(sorted(others))}.")


def _say_what_is_elsewhere(run: RunDir, found: Findings) -> None:
    sealed = [folder for folder in (run.merged, run.gguf) if (run.seals / f"{folder.name}.json").is_file()]
    if away := [f"{folder.name}/" for folder in sealed if not folder.exists()]:
        hold = command_line("minigrpo", "audit", run.path, "--model", "FOLDER")
        words = "is not here" if len(away) == 1 else "are not here"
        found.unshown.append(
            f"{' and '.join(away)} {words}, but their hashes. Hold what you have to them: {hold} FOLDER"
        )


def merged_faults(run: RunDir, folder: Path, *, base: str | None = None) -> Iterator[str]:
    """Yield what is wrong with the numbers of a merged model of the run. `base`: where the base lies here."""
    import torch

    from minigrpo.delivery.parity.weights import prove_weights
    from minigrpo.models.model_files import open_base

    try:
        original, adapter = source_of(run, base=base).open()
        seal = _seal(run, run.merged)
        assert seal is not None, "whoever calls has found the seal"
        fault = prove_weights(open_base(folder), original, adapter, getattr(torch, seal["dtype"])).fault
    except MinigrpoError as error:
        fault = str(error)
    if fault:
        yield f"{folder}: {fault}"
