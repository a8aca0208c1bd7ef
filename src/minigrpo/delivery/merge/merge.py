"""Merge an adapter into its base, giving a model folder that other tools can read, and prove that it is what was
trained.

    choose a dtype    the base's own, unless rounding would lose what was learned (merged_weights.py)
    write             shard by shard, into a draft folder
    compare           every weight with what PEFT makes of base and adapter (parity/weights.py)
    prove             what rounding costs: KL(merged || trained) / KL(base || trained) on held texts, at most 0.1
    rename            only after the proof; a merge that fails it is kept as merged.rejected

A full-parameter run has no adapter: its tensors replace the base's, by the same steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.config.schema import DtypeName
from minigrpo.delivery.artifacts import merged_weights
from minigrpo.delivery.artifacts.merged_weights import Rounding, WeightChange
from minigrpo.delivery.artifacts.source import (
    TrainedSource,
    read_seal,
    require_replaceable,
    seal_folder,
    source_of,
)
from minigrpo.delivery.parity.compare import (
    PACKED_ROW,
    ParityReference,
    place_of,
    prove_merged,
    trained_in_4bit,
    trained_reference,
)
from minigrpo.delivery.parity.kl import Divergence, record_parity
from minigrpo.delivery.parity.table import parity_table, proof_title
from minigrpo.delivery.parity.weights import WeightsProof, prove_weights
from minigrpo.errors import ArtifactError, command_line
from minigrpo.models.model_files import BaseFiles, open_base, write_companions
from minigrpo.runs.manifest import read_sealed
from minigrpo.runs.rundir import REJECTED, SPARE, RunDir, complete_folder, report_full_disk, staying
from minigrpo.ui.progress import Report, stage
from minigrpo.ui.screen import Screen
from minigrpo.utils.memory import return_freed_memory

MergeVerdict = Literal["merged", "nothing was learned", "not proved", "there already"]

_PARTS = 5
"""Parts of a merge, for its progress: rounding, files, weights, reference, merged model."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a merge. `rounding`: what each candidate dtype would do to the learned change. `stages`: the
    proof's rows."""

    folder: Path
    dtype: str
    verdict: MergeVerdict
    rounding: tuple[Rounding, ...] = ()
    stages: tuple[Divergence, ...] = ()
    texts: str = ""
    notes: tuple[str, ...] = ()
    weights: WeightsProof | None = None

    def to_dict(self) -> dict[str, Any]:
        stages = [row.to_dict() for row in self.stages]
        return asdict(self) | {"folder": str(self.folder), "stages": stages}


@return_freed_memory()
def merge(
    run: RunDir | Path,
    *,
    dtype: DtypeName = "auto",
    base: str | None = None,
    out: Path | None = None,
    proof: bool = True,
    force: bool = False,
    quiet: bool = False,
) -> Merged:
    """Merge what a run trained, or a PEFT adapter's folder, into `out` (RUN/merged, or beside the adapter).

    `base`: where the base lies now, if it was moved. `force`: replace a folder that was changed by hand. An existing
    merge of the same parts is not made again. Raises ArtifactError where the proof fails, ModelError where base and
    adapter do not belong together; the folder's name is then as it was before.
    """
    source = source_of(run, base=base)
    files, adapter = source.open()
    changes = merged_weights.weight_changes(files, adapter)
    target = out or (source.run.merged if source.run else source.folder.with_name(f"{source.folder.name}-merged"))
    made = source.made("merge", files)
    made["from"] |= {"asked": dtype, "proved": proof}
    if found := _existing_merge(target, made, force, source):
        return found
    if proof:
        place_of(source, files)  # what will have no room is said before anything is written
    in_use = (source.folder, files.folder, target.parent)
    with staying(*in_use), stage("merge", _PARTS, Screen(stderr=True, quiet=quiet)) as report:
        report(0, _PARTS, "what rounding would do to the change")
        chosen, measured, notes = choose_dtype(files, changes, dtype)
        _check_room(files, chosen, target)
        with report_full_disk(partial(_disk_is_full, target, source)), complete_folder(target) as draft:
            merged_weights.write_merged(files, changes, chosen, draft, partial(_report_shard, report))
            write_companions(files, source.folder, draft, chosen)
            report(2, _PARTS, "comparing every weight with PEFT's merge")
            proved = _ProvedMerge(prove_weights(open_base(draft), files, adapter, chosen))
            if proof and not proved.fault:
                proved = _prove_texts(proved.weights, source, files, draft, report)
            dtype_name = merged_weights.dtype_name(chosen)
            stages = [row.to_dict() for row in proved.stages]
            seal_folder(draft, made, {"dtype": dtype_name, "stages": stages, "weights": proved.weights.to_dict()})
            _record_or_reject(source, draft, target, proved, measured)
        report(_PARTS, _PARTS, "")
    told = (*notes, *proved.notes(source))
    return Merged(
        target, dtype_name, proved.verdict, tuple(measured), proved.stages, proved.texts, told, proved.weights
    )


