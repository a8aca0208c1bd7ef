"""Attention of completions on a CPU, in two parts that are joined by their sums: the shared prompt, and the own tokens.

A softmax over [prompt, own] is the two softmaxes weighed by their sums of exponentials, which the kernel reports as
logarithms. So nothing is laid out per completion but its own tokens: the queries of a whole group meet its prompt in
one product, whose keys are never copied, and completions of like length stand side by side, so that a long one does
not stretch all others. For the backward pass each part is told the joined output and the joined sum; what the kernel
then returns is exactly its part of the gradient.

Shapes: N completion tokens, M groups, H query heads, K key/value heads, R = H / K, D head width, P longest shared
prompt, Q most completion tokens of a group, b completions of a bucket, c the longest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Spot:
    """Tokens in a rectangle [rows, longest]: which of the N they are, and where they stand. None: all, in order."""

    rows: int
    longest: int
    tokens_n: Tensor | None
    places_n: Tensor | None

    @classmethod
    def of(cls, lengths: tuple[int, ...], chosen: list[int], device: torch.device) -> Spot:
        """The stretches `chosen` of those that stand one after the other."""
        longest = max(lengths[i] for i in chosen)
        whole = chosen == list(range(len(lengths)))
        if whole and min(lengths) == longest:
            return cls(len(chosen), longest, None, None)
        starts = [sum(lengths[:i]) for i in chosen]
        tokens = [start + n for start, i in zip(starts, chosen, strict=True) for n in range(lengths[i])]
        places = [row * longest + n for row, i in enumerate(chosen) for n in range(lengths[i])]
        kept = None if whole else torch.tensor(tokens, device=device)
        return cls(len(chosen), longest, kept, torch.tensor(places, device=device))

    def laid(self, x_NHD: Tensor) -> Tensor:
        """[N, H, ...] -> [rows, longest, H, ...], zeros behind."""
        if self.places_n is not None:
            x_nHD = x_NHD if self.tokens_n is None else x_NHD.index_select(0, self.tokens_n)
            grid = x_NHD.new_zeros(self.rows * self.longest, *x_NHD.shape[1:])
            x_NHD = grid.index_copy_(0, self.places_n, x_nHD)
        return x_NHD.unflatten(0, (self.rows, self.longest))

    def put(self, x_bcHD: Tensor, into_NHD: Tensor) -> None:
        """The way back."""
        x_nHD = x_bcHD.flatten(0, 1)
        x_nHD = x_nHD if self.places_n is None else x_nHD.index_select(0, self.places_n)
        if self.tokens_n is None:
            into_NHD.copy_(x_nHD)
        else:
            into_NHD.index_copy_(0, self.tokens_n, x_nHD)


@lru_cache(maxsize=4)
def spots(own_MG: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Spot, tuple[Spot, ...]]:
    """The groups, and the buckets of completions: in each, the shortest has more than two thirds of the longest."""
    own_B = tuple(n for own_G in own_MG for n in own_G)
    left = sorted(range(len(own_B)), key=lambda i: -own_B[i])
    buckets = []
    while left:
        longest = own_B[left[0]]
        alike = [i for i in left if 3 * own_B[i] > 2 * longest or longest <= 8]
        left = left[len(alike) :]
        buckets.append(Spot.of(own_B, sorted(alike), device))
    groups = tuple(map(sum, own_MG))
    return Spot.of(groups, list(range(len(groups))), device), tuple(buckets)


@lru_cache(maxsize=4)
def prompt_bias(shared_M: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[M, 1, 1, P]: -inf behind a shorter prompt; None where all are equally long."""
    longest = max(shared_M)
    if min(shared_M) == longest:
        return None
    beyond_MP = torch.arange(longest, device=device) >= torch.tensor(shared_M, device=device)[:, None]
    bias_MP = torch.zeros(beyond_MP.shape, dtype=dtype, device=device).masked_fill_(beyond_MP, -torch.inf)
    return bias_MP[:, None, None]


