"""torch's attention kernel for GPUs, done on the CPU's numbers.

A torch without CUDA would take the plain products, which it takes on none of NVIDIA's where it can help it. So it is
told to take the memory-efficient kernel: every card has that, with masks and without. What torch would choose on a
card, the rehearsal does not show. On Apple's GPUs products are taken.

Shapes: B rows, H heads, L queries, S keys, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def attention_of(kind: str) -> Iterator[None]:
    """Let `scaled_dot_product_attention` of a GPU's tensors be the memory-efficient kernel; on Apple's, products."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", *KERNELS[kind])
    try:
        yield
    finally:
        library._destroy()


def _products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *given: Any, **named: Any
) -> Tensor:
    bias = _bias(attn_mask, query)
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(query, key, value, bias, *given, **named)[0]
    return out


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Return a boolean mask as an additive one."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and query.shape[-3] != key.shape[-3]:  # the kernel knows no shared key heads: torch takes products
        return _products(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)
    bias = _bias(attn_mask, query)
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    fused: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )[0]
    return fused


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    keeps_logsumexp: bool,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the output [B, H, L, D] by the CPU's own attention, and what the backward pass is handed."""
    assert dropout == 0, "dropout of attention is not used"
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )[0]
    nothing = torch.zeros((), dtype=torch.long)
    return out, query.new_zeros(query.shape[:3], dtype=torch.float32), nothing, nothing.clone()


def efficient_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    seed: Tensor,
    offset: Tensor,
    dropout: float,
    wanted: Any,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key and value, in float32 between."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, grad = (x.float() for x in (query, key, value, grad_out))
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    probs = scores.softmax(-1)
    grad_probs = grad @ v.mT
    grad_scores = probs * (grad_probs - (grad_probs * probs).sum(-1, True)) * scale
    found = grad_scores @ k, grad_scores.mT @ q, probs.mT @ grad
    return *(each.to(query.dtype) for each in found), None


KERNELS = {"cuda": (_attend, "AutogradCUDA"), "mps": (_products, "AutogradMPS")}
"""By kind of device, with the place in torch's dispatcher."""

EMULATED: dict[str, Any] = {
    "aten._scaled_dot_product_efficient_attention.default": efficient,
    "aten._scaled_dot_product_efficient_attention_backward.default": efficient_backward,
}
