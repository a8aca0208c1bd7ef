"""Causal attention of short sequences on a CPU, by two kernels with one result: plain products, and torch's fused one.

The fused kernel never holds the scores, and pays for it with many small products, one after the other. While all scores
of a call fit into the processor's cache, two batched products are several times quicker, and most of a reasoning
model's completions are that short beside one another. Both kernels report the logarithm of each row's sum of
exponentials, and take it back for the gradient, so what they return can be joined with the attention over other keys.

Shapes: H heads, b sequences, c tokens of each, D head width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FEW = 1 << 22
"""Bytes of the scores of one call, in float32, up to which they are held."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(laid: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries, keys and values [3, H, b, c, D] -> [H, b, c, D], and the logarithms of the sums [H, b, c]."""
    if not _few(laid):
        out, total = _flash(*laid, 0.0, True, scale=scale)
        return out, total
    query, key, value = _flat(laid)
    probs = _scores(query, key, scale)
    peak = probs.amax(-1, True)
    total = probs.sub_(peak).exp_().sum(-1, True)
    out = torch.bmm(probs.to(value.dtype), value).div_(total)
    return out.view(laid.shape[1:]), total.log_().add_(peak).view(laid.shape[1:-1])


def attend_back(laid: Tensor, total: Tensor, scale: float) -> Tensor:
    """Slopes of outputs, outputs, queries, keys and values [5, H, b, c, D] -> slopes of queries, keys and values
    [3, H, b, c, D]. Outputs and `total` [H, b, c] may be those of an attention over more keys than these.
    """
    slope, out, query, key, value = laid
    if not _few(laid):
        return torch.stack(_flash_back(slope, query, key, value, out, total, 0.0, True, scale=scale))
    slope, out, query, key, value = _flat(laid)
    probs = _scores(query, key, scale).sub_(total.reshape(len(query), -1, 1)).exp_()
    wide = probs.dtype
    slopes = laid.new_empty(3, *query.shape)
    torch.bmm(probs.mT.to(slope.dtype), slope, out=slopes[2])
    pull = (slope.to(wide) * out).sum(-1, True)
    slope_scores = torch.bmm(slope, value.mT).to(wide).sub_(pull).mul_(probs).mul_(scale).to(query.dtype)
    torch.bmm(slope_scores, key, out=slopes[0])
    torch.bmm(slope_scores.mT, query, out=slopes[1])
    return slopes.view(3, *laid.shape[1:])


def _few(laid: Tensor) -> bool:
    _, H, b, c, _ = laid.shape
    return 4 * H * b * c * c <= FEW


def _flat(laid: Tensor) -> tuple[Tensor, ...]:
    """[k, H, b, c, D] -> k times [H * b, c, D]."""
    return laid.flatten(1, 2).unbind()


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[H * b, c, c], in float32 at least; -inf where a key is ahead of its query."""
    wide = torch.promote_types(query.dtype, torch.float32)
    ahead = _ahead(query.shape[1], wide, query.device)
    if query.dtype == wide:
        return torch.baddbmm(ahead, query, key.mT, alpha=scale)
    return torch.bmm(query, key.mT).to(wide).mul_(scale).add_(ahead)


@lru_cache(maxsize=64)
def _ahead(c: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((c, c), -torch.inf, dtype=dtype, device=device).triu_(1)
