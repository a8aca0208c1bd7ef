"""Compare every tensor of a GGUF file with the merged model's, value by value, as the `gguf` package unpacks it.

    F32, F16, BF16    the same number, rounded once: nothing else passes
    Q8_0              each value the nearest multiple of its block's step, which follows from the largest
    Q2 to Q6          each value the nearest of the levels that its block has in the file, and within the error that
                      rounding such blocks can have
    other types       within that error

No value is taken for chance: a model that was packed before, as many are published, has weights on a grid, and rounding
them to another one moves whole tensors to one side.

Names and the order of rows are mapped back for the architectures whose layout is known exactly; files of others are
held to their answers alone.

Shapes: O rows of a weight, I columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigrpo.delivery.gguf.writer import GgufSource, gguf_sources, unsupported_reason
from minigrpo.delivery.parity.weights import name_faults
from minigrpo.models.model_files import BaseFiles
from minigrpo.models.safetensors_io import StoredTensor

BLOCK = 32
"""Values that share a step, in every type."""
HALF_ROUNDOFF, HALF_SUBNORMAL = 2.0**-11, 2.0**-25
"""Largest error of rounding to float16: of its value, and where that is tiny."""
MIDDLE = 127 * 2.0**-22
"""Steps by which float32 may miss the middle between two: 127 of them, times what two roundings add."""
_WHOLE = {
    **{"Q4_0": slice(2, 18), "Q4_1": slice(4, 20), "Q5_0": slice(2, 22), "Q5_1": slice(4, 24)},
    **{"Q2_K": slice(16, 80), "Q3_K": slice(0, 96), "Q4_K": slice(16, 144), "Q5_K": slice(16, 176)},
    **{"Q6_K": slice(0, 192)},
}
"""Type -> the bytes of a block that hold its whole numbers; the others hold its steps and offsets."""
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorsProof:
    """The result. `compared`: whether the architecture's layout is known. `error`: the largest error of a tensor, its
    root mean square over the tensor's."""

    compared: bool
    tensors: int = 0
    values: int = 0
    error: float = 0.0
    faults: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        if not self.faults:
            return None
        return (
            f"It does not hold the merged model's weights: {name_faults(self.faults)}. Export again with --force; if "
            "it stays so, the model is written wrongly: report it with its name."
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"faults": list(self.faults)}


def prove_tensors(file: Path, merged: BaseFiles) -> TensorsProof:
    """Compare a file's tensors with those of the model that it was made from."""
    import gguf

    if unsupported_reason(merged.config):
        return TensorsProof(False)
    here = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    right = gguf_sources(merged)
    faults = [f"{name} is missing" for name in sorted(right.keys() - here.keys())]
    faults += [f"{name} was added" for name in sorted(here.keys() - right.keys())]
    values, largest = 0, 0.0
    for name in sorted(right.keys() & here.keys()):
        kind = here[name].tensor_type
        found = _Tally(kind.name)
        if tuple(int(size) for size in reversed(here[name].shape)) != tuple(right[name].shape):
            faults.append(f"{name} has another shape")
            continue
        for part, right_OI in _blocks(here[name], right[name]):
            found.add(_unpack(part, kind, right_OI), right_OI, _levels(part, kind, right_OI))
        values += found.values
        largest = max(largest, found.error)
        faults += [f"{name}: {fault}"] if (fault := found.fault()) else []
    return TensorsProof(True, len(right), values, largest, tuple(faults))


def _blocks(tensor: Any, source: GgufSource) -> Iterator[tuple[Any, Tensor]]:
    """Yield (packed, right) of blocks of rows: as they are in the file, and the values in float32."""
    for first, last, right in _read_blocks(source):
        yield tensor.data[first:last], right.float()


def _unpack(part: Any, kind: Any, like: Tensor) -> Tensor:
    import gguf
    import numpy as np

    return torch.from_numpy(np.array(gguf.quants.dequantize(part, kind), dtype=np.float32)).view(like.shape)