@dataclass(frozen=True, slots=True)
class _ProvedMerge:
    """What was found. `fault`: what is wrong besides the distances of `stages`. No `reference`: no texts were read."""

    weights: WeightsProof
    reference: ParityReference | None = None
    stages: tuple[Divergence, ...] = ()
    broken_link: str | None = None

    @property
    def fault(self) -> str | None:
        return self.weights.fault or self.broken_link

    @property
    def verdict(self) -> MergeVerdict:
        if self.reference is None:
            return "not proved"
        return "nothing was learned" if self.reference.nothing_learned else "merged"

    @property
    def texts(self) -> str:
        return self.reference.held.source if self.reference else ""

    def notes(self, source: TrainedSource) -> list[str]:
        notes = []
        if self.reference and trained_in_4bit(source) and all(row.name != PACKED_ROW for row in self.stages):
            notes.append("How far this is from the 4-bit policy could not be told: bitsandbytes is not installed.")
        if self.reference and self.reference.nothing_learned:
            notes.append("Nothing was learned: the base and the trained policy say the same. Train longer.")
        return notes


def _prove_texts(
    weights: WeightsProof, source: TrainedSource, files: BaseFiles, draft: Path, report: Report
) -> _ProvedMerge:
    """Compare what base, trained policy and the merged draft say on texts."""
    report(3, _PARTS, "what base and trained policy say")
    reference = trained_reference(source, files, open_base(draft))
    report(4, _PARTS, "what the merged model says")
    stages, fault = prove_merged(draft, source, files, reference)
    return _ProvedMerge(weights, reference, tuple(stages), fault)


def _report_shard(report: Report, done: int, total: int = 0, note: str = "") -> None:
    report(1, _PARTS, f"writing file {min(done + 1, total)} of {total}")


def choose_dtype(
    base: BaseFiles, changes: Mapping[str, WeightChange], asked: DtypeName
) -> tuple[torch.dtype, list[Rounding], list[str]]:
    """Return the dtype, the measurements, and a note where the base's own dtype would lose what was learned."""
    if asked != "auto":
        dtype = getattr(torch, asked)
        return dtype, merged_weights.measure_rounding(changes, [dtype]), []
    tried = merged_weights.candidate_dtypes(base.dtype)
    measured = merged_weights.measure_rounding(changes, tried)
    fit = next((dtype for dtype, found in zip(tried, measured, strict=True) if found.holds), tried[-1])
    if fit == base.dtype:
        return fit, measured, []
    own = measured[0]
    note = (
        f"The base is {own.dtype}, which would leave {own.lost:.0%} of the changed weights as they were and blur the "
        f"change by {own.noise:.0%} of its size; {merged_weights.dtype_name(fit)} holds it. "
        "A longer training makes it larger."
    )
    return fit, measured, [note]


