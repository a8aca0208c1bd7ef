"""Export a merged model as folders that vLLM reads, each compared with the model, weight by weight, before it gets its
name.

    pack      by llm-compressor, in an environment of its own, without calibration data
    prove     every tensor, unpacked here, against the merged model's (weights.py)
    measure   distributions on held texts, where that environment can run the model: told, not judged
    rename    only after the proof; a folder that fails it is kept with .rejected in its name

A folder that was already made from the same model is not made again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.delivery.artifacts.merged_weights import weight_bytes
from minigrpo.delivery.artifacts.source import find_exportable, read_seal, require_replaceable, seal_folder
from minigrpo.delivery.compressed.compressor import Compressor, find_compressor
from minigrpo.delivery.compressed.schemes import SCHEMES, PackingPlan, Scheme, packing_plan
from minigrpo.delivery.compressed.weights import prove_packed
from minigrpo.delivery.gguf.parity import GgufReference, describe_texts, gguf_reference
from minigrpo.delivery.parity.compare import compare_texts
from minigrpo.delivery.parity.kl import record_parity
from minigrpo.delivery.parity.table import format_kl
from minigrpo.delivery.parity.texts import StoredLogprobs
from minigrpo.errors import ArtifactError, ModelError, command_line
from minigrpo.models.model_files import BaseFiles, open_base
from minigrpo.runs.manifest import hash_files, slug
from minigrpo.runs.rundir import REJECTED, SPARE, RunDir, complete_folder, report_full_disk
from minigrpo.ui.progress import Report, stage
from minigrpo.ui.screen import Screen
from minigrpo.ui.tables import plain_table, titled
from minigrpo.utils.paths import user_path
from minigrpo.versions import installed

CompressVerdict = Literal["weights proved", "there already"]
_STEPS = 3
"""Steps of each format, for the progress: pack, prove, measure."""


@dataclass(frozen=True, slots=True)
class CompressedFolder:
    """One folder. `bits`: a weight, over the whole folder. `proof`: of the weights. `rows`: distances from the merged
    model on texts; none where they were not measured. `notes`: what the user should know, in sentences."""

    folder: Path
    format: str
    verdict: CompressVerdict
    bits: float
    proof: dict[str, Any]
    rows: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class Compressed:
    """The result. `by`: the program that wrote the numbers."""

    by: str
    folders: tuple[CompressedFolder, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"by": self.by, "folders": [each.to_dict() for each in self.folders]}


@dataclass(frozen=True, slots=True)
class CompressJob:
    """What is packed, by what, and to where: `parent` holds the folders, which are named after `name`."""

    model: Path
    run: RunDir | None
    parent: Path
    name: str
    base: BaseFiles
    compressor: Compressor
    out: Path | None
    sums: dict[str, str]

    def target(self, scheme: Scheme) -> Path:
        return self.parent / f"{self.name}-{scheme.name}"

    def command(self, scheme: Scheme) -> str:
        out = ("--out", self.out) if self.out else ()
        subject = self.run.path if self.run else self.model
        return command_line("minigrpo", "export", subject, "--format", scheme.name, *out)

    def made(self, scheme: Scheme) -> dict[str, Any]:
        versions = {package: installed(package) for package in ("minigrpo", "transformers")}
        made_from = {"model": self.sums, "compressor": self.compressor.name, "preset": scheme.preset}
        return {"verb": "export", "versions": versions, "from": made_from}


def compress(
    path: RunDir | Path,
    schemes: Sequence[Scheme] = (SCHEMES["FP8"],),
    *,
    out: Path | None = None,
    compressor: Path | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Compressed:
    """Pack a run's merged model, named by either, or a model folder, into folders in `out` (RUN/compressed, or beside
    the model's).

    `compressor`: the python that has llm-compressor. `force`: make existing folders again. Raises MinigrpoError where
    nothing can be made, ArtifactError where a folder is not the merged model.
    """
    job = _compress_job(path, out, compressor)
    plans = {scheme.name: packing_plan(job.base, scheme) for scheme in schemes}
    done = {scheme.name: found for scheme in schemes if not force and (found := _existing(job, scheme))}
    for scheme in schemes if force else ():
        if job.target(scheme).exists():
            require_replaceable(job.target(scheme), "export")
    missing = [scheme for scheme in schemes if scheme.name not in done]
    total = _STEPS * len(missing) + 1
    with stage("export", total if missing else 0, Screen(stderr=True, quiet=quiet)) as report:
        if missing:
            report(0, total, "what the merged model says")
            reference = gguf_reference(job.model, job.run)
        for count, scheme in enumerate(missing):
            step = partial(_report_step, report, _STEPS * count + 1, total)
            done[scheme.name] = _make_folder(job, scheme, plans[scheme.name], reference, step)
        report(total, total, "")
    return Compressed(job.compressor.name, tuple(done[scheme.name] for scheme in schemes))


def _report_step(report: Report, before: int, total: int, done: int, note: str) -> None:
    report(before + done, total, note)


def _compress_job(path: RunDir | Path, out: Path | None, compressor: Path | None) -> CompressJob:
    """Find model and program. Raises ArtifactError where the path is neither a run's folder nor a model's."""
    found = find_exportable(path)
    parent = found.run.compressed if found.run else found.folder.parent
    return CompressJob(
        *(found.folder, found.run, user_path(out or parent), slug(found.name)),
        base=open_base(found.folder),
        compressor=find_compressor(compressor),
        out=out,
        sums=hash_files(found.folder),
    )


def _existing(job: CompressJob, scheme: Scheme) -> CompressedFolder | None:
    """Return the folder that exists, if it was made from the same model and is unchanged. Raises ArtifactError where
    somebody changed it."""
    target = job.target(scheme)
    if not target.exists():
        return None
    require_replaceable(target, "export")
    try:
        sealed = read_seal(target)
    except ArtifactError as fault:
        raise ArtifactError(f"{fault} To put a fresh export in its place: {job.command(scheme)} --force") from None
    if sealed["made"]["from"] != job.made(scheme)["from"]:
        return None
    if job.run is not None and sealed["rows"]:  # where parity.json was lost
        record_parity(job.run.parity, sealed["rows"], keep=True)
    facts = {name: sealed[name] for name in ("bits", "proof")}
    return CompressedFolder(
        target, scheme.name, "there already", **facts, rows=tuple(sealed["rows"]), notes=tuple(sealed["notes"])
    )


def _make_folder(
    job: CompressJob, scheme: Scheme, plan: PackingPlan, reference: GgufReference, step: Callable[[int, str], None]
) -> CompressedFolder:
    target = job.target(scheme)
    _check_room(job, scheme)
    with report_full_disk(partial(_disk_is_full, job, scheme)), complete_folder(target) as draft:
        step(0, f"{scheme.name}: llm-compressor packs the weights")
        job.compressor.make(job.model, draft, scheme, plan.ignored)
        (draft / "made.json").unlink(missing_ok=True)  # the merged model's own seal was copied
        step(1, f"{scheme.name}: comparing every weight")
        proof = prove_packed(draft, job.base, scheme, plan)
        if proof.fault:
            _reject(job, scheme, draft, proof.fault)
        step(2, f"{scheme.name}: what the folder says")
        rows, notes = _measure(job, scheme, draft, reference)
        notes = [*_kept_notes(scheme, plan), *notes]
        bits = 8 * sum(file.stat().st_size for file in draft.glob("*.safetensors")) / _count(job.base)
        facts = {"scheme": scheme.name, "bits": bits, "proof": proof.to_dict(), "rows": rows, "notes": notes}
        seal_folder(draft, job.made(scheme), {**facts, "texts": describe_texts(reference)})
    shutil.rmtree(target.with_name(target.name + REJECTED), ignore_errors=True)
    if job.run is not None and rows:
        record_parity(job.run.parity, rows)
    return CompressedFolder(target, scheme.name, "weights proved", bits, proof.to_dict(), tuple(rows), tuple(notes))


def _measure(
    job: CompressJob, scheme: Scheme, draft: Path, reference: GgufReference
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return (rows of distances, notes): what is told where the environment cannot run the model."""
    try:
        found = StoredLogprobs(job.compressor.distributions(draft, reference.held.all))
    except ModelError as fault:
        return [], [f"{scheme.name}: weights proved; probabilities not measured. {fault}"]
    except ArtifactError as fault:
        _reject(job, scheme, draft, str(fault))
        raise
    name = f"compressed {scheme.name}"
    rows = compare_texts(name, found, reference.merged, reference.held, base_kl=reference.base_kl)
    return [row.to_dict() | {"judged": False} for row in rows if row], []


