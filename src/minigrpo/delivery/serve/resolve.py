"""What can be served, found by its name, and refused where it is missing, changed or stale.

a run       its GGUF file for llama.cpp, its merged model or its adapter for vLLM
a .gguf     llama.cpp
a folder    vLLM, of a model; of an adapter, with its base beside it
a Hub id    vLLM, of a model or of an adapter
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.delivery.artifacts.merged_weights import changes_of
from minigrpo.delivery.artifacts.source import TrainedSource, merged_of, refuse_changed, source_of
from minigrpo.delivery.gguf.header import read_head
from minigrpo.delivery.hub.client import adapter_on_hub, settings_on_hub
from minigrpo.delivery.serve.commands import LOCAL, Model, find_vllm
from minigrpo.delivery.serve.server import SILENCE
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.runs.manifest import hash_files, read_sealed, slug
from minigrpo.runs.rundir import FoundRun, RunDir, digest, find_run

Choice = Literal["auto", "llama.cpp", "vllm"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TOKENS = 256
"""Of an answer outside of a run."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user chose, beyond the artefact itself. `base`: of an adapter, where it lies now.
    `vllm`: the python that has it. `llama_cpp`: its programs."""

    engine: Choice = "auto"
    host: str = LOCAL
    port: int = 8000
    format: str = "Q8_0"
    adapter: bool = False
    base: str | None = None
    context: int | None = None
    wait: float = SILENCE
    vllm: Path | None = None
    llama_cpp: Path | None = None


@dataclass(frozen=True, slots=True)
class Servable:
    """What is served: a GGUF file (`gguf`), or what vLLM takes (`model`)."""

    name: str
    run: RunDir | None
    gguf: Path | None = None
    model: Model | None = None

    @property
    def recipe(self) -> Recipe | None:
        return load_recipe(str(self.run.path)) if self.run else None

    @property
    def temperature(self) -> float:
        return self.recipe.rollout.temperature if self.recipe else 1.0

    @property
    def tokens(self) -> int:
        return self.recipe.rollout.max_tokens if self.recipe else TOKENS


def resolve_servable(what: str, wanted: ServeOptions) -> Servable:
    """Raises ArtifactError where it is missing, stale, or nothing that the engine serves."""
    path = Path(what).expanduser()
    place = find_run(path)
    if place and place.artefact in ("run", "merged", "gguf", "adapter", "model"):
        return _of_run(place, wanted)
    if path.suffix == ".gguf" or path.is_file():
        return _of_file(path, wanted)
    if path.is_dir():
        return _of_folder(path, wanted)
    if HUB_ID.fullmatch(what) and wanted.engine != "llama.cpp":
        return _on_hub(what, wanted)
    raise ArtifactError(
        f"{what} is not there. Give a run's folder, a .gguf file, a model's folder, or, for vLLM, a Hub id."
    )


def _of_run(place: FoundRun, wanted: ServeOptions) -> Servable:
    run, name = place.run, slug(place.run.path.absolute().name)
    if wanted.adapter or place.artefact == "adapter":
        _refuse_llama(wanted, f"An adapter is served unmerged by vLLM only. The whole: minigrpo serve {run.path}")
        source = source_of(run, base=wanted.base)
        if source.full:
            raise ArtifactError(f"{run.path} trained every parameter, so there is no adapter. Leave --adapter out.")
        return Servable(name, run, model=_beside(source))
    if place.artefact != "gguf" and (wanted.engine == "vllm" or (wanted.engine == "auto" and _vllm_fits(wanted))):
        return Servable(name, run, model=Model(str(merged_of(run))))
    return Servable(name, run, gguf=gguf_of(run, wanted.format))


def gguf_of(run: RunDir, kind: str) -> Path:
    """The run's file of that type, as it was proved. Raises ArtifactError where it is missing, changed or stale."""
    kind = kind.upper()
    made = run.gguf / "made.json"
    entries = read_sealed(made)["files"] if made.is_file() else {}
    file = run.gguf / f"{slug(run.path.absolute().name)}-{kind}.gguf"
    if not file.is_file():  # a run whose folder was renamed has files of its old name
        old = (run.gguf / name for name, entry in entries.items() if entry["format"] == kind)
        file = next((other for other in old if other.is_file()), file)
    make = f"minigrpo export {run.path} --format {kind}"
    if not file.is_file():
        others = ", ".join(sorted(other.stem.rpartition("-")[2] for other in run.gguf.glob("*.gguf")))
        there = f" There are: {others} (--format)." if others else ""
        raise ArtifactError(f"{file} is missing.{there} Export first: {make}")
    known = entries.get(file.name)
    read_head(file)  # the plainest fault first
    if known is None or digest(file) != known["sha256"]:
        raise ArtifactError(f"{file} was put there or changed by somebody. Export again: {make} --force")
    if run.merged.is_dir() and known["from"]["model"] != hash_files(merged_of(run)):
        raise ArtifactError(f"{file} is stale: it was made from another {run.merged}. Export again: {make}")
    return file


def _of_file(path: Path, wanted: ServeOptions) -> Servable:
    if wanted.engine == "vllm" or wanted.adapter:
        raise ArtifactError(f"{path}: vLLM serves model folders. This file: minigrpo serve {path} --engine llama.cpp")
    read_head(path)
    refuse_changed(path)
    place = find_run(path)
    return Servable(path.stem, place.run if place else None, gguf=path)


def _of_folder(path: Path, wanted: ServeOptions) -> Servable:
    if (path / "adapter_config.json").is_file():
        _refuse_llama(wanted, f"llama.cpp serves GGUF files. Merge and export: minigrpo merge {path}")
        return Servable(slug(path.absolute().name), None, model=_beside(source_of(path, base=wanted.base)))
    if (path / "config.json").is_file():
        _refuse_llama(wanted, f"llama.cpp serves GGUF files. Export one: minigrpo export {path}")
        return Servable(slug(path.absolute().name), None, model=Model(str(path)))
    files = sorted(path.glob(f"*{wanted.format.upper()}.gguf"))
    if len(files) == 1:
        return _of_file(files[0], wanted)
    raise ArtifactError(f"{path} is neither a run's folder, nor a model's or an adapter's. Name a .gguf file itself.")


def _beside(source: TrainedSource) -> Model:
    """An adapter beside its base. Raises ModelError where the two do not belong together."""
    base, adapter = source.open()
    changes_of(base, adapter)
    return Model(str(base.folder), source.folder)


def _on_hub(repo: str, wanted: ServeOptions) -> Servable:
    """A model, whose settings are read, or an adapter, which is downloaded; its base is opened as any adapter's."""
    name, adapter, unread = slug(repo.rpartition("/")[2]), None, None
    try:
        adapter = settings_on_hub(repo, "adapter_config.json")
    except MinigrpoError as fault:  # where nobody answers, the cache may yet know it as a model
        unread = fault
    if adapter is not None:
        return replace(_of_folder(adapter_on_hub(repo), wanted), name=name)
    try:
        return Servable(name, None, model=Model(repo, config=Model(repo).settings()))
    except MinigrpoError as fault:
        raise unread or fault from None


def _refuse_llama(wanted: ServeOptions, sentence: str) -> None:
    if wanted.engine == "llama.cpp":
        raise ArtifactError(sentence)


def _vllm_fits(wanted: ServeOptions) -> bool:
    """Named, or installed here where a GPU is."""
    if wanted.vllm is not None:
        return True
    if find_vllm(None) is None:
        return False
    import torch

    return torch.cuda.is_available()