def _existing_merge(target: Path, made: Mapping[str, Any], force: bool, source: TrainedSource) -> Merged | None:
    """Return the merge that exists, if it was made from the same parts and is unchanged. Raises ArtifactError where
    somebody changed it."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise ArtifactError(f"{target} is a file. Move it away, or name another place: --out FOLDER")
    require_replaceable(target, "merge")
    if force:
        return None
    try:
        sealed = read_seal(target)
    except ArtifactError as fault:
        out = () if source.run and target == source.run.merged else ("--out", target)
        again = command_line("minigrpo", "merge", source.named, *out, "--force")
        raise ArtifactError(f"{fault} To put a fresh merge in its place: {again}") from None
    if sealed["made"]["from"] != made["from"]:
        return None
    if source.run and target == source.run.merged and sealed["stages"]:  # where parity.json was lost
        _record_proof(source.run, sealed, keep=True)
    return Merged(target, sealed["dtype"], "there already")


def _record_proof(run: RunDir, sealed: Mapping[str, Any], *, keep: bool = False) -> None:
    """Write what a merged folder's seal tells of its proof into the run's parity.json; `keep`: unless it is there."""
    record_parity(run.parity, sealed["stages"], {name: sealed.get(name) for name in ("made", "weights")}, keep=keep)


def _record_or_reject(
    source: TrainedSource,
    draft: Path,
    target: Path,
    proved: _ProvedMerge,
    measured: list[Rounding],
) -> None:
    """Record the proof. Raises ArtifactError, and renames the folder to .rejected, where it fails."""
    if source.run and proved.stages and target == source.run.merged:
        _record_proof(source.run, read_sealed(draft / "made.json"))
    failed, fault = next((row for row in proved.stages if not row.ok), None), proved.fault
    if failed is None and fault is None:
        return
    rejected = target.with_name(target.name + REJECTED)
    shutil.rmtree(rejected, ignore_errors=True)
    draft.rename(rejected)
    rejected.chmod(0o755)
    what = fault
    if failed and not fault:
        what = f"{failed.excess}. {_remedy(measured)}"
    raise ArtifactError(
        f"The merged model is not what was trained: {what} What was made is kept for a look: {rejected}",
        entry="the-merge-is-refused",
    )


def _remedy(measured: list[Rounding]) -> str:
    worst = measured[0]
    if worst.dtype == "float32":
        return "Rounding is not the cause. Is --base the model that was trained on?"
    return (
        f"{worst.dtype} leaves {worst.lost:.0%} of the changed weights as they were. Merge with --dtype float32 (or "
        "float16, eight times as fine as bfloat16), or train longer, so that the change is larger."
    )


def _check_room(base: BaseFiles, dtype: torch.dtype, target: Path) -> None:
    there = next(folder for folder in target.absolute().parents if folder.is_dir())
    need, free = merged_weights.weight_bytes(base, dtype) + SPARE, shutil.disk_usage(there).free
    if free < need:
        raise ArtifactError(
            f"{target} needs {need / 1e9:.2f} GB, and {there} has {free / 1e9:.2f} GB left. Make room, or name another "
            "place: --out FOLDER"
        )


def _disk_is_full(target: Path, source: TrainedSource, reason: str) -> str:
    """Say that there is nothing to resume."""
    again = command_line("minigrpo", "merge", source.named)
    return f"{target} could not be written: {reason}. Nothing half-written was left. Make room, then again: {again}"


def merged_table(merged: Merged) -> RenderableType:
    """Show the proof row by row, then the result."""
    lines: list[RenderableType] = []
    if merged.stages:
        stages = [row.to_dict() for row in merged.stages]
        lines.append(parity_table(stages, proof_title(stages, merged.texts)))
    if merged.weights:
        told = f"{merged.weights.values:,} weights compared with PEFT's merge, {merged.weights.changed} tensors changed"
        lines.append(Text(f"{told}: every one is the same in {merged.dtype}"))
    lines += [Text(f"note: {note}", style="yellow") for note in merged.notes]
    lines.append(Text(f"{merged.verdict}: {merged.folder} ({merged.dtype})", style="bold green"))
    return Stack(*lines)
