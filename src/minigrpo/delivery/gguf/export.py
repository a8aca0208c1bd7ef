"""Export a merged model as GGUF files, each proved in llama.cpp itself before it gets its name.

    convert     to floats, by llama.cpp's converter or our own writer: tensor by tensor what was merged
    quantise    from the float type that loses nothing
    prove       ids of prompts one by one; distributions against the merged model's on held texts
    rename      only after the proof; a file that fails it is kept with .rejected in its name

A format that was already made from the same model is not made again: an export that was stopped goes on.
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
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.config.load import load_recipe
from minigrpo.delivery.artifacts.merged_weights import weight_bytes
from minigrpo.delivery.artifacts.source import find_exportable, made_by
from minigrpo.delivery.gguf.converter import Converter, find_converter
from minigrpo.delivery.gguf.llamacpp import require_library
from minigrpo.delivery.gguf.modelfile import render_modelfile
from minigrpo.delivery.gguf.parity import (
    GgufProof,
    GgufReference,
    describe_texts,
    gguf_reference,
    prove_file,
    rows_of_proof,
)
from minigrpo.delivery.gguf.quantize import FLOAT_FORMATS, FORMATS, Quantised, measure_file, quantise
from minigrpo.delivery.parity.kl import record_parity
from minigrpo.delivery.parity.table import format_kl, unusable_reason
from minigrpo.errors import ArtifactError, MinigrpoError, command_line, more_at
from minigrpo.models.model_files import BaseFiles, open_base
from minigrpo.runs.manifest import hash_files, read_sealed, slug, write_sealed
from minigrpo.runs.rundir import (
    DRAFT,
    REJECTED,
    SPARE,
    RunDir,
    digest,
    enclosing_run,
    make_folder,
    report_full_disk,
    staying,
    sync,
    write_whole,
    writing,
)
from minigrpo.ui.progress import Report, stage
from minigrpo.ui.screen import Screen
from minigrpo.ui.tables import plain_table, titled
from minigrpo.utils.memory import return_freed_memory
from minigrpo.utils.paths import user_path
from minigrpo.versions import installed

ExportVerdict = Literal["proved", "measured", "rejected", "there already"]
"""measured: a type that rounds so much that no limit fits all models; the file that it was made from was proved."""
GGUF_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KEPT = ".kept"
INTERMEDIATE = ""
"""Key among the formats for a float file that nobody asked for."""


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One exported file. `bits`: a weight. `types`: number of tensors of each type. `by`: the program that wrote the
    numbers."""

    file: Path
    format: str
    verdict: ExportVerdict
    by: str
    bits: float
    types: dict[str, int]
    proof: dict[str, Any]

    @property
    def unusable(self) -> str | None:
        """Say why the file is of no use although it was not rejected, and what to take; None where it is usable."""
        return None if self.verdict == "rejected" else unusable_reason(self.proof)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"file": str(self.file), "unusable": self.unusable}


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export. `converter`: what wrote the floats. `texts`: where the held texts come from. `kept`: the
    proved float file that further formats are made from, where nobody asked for it by name."""

    folder: Path
    converter: str
    files: tuple[ExportedFile, ...]
    texts: str = ""
    kept: Path | None = None

    @property
    def ok(self) -> bool:
        return all(file.verdict != "rejected" for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        files = [file.to_dict() for file in self.files]
        kept = self.kept and str(self.kept)
        return asdict(self) | {"ok": self.ok, "folder": str(self.folder), "files": files, "kept": kept}


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What to export, and to where. `lossless`: the float type that holds the model's weights exactly. `afresh`: use
    nothing that was made before."""

    model: Path
    run: RunDir | None
    folder: Path
    name: str
    base: BaseFiles
    converter: Converter
    tools: Path | None
    made: dict[str, Any]
    afresh: bool = False

    @property
    def kept(self) -> Path:
        """Name the float file that is kept for further formats: hidden, and no .gguf, so that nobody takes it for one
        that was asked for."""
        return self.folder / f".{self.name}-{self.lossless}{KEPT}"

    @property
    def lossless(self) -> str:
        return GGUF_DTYPES.get(self.base.dtype, "F32")

    @property
    def usual_folder(self) -> Path:
        """Return where the files go unless the user names another folder."""
        return self.run.gguf if self.run else self.model.with_name(f"{self.model.name}-gguf")

    def command(self, *options: object) -> str:
        """Write the command that makes this export, with further options."""
        out = ("--out", self.folder) if self.run and self.folder != self.run.gguf else ()
        return command_line("minigrpo", "export", self.run.path if self.run else self.model, *out, *options)

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.name}-{kind}.gguf"

    def draft(self, kind: str) -> Path:
        return self.folder / f".{self.name}-{kind}.gguf.{os.getpid()}{DRAFT}"


