"""bitsandbytes' 4-bit weights on a pretended GPU, packed and unpacked by its code for CPUs.

Import it before a GPU is pretended: bitsandbytes looks for CUDA's own calls when it is first imported beside one.

bitsandbytes turns a weight in main memory into a GPU's by exchanging its storage. A pretended tensor cannot be
exchanged like that, so packing returns a new weight, which is what `quantize_four_bit` takes anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Params4bit
from torch import Tensor

from tests.rehearsal.device import GpuTensor


class PackedGpuTensor(GpuTensor, Params4bit):
    """A packed weight on a pretended GPU: bytes, and the state that unpacks them."""

    @classmethod
    def of(cls, packed: GpuTensor, facts: dict[str, Any]) -> PackedGpuTensor:
        made: PackedGpuTensor = cls.__new__(cls, packed.host, packed.device)
        vars(made).update(facts, host=packed.host)
        return made

    def detach(self) -> PackedGpuTensor:
        return self.of(self, vars(self))

    def to(self, device: Any = None, *_: Any, **__: Any) -> PackedGpuTensor:
        assert torch.device(device).type == "cuda", "a packed weight stays on its GPU"
        return self


_pack = Params4bit._quantize


def pack(weight: Params4bit, device: torch.device | str) -> Tensor:
    """Params4bit's own `_quantize`, for a GPU."""
    if torch.device(device).type != "cuda":
        packed_here: Tensor = _pack(weight, device)
        return packed_here
    packed, state = quantize_4bit(
        weight.data.contiguous().to(device),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    weight.module.quant_state = state
    return PackedGpuTensor.of(packed, {**vars(weight), "quant_state": state, "bnb_quantized": True})


@contextmanager
def four_bit_weights() -> Iterator[None]:
    with patch.object(Params4bit, "_quantize", pack):
        yield
