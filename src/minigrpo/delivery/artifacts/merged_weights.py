"""Add an adapter to its base, shard by shard: in float32, out of place, in blocks of rows, so that memory does not grow
with the model. Names, shards and byte order are the base's; an adapter that changes nothing leaves every byte as it is.

A 16-bit weight can only hold changes above a certain size. How much of what was learned a dtype would lose is measured
on the weights themselves (`measure_rounding`) before a dtype is chosen.

Shapes: O rows of a weight (its outputs), I columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError, ModelError
from minigrpo.models.adapter import Adapter, LoraPair
from minigrpo.models.model_files import WEIGHTS_INDEX, BaseFiles
from minigrpo.models.safetensors_io import DTYPE_NAMES, FLOAT_DTYPES, PlannedTensor, StoredTensor, write_safetensors
from minigrpo.ui.progress import Report, no_report

MAX_ROUNDING_NOISE = 0.3
"""Largest rounding noise, relative to the size of the learned change, at which a dtype is accepted. Its square is about
the relative KL that the proof will find (measured on 0.3 billion random weights: noise 0.86 and 0.31, relative KL 0.76
and 0.075); the proof's limit is 0.1."""


@dataclass(frozen=True, slots=True)
class WeightChange:
    """A change of one tensor of the base: a LoRA pair is added to it, or another tensor replaces it (`whole`)."""

    base: StoredTensor
    pair: LoraPair | None = None
    whole: StoredTensor | None = None

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (before, after) for blocks of rows, in float32. Raises ArtifactError where either is not finite."""
        left, right = self.pair.factors() if self.pair else (None, None)
        length_O = self.pair.magnitude.read().float() if self.pair and self.pair.magnitude else None
        for first, last in self.base.blocks():
            before_OI = _require_finite(self.base, self.base.read(first, last)).float()
            if self.whole is not None:
                yield before_OI, _require_finite(self.whole, self.whole.read(first, last)).float()
                continue
            assert left is not None
            assert right is not None
            delta_OI = left[first:last] @ right
            # Adding zero would turn -0 into 0; where nothing was learned, no byte may change.
            after_OI = torch.where(delta_OI == 0, before_OI, before_OI + delta_OI)
            if length_O is not None:
                lengths_O1 = torch.linalg.vector_norm(after_OI, dim=1, keepdim=True)
                after_OI = length_O.flatten()[first:last, None] / lengths_O1 * after_OI
            if not torch.isfinite(after_OI).all():
                raise ArtifactError(f"{self.base.name} is not finite with the adapter: its values are far too large.")
            yield before_OI, after_OI


def _require_finite(stored: StoredTensor, values: Tensor) -> Tensor:
    """Return `values`. Raises ArtifactError where a value of a float dtype is NaN or infinite."""
    if stored.dtype in FLOAT_DTYPES and not torch.isfinite(values).all():
        raise ArtifactError(
            f"{stored.file}: {stored.name} holds values that are not finite (NaN or infinity). Copy or download it "
            "again; if it is so at its source, no merge can mend it."
        )
    return values


def weight_changes(base: BaseFiles, adapter: Adapter) -> dict[str, WeightChange]:
    """Return the changes by the name of the base's tensor. Raises ModelError where the adapter was made for another
    base, or changes one of two tied weights."""
    found: dict[str, WeightChange] = {}
    for module, pair in adapter.pairs.items():
        stored = _find_changed_tensor(base, adapter, f"{module}.weight")
        if pair.shape != stored.shape:
            raise ModelError(
                _wrong_base_message(
                    base, adapter, f"{module} is {_format_shape(stored)} there and {_format_shape(pair)} here"
                )
            )
        found[stored.name] = WeightChange(stored, pair=pair)
    for name, whole in adapter.whole.items():
        stored = _find_changed_tensor(base, adapter, name)
        if whole.shape != stored.shape:
            raise ModelError(
                _wrong_base_message(
                    base, adapter, f"{name} is {_format_shape(stored)} there and {_format_shape(whole)} here"
                )
            )
        found[stored.name] = WeightChange(stored, whole=whole)
    if adapter.config and base.tied and (tied := sorted(name for name in found if _is_embedding_or_head(name))):
        raise ModelError(
            f"The adapter changes {tied[0]}, but in {base.folder} embedding and output head are one and the same: the "
            "other one would change with it, and the model collapse. Train without lm_head and embed_tokens."
        )
    return found


def _find_changed_tensor(base: BaseFiles, adapter: Adapter, name: str) -> StoredTensor:
    """Find the base's tensor by its name in the adapter. Raises ModelError where the base has none."""
    place = base.on_disk(name)
    if place is None and base.tied and name.startswith("lm_head") and (place := _embedding(base)) is None:
        raise ModelError(f"{base.folder} has tied embeddings, but no embedding.")
    if place is None:
        raise ModelError(_wrong_base_message(base, adapter, f"it has no {name}"))
    return base.tensors[place]


def _embedding(base: BaseFiles) -> str | None:
    return next((name for name in base.tensors if name.endswith("embed_tokens.weight")), None)