@return_freed_memory()
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

    `llama_cpp`: sources of llama.cpp whose converter and tools are used; `writer`: auto, official or own. `force`: make
    existing formats again; only files of an earlier export are replaced. Raises MinigrpoError where nothing can be
    made; a file that fails its proof is reported in the result.
    """
    kinds = parse_formats(formats)
    require_library()
    job = replace(export_job(path, out=out, llama_cpp=llama_cpp, writer=writer), afresh=force)
    _require_own_folder(job)
    done = _finished_files(job, kinds, force)
    missing = [kind for kind in kinds if kind not in done]
    reference = None
    in_use = (job.model, job.folder, *([job.run.path] if job.run else []))
    with (
        staying(*in_use),
        report_full_disk(partial(_disk_is_full, job)),
        writing(job.folder / "made.json"),
        stage("export", len(missing), Screen(stderr=True, quiet=quiet)) as report,
    ):
        if missing:
            report(0, len(missing), "what the merged model says")
            reference = gguf_reference(job.model, job.run)
            _export_missing(job, missing, done, reference, report)
    files = tuple(done[kind] for kind in kinds)
    kept = job.kept if job.kept.is_file() else None
    return Exported(job.folder, job.converter.name, files, reference.held.source if reference else "", kept)


def parse_formats(formats: Sequence[str]) -> list[str]:
    """Return format names as llama.cpp writes them, floats first: quantised files are made from one of them. Raises
    MinigrpoError for unknown names."""
    names = list(dict.fromkeys(part.strip().upper() for text in formats for part in text.split(",") if part.strip()))
    if unknown := [name for name in names if name not in FORMATS]:
        raise MinigrpoError(f"--format {unknown[0]} is not known. There are: {', '.join(FORMATS)}")
    if not names:
        raise MinigrpoError("No format was named. For one: --format Q8_0")
    return sorted(names, key=lambda name: name not in FLOAT_FORMATS)


def export_job(path: RunDir | Path, *, out: Path | None, llama_cpp: Path | None, writer: str) -> ExportJob:
    """Find the model and the converter. Raises ArtifactError where the path is neither a run's folder nor a model's."""
    found = find_exportable(path)
    model, run = found.folder, found.run
    folder = run.gguf if run else model.with_name(f"{model.name}-gguf")
    converter = find_converter(model, llama_cpp, writer)
    versions = {package: installed(package) for package in ("minigrpo", "gguf", "xllamacpp", "transformers")}
    made = {"verb": "export", "versions": versions, "from": {"model": hash_files(model), "converter": converter.name}}
    return ExportJob(
        *(model, run, user_path(out or folder), slug(found.name)),
        base=open_base(model),
        converter=converter,
        tools=llama_cpp,
        made=made,
    )


def _sealed_entries(job: ExportJob) -> dict[str, Any]:
    """Return the entries of made.json by file name; {} where there is none."""
    file = job.folder / "made.json"
    return dict(read_sealed(file)["files"]) if file.is_file() else {}


def _require_own_folder(job: ExportJob) -> None:
    """Raise ArtifactError where the files would lie among those of a model or a run, or over what is no export."""
    folder, run = job.folder.resolve(), enclosing_run(job.folder)
    if folder == job.model.resolve() or (run and folder != job.usual_folder.resolve()):
        place = f"the run {run.path}" if run else f"the model {job.model}"
        raise ArtifactError(
            f"{job.folder} lies among the files of {place}, which no export may touch. Name another: --out FOLDER"
        )
    if os.path.lexists(job.folder / "made.json") and made_by(job.folder) != "export":
        raise ArtifactError(
            f"{job.folder / 'made.json'} was not written by minigrpo export, so it is not replaced. Move it away, or "
            "name another place: --out FOLDER"
        )


def _finished_files(job: ExportJob, kinds: Sequence[str], force: bool) -> dict[str, ExportedFile]:
    """Return formats that exist and were proved, from this model; none with `force`. Raises ArtifactError for files
    that were changed, unless with `force`, and for files that no export ever wrote."""
    known, entries = _sealed_entries(job), {}
    for kind in kinds:
        file, then = job.file(kind), known.get(job.file(kind).name)
        foreign = [] if then else [each for each in (file, file.with_suffix(".Modelfile")) if os.path.lexists(each)]
        if foreign:
            raise ArtifactError(
                f"{foreign[0]} was not written by minigrpo export, so it is not replaced. Move it away, or name "
                "another place: --out FOLDER"
            )
        if force or not file.exists():
            continue
        assert then is not None
        if digest(file) != then["sha256"]:
            again = job.command("--format", kind, "--force")
            raise ArtifactError(
                f"{file} was put there or changed by somebody. To put a fresh export in its place: {again}"
            )
        if then["from"] == job.made["from"]:
            entries[kind] = ExportedFile(
                file, kind, "there already", **{name: then[name] for name in ("by", "bits", "types", "proof")}
            )
            if job.run is not None:  # where parity.json was lost
                record_parity(job.run.parity, rows_of_proof(then["proof"]), keep=True)
    return entries


def _export_missing(
    job: ExportJob, kinds: Sequence[str], done: dict[str, ExportedFile], reference: GgufReference, report: Report
) -> None:
    """Make each missing format and add it to `done`. Quantised files are made from a proved float file, requested or
    not."""
    make_folder(job.folder)
    for count, kind in enumerate(kinds):
        report(count, len(kinds), kind)
        source = done.get(job.lossless) or done.get(INTERMEDIATE)
        if kind not in FLOAT_FORMATS and source is None:
            source = done[INTERMEDIATE] = _proved_before(job) or _make_intermediate(job, reference)
        if source is not None and source.verdict == "rejected":
            done[kind] = replace(source, format=kind)  # its source failed the proof
        else:
            done[kind] = _make_file(job, kind, source.file if source else None, reference)
    if job.file(job.lossless).is_file():
        job.kept.unlink(missing_ok=True)  # the one that was asked for serves as well
    report(len(kinds), len(kinds), "")


def _proved_before(job: ExportJob) -> ExportedFile | None:
    """Return the float file that an earlier export of this model proved and left; None where there is none."""
    if job.afresh:
        return None
    for file, then in ((job.file(job.lossless), _sealed_entries(job).get(job.file(job.lossless).name)), _kept(job)):
        if then and file.is_file() and then["from"] == job.made["from"] and digest(file) == then["sha256"]:
            facts = {name: then[name] for name in ("by", "bits", "types", "proof")}
            return ExportedFile(file, job.lossless, "there already", **facts)
    return None


def _kept(job: ExportJob) -> tuple[Path, Any]:
    seal = job.folder / "made.json"
    return job.kept, read_sealed(seal).get("kept") if seal.is_file() else None


def _make_intermediate(job: ExportJob, reference: GgufReference) -> ExportedFile:
    """Make the float file that quantised ones are made from, and keep it for further formats, under a hidden name."""
    draft = job.draft(job.lossless)
    try:
        _convert(job, job.lossless, draft)
        proof = prove_file(draft, job.lossless, reference)
        made = Quantised(job.converter.name, *measure_file(draft))
        if not proof.ok:
            return _name_or_reject(job, job.lossless, draft, made=made, proof=proof, reference=reference)
        found = ExportedFile(job.kept, job.lossless, "proved", made.by, made.bits, made.types, proof.to_dict())
        _seal(job, draft, kept=_entry(job, draft, found, reference))
        draft.replace(job.kept)
        return found
    finally:
        draft.unlink(missing_ok=True)


def _entry(job: ExportJob, draft: Path, found: ExportedFile, reference: GgufReference) -> dict[str, Any]:
    """Return what made.json tells of a file."""
    facts = {name: getattr(found, name) for name in ("format", "by", "bits", "types", "proof")}
    return {**facts, "sha256": digest(draft), "from": job.made["from"], "texts": describe_texts(reference)}


def _seal(job: ExportJob, draft: Path, *, name: str | None = None, kept: Any = None, entry: Any = None) -> None:
    """Write a file's entry into made.json before the file is renamed: an entry without its file is made again; a file
    without its entry counts as foreign."""
    seal = job.folder / "made.json"
    then = read_sealed(seal) if seal.is_file() else {}
    files = {**then.get("files", {}), **({name: entry} if name else {})}
    write_sealed(seal, {"made": job.made, "files": files, "kept": kept or then.get("kept")})
    sync(draft)


def _make_file(job: ExportJob, kind: str, source: Path | None, reference: GgufReference) -> ExportedFile:
    draft = job.folder / f".{job.name}-{kind}.new.{os.getpid()}{DRAFT}"
    try:
        if kind in FLOAT_FORMATS:
            _convert(job, kind, draft)
            made = Quantised(job.converter.name, *measure_file(draft))
        else:
            assert source is not None
            made = quantise(source, draft, kind, job.tools)
        return _name_or_reject(
            job, kind, draft, made=made, proof=prove_file(draft, kind, reference), reference=reference
        )
    finally:
        draft.unlink(missing_ok=True)


def _convert(job: ExportJob, kind: str, file: Path) -> None:
    need = weight_bytes(job.base, torch.float32 if kind == "F32" else torch.float16) + SPARE
    free = shutil.disk_usage(job.folder).free
    if free < need:
        raise ArtifactError(
            f"{job.folder} needs {need / 1e9:.2f} GB for {kind} and has {free / 1e9:.2f} GB left. Make room, then go "
            f"on with the same command, or name another place, --out FOLDER: {job.command('--format', kind)}"
        )
    job.converter.convert(job.model, file, kind, job.name)


def _name_or_reject(
    job: ExportJob, kind: str, draft: Path, *, made: Quantised, proof: GgufProof, reference: GgufReference
) -> ExportedFile:
    """Give the file its name, or that of a rejected one; only a proved file replaces an existing one."""
    if job.run is not None:
        record_parity(job.run.parity, rows_of_proof(proof.to_dict()))
    target = job.file(kind)
    rejected = target.with_name(target.name + REJECTED)
    verdict: ExportVerdict = "proved" if proof.judged else "measured"
    found = ExportedFile(target, kind, verdict, made.by, made.bits, made.types, proof.to_dict())
    if not proof.ok:
        draft.replace(rejected)
        return replace(found, file=rejected, verdict="rejected")
    _seal(job, draft, name=target.name, entry=_entry(job, draft, found, reference))
    draft.replace(target)
    rejected.unlink(missing_ok=True)
    temperature = load_recipe(str(job.run.path)).rollout.temperature if job.run else 1.0
    system = reference.system if job.run else None
    text = render_modelfile(target.name, job.model, reference.tokenizer, temperature, system)
    write_whole(target.with_suffix(".Modelfile"), text)
    return found


def _disk_is_full(job: ExportJob, reason: str) -> str:
    """Say that what is whole stays, and that the same command goes on from there."""
    free = shutil.disk_usage(job.folder).free / 1e9
    return (
        f"{job.folder} could not be written: {reason} ({free:.2f} GB left). Formats that are there are whole. Make "
        f"room, then go on with the same command: {job.command()}"
    )


def exported_table(exported: Exported) -> RenderableType:
    """Show one line for each format, the faults of those that were rejected, and the result."""
    table = plain_table("GB", "bits", "KL", "of training", "worst", "top-1", "elsewhere", "")
    for file in exported.files:
        row: Mapping[str, Any] = file.proof
        figures = (
            format_kl(row["mean_kl"]),
            format_kl(row["relative_kl"]),
            format_kl(row["max_kl"]),
            f"{row['top1']:.1%}",
            format_kl(row["elsewhere"]["mean_kl"] if row.get("elsewhere") else None),
        )
        size = f"{file.file.stat().st_size / 1e9:.3g}" if file.file.exists() else "-"
        table.add_row(file.format, size, f"{file.bits:.2f}", *figures, "unusable" if file.unusable else file.verdict)
    title = "distance from the merged model, nats a token, as llama.cpp reads the file"
    lines: list[RenderableType] = [titled(title, table), Text(f"written by {exported.converter}", style="dim")]
    for file in exported.files:
        lines += [Text(f"{file.format} rejected: {fault}", style="red") for fault in file.proof["faults"]]
        more = more_at("a-gguf-file-is-unusable")
        lines += [Text(f"{file.file.name} is {file.unusable} {more}", style="red")] if file.unusable else []
    if exported.kept:
        size = f"{exported.kept.stat().st_size / 1e9:.3g} GB"
        lines.append(Text(f"kept for further formats: {exported.kept} ({size}); remove it as you like", style="dim"))
    style = "bold green" if exported.ok else "bold red"
    lines.append(Text(f"{'exported' if exported.ok else 'not all could be exported'}: {exported.folder}", style=style))
    return Stack(*lines)
