"""A merged model -> GGUF files, each proved in llama.cpp itself before it has its name.

    convert     to floats, by llama.cpp's converter or our own writer: tensor by tensor what was merged
    quantise    from the float type that loses nothing
    prove       ids of prompts one by one; distributions against the merged model's on held texts
    name it     only now; what fails is kept under its name with .rejected

A format that is there already, from the same model, is not made again: an export that was stopped goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.text import Text

from minigrpo.config.load import load_recipe
from minigrpo.delivery.artifacts.merged_weights import bytes_of
from minigrpo.delivery.artifacts.source import alone, merged_of
from minigrpo.delivery.gguf.converter import Converter, find_converter
from minigrpo.delivery.gguf.llamacpp import require_library
from minigrpo.delivery.gguf.modelfile import modelfile
from minigrpo.delivery.gguf.parity import GgufProof, GgufReference, gguf_reference, outline, prove_file
from minigrpo.delivery.gguf.quantize import FLOATS, FORMATS, Quantised, quantise, weigh
from minigrpo.delivery.parity.kl import record
from minigrpo.delivery.parity.table import figure
from minigrpo.errors import ArtifactError, MinigrpoError
from minigrpo.models.model_files import BaseFiles, open_base
from minigrpo.runs.manifest import hash_files, read_sealed, slug, write_sealed
from minigrpo.runs.rundir import (
    DRAFT,
    REJECTED,
    SPARE,
    RunDir,
    digest,
    find_run,
    full_disk_told,
    sync,
    write_whole,
    writing,
)
from minigrpo.ui.progress import Report, stage
from minigrpo.ui.tables import plain_table, titled
from minigrpo.versions import installed

Verdict = Literal["proved", "measured", "rejected", "there already"]
"""measured: a type that rounds so much that no limit fits all models; what it is made from was proved."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
HIDDEN = ""
"""Stands among the formats for the float file that nobody asked for."""


@dataclass(frozen=True, slots=True)
class File:
    """One exported file. `bits`: a weight. `types`: how many tensors of each. `by`: who wrote its numbers."""

    file: Path
    format: str
    verdict: Verdict
    by: str
    bits: float
    types: dict[str, int]
    proof: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"file": str(self.file)}


