"""torch's attention kernel for GPUs, done on the CPU's numbers.

torch chooses among kernels that a CPU lacks. The memory-efficient one is taken here wherever it can be: every card has
it, with masks and without. What torch would choose on a card, the rehearsal does not show.

Shapes: B rows, H heads, L queries, S keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MATH, EFFICIENT = 0, 2


def choose(query: Tensor, key: Tensor, *_: Any, **options: Any) -> int:
    """Return the number of the kernel that torch would be told: the efficient one knows no shared key heads."""
    return MATH if options.get("enable_gqa") and query.shape[-3] != key.shape[-3] else EFFICIENT


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
    # By name: below a dispatch mode torch would choose its form for tensors that have no kernel.
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


EMULATED: dict[str, Any] = {
    "aten._fused_sdp_choice.default": choose,
    "aten._scaled_dot_product_efficient_attention.default": efficient,
    "aten._scaled_dot_product_efficient_attention_backward.default": efficient_backward,
}
