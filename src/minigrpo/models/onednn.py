"""Matrix products in float32 on a CPU, by the library that is faster there.

torch takes them to MKL, which on AMD's processors uses half of the width of AVX-512; oneDNN, which torch has as well,
uses all of it. What decides is the processor and the number of rows alone, so a run that is resumed computes what it
would have computed. Both sum in float32; they differ by rounding.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

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


@lru_cache(maxsize=1)
def uses_onednn() -> bool:
    """Tell whether this is an AMD processor with AVX-512."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