@dataclass(frozen=True, slots=True)
class Exported:
    folder: Path
    converter: str
    files: tuple[File, ...]
    texts: str = ""

    @property
    def ok(self) -> bool:
        return all(file.verdict != "rejected" for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        files = [file.to_dict() for file in self.files]
        return asdict(self) | {"ok": self.ok, "folder": str(self.folder), "files": files}


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What is exported, and to where. `lossless`: the float type that holds the model's weights as they are."""

    model: Path
    run: RunDir | None
    folder: Path
    name: str
    base: BaseFiles
    converter: Converter
    tools: Path | None
    made: dict[str, Any]

    @property
    def lossless(self) -> str:
        return DTYPES.get(self.base.dtype, "F32")

    @property
    def command(self) -> str:
        out = f" --out {self.folder}" if self.run and self.folder != self.run.gguf else ""
        return f"minigrpo export {self.run.path if self.run else self.model}{out}"

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{kind}.gguf"

    def draft(self, kind: str) -> Path:
        return self.folder / f".{self.name}-{kind}.gguf.{os.getpid()}{DRAFT}"


def export(
    path: RunDir | Path,
    formats: Sequence[str] = ("Q8_0",),
    *,
    out: Path | None = None,
    llama_cpp: Path | None = None,
    writer: str = "auto",
    force: bool = False,
    quiet: bool = False,
) -> Exported:
    """Export a run's merged model, named by either, or a model folder, into `out` (RUN/gguf, or beside the folder).

    `llama_cpp`: sources of llama.cpp whose converter and tools are to be used; `writer`: auto, official or own.
    `force`: make again what is there. Raises MinigrpoError where nothing can be made; a file that fails its proof is
    told in the result.
    """
    kinds = chosen(formats)
    require_library()
    order = export_job(path, out=out, llama_cpp=llama_cpp, writer=writer)
    done = {} if force else _done(order, kinds)
    missing = [kind for kind in kinds if kind not in done]
    truth = gguf_reference(order.model, order.run) if missing else None
    with (
        full_disk_told(partial(_disk_is_full, order)),
        writing(order.folder / "made.json"),
        stage("export", len(missing), Console(stderr=True, quiet=quiet)) as report,
    ):
        if truth:
            _make(order, missing, done, truth, report)
    files = tuple(done[kind] for kind in kinds)
    return Exported(order.folder, order.converter.name, files, truth.held.source if truth else "")


def export_alone(path: Path, formats: Sequence[str], **options: Any) -> Exported:
    """`export`, with the run's folder for this process alone, rid of what killed exports left."""
    run = RunDir(path.expanduser())
    if not run.exists():
        return export(run.path, formats, **options)
    with alone(run):
        return export(run, formats, **options)


def chosen(formats: Sequence[str]) -> list[str]:
    """Names as llama.cpp writes them, floats first: what is quantised is made from one of them."""
    names = list(dict.fromkeys(part.strip().upper() for text in formats for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in FORMATS]:
        raise MinigrpoError(f"--format {unknown[0]} is not known. There are: {', '.join(FORMATS)}")
    if not names:
        raise MinigrpoError("No format was named. For one: --format Q8_0")
    return sorted(names, key=lambda name: name not in FLOATS)


def export_job(path: RunDir | Path, *, out: Path | None, llama_cpp: Path | None, writer: str) -> ExportJob:
    found = find_run(path)
    run = found.run if found and found.artefact in ("run", "merged") else None
    given = path.path if isinstance(path, RunDir) else Path(path).expanduser()
    here = given.absolute()
    if run:
        model, folder, name = merged_of(run), run.gguf, run.path.absolute().name
    elif (here / "config.json").is_file():
        model, folder, name = here, here.with_name(f"{here.name}-gguf"), here.name
    else:
        raise ArtifactError(f"{given} is neither a run's folder nor a model's. Merge first: minigrpo merge RUN")
    converter = find_converter(model, llama_cpp, writer)
    versions = {package: installed(package) for package in ("minigrpo", "gguf", "xllamacpp", "transformers")}
    made = {"verb": "export", "versions": versions, "from": {"model": hash_files(model), "converter": converter.name}}
    return ExportJob(
        *(model, run, (out or folder).expanduser(), slug(name)),
        base=open_base(model),
        converter=converter,
        tools=llama_cpp,
        made=made,
    )


def _known(order: ExportJob) -> dict[str, Any]:
    """What made.json says of each file; nothing where it was made from another model."""
    file = order.folder / "made.json"
    return dict(read_sealed(file)["files"]) if file.is_file() else {}


def _done(order: ExportJob, kinds: Sequence[str]) -> dict[str, File]:
    """Formats that are there and proved, from this model. Raises ArtifactError for a file that is not ours."""
    known, found = _known(order), {}
    for kind in kinds:
        file, then = order.file(kind), known.get(order.file(kind).name)
        if not file.exists():
            continue
        if then is None or digest(file) != then["sha256"]:
            raise ArtifactError(
                f"{file} was put there or changed by somebody. To put a fresh export in its place: {order.command} "
                f"--format {kind} --force"
            )
        if then["from"] == order.made["from"]:
            found[kind] = File(
                file, kind, "there already", **{name: then[name] for name in ("by", "bits", "types", "proof")}
            )
            if order.run is not None:  # where parity.json was lost
                record(order.run.parity, [then["proof"]], keep=True)
    return found


def _make(order: ExportJob, kinds: Sequence[str], done: dict[str, File], truth: GgufReference, report: Report) -> None:
    """Puts each missing format into `done`. What is quantised is made from a proved file, asked for or not."""
    order.folder.mkdir(parents=True, exist_ok=True)
    own = order.draft(order.lossless)
    try:
        for count, kind in enumerate(kinds):
            report(count, len(kinds), kind)
            source = done.get(order.lossless)
            if kind not in FLOATS and source is None:
                source = done.get(HIDDEN) or _hidden(order, own, truth)
                done[HIDDEN] = source
            if source is not None and source.verdict == "rejected":
                done[kind] = replace(source, format=kind)  # what it would be made from is wrong itself
            else:
                done[kind] = _one(order, kind, source.file if source else None, truth)
        report(len(kinds), len(kinds), "")
    finally:
        own.unlink(missing_ok=True)


def _hidden(order: ExportJob, own: Path, truth: GgufReference) -> File:
    """The float file that only the others are made from; it keeps a name only where it is wrong."""
    _convert(order, order.lossless, own)
    proof = prove_file(own, order.lossless, truth)
    if proof.ok:
        return File(own, order.lossless, "proved", order.converter.name, *weigh(own), proof.to_dict())
    made = Quantised(order.converter.name, *weigh(own))
    return _place(order, order.lossless, own, made=made, proof=proof, truth=truth)


def _one(order: ExportJob, kind: str, source: Path | None, truth: GgufReference) -> File:
    draft = order.folder / f".{order.name}-{kind}.new.{os.getpid()}{DRAFT}"
    try:
        if kind in FLOATS:
            _convert(order, kind, draft)
            made = Quantised(order.converter.name, *weigh(draft))
        else:
            assert source is not None
            made = quantise(source, draft, kind, order.tools)
        return _place(order, kind, draft, made=made, proof=prove_file(draft, kind, truth), truth=truth)
    finally:
        draft.unlink(missing_ok=True)


def _convert(order: ExportJob, kind: str, file: Path) -> None:
    need = bytes_of(order.base, torch.float32 if kind == "F32" else torch.float16) + SPARE
    free = shutil.disk_usage(order.folder).free
    if free < need:
        raise ArtifactError(
            f"{order.folder} needs {need / 1e9:.2f} GB for {kind} and has {free / 1e9:.2f} GB left. Make room, or name "
            f"another place: {order.command} --out FOLDER"
        )
    order.converter.convert(order.model, file, kind, order.name)


def _place(
    order: ExportJob, kind: str, draft: Path, *, made: Quantised, proof: GgufProof, truth: GgufReference
) -> File:
    """Give it its name, or that of a rejected one; what stood there before gives way to a proved one only."""
    if order.run is not None:
        record(order.run.parity, [proof.to_dict()])
    target = order.file(kind)
    rejected = target.with_name(target.name + REJECTED)
    verdict: Verdict = "proved" if proof.judged else "measured"
    found = File(target, kind, verdict, made.by, made.bits, made.types, proof.to_dict())
    if not proof.ok:
        draft.replace(rejected)
        return replace(found, file=rejected, verdict="rejected")
    facts = {"format": kind, "by": made.by, "bits": made.bits, "types": made.types, "proof": proof.to_dict()}
    entry = {**facts, "sha256": digest(draft), "from": order.made["from"], "texts": outline(truth)}
    # Before the file has its name: an entry without its file is made again, a file without its entry is a stranger's.
    write_sealed(order.folder / "made.json", {"made": order.made, "files": {**_known(order), target.name: entry}})
    sync(draft)
    draft.replace(target)
    rejected.unlink(missing_ok=True)
    heat = load_recipe(str(order.run.path)).rollout.temperature if order.run else 1.0
    write_whole(target.with_suffix(".Modelfile"), modelfile(target.name, order.model, truth.tokenizer, heat))
    return found


def _disk_is_full(order: ExportJob, reason: str) -> str:
    """Say that what is whole stays, and that the same command goes on from there."""
    free = shutil.disk_usage(order.folder).free / 1e9
    return (
        f"{order.folder} could not be written: {reason} ({free:.2f} GB left). Formats that are there are whole. Make "
        f"room, then go on with the same command: {order.command}"
    )


def exported_table(found: Exported) -> RenderableType:
    """One line for each format, what is wrong with those that were rejected, and the verdict."""
    table = plain_table("GB", "bits", "KL", "of training", "worst", "top-1", "")
    for file in found.files:
        row: Mapping[str, Any] = file.proof
        figures = figure(row["mean_kl"]), figure(row["relative_kl"]), figure(row["max_kl"]), f"{row['top1']:.1%}"
        size = f"{file.file.stat().st_size / 1e9:.3g}" if file.file.exists() else "-"
        table.add_row(file.format, size, f"{file.bits:.2f}", *figures, file.verdict)
    title = "distance from the merged model, nats a token, as llama.cpp reads the file"
    lines: list[RenderableType] = [titled(title, table), Text(f"written by {found.converter}", style="dim")]
    for file in found.files:
        lines += [Text(f"{file.format} rejected: {fault}", style="red") for fault in file.proof["faults"]]
    style = "bold green" if found.ok else "bold red"
    lines.append(Text(f"{'exported' if found.ok else 'not all could be exported'}: {found.folder}", style=style))
    return Stack(*lines)