def _reject(job: CompressJob, scheme: Scheme, draft: Path, fault: str) -> None:
    """Keep the folder under another name. Raises ArtifactError, always."""
    rejected = job.target(scheme).with_name(job.target(scheme).name + REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    draft.rename(rejected)
    rejected.chmod(0o755)
    raise ArtifactError(
        f"What {job.compressor.name} made of {job.model} is not that model as {scheme.name}: {fault.rstrip('.')}. It "
        f"is kept for a look: {rejected}. Again: {job.command(scheme)}; if it stays so, report it with the model's name"
    )


def _kept_notes(scheme: Scheme, plan: PackingPlan) -> list[str]:
    if not plan.kept:
        return []
    more = " and others" if len(plan.kept) > 1 else ""
    told = f"{scheme.name}: {len(plan.kept)} of {len(plan.kept) + len(plan.packed)} layers stay as they are"
    return [f"{told}: their width does not divide by {scheme.group} ({plan.kept[0]}{more})."]


def _count(base: BaseFiles) -> int:
    return sum(math.prod(stored.shape) for stored in base.tensors.values())


def _check_room(job: CompressJob, scheme: Scheme) -> None:
    there = next(folder for folder in job.target(scheme).absolute().parents if folder.is_dir())
    need, free = weight_bytes(job.base, job.base.dtype) + SPARE, shutil.disk_usage(there).free
    if free < need:
        raise ArtifactError(
            f"{scheme.name} needs up to {need / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left. Make room, or "
            "name another place: --out FOLDER"
        )


def _disk_is_full(job: CompressJob, scheme: Scheme, reason: str) -> str:
    return (
        f"{job.target(scheme)} could not be written: {reason}. Nothing half-written was left. Make room, then again: "
        f"{job.command(scheme)}"
    )


def sealed_rows(run: RunDir, faults: list[str]) -> list[Mapping[str, Any]]:
    """Return the rows of the run's folders that are unchanged and were made from the current merged model; add a fault
    for each other folder."""
    rows: list[Mapping[str, Any]] = []
    sums = hash_files(run.merged) if run.compressed.is_dir() else {}
    for folder in sorted(run.compressed.glob("*/")) if run.compressed.is_dir() else ():
        kind = folder.name.rpartition("-")[2]
        if folder.name.startswith(".") or kind not in SCHEMES:
            continue
        again = f"Export again: {command_line('minigrpo', 'export', run.path, '--format', kind, '--force')}"
        try:
            sealed = read_seal(folder)
        except ArtifactError as fault:
            faults.append(f"{fault} {again}")
            continue
        if sealed["made"]["from"]["model"] == sums:
            rows += sealed["rows"]
        else:
            faults.append(f"{folder} is stale: it was made from another {run.merged}. {again}")
    return rows


def compressed_table(compressed: Compressed) -> RenderableType:
    """Show one line for each format, then what is to be known about them."""
    table = plain_table("GB", "bits", "KL", "of training", "worst", "top-1", "other texts", "")
    for each in compressed.folders:
        figures = ["-"] * 5
        if each.rows:
            row, *others = each.rows
            figures = [format_kl(row[name]) for name in ("mean_kl", "relative_kl", "max_kl")]
            figures += [f"{row['top1']:.1%}", format_kl(others[0]["mean_kl"] if others else None)]
        size = sum(file.stat().st_size for file in each.folder.glob("*.safetensors")) / 1e9
        table.add_row(each.format, f"{size:.3g}", f"{each.bits:.2f}", *figures, each.verdict)
    title = "distance from the merged model, nats a token, as compressed-tensors reads the folder"
    lines: list[RenderableType] = [titled(title, table), Text(f"written by {compressed.by}", style="dim")]
    for each in compressed.folders:
        lines += [Text(f"note: {note}", style="yellow") for note in each.notes]
    commands = [command_line("vllm", "serve", each.folder) for each in compressed.folders]
    lines += [Text(f"exported: {command}", style="bold green") for command in commands]
    return Stack(*lines)