def _is_embedding_or_head(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias"))


def _wrong_base_message(base: BaseFiles, adapter: Adapter, what: str) -> str:
    named = f", which names {adapter.base}" if adapter.base else ""
    return f"{base.folder} is not the base of {adapter.folder}{named}: {what}. Give the right one: --base FOLDER"


def _format_shape(thing: StoredTensor | LoraPair) -> str:
    return " x ".join(map(str, thing.shape))


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a dtype does to the learned change. `lost`: share of the changed weights that rounding puts back to the
    base's value. `noise`: size of the rounding error over the size of the change. `fits`: whether all values stay
    finite."""

    dtype: str
    lost: float
    noise: float
    fits: bool

    @property
    def holds(self) -> bool:
        return self.fits and self.noise <= MAX_ROUNDING_NOISE


def measure_rounding(changes: Mapping[str, WeightChange], dtypes: Sequence[torch.dtype]) -> list[Rounding]:
    """Measure each dtype on the first block of rows of every changed tensor."""
    moved = signal = 0.0
    lost, noise = dict.fromkeys(dtypes, 0.0), dict.fromkeys(dtypes, 0.0)
    fits = dict.fromkeys(dtypes, True)
    for change in changes.values():
        before, after = next(change.blocks())
        moved += float((after != before).sum())
        signal += float((after - before).double().square().sum())
        for dtype in dtypes:
            stored = after.to(dtype)
            lost[dtype] += float(((after != before) & (stored == before.to(dtype))).sum())
            noise[dtype] += float((stored.float() - after).double().square().sum())
            fits[dtype] = fits[dtype] and bool(torch.isfinite(stored).all())
    return [
        Rounding(dtype_name(d), lost[d] / max(1.0, moved), math.sqrt(noise[d] / signal) if signal else 0.0, fits[d])
        for d in dtypes
    ]


def candidate_dtypes(own: torch.dtype) -> tuple[torch.dtype, ...]:
    """Return the base's own dtype, then those that can hold more."""
    return tuple(dict.fromkeys((own, torch.float16, torch.float32))) if own != torch.float32 else (own,)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def duplicate_heads(base: BaseFiles) -> set[str]:
    """Return the names of output heads that are a second copy of the embedding. Raises ModelError where the config says
    so, but their values differ."""
    heads = [name for name in base.tensors if name.endswith("lm_head.weight")] if base.tied else []
    embedding = _embedding(base)
    for name in heads:
        if embedding is None:
            continue
        one, other = base.tensors[name], base.tensors[embedding]
        same = (one.shape, one.dtype) == (other.shape, other.dtype)
        if not same or any(not torch.equal(one.read(*rows), other.read(*rows)) for rows in one.blocks()):
            raise ModelError(
                f"{base.folder}: config.json says that the embeddings are tied, but {name} is not the embedding. Set "
                "tie_word_embeddings to what is meant."
            )
    return set(heads) if embedding is not None else set()


def write_merged(
    base: BaseFiles, changes: Mapping[str, WeightChange], dtype: torch.dtype, folder: Path, report: Report = no_report
) -> None:
    """Write the weights into `folder`, under the names of the base's shards. Weights of the base's main dtype become
    `dtype`; all others, and those of the vision tower, keep theirs."""
    dropped = duplicate_heads(base)
    total = 0
    places: dict[str, str] = {}
    for done, (shard, header) in enumerate(base.headers.items()):
        report(done, len(base.headers), shard)
        kept = [stored for stored in header.tensors.values() if stored.name not in dropped]
        if not kept:
            continue
        planned = [_plan_tensor(base, stored, changes.get(stored.name), dtype) for stored in kept]
        total += write_safetensors(folder / shard, planned, header)
        places |= {stored.name: shard for stored in kept}
    if base.sharded:
        count = sum(math.prod(base.tensors[name].shape) for name in places)
        _write_index(
            folder / WEIGHTS_INDEX,
            base.folder / WEIGHTS_INDEX,
            places,
            {"total_size": total, "total_parameters": count},
        )
    report(len(base.headers), len(base.headers), "")


def weight_bytes(base: BaseFiles, dtype: torch.dtype) -> int:
    """Estimate how many bytes the weights will take on disk."""
    return sum(math.prod(t.shape) * target_dtype(base, t, dtype).itemsize for t in base.tensors.values())


def _write_index(file: Path, then: Path, places: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Write the index of the shards, with the base's metadata where it is still true."""
    index = json.loads(then.read_text(encoding="utf-8"))
    told = index.get("metadata") or {}
    told = told | {name: size for name, size in sizes.items() if name in told or name == "total_size"}
    now = {"metadata": told, "weight_map": {name: places[name] for name in index["weight_map"] if name in places}}
    text = json.dumps(index | now, indent=2) + "\n"
    file.write_text(text, encoding="utf-8", newline="\n")


def target_dtype(base: BaseFiles, stored: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if stored.torch_dtype == base.dtype and base.is_text(stored.name) else stored.torch_dtype


def _plan_tensor(
    base: BaseFiles, stored: StoredTensor, change: WeightChange | None, dtype: torch.dtype
) -> PlannedTensor:
    target = target_dtype(base, stored, dtype)
    return PlannedTensor(stored.name, DTYPE_NAMES[target], stored.shape, _cast_blocks(stored, change, target))


def _cast_blocks(stored: StoredTensor, change: WeightChange | None, target: torch.dtype) -> Iterator[Tensor]:
    after = (pair[1] for pair in change.blocks()) if change else (
        _require_finite(stored, stored.read(first, last)) for first, last in stored.blocks()
    )  # fmt: skip
    for block in after:
        cast = block.to(target)
        if target == torch.float16 and not torch.isfinite(cast).all():
            raise ModelError(
                f"{stored.name} of {stored.file} holds values beyond 65504, which float16 cannot. Merge with "
                "--dtype float32, or --dtype bfloat16."
            )
        yield cast
