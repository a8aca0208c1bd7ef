"""Compare every tensor of a GGUF file with the merged model's, value by value, as the `gguf` package unpacks it.

    F32, F16, BF16    the same number, rounded once: nothing else passes
    Q8_0              each value within half a step of its block, and what rounding the step itself to 16 bits adds
    coarser types     within the error that rounding such blocks can have, and neither larger nor smaller as a whole

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
DEVIATIONS = 6
"""Standard deviations of chance that a tensor's scale may be off: once in a thousand million tensors."""
HALF_ROUNDOFF, HALF_SUBNORMAL = 2.0**-11, 2.0**-25
"""Largest error of rounding to float16: of its value, and where that is tiny."""
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
        found = _Tally(here[name].tensor_type.name)
        if tuple(int(size) for size in reversed(here[name].shape)) != tuple(right[name].shape):
            faults.append(f"{name} has another shape")
            continue
        for unpacked_OI, right_OI in _blocks(here[name], right[name]):
            found.add(unpacked_OI, right_OI)
        values += found.values
        largest = max(largest, found.error)
        faults += [f"{name}: {fault}"] if (fault := found.fault()) else []
    return TensorsProof(True, len(right), values, largest, tuple(faults))


def _blocks(tensor: Any, source: GgufSource) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (unpacked, right) of blocks of rows, in float32."""
    import gguf
    import numpy as np

    for first, last, right in _read_blocks(source):
        part = tensor.data[first:last]
        unpacked = np.array(gguf.quants.dequantize(part, tensor.tensor_type), dtype=np.float32)
        yield torch.from_numpy(unpacked).view(right.shape), right.float()


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
        self.size = self.along = self.loss = self.chance = 0.0

    def add(self, unpacked: Tensor, right: Tensor) -> None:
        self.values += right.numel()
        if self.kind in _FLOATS:
            self.outside += int((unpacked != right.to(_FLOATS[self.kind]).float()).sum())
            return
        off, right_64 = (unpacked - right).double(), right.double()
        self.size += float(right_64.square().sum())
        self.along += float((unpacked.double() * right_64).sum())
        self.loss += float(off.square().sum())
        self.chance += float((off * right_64).square().sum())
        if self.kind == "Q8_0":
            self.outside += int((off.abs() > _q8_bound(right)).sum())

    @property
    def error(self) -> float:
        return math.sqrt(self.loss / self.size) if self.size else 0.0

    def fault(self) -> str | None:
        """Say what is wrong with the tensor; None where nothing is."""
        if self.outside:
            return f"{self.outside:,} of {self.values:,} values are beyond what {self.kind} rounds"
        if self.kind in _FLOATS or not self.size:
            return None
        loss, scale = self.loss / self.size, self.along / self.size
        if loss > (limit := worst_error(self.kind)):
            return (
                f"its error is {math.sqrt(loss):.2g} of its size, and {self.kind} makes at most {math.sqrt(limit):.2g}"
            )
        # A rounding with the least error shrinks what it rounds by the share of the error; the rest is chance.
        if abs(scale - 1) > loss + DEVIATIONS * math.sqrt(self.chance) / self.size:
            return f"it is {scale:.4f} times the merged model's, which {self.kind} does not explain"
        return None


def _q8_bound(right: Tensor) -> Tensor:
    """Return the largest error of each value: half a step, and 127 times the error of the step's own rounding."""
    blocks = right.reshape(-1, BLOCK)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    half_step = step / 2 * (1 + 1e-5)  # 1 / step is rounded to float32 before it is used
    bound = half_step + 127 * torch.maximum(step * HALF_ROUNDOFF, torch.full_like(step, HALF_SUBNORMAL))
    return bound.expand_as(blocks).reshape(right.shape).double()


def worst_error(kind: str) -> float:
    """Return the largest mean square error, over the mean square, of rounding blocks to `kind`.

    A block of 32 with 2^b levels up to its largest value m has steps of m / 2^(b-1), whose error is a twelfth of their
    square on average: m^2 / (3 4^b). At worst all of a block's size is in one value: m^2 is 32 times the mean square.
    """
    bits = re.search(r"\d", kind)
    return BLOCK / (3 * 4.0 ** int(bits.group())) if bits else 1.0
