"""An adapter as arithmetic: which low-rank pair stands beside a linear layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from minigrpo.errors import ModelError


def low_rank(module: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A [r, in], B [out, r], scale) of the active PEFT LoRA adapter on a layer; None for a bare or switched-off one.

    The layer computes x W' + scale * (x A') B'. Raises ModelError for adapters that are more than one such pair.
    """
    if not hasattr(module, "lora_A") or module.disable_adapters:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return None
    if len(active) > 1 or module.merged or getattr(module, "use_dora", {}).get(active[0], False):
        raise ModelError("only one plain LoRA adapter at a time can be sampled from: use --rollout.engine transformers")
    name = active[0]
    return module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])