@dataclass(frozen=True, slots=True)
class Call:
    group: Spot
    buckets: tuple[Spot, ...]
    bias: Tensor | None
    scale: float

    def to_prompt(self, x_NHD: Tensor, kv_heads: int) -> Tensor:
        """[N, H, D] -> [M, K, R * Q, D]: the heads that share a key stand one after the other."""
        x_MQKRD = self.group.laid(x_NHD).unflatten(2, (kv_heads, -1))
        return x_MQKRD.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def from_prompt(self, x_MKqD: Tensor, into_NHD: Tensor) -> None:
        x_MKRQD = x_MKqD.unflatten(2, (-1, self.group.longest))
        self.group.put(x_MKRQD.permute(0, 3, 1, 2, 4).flatten(2, 3), into_NHD)

    def mask(self, query: Tensor) -> dict[str, Any]:
        bias = None if self.bias is None else self.bias.expand(-1, 1, query.shape[2], -1)
        return {"attn_mask": bias, "scale": self.scale}


def split_attention(query_NHD: Tensor, own: tuple[Tensor, Tensor], shared: tuple[Tensor, ...], call: Call) -> Tensor:
    """[N, H, D]. `own`: keys and values [N, H, D]; `shared`: those of the prompts [M, K, P, D]."""
    out_NHD: Tensor = _Split.apply(query_NHD, *own, *shared, call)
    return out_NHD


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query_NHD, key_NHD, value_NHD, key_MKPD, value_MKPD, call = given
        N, H, _ = query_NHD.shape
        outs = [torch.empty_like(query_NHD) for _ in range(2)]
        wide = torch.promote_types(query_NHD.dtype, torch.float32)
        sums = [query_NHD.new_empty(N, H, 1, dtype=wide) for _ in range(2)]
        rows = call.to_prompt(query_NHD, key_MKPD.shape[1])
        out, total = _flash(rows, key_MKPD, value_MKPD, 0.0, False, **call.mask(rows))
        call.from_prompt(out, outs[0])
        call.from_prompt(total.unsqueeze(-1), sums[0])
        for spot in call.buckets:
            laid = [spot.laid(x).transpose(1, 2) for x in (query_NHD, key_NHD, value_NHD)]
            out, total = _flash(*laid, 0.0, True, scale=call.scale)
            spot.put(out.transpose(1, 2), outs[1])
            spot.put(total.unsqueeze(-1).transpose(1, 2), sums[1])
        sum_NH1 = torch.logaddexp(*sums)
        out_NHD = (outs[0] * (sums[0] - sum_NH1).exp_() + outs[1] * (sums[1] - sum_NH1).exp_()).to(query_NHD.dtype)
        ctx.save_for_backward(query_NHD, key_NHD, value_NHD, key_MKPD, value_MKPD, out_NHD, sum_NH1)
        ctx.call = call
        return out_NHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_NHD, key_NHD, value_NHD, key_MKPD, value_MKPD, out_NHD, sum_NH1 = ctx.saved_tensors
        call, slope_NHD, kv_heads = ctx.call, gradients[0], key_MKPD.shape[1]
        rows, slope, out = (call.to_prompt(x, kv_heads) for x in (query_NHD, slope_NHD, out_NHD))
        total = call.to_prompt(sum_NH1, kv_heads)[..., 0]
        slope_rows, slope_key_M, slope_value_M = _flash_back(
            slope, rows, key_MKPD, value_MKPD, out, total, 0.0, False, **call.mask(rows)
        )
        slopes = [torch.empty_like(query_NHD) for _ in range(4)]
        call.from_prompt(slope_rows, slopes[3])
        for spot in call.buckets:
            laid = [spot.laid(x).transpose(1, 2) for x in (slope_NHD, query_NHD, key_NHD, value_NHD, out_NHD, sum_NH1)]
            own = _flash_back(*laid[:5], laid[5][..., 0], 0.0, True, scale=call.scale)
            for part, into in zip(own, slopes, strict=False):
                spot.put(part.transpose(1, 2), into)
        return slopes[0].add_(slopes[3]), slopes[1], slopes[2], slope_key_M, slope_value_M, None
