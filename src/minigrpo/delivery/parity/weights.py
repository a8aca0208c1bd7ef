"""Compare a merged folder with what PEFT makes of base and adapter, value by value.

PEFT's own code adds each pair to its weight, one layer at a time, in a skeleton of the model without other values.
Two codes that add in float32 may differ by rounding, and by no more than `float32_slack`. Rounding to the stored type
never turns an order around, so a right value lies between the two rounded ends of that interval. What the adapter does
not touch must be the base's, bit for bit.

Nothing depends on how much training changed: a merge that loses a hundredth of a small change is found as surely as one
that loses all of a large one, as long as the stored type can hold the difference.

Shapes: O outputs of a layer, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo.delivery.artifacts.merged_weights import duplicate_heads, target_dtype
from minigrpo.errors import ArtifactError, MinigrpoError, ModelError
from minigrpo.models.adapter import ADAPTER_FILE, Adapter
from minigrpo.models.loading import model_class, open_config
from minigrpo.models.model_files import BaseFiles
from minigrpo.models.peft_compat import prepare_peft, without_peft_warning
from minigrpo.models.safetensors_io import StoredTensor, read_header

UNIT_ROUNDOFF = 2.0**-24
"""Largest relative error of one rounding to float32."""
NAMED_FAULTS = 3
"""Tensors that a refusal names one by one."""


@dataclass(frozen=True, slots=True)
class TensorFault:
    """A tensor that is not what it should be. `outside`: values beyond what rounding explains, of `values`. `share`: of
    the adapter's change that is in it, by least squares; None where the adapter does not touch it."""

    name: str
    outside: int
    values: int
    share: float | None

    def __str__(self) -> str:
        what = "the base's" if self.share is None else "base + adapter"
        told = f"{self.name}: {self.outside:,} of {self.values:,} values are not {what}"
        return told if self.share is None else f"{told}, {self.share:.2f} of the adapter's change is in it"


@dataclass(frozen=True, slots=True)
class WeightsProof:
    """The result: how many tensors and values were compared, how many tensors are changed, and what is wrong."""

    tensors: int
    values: int
    changed: int
    wrong: tuple[TensorFault, ...] = ()
    names: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.wrong and not self.names

    @property
    def fault(self) -> str | None:
        """Say what is wrong, worst tensor first; None where nothing is."""
        told = [*self.names, *map(str, sorted(self.wrong, key=lambda each: -each.outside / each.values))]
        return name_faults(told) if told else None

    def to_dict(self) -> dict[str, Any]:
        wrong = [asdict(each) for each in self.wrong]
        return asdict(self) | {"wrong": wrong, "names": list(self.names), "ok": self.ok}


def name_faults(faults: Sequence[str]) -> str:
    """Name the first faults, and count the others."""
    more = f"; and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
    return f"{'; '.join(faults[:NAMED_FAULTS])}{more}"


def prove_weights(merged: BaseFiles, base: BaseFiles, adapter: Adapter, dtype: torch.dtype) -> WeightsProof:
    """Compare every tensor of a merged folder, stored in `dtype`, with the base's and what PEFT makes of it.

    Raises ModelError where PEFT has no place for a part of the adapter.
    """
    dropped = duplicate_heads(base)
    expected = {name for name in base.tensors if name not in dropped}
    names = [f"{name} is missing" for name in sorted(expected - merged.tensors.keys())]
    names += [f"{name} was added" for name in sorted(merged.tensors.keys() - expected)]
    wrong: list[TensorFault] = []
    left, values, changed = expected & merged.tensors.keys(), 0, 0
    for name, fault, count in _changed_faults(merged, base, adapter, dtype, left):
        left.discard(name)
        values, changed = values + count, changed + 1
        wrong += [fault] if fault else []
    for name in sorted(left):
        count, outside = _count_different(merged.tensors[name], base, base.tensors[name], dtype)
        values += count
        wrong += [TensorFault(name, outside, count, None)] if outside else []
    return WeightsProof(len(expected), values, changed, tuple(wrong), tuple(names))


def _changed_faults(
    merged: BaseFiles, base: BaseFiles, adapter: Adapter, dtype: torch.dtype, names: set[str]
) -> Iterator[tuple[str, TensorFault | None, int]]:
    """Yield (name, fault, values) of each tensor that the adapter changes."""
    for module, whole in adapter.whole.items():
        place = _place(base, module)
        if place in names:
            count, outside = _count_different(merged.tensors[place], base, whole, dtype, like=base.tensors[place])
            yield place, TensorFault(place, outside, count, None) if outside else None, count
    for place, before_OI, after_OI, slack_OI in _merged_by_peft(base, adapter) if adapter.pairs else ():
        if place in names:
            stored = merged.tensors[place]
            kind = target_dtype(base, base.tensors[place], dtype)
            yield place, _compare_changed(stored, kind, before_OI, after_OI, slack_OI), after_OI.numel()


def _place(base: BaseFiles, name: str) -> str:
    """Return the tensor's name on the disk. A tied head is stored as the embedding."""
    place = base.on_disk(name)
    if place is None and base.tied and name.startswith("lm_head"):
        place = next((name for name in base.tensors if name.endswith("embed_tokens.weight")), None)
    if place is None:
        raise ModelError(f"{base.folder} has no {name}, which the adapter changes.")
    return place


def _count_different(
    found: StoredTensor, base: BaseFiles, right: StoredTensor, dtype: torch.dtype, *, like: StoredTensor | None = None
) -> tuple[int, int]:
    """Return (values, values that differ from `right`, rounded to the type that `like` is merged in)."""
    kind = target_dtype(base, like or right, dtype)
    if found.shape != right.shape or found.torch_dtype != kind:
        return max(1, found.rows * found.width), max(1, found.rows * found.width)
    different = 0
    for rows in found.blocks():
        ours, theirs = found.read(*rows), right.read(*rows)
        theirs = theirs if theirs.dtype == kind else (theirs.float() if like else theirs).to(kind)
        different += int((_bits(ours) != _bits(theirs)).sum())
    return found.rows * found.width, different


