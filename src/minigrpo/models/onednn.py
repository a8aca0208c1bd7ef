"""Matrix products on a CPU, by the library and the layout that are faster there.

float32: torch takes them to MKL, which on AMD's processors uses half of the width of AVX-512; oneDNN, which torch has
as well, uses all of it. What decides is the processor and the number of rows alone, so a run that is resumed computes
what it would have computed. Both sum in float32; they differ by rounding.

bfloat16: oneDNN lays a weight out in blocks before it multiplies, again in every call. With few rows that takes as long
as the product, with many a tenth of it. A weight that does not change can be blocked once; the results are the same
bits.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minigrpo.utils.cpu import bfloat16_instructions

ROWS_OF_BLOCKS = 16
"""Rows that a blocked layout is chosen for. Those for 1 to 64 are as quick as each other, for any number of rows."""
LEAST_OUTPUTS = 16
"""Outputs of a weight from which its blocks give the same bits: narrower ones are summed in another order, found by
trying: with 4 to 12 outputs one of a million numbers was rounded otherwise, with 16 to 152k none.
"""
BLOCKS_ON = frozenset({"avx512_bf16", "amx_bf16"})
"""Instructions of the processors on which blocks are used. On ARM's nobody has tried them."""
_TILE = 64
"""Rows that are transposed at a time: a few are read in the cache, where a whole matrix is read in steps of a row."""
MIN_ROWS = 32
"""With fewer rows, calling oneDNN costs more than it saves."""


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Map [..., N, I] to [..., N, O]. Not differentiable: for callers with a gradient of their own, or none."""
    if x_NI.dtype == torch.float32 and x_NI.shape[-2] >= MIN_ROWS and x_NI.device.type == "cpu" and uses_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")
        return product
    return functional.linear(x_NI, weight_OI, bias_O)


def weight_grad(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """Return grad' x [O, I], the gradient of a weight. oneDNN copies its first operand, so that is the narrower one."""
    if grad_NO.shape[1] <= x_NI.shape[1]:
        return linear(grad_NO.T, x_NI.T)
    return linear(x_NI.T, grad_NO.T).T


def gains_by_blocks(dtype: torch.dtype, device: str) -> bool:
    """Tell whether weights of this type are quicker when they are blocked: bfloat16 on a CPU with it in hardware."""
    return (
        device == "cpu"
        and dtype == torch.bfloat16
        and not BLOCKS_ON.isdisjoint(bfloat16_instructions())
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def blocked(weight_OI: Tensor) -> Tensor:
    """Return a copy of a bfloat16 weight in blocks, which only the functions below can read. It has LEAST_OUTPUTS rows
    or more.
    """
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), ROWS_OF_BLOCKS)
    return copy


def blocked_linear(x: Tensor, blocked_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Map [..., I] to [..., O]: the bits of `functional.linear`. Not differentiable."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, blocked_OI, bias_O, "none", [], "")
    return product


def add_blocked_linear(y: Tensor, x: Tensor, blocked_OI: Tensor) -> Tensor:
    """Return y + x W', [..., O], rounded once: the bits of `addmm`. Not differentiable."""
    total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, y, blocked_OI, None, "add")
    return total


@dataclass(frozen=True, slots=True)
class LayerBlocks:
    """A frozen layer's weight in blocks: for its outputs, and where asked for, for the gradient of its inputs."""

    forward_OI: Tensor
    backward_IO: Tensor | None = None


def is_frozen_bfloat16(layer: Any) -> bool:
    """Tell whether this is a plain linear layer in bfloat16 whose weights are not trained."""
    return type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad


def can_block(layer: Any) -> bool:
    """Tell whether a layer's blocks give the same bits, in both directions."""
    return is_frozen_bfloat16(layer) and min(layer.weight.shape) >= LEAST_OUTPUTS


def keep_blocks(layer: Any) -> LayerBlocks:
    """Return the blocks of a frozen layer. They are made once and kept with the layer, for all who multiply by it."""
    blocks = kept_blocks(layer)
    if blocks is None:
        blocks = layer.blocks = LayerBlocks(blocked(layer.weight))
    return blocks


def keep_blocks_both_ways(layers: Iterable[Any]) -> None:
    """Make the layers' blocks for the gradient of their inputs, too, where they are missing."""
    transposed: dict[torch.Size, Tensor] = {}
    for layer in layers:
        blocks, weight_OI = keep_blocks(layer), layer.weight.detach()
        if blocks.backward_IO is None:
            # Into the same memory each time: the system takes longer to hand out new pages than the copy takes.
            room_IO = transposed.get(weight_OI.shape)
            if room_IO is None:
                room_IO = transposed[weight_OI.shape] = weight_OI.new_empty(weight_OI.shape[::-1])
            for rows, columns in zip(weight_OI.split(_TILE), room_IO.split(_TILE, 1), strict=True):
                columns.copy_(rows.T)
            layer.blocks = replace(blocks, backward_IO=blocked(room_IO))


def kept_blocks(layer: Any) -> LayerBlocks | None:
    """Return the blocks that are kept with the layer, if any."""
    return getattr(layer, "blocks", None)


@lru_cache(maxsize=1)
def uses_onednn() -> bool:
    """Tell whether this is an AMD processor with AVX-512."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
