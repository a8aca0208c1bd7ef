"""A linear layer and its LoRA adapter as one step of the graph: PEFT's arithmetic with a third of its calls.

PEFT computes W x and s B A x as five recorded operations and keeps an input for each. Here the layer is one operation
with a written-out gradient, and keeps x and A x alone. Two exact forms, chosen by what they cost:

    narrow   y = x W' + (x A') (s B)'        two thin products beside the wide one
    folded   y = x (W + s B A)'              where the adapter is not thin: one product, in float32 or wider only

In 16 bit the thin products are taken in the base's own type, as the engine takes them. Everything that is not one plain
adapter (dropout, DoRA, several adapters, an adapter switched off) goes PEFT's own way.

Shapes: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def install(model: nn.Module) -> None:
    """Let every LoRA layer of a PEFT model over a plain linear layer take the fused way in training."""
    for module in model.modules():
        if hasattr(module, "lora_A") and type(getattr(module, "base_layer", None)) is nn.Linear:
            # A bound method, not a closure: it survives copy.deepcopy.
            module.forward = types.MethodType(_forward, module)


def _forward(self: Any, x: Tensor, *args: Any, **others: Any) -> Tensor:
    if not torch.is_grad_enabled() or not _is_plain(self):
        output: Tensor = type(self).forward(self, x, *args, **others)
        return output
    base, name = self.base_layer, self.active_adapters[0]
    A, B, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    wide = base.weight.dtype in (torch.float32, torch.float64)
    folds = wide and 3 * len(A) * (base.in_features + base.out_features) > base.in_features * base.out_features
    y_NO = (_Folded if folds else _Narrow).apply(x.flatten(0, -2), base, A, B, scale)
    return y_NO.unflatten(0, x.shape[:-1])


def _is_plain(module: Any) -> bool:
    active = module.active_adapters
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] not in module.lora_A:
        return False
    name = active[0]
    return (
        isinstance(module.lora_dropout[name], nn.Identity)
        and not module.lora_variant.get(name)
        and module.lora_B[name].bias is None
        and not module.base_layer.weight.requires_grad
    )


class _Folded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, base: nn.Linear, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
        folded_OI = torch.addmm(base.weight, B_OR, A_RI, alpha=scale)
        ctx.save_for_backward(x_NI, folded_OI, A_RI, B_OR)
        ctx.scale = scale
        return linear(x_NI, folded_OI, base.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, folded_OI, A_RI, B_OR = ctx.saved_tensors
        slope_NO = gradients[0]
        slope_OI = slope_NO.T @ x_NI
        slope_NI = slope_NO @ folded_OI if ctx.needs_input_grad[0] else None
        return slope_NI, None, (B_OR.T @ slope_OI).mul_(ctx.scale), (slope_OI @ A_RI.T).mul_(ctx.scale), None


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, base: nn.Linear, A_RI: Tensor, B_OR: Tensor, scale: float) -> Tensor:
        W_OI = base.weight
        A, B = A_RI.to(W_OI.dtype), (B_OR * scale).to(W_OI.dtype)
        thin_NR = x_NI @ A.T
        ctx.save_for_backward(x_NI, thin_NR, W_OI, A, B)
        ctx.scale, ctx.dtype = scale, A_RI.dtype
        return torch.addmm(linear(x_NI, W_OI, base.bias), thin_NR, B.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, thin_NR, W_OI, A, B = ctx.saved_tensors
        slope_NO = gradients[0]
        slope_NR = slope_NO @ B
        slope_NI = (slope_NO @ W_OI).addmm_(slope_NR, A) if ctx.needs_input_grad[0] else None
        slope_A = (slope_NR.T @ x_NI).to(ctx.dtype)
        slope_B = (slope_NO.T @ thin_NR).to(ctx.dtype).mul_(ctx.scale)
        return slope_NI, None, slope_A, slope_B, None