def _bits(values: Tensor) -> Tensor:
    """Return the values' bits, so that NaN equals itself and -0 differs from 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(sizes[values.dtype.itemsize])


def _compare_changed(
    stored: StoredTensor, kind: torch.dtype, before_OI: Tensor, after_OI: Tensor, slack_OI: Tensor
) -> TensorFault | None:
    values = after_OI.numel()
    if stored.shape != tuple(after_OI.shape) or stored.torch_dtype != kind:
        return TensorFault(stored.name, values, values, 0.0)
    outside, against, along = 0, 0.0, 0.0
    for first, last in stored.blocks():
        found, right, slack = stored.read(first, last), after_OI[first:last], slack_OI[first:last]
        low, high = (right - slack).to(kind), (right + slack).to(kind)
        outside += int((~((found >= low) & (found <= high))).sum())
        delta = (right - before_OI[first:last]).double()
        against += float(((found.double() - before_OI[first:last].double()) * delta).sum())
        along += float(delta.square().sum())
    share = against / along if along else 1.0
    return TensorFault(stored.name, outside, values, share) if outside else None


def _merged_by_peft(base: BaseFiles, adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (name on the disk, before [O, I], after [O, I], slack [O, I]) of each layer with a pair, as PEFT merges it.

    The weights of one layer are in memory at a time, in float32.
    """
    prepare_peft()
    from peft.tuners.lora import LoraLayer

    wrapped = _skeleton(base.folder, adapter.folder)
    saved = read_header(adapter.folder / ADAPTER_FILE).tensors
    met = 0
    for name, layer in wrapped.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        place = _place(base, f"{name}.weight")
        before_OI = base.tensors[place].read().float()
        _fill_layer(layer, before_OI, {end: saved.get(f"base_model.model.{name}.{end}") for end in _ENDS})
        slack_OI = float32_slack(layer, before_OI)
        layer.merge()
        after_OI = layer.get_base_layer().weight.detach()
        layer.to("meta")
        met += 1
        yield place, before_OI, after_OI, slack_OI
    if met != len(adapter.pairs):
        raise ModelError(f"PEFT knows {met} layers of {adapter.folder}, and its file holds {len(adapter.pairs)}.")


def _skeleton(base: Path, adapter: Path) -> Any:
    """Return the base's architecture under the adapter, as PEFT builds it from its config, without any value."""
    from peft import LoraConfig, PeftModel

    config = open_config(base)
    try:
        pair = LoraConfig.from_pretrained(str(adapter))
        pair.init_lora_weights = True  # some ways to begin compute with the weights, and here are none
        with torch.device("meta"), without_peft_warning():
            return PeftModel(model_class(config).from_config(config, dtype=torch.float32), pair)
    except MinigrpoError:
        raise
    except Exception as fault:  # of PEFT, and of Python where adapter_config.json holds something else
        reason = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        raise ModelError(f"PEFT cannot put {adapter} on {base}: {reason}. Save the adapter again with PEFT.") from fault


_ENDS = (
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "lora_magnitude_vector.weight"),
)
"""What PEFT's files hold of a layer."""


def _fill_layer(layer: Any, weight_OI: Tensor, parts: Mapping[str, StoredTensor | None]) -> None:
    """Give a layer of the skeleton its values."""
    name = layer.active_adapters[0]
    layer.get_base_layer().weight = nn.Parameter(weight_OI.clone(), requires_grad=False)
    for end, stored in parts.items():
        if stored is None:
            continue
        holder, value = getattr(layer, end.removesuffix(".weight")), nn.Parameter(stored.read().float(), False)
        if isinstance(holder, nn.ParameterDict):
            holder[name] = value
        else:
            holder[name].weight = value
    if any(value.is_meta for end, value in layer.named_parameters() if "lora_" in end):
        raise ArtifactError(f"The adapter's file lacks a part of {layer}, which its config names. Train again.")


def float32_slack(layer: Any, before_OI: Tensor) -> Tensor:
    """Return how far two float32 codes may be apart in W + s B A, by the usual bound on sums of products.

    A sum of R products, scaled and added, is off by at most (R + 3) roundings of s |B| |A|, and one of the result; two
    codes by twice that. |B| |A| is at most the product of the norms. DoRA's lengths add I + 8 roundings of the result.
    """
    name = layer.active_adapters[0]
    embedding = name in getattr(layer, "lora_embedding_A", {})
    a_RI = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
    b_OR = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
    outer_OI = b_OR.detach().norm(dim=1)[:, None] * a_RI.detach().norm(dim=0)[None]
    flipped = embedding or getattr(layer, "fan_in_fan_out", False)
    product_OI = abs(float(layer.scaling[name])) * (outer_OI.T if flipped else outer_OI)
    slack_OI = 2 * UNIT_ROUNDOFF * ((a_RI.shape[0] + 3) * product_OI + before_OI.abs() + product_OI)
    magnitude = getattr(layer, "lora_magnitude_vector", {})
    if name not in magnitude:
        return slack_OI
    delta_OI = layer.get_delta_weight(name).detach()
    plain_OI = before_OI + delta_OI
    grown_O1 = (magnitude[name].weight.detach().flatten().abs() / plain_OI.norm(dim=1))[:, None]
    return grown_O1 * (slack_OI + 2 * UNIT_ROUNDOFF * (plain_OI.shape[1] + 8) * plain_OI.abs())
