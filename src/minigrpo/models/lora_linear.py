"""A linear layer and its LoRA adapter as one autograd operation: PEFT's arithmetic with a third of its calls.

PEFT computes W x and s B A x as five recorded operations and keeps an input for each. Here the layer is one operation
with a written-out gradient, and keeps x and A x alone. Two exact forms, chosen by what they cost:

    narrow   y = x W' + (drop(x) A') (s B)'  two thin products beside the wide one
    folded   y = x (W + s B A)'              where the adapter is not thin: one product, in float32 or wider only, and
                                             only where nothing is dropped

In 16 bit the thin products are taken in the base's own type, as the engine takes them. Weights in 4 bit are unpacked
for the forward pass and again for the backward pass: kept, they would be the copy that 4 bit saves. A dropout mask is
kept as one byte an input, beside the x that neighbouring layers share. Everything that is not one plain adapter (DoRA,
several adapters, an adapter switched off) goes PEFT's own way.

Shapes: N rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo.models import onednn
from minigrpo.models.onednn import linear, weight_grad
from minigrpo.utils.rng import keep_mask, name_key


class SeededDropout(nn.Module):
    """Inverted dropout: kept inputs are scaled by 1 / (1 - p). Off while `step` is None.

    `token_keys` identifies the tokens of the next pass: it must have the input's leading shape.
    """

    def __init__(self, p: float, name: str) -> None:
        super().__init__()
        self.p = p
        self.name = name
        self.step: int | None = None
        self.token_keys: Tensor | None = None

    def keep(self, x: Tensor) -> Tensor | None:
        """Return True where an entry of x is kept, or None while nothing is dropped."""
        if self.step is None:
            return None
        keys = self.token_keys
        if keys is None or keys.shape != x.shape[:-1]:
            raise RuntimeError(f"dropout of {self.name}: its tokens have no names")
        return keep_mask(keys, name_key(self.name, self.step), x.shape[-1], self.p)

    def forward(self, x: Tensor) -> Tensor:
        keep = self.keep(x)
        return x if keep is None else x * _as_bytes(keep) * (1 / (1 - self.p))


def fuse_lora_layers(model: nn.Module) -> None:
    """Fuse every LoRA layer over a plain or 4-bit linear layer of a PEFT model, for training."""
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if hasattr(module, "lora_A") and (type(base) is nn.Linear or is_four_bit(base)):
            # A bound method, not a closure: it survives copy.deepcopy.
            module.forward = types.MethodType(_fused_forward, module)


def block_base_weights(model: nn.Module) -> None:
    """Copy each frozen bfloat16 weight under an adapter into blocks, for both directions of a training pass."""
    bases = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    onednn.keep_blocks_both_ways(filter(onednn.can_block, bases))


def is_four_bit(layer: Any) -> bool:
    """Tell whether a layer's weights are in 4 bit."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def unpacked_weight(layer: Any) -> Tensor:
    """Return the layer's weights [O, I], unpacked into new memory where they are in 4 bit."""
    if not is_four_bit(layer):
        weight: Tensor = layer.weight
        return weight
    from bitsandbytes.functional import dequantize_4bit

    unpacked: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return unpacked


