"""Attention of completions on a CPU, in two parts that are joined by their sums: the shared prompt, and the own tokens.

A softmax over [prompt, own] is the two softmaxes weighed by their sums of exponentials, which the kernel reports as
logarithms. So nothing is laid out per completion but its own tokens: the queries of a whole group meet its prompt in
one product, whose keys are never copied, and completions of like length stand side by side, so that a long one does
not stretch all others. For the backward pass each part is told the joined output and the joined sum; what the kernel
then returns is exactly its part of the gradient.

Shapes: N completion tokens, M groups, H query heads, K key/value heads, R = H / K, D head width, P longest shared
prompt, Q most completion tokens of a group, b completions of a bucket, c the longest of them, S slots of a rectangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minigrpo import causal

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Spot:
    """Stretches of tokens in a rectangle [rows, longest]. `tokens_S`: who stands where, N where nobody does; None: all
    of the N, in order. `places_N`: where the tokens stand.
    """

    rows: int
    longest: int
    tokens_S: Tensor | None
    places_N: Tensor | None

    @classmethod
    def of(cls, lengths: tuple[int, ...], chosen: list[int], device: torch.device) -> Spot:
        """The stretches `chosen` of those that stand one after the other."""
        longest = max(lengths[i] for i in chosen)
        if chosen == list(range(len(lengths))) and min(lengths) == longest:
            return cls(len(chosen), longest, None, None)
        tokens, N = _rectangle(lengths, chosen), sum(lengths)
        places = [slot for slot, token in enumerate(tokens) if token < N]
        return cls(len(chosen), longest, torch.tensor(tokens, device=device), torch.tensor(places, device=device))

    def laid(self, x_N: Tensor) -> Tensor:
        """[parts, H, N + 1, D], nothing but zeros in the last, -> [parts, H, rows, longest, D]."""
        x_S = x_N[:, :, :-1] if self.tokens_S is None else x_N.index_select(2, self.tokens_S)
        return x_S.unflatten(2, (self.rows, self.longest))


@dataclass(frozen=True, slots=True)
class Buckets:
    """Completions of like length side by side. `back_N`: where each token stands among all slots of all buckets."""

    spots: tuple[Spot, ...]
    back_N: Tensor | None

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Buckets:
        """In each, the shortest has more than half of the longest."""
        left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        chosen: list[list[int]] = []
        while left:
            longest = lengths[left[0]]
            alike = [i for i in left if 2 * lengths[i] > longest or longest <= 8]
            chosen.append(sorted(alike))
            left = left[len(alike) :]
        spots = tuple(Spot.of(lengths, each, device) for each in chosen)
        if spots[0].tokens_S is None:
            return cls(spots, None)
        slots = [token for each in chosen for token in _rectangle(lengths, each)]
        where = {token: slot for slot, token in enumerate(slots)}
        return cls(spots, torch.tensor([where[token] for token in range(sum(lengths))], device=device))

    def back(self, parts: Sequence[Tensor]) -> Tensor:
        """Of each bucket [..., rows, longest, D] -> [..., N, D]."""
        x_S = torch.cat([part.flatten(-3, -2) for part in parts], -2)
        return x_S if self.back_N is None else x_S.index_select(x_S.ndim - 2, self.back_N)


def _rectangle(lengths: tuple[int, ...], chosen: list[int]) -> list[int]:
    """Who stands where in [chosen, longest] of the stretches that stand one after the other; N: nobody."""
    ends, N = list(accumulate(lengths)), sum(lengths)
    longest = max(lengths[i] for i in chosen)
    return [ends[i] - lengths[i] + n if n < lengths[i] else N for i in chosen for n in range(longest)]


def beside(*parts: Tensor) -> Tensor:
    """[N, H, D] each -> [parts, H, N + 1, D]: heads first, as products want them, and a row of zeros behind."""
    N, H, D = parts[0].shape
    together = parts[0].new_empty(len(parts), H, N + 1, D)
    for place, part in enumerate(parts):
        together[place, :, :N] = part.transpose(0, 1)
    together[:, :, N] = 0
    return together


@lru_cache(maxsize=4)
def spots(own_MG: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Spot, Buckets]:
    """The groups, and the buckets of completions."""
    groups = tuple(map(sum, own_MG))
    own_B = tuple(n for own_G in own_MG for n in own_G)
    return Spot.of(groups, list(range(len(groups))), device), Buckets.of(own_B, device)


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
    buckets: Buckets
    bias: Tensor | None
    scale: float

    def to_prompt(self, x_N: Tensor, kv_heads: int) -> Tensor:
        """[parts, H, N + 1, D] -> [parts, M, K, R * Q, D]: the heads that share a key stand one after the other."""
        x_pKRMQD = self.group.laid(x_N).unflatten(1, (kv_heads, -1))
        return x_pKRMQD.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)

    def from_prompt(self, x_MKqD: Tensor) -> Tensor:
        """[M, K, R * Q, D] -> [H, N, D]."""
        x_MKRQD = x_MKqD.unflatten(2, (-1, self.group.longest))
        x_HSD = x_MKRQD.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1, 2)
        return x_HSD if self.group.places_N is None else x_HSD.index_select(1, self.group.places_N)

    def mask(self, query: Tensor) -> dict[str, Any]:
        bias = None if self.bias is None else self.bias.expand(-1, 1, query.shape[2], -1)
        return {"attn_mask": bias, "scale": self.scale}


def split_attention(query_NHD: Tensor, own: tuple[Tensor, Tensor], shared: tuple[Tensor, ...], call: Call) -> Tensor:
    """[N, H, D]. `own`: keys and values [N, H, D]; `shared`: those of the prompts [M, K, P, D]."""
    out_NHD: Tensor = _Split.apply(query_NHD, *own, *shared, call)
    return out_NHD


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """[M, H, P, D] each: every token sees itself and what stands before it."""
    out: Tensor = _Causal.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return out


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out, total = causal.attend(torch.stack([query, key, value]), scale)
        ctx.save_for_backward(out, query, key, value, total)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *given, total = ctx.saved_tensors
        return *causal.attend_back(torch.stack([gradients[0], *given]), total, ctx.scale), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query_NHD, key_NHD, value_NHD, key_MKPD, value_MKPD, call = given
        together = beside(query_NHD, key_NHD, value_NHD)
        (rows,) = call.to_prompt(together[:1], key_MKPD.shape[1])
        out, total = _flash(rows, key_MKPD, value_MKPD, 0.0, False, **call.mask(rows))
        outs, sums = [call.from_prompt(out)], [call.from_prompt(total.unsqueeze(-1))]
        own = [causal.attend(spot.laid(together), call.scale) for spot in call.buckets.spots]
        outs.append(call.buckets.back([out for out, _ in own]))
        sums.append(call.buckets.back([total.unsqueeze(-1) for _, total in own]))
        sum_HN1 = torch.logaddexp(*sums)
        out_HND = (outs[0] * (sums[0] - sum_HN1).exp_() + outs[1] * (sums[1] - sum_HN1).exp_()).to(query_NHD.dtype)
        out_NHD, sum_NH1 = out_HND.transpose(0, 1), sum_HN1.transpose(0, 1)
        ctx.save_for_backward(query_NHD, key_NHD, value_NHD, key_MKPD, value_MKPD, out_NHD, sum_NH1)
        ctx.call = call
        return out_NHD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_NHD, key_NHD, value_NHD, key_MKPD, value_MKPD, out_NHD, sum_NH1 = ctx.saved_tensors
        call, kv_heads = ctx.call, key_MKPD.shape[1]
        together, total_N = beside(gradients[0], out_NHD, query_NHD, key_NHD, value_NHD), beside(sum_NH1)
        slope, out, rows = call.to_prompt(together[:3], kv_heads)
        total = call.to_prompt(total_N, kv_heads)[0, ..., 0]
        slope_rows, slope_key_M, slope_value_M = _flash_back(
            slope, rows, key_MKPD, value_MKPD, out, total, 0.0, False, **call.mask(rows)
        )
        own = [
            causal.attend_back(spot.laid(together), spot.laid(total_N)[0, ..., 0], call.scale)
            for spot in call.buckets.spots
        ]
        slopes = call.buckets.back(own)
        slopes[0] += call.from_prompt(slope_rows)
        slope_query, slope_key, slope_value = slopes.transpose(1, 2)
        return slope_query, slope_key, slope_value, slope_key_M, slope_value_M, None