def _levels(part: Any, kind: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the first and the last level of each value's block: what a value would be were all bits of its whole
    number 0, or 1. None for a type whose levels are not evenly spaced."""
    import gguf

    if kind.name not in _WHOLE:
        return None
    ends = []
    for bits in (0, 255):
        packed = part.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
        packed[:, _WHOLE[kind.name]] = bits
        ends.append(_unpack(packed.reshape(part.shape), kind, like))
    return ends[0], ends[1]


def _read_blocks(source: GgufSource) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (first, last, values) of blocks of rows, in the file's order. Rows that change places are read at once."""
    if isinstance(source.values, StoredTensor) and source.heads is None:
        yield from ((first, last, source.values.read(first, last)) for first, last in source.values.blocks())
        return
    values = source.read()
    yield 0, len(values), values if source.heads is None else values[rotated_rows(len(values), source.heads)]


def rotated_rows(rows: int, heads: int) -> Tensor:
    """Return which of the model's rows stands in each row of the file, for q and k.

    The model rotates row j of a head together with row j + D/2 of its D rows; llama.cpp rotates neighbours. So 2j of
    the file is j of the model, and 2j + 1 is j + D/2.
    """
    row_O, width = torch.arange(rows), rows // heads
    inside_O = row_O % width
    return row_O - inside_O + inside_O // 2 + (inside_O % 2) * (width // 2)


class _Tally:
    """What the blocks of one tensor add up to."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.values = self.outside = 0
        self.size = self.loss = 0.0

    def add(self, unpacked: Tensor, right: Tensor, levels: tuple[Tensor, Tensor] | None) -> None:
        self.values += right.numel()
        if self.kind in _FLOATS:
            self.outside += int((unpacked != right.to(_FLOATS[self.kind]).float()).sum())
            return
        self.size += float(torch.linalg.vector_norm(right, dtype=torch.float64)) ** 2
        self.loss += float(torch.linalg.vector_norm(unpacked - right, dtype=torch.float64)) ** 2
        if self.kind == "Q8_0":
            self.outside += int((~_nearest_multiple(unpacked, right)).sum())
        elif levels:
            self.outside += int((~_nearest_level(unpacked, right, *levels, bits_of(self.kind))).sum())

    @property
    def error(self) -> float:
        return math.sqrt(self.loss / self.size) if self.size else 0.0

    def fault(self) -> str | None:
        """Say what is wrong with the tensor; None where nothing is."""
        if self.outside:
            return f"{self.outside:,} of {self.values:,} values are not what {self.kind} rounds them to"
        if self.kind in _FLOATS or not self.size:
            return None
        if not self.error <= (limit := math.sqrt(worst_error(self.kind))):  # NaN is not, either
            return f"its error is {self.error:.2g} of its size, and {self.kind} makes at most {limit:.2g}"
        return None


def _nearest_multiple(unpacked: Tensor, right: Tensor) -> Tensor:
    """Return where a value of a Q8_0 file is its own rounded to the nearest step.

    llama.cpp divides a block's largest value by 127, rounds all values to whole multiples of that step, and stores the
    step in float16. Near the middle between two multiples either is right: the division is done in float32.
    """
    blocks = right.reshape(-1, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    stored = step.half().double()
    whole = blocks.double() / step.double().clamp_min(torch.finfo(torch.float64).tiny)
    return ((unpacked.reshape(-1, BLOCK).double() - whole * stored).abs() <= stored * (0.5 + MIDDLE)).view(right.shape)


def _nearest_level(unpacked: Tensor, right: Tensor, first: Tensor, last: Tensor, bits: int) -> Tensor:
    """Return where a value of a file is the nearest of its block's levels, 2^bits from first to last.

    Some types look for the level before they round the step and the first level to float16: either of two levels is
    right where the middle between them is nearer than that rounding.
    """
    count = 2**bits - 1
    step = (last - first) / count
    index = ((right - first) / step).nan_to_num_(0.0).round_().clamp_(0, count)  # 0 / 0: all levels are one
    nearest = step.mul_(index).add_(first).sub_(right).abs_()
    rounding = first.abs_().add_(last.abs_()).mul_(2 * HALF_ROUNDOFF).add_(2 * HALF_SUBNORMAL * count)
    return (unpacked - right).abs_() <= nearest.add_(rounding)


def bits_of(kind: str) -> int:
    """Return the bits of a value in a type, by its name; 0 where that has no number."""
    found = re.search(r"\d", kind)
    return int(found.group()) if found else 0


def worst_error(kind: str) -> float:
    """Return the largest mean square error, over the mean square, of rounding blocks to `kind`.

    A block of 32 with 2^b levels up to its largest value m has steps of m / 2^(b-1), whose error is a twelfth of their
    square on average: m^2 / (3 4^b). At worst all of a block's size is in one value: m^2 is 32 times the mean square.
    """
    return BLOCK / (3 * 4.0**bits) if (bits := bits_of(kind)) else 1.0