@dataclass(frozen=True, slots=True)
class _FixedLayer:
    """What a layer does not train. `scale`: the adapter's; `gain`: 1 / (1 - p), which makes up for dropped inputs."""

    base: nn.Linear
    scale: float
    gain: float = 1.0

    def outputs(self, x_NI: Tensor) -> Tensor:
        """Return x W' and the bias."""
        blocks = onednn.kept_blocks(self.base)
        if blocks is None:
            return linear(x_NI, unpacked_weight(self.base), self.base.bias)
        return onednn.blocked_linear(x_NI, blocks.forward_OI, self.base.bias)

    def input_grad(self, grad_NO: Tensor) -> Tensor:
        """Return g W."""
        blocks = onednn.kept_blocks(self.base)
        if blocks is None or blocks.backward_IO is None:
            return linear(grad_NO, unpacked_weight(self.base).T)
        return onednn.blocked_linear(grad_NO, blocks.backward_IO)

    def factors(self, A_RI: Tensor, B_OR: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B in the given type. The gain goes into A, which is small, and not over every input."""
        return (A_RI if self.gain == 1 else A_RI * self.gain).to(dtype), (B_OR * self.scale).to(dtype)


def _fused_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not torch.is_grad_enabled() or not _is_plain_lora(self):
        output: Tensor = type(self).forward(self, x, *args, **kwargs)
        return output
    base, name = self.base_layer, self.active_adapters[0]
    A, B, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    dropout, x_NI = self.lora_dropout[name], x.flatten(0, -2)
    keep = dropout.keep(x) if isinstance(dropout, SeededDropout) else None
    if keep is not None:
        y_NO = _NarrowLora.apply(x_NI, A, B, keep.flatten(0, -2), _FixedLayer(base, scale, 1 / (1 - dropout.p)))
    elif _should_fold(base, len(A)):
        y_NO = _FoldedLora.apply(x_NI, A, B, _FixedLayer(base, scale))
    else:
        y_NO = _NarrowLora.apply(x_NI, A, B, None, _FixedLayer(base, scale))
    return y_NO.unflatten(0, x.shape[:-1])


def _should_fold(base: nn.Linear, rank: int) -> bool:
    wide = base.weight.dtype in (torch.float32, torch.float64)
    return wide and 3 * rank * (base.in_features + base.out_features) > base.in_features * base.out_features


def _is_plain_lora(module: Any) -> bool:
    active = module.active_adapters
    if module.disable_adapters or module.merged or len(active) != 1 or active[0] not in module.lora_A:
        return False
    name = active[0]
    return (
        isinstance(module.lora_dropout[name], nn.Identity | SeededDropout)
        and not module.lora_variant.get(name)
        and module.lora_B[name].bias is None
        and not module.base_layer.weight.requires_grad
    )


class _FoldedLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, fixed: _FixedLayer) -> Tensor:
        folded_OI = torch.addmm(fixed.base.weight, B_OR, A_RI, alpha=fixed.scale)
        ctx.save_for_backward(x_NI, folded_OI, A_RI, B_OR)
        ctx.scale = fixed.scale
        return linear(x_NI, folded_OI, fixed.base.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, folded_OI, A_RI, B_OR = ctx.saved_tensors
        grad_NO = gradients[0]
        grad_OI = weight_grad(grad_NO, x_NI)
        grad_NI = linear(grad_NO, folded_OI.T) if ctx.needs_input_grad[0] else None
        return grad_NI, (B_OR.T @ grad_OI).mul_(ctx.scale), (grad_OI @ A_RI.T).mul_(ctx.scale), None


class _NarrowLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, A_RI: Tensor, B_OR: Tensor, keep_NI: Tensor | None, fixed: _FixedLayer
    ) -> Tensor:
        y_NO = fixed.outputs(x_NI)
        A, B = fixed.factors(A_RI, B_OR, y_NO.dtype)
        thin_NR = _apply_dropout(x_NI, keep_NI) @ A.T
        # The adapter's own tensors: A and B in another type or scale are soon made again, and would be held twice.
        ctx.save_for_backward(x_NI, thin_NR, keep_NI, A_RI, B_OR)
        ctx.fixed = fixed
        return y_NO.addmm_(thin_NR, B.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, thin_NR, keep_NI, A_RI, B_OR = ctx.saved_tensors
        fixed, grad_NO = ctx.fixed, gradients[0]
        A, B = fixed.factors(A_RI, B_OR, x_NI.dtype)
        grad_NR = grad_NO @ B
        grad_NI = None
        if ctx.needs_input_grad[0]:
            grad_NI = fixed.input_grad(grad_NO)
            grad_NI = (
                grad_NI.addmm_(grad_NR, A) if keep_NI is None else grad_NI.add_((grad_NR @ A).mul_(_as_bytes(keep_NI)))
            )
        grad_A = (grad_NR.T @ _apply_dropout(x_NI, keep_NI)).to(A_RI.dtype)
        grad_B = (grad_NO.T @ thin_NR).to(B_OR.dtype).mul_(fixed.scale)
        return grad_NI, grad_A if fixed.gain == 1 else grad_A.mul_(fixed.gain), grad_B, None, None


def _apply_dropout(x_NI: Tensor, keep_NI: Tensor | None) -> Tensor:
    return x_NI if keep_NI is None else x_NI * _as_bytes(keep_NI)


def _as_bytes(keep_NI: Tensor) -> Tensor:
    """Return a mask as the numbers 0 and 1: torch multiplies by them three times as fast as by truth values."""
    return keep_NI.view(torch.uint8)
