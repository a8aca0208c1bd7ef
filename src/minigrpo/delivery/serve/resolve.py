"""Find what is to be served by its name; refuse it where it is missing, changed or stale.

a run       its GGUF file for llama.cpp, its merged model or its adapter for vLLM
a .gguf     llama.cpp
a folder    vLLM: a model, or an adapter with its base
a Hub id    vLLM: a model or an adapter
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minigrpo.config.load import load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.delivery.artifacts.merged_weights import weight_changes
from minigrpo.delivery.artifacts.source import TrainedSource, refuse_changed, require_merged, source_of
from minigrpo.delivery.gguf.header import read_header
from minigrpo.delivery.hub.client import download_adapter, read_hub_json
from minigrpo.delivery.serve.access import OPEN, Access
from minigrpo.delivery.serve.commands import LOCALHOST, VllmModel, find_vllm
from minigrpo.delivery.serve.server import STARTUP_SILENCE_S
from minigrpo.errors import ArtifactError, MinigrpoError, command_line
from minigrpo.models.adapter import require_finite_adapter
from minigrpo.runs.manifest import hash_files, read_sealed, slug
from minigrpo.runs.rundir import FoundRun, RunDir, digest, find_run
from minigrpo.utils.paths import user_path

EngineChoice = Literal["auto", "llama.cpp", "vllm"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NONSENSE = "a-gguf-file-answers-nonsense"
"""The entry of the troubleshooting page on a file that was trained and answers as if it was not."""
DEFAULT_ANSWER_TOKENS = 256
"""Length of an answer where no run tells it."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What the user chose besides the artefact. `base`: where an adapter's base lies now. `vllm`: the python that
    has vLLM. `llama_cpp`: folder of llama.cpp's programs. `parallel`: requests at a time, None for the program's own
    number."""

    engine: EngineChoice = "auto"
    host: str = LOCALHOST
    port: int = 8000
    format: str = "Q8_0"
    adapter: bool = False
    base: str | None = None
    context: int | None = None
    wait: float = STARTUP_SILENCE_S
    vllm: Path | None = None
    llama_cpp: Path | None = None
    parallel: int | None = None
    access: Access = OPEN


@dataclass(frozen=True, slots=True)
class Servable:
    """An artefact that can be served: a GGUF file (`gguf`), or what vLLM takes (`model`)."""

    name: str
    run: RunDir | None
    gguf: Path | None = None
    model: VllmModel | None = None

    @property
    def recipe(self) -> Recipe | None:
        return load_recipe(str(self.run.path)) if self.run else None

    @property
    def temperature(self) -> float:
        return self.recipe.rollout.temperature if self.recipe else 1.0

    @property
    def tokens(self) -> int:
        return self.recipe.rollout.max_tokens if self.recipe else DEFAULT_ANSWER_TOKENS


def resolve_servable(what: str, options: ServeOptions) -> Servable:
    """Find the artefact. Raises ArtifactError where it is missing, stale, or not served by the chosen engine."""
    path = user_path(what)
    place = find_run(path)
    if place and place.artefact in ("run", "merged", "gguf", "adapter", "model"):
        return _from_run(place, options)
    if path.suffix == ".gguf" or path.is_file():
        return _from_file(path, options)
    if path.is_dir():
        return _from_folder(path, options)
    if HUB_ID.fullmatch(what) and options.engine != "llama.cpp":
        return _from_hub(what, options)
    raise ArtifactError(
        f"{what} is not there. Give a run's folder, a .gguf file, a model's folder, or, for vLLM, a Hub id."
    )


def no_template(file: Path) -> str:
    """Return the sentence on a GGUF file that has no chat template."""
    return (
        f"{file} holds no chat template, which writes messages as the prompts that the model was trained on. Export "
        "the model again with its template: minigrpo export RUN, or minigrpo export FOLDER."
    )


def _from_run(place: FoundRun, options: ServeOptions) -> Servable:
    run, name = place.run, slug(place.run.path.absolute().name)
    if options.adapter or place.artefact == "adapter":
        _refuse_llama(
            options,
            f"An adapter is served unmerged by vLLM only. The whole: {command_line('minigrpo', 'serve', run.path)}",
        )
        source = source_of(run, base=options.base)
        if source.full:
            raise ArtifactError(f"{run.path} trained every parameter, so there is no adapter. Leave --adapter out.")
        return Servable(name, run, model=_adapter_with_base(source))
    if place.artefact != "gguf" and (options.engine == "vllm" or (options.engine == "auto" and _prefers_vllm(options))):
        return Servable(name, run, model=VllmModel(str(require_merged(run))))
    return Servable(name, run, gguf=require_gguf(run, options.format))


def require_gguf(run: RunDir, kind: str) -> Path:
    """Return the run's file of that type, as it was proved. Raises ArtifactError where it is missing, changed or
    stale."""
    kind = kind.upper()
    made = run.gguf / "made.json"
    entries = read_sealed(made)["files"] if made.is_file() else {}
    file = run.gguf / f"{slug(run.path.absolute().name)}-{kind}.gguf"
    if not file.is_file():  # a run whose folder was renamed has files of its old name
        old = (run.gguf / name for name, entry in entries.items() if entry["format"] == kind)
        file = next((other for other in old if other.is_file()), file)
    make = ("minigrpo", "export", run.path, "--format", kind)
    if not file.is_file():
        others = ", ".join(sorted(other.stem.rpartition("-")[2] for other in run.gguf.glob("*.gguf")))
        there = f" There are: {others} (--format)." if others else ""
        raise ArtifactError(f"{file} is missing.{there} Export first: {command_line(*make)}")
    known = entries.get(file.name)
    read_header(file)  # a damaged file is reported as such, not as changed
    if known is None or digest(file) != known["sha256"]:
        again = command_line(*make, "--force")
        raise ArtifactError(f"{file} was put there or changed by somebody. Export again: {again}")
    if run.merged.is_dir() and known["from"]["model"] != hash_files(require_merged(run)):
        again = command_line(*make)
        raise ArtifactError(f"{file} is stale: it was made from another {run.merged}. Export again: {again}")
    return file


def _from_file(path: Path, options: ServeOptions) -> Servable:
    if options.engine == "vllm" or options.adapter:
        this = command_line("minigrpo", "serve", path, "--engine", "llama.cpp")
        raise ArtifactError(f"{path}: vLLM serves model folders. This file: {this}")
    read_header(path)
    refuse_changed(path)
    place = find_run(path)
    return Servable(path.stem, place.run if place else None, gguf=path)


def _from_folder(path: Path, options: ServeOptions) -> Servable:
    if (path / "adapter_config.json").is_file():
        _refuse_llama(
            options, f"llama.cpp serves GGUF files. Merge and export: {command_line('minigrpo', 'merge', path)}"
        )
        return Servable(slug(path.absolute().name), None, model=_adapter_with_base(source_of(path, base=options.base)))
    if (path / "config.json").is_file():
        _refuse_llama(options, f"llama.cpp serves GGUF files. Export one: {command_line('minigrpo', 'export', path)}")
        return Servable(slug(path.absolute().name), None, model=VllmModel(str(path)))
    files = sorted(path.glob(f"*{options.format.upper()}.gguf"))
    if len(files) == 1:
        return _from_file(files[0], options)
    raise ArtifactError(f"{path} is neither a run's folder, nor a model's or an adapter's. Name a .gguf file itself.")


def _adapter_with_base(source: TrainedSource) -> VllmModel:
    """Return an adapter with its base. Raises ModelError where the two do not belong together, ArtifactError for an
    adapter that is not finite."""
    base, adapter = source.open()
    weight_changes(base, adapter)
    require_finite_adapter(source.folder)
    return VllmModel(str(base.folder), source.folder)


def _from_hub(repo: str, options: ServeOptions) -> Servable:
    """Return a model, after reading its settings, or an adapter, which is downloaded; its base is opened as for any
    adapter."""
    name, adapter, unread = slug(repo.rpartition("/")[2]), None, None
    try:
        adapter = read_hub_json(repo, "adapter_config.json")
    except MinigrpoError as fault:  # without a network, the cache may still hold it as a model
        unread = fault
    if adapter is not None:
        return replace(_from_folder(download_adapter(repo), options), name=name)
    try:
        return Servable(name, None, model=VllmModel(repo, config=VllmModel(repo).settings()))
    except MinigrpoError as fault:
        raise unread or fault from None


def _refuse_llama(options: ServeOptions, sentence: str) -> None:
    """Raise ArtifactError with the sentence where llama.cpp was chosen."""
    if options.engine == "llama.cpp":
        raise ArtifactError(sentence)


def _prefers_vllm(options: ServeOptions) -> bool:
    """Tell whether vLLM was named, or is installed here beside a GPU."""
    if options.vllm is not None:
        return True
    if find_vllm(None) is None:
        return False
    import torch

    return torch.cuda.is_available()
