"""Attention of a packed row on a CPU: stretch by stretch, by plain products.

A stretch is a prompt, which sees itself, or a completion, which sees its prompt and itself. Stretches of like length
lie side by side in a bucket, the keys of a completion's prompt before its own, and a bucket is two batched products
with a softmax between them. A few stretches are worked on at a time, so that their scores never leave the processor's
cache; a fused kernel, which holds none, pays for it with many small products, one after the other. Small
probabilities are kept for the backward pass, others are made again.

Prompts' keys are copied for each sibling, so their slopes are summed over siblings, one after the other: the same sum
in every run. Padding stands behind: a pad is a copy of some token, ahead of all that is real, and its slope is zero.

Shapes: T tokens, M groups, S slots (tokens and padding), E = H * D or 2 * K * D channels of a slot, H query heads,
K key/value heads, R = H / K, D head width; b stretches of a bucket, c the longest, P the longest prompt before them,
n of either, B = b * K.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.packing import PackedLayout

CACHED = 1 << 19
"""Scores worked on at a time."""
KEPT = 1 << 23
"""Bytes of a layer's probabilities up to which they are kept."""
PLANS = 2
"""Shapes of pass whose plan is remembered: that of the pass itself, and one before it."""


@dataclass(frozen=True, slots=True)
class Heads:
    kv: int
    repeats: int
    width: int
    scale: float


@dataclass(frozen=True, slots=True)
class Bucket:
    """`queries`, `keys`: its slots among all. `bias_b1cn`: -inf where a key is out of a query's sight.
    `owners_b`: which prompt each stretch reads; None: none has a prompt.
    """

    rows: int
    longest: int
    prefix: int
    queries: slice
    keys: slice
    bias_b1cn: Tensor
    owners_b: Tensor | None

    @property
    def scores(self) -> int:
        """Of one query head."""
        return self.rows * self.longest * (self.prefix + self.longest)

    def spans(self, heads: Heads) -> Iterator[slice]:
        """The B in parts whose scores stay in the cache: whole stretches, or single key heads of long ones."""
        size = CACHED * self.rows // (self.scores * heads.repeats)
        size, end = size // heads.kv * heads.kv or 1, self.rows * heads.kv
        return (slice(start, min(start + size, end)) for start in range(0, end, size))

    def probs(self, query_BnD: Tensor, key_BnD: Tensor, at: slice, heads: Heads, out: Tensor | None = None) -> Tensor:
        """[B, R * c, P + c] of the span `at`."""
        scores = torch.baddbmm(_nothing(query_BnD), query_BnD[at], key_BnD[at].mT, beta=0, alpha=heads.scale)
        K = heads.kv if len(scores) % heads.kv == 0 else 1
        bias = self.bias_b1cn[at.start // heads.kv : -(-at.stop // heads.kv)]
        scores.view(len(bias), K * heads.repeats, self.longest, -1).add_(bias)
        return torch.softmax(scores, -1) if out is None else torch.softmax(scores, -1, out=out)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which tokens stand where. `query_S`, `key_S`: the token of each slot; `real_S1`: 0 for padding, else 1.
    `asked_T`, `told_T`: the slots of a token as query and as key. `shared_P`: where prompts' tokens, the first of the
    T, stand in [prompts, longest].
    """

    buckets: tuple[Bucket, ...]
    query_S: Tensor
    key_S: Tensor
    real_S1: Tensor
    asked_T: Tensor
    told_T: Tensor
    shared_P: Tensor
    prompts: int
    longest: int


def attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    layout: PackedLayout,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """[T, H, D]; differentiable."""
    H, D, K = query_THD.shape[1], query_THD.shape[2], key_TKD.shape[1]
    longest = max(shared + own for shared, own_G in zip(layout.shared_M, layout.own_MG, strict=True) for own in own_G)
    window = None if window is None or window >= longest else window
    plan = attention_plan(layout, window, query_THD.dtype, query_THD.device)
    heads = Heads(K, H // K, D, D**-0.5 if scale is None else scale)
    out_THD: Tensor = _Attention.apply(query_THD, key_TKD, value_TKD, plan, heads)
    return out_THD


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, plan: AttentionPlan, heads: Heads
    ) -> Tensor:
        given = _laid(plan, heads, query_THD, key_TKD, value_TKD)
        held = heads.kv * heads.repeats * sum(bucket.scores for bucket in plan.buckets) * query_THD.dtype.itemsize
        keeps = held <= KEPT and any(ctx.needs_input_grad)
        out_SE, kept = query_THD.new_empty(len(plan.query_S), query_THD[0].numel()), []
        for bucket, (query, key, value) in zip(plan.buckets, given, strict=True):
            probs = query.new_empty(len(query), query.shape[1], key.shape[1]) if keeps else None
            out = torch.empty_like(query)
            for at in bucket.spans(heads):
                now = bucket.probs(query, key, at, heads, None if probs is None else probs[at])
                torch.bmm(now, value[at], out=out[at])
            _take(out_SE[bucket.queries], out, bucket.rows, heads.kv, heads.repeats)
            kept += [query, key, value, probs]
        ctx.save_for_backward(*(kept if keeps else (query_THD, key_TKD, value_TKD)))
        ctx.plan, ctx.heads, ctx.keeps = plan, heads, keeps
        return out_SE.index_select(0, plan.asked_T).view_as(query_THD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, heads, saved = ctx.plan, ctx.heads, ctx.saved_tensors
        slope_SE = gradients[0].flatten(1).index_select(0, plan.query_S).mul_(plan.real_S1)
        query_SE = torch.empty_like(slope_SE)
        keys_SE = slope_SE.new_empty(len(plan.key_S), 2 * heads.kv * heads.width)
        kept = [saved[i : i + 4] for i in range(0, len(saved), 4)] if ctx.keeps else _laid(plan, heads, *saved)
        for bucket, (query, key, value, *probs) in zip(plan.buckets, kept, strict=True):
            (slope,) = _give(slope_SE[bucket.queries], bucket.rows, 1, heads.kv, heads.repeats)
            slope_query, slope_keys = torch.empty_like(query), key.new_empty(2, *key.shape)
            for at in bucket.spans(heads):
                now = probs[0][at] if probs else bucket.probs(query, key, at, heads)
                torch.bmm(now.mT, slope[at], out=slope_keys[1, at])
                pull = torch.bmm(slope[at], value[at].mT)
                pull = torch._softmax_backward_data(pull, now, -1, pull.dtype)
                for out, left, right in ((slope_query, pull, key), (slope_keys[0], pull.mT, query)):
                    torch.baddbmm(_nothing(left), left, right[at], beta=0, alpha=heads.scale, out=out[at])
            _take(query_SE[bucket.queries], slope_query, bucket.rows, heads.kv, heads.repeats)
            _take(keys_SE[bucket.keys], slope_keys, bucket.rows, heads.kv, 1)
        slope_keys = _collected(plan, keys_SE).unflatten(1, (2, heads.kv, -1))
        slope_query = query_SE.index_select(0, plan.asked_T).view_as(gradients[0])
        return slope_query, slope_keys[:, 0], slope_keys[:, 1], None, None


def _laid(
    plan: AttentionPlan, heads: Heads, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each bucket: queries [B, R * c, D], keys and values [B, P + c, D]."""
    query_SE = query_THD.flatten(1).index_select(0, plan.query_S)
    keys_SE = torch.cat([key_TKD.flatten(1), value_TKD.flatten(1)], 1).index_select(0, plan.key_S)
    laid = []
    for bucket in plan.buckets:
        (query,) = _give(query_SE[bucket.queries], bucket.rows, 1, heads.kv, heads.repeats)
        key, value = _give(keys_SE[bucket.keys], bucket.rows, 2, heads.kv, 1)
        laid.append((query, key, value))
    return laid


def _give(x_SE: Tensor, rows: int, parts: int, kv: int, repeats: int) -> Tensor:
    """A bucket's slots -> [parts, B, repeats * n, D]."""
    x_bnpKRD = x_SE.view(rows, len(x_SE) // rows, parts, kv, repeats, -1)
    return x_bnpKRD.permute(2, 0, 3, 4, 1, 5).reshape(parts, rows * kv, -1, x_bnpKRD.shape[-1])


def _take(to_SE: Tensor, x_pBnD: Tensor, rows: int, kv: int, repeats: int) -> None:
    """The inverse of _give, written to a bucket's slots."""
    x_pbKRnD = x_pBnD.view(-1, rows, kv, repeats, len(to_SE) // rows, x_pBnD.shape[-1])
    to_SE.view(rows, len(to_SE) // rows, -1, kv, repeats, x_pBnD.shape[-1]).copy_(x_pbKRnD.permute(1, 4, 0, 2, 3, 5))


def _collected(plan: AttentionPlan, keys_SE: Tensor) -> Tensor:
    """Slopes of key slots -> [T, 2 * K * D]: a token's own, and for a prompt's those of all who read it."""
    keys_TE = keys_SE.index_select(0, plan.told_T)
    reading = [(bucket, bucket.owners_b) for bucket in plan.buckets if bucket.owners_b is not None]
    if not reading:
        return keys_TE
    wide = torch.promote_types(keys_SE.dtype, torch.float32)
    shared_MPE = keys_SE.new_zeros(plan.prompts, plan.longest, keys_SE.shape[1], dtype=wide)
    for bucket, owners_b in reading:
        read_bPE = keys_SE[bucket.keys].unflatten(0, (bucket.rows, -1))[:, : bucket.prefix]
        shared_MPE[:, : bucket.prefix].index_add_(0, owners_b, read_bPE.to(wide))
    keys_TE[: len(plan.shared_P)] += shared_MPE.flatten(0, 1).index_select(0, plan.shared_P)
    return keys_TE


def _nothing(x: Tensor) -> Tensor:
    """For baddbmm, which is asked for its scale and adds nothing."""
    return x.new_empty(1, 1, 1)


@lru_cache(maxsize=PLANS)
def attention_plan(layout: PackedLayout, window: int | None, dtype: torch.dtype, device: torch.device) -> AttentionPlan:
    """The layers of one pass share it."""
    shared_M, own_B = layout.shared_M, layout.own_B
    lengths = torch.tensor([*shared_M, *own_B], device="cpu")
    starts, M = lengths.cumsum(0) - lengths, len(shared_M)
    prompts = [m for m in range(M) if shared_M[m]]
    chosen = [[prompts[i] for i in each] for each in alike([shared_M[m] for m in prompts])]
    chosen += [[M + i for i in each] for each in alike(own_B)]
    buckets, slots = [], _Slots()
    for each in chosen:
        owners = [(i - M) // layout.siblings for i in each] if each[0] >= M else None
        shared_b1 = torch.tensor([shared_M[m] for m in owners] if owners else [0] * len(each), device="cpu")[:, None]
        first_b1 = starts[owners][:, None] if owners else torch.zeros_like(shared_b1)
        queries, keys = slots.add(starts[each][:, None], lengths[each][:, None], first_b1, shared_b1)
        c, P = max(lengths[each].tolist()), max(shared_b1.flatten().tolist())
        owners_b = torch.tensor(owners, device=device) if owners and P else None
        bias = _bias(c, shared_b1, window, dtype).to(device).expand(len(each), -1, -1, -1)
        buckets.append(Bucket(len(each), c, P, queries, keys, bias, owners_b))
    return slots.plan(tuple(buckets), torch.tensor(shared_M, device="cpu"), dtype, device)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places of stretches of like length: in each list, the shortest has more than five sevenths of the longest."""
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    lists: list[list[int]] = []
    while left:
        longest = lengths[left[0]]
        lists.append(sorted(i for i in left if 7 * lengths[i] > 5 * longest or longest <= 8))
        left = left[len(lists[-1]) :]
    return lists


class _Slots:
    """Slots of one bucket after the other, as they are counted out."""

    def __init__(self) -> None:
        self.query: list[Tensor] = []
        self.key: list[Tensor] = []
        self.real: list[Tensor] = []
        self.own: list[Tensor] = []
        self.asked = self.told = 0

    def add(self, start_b1: Tensor, length_b1: Tensor, first_b1: Tensor, shared_b1: Tensor) -> tuple[slice, slice]:
        """Stretches that begin at `start`, behind prompts that begin at `first`: their slots as queries and keys."""
        at_c = torch.arange(int(length_b1.max()), device="cpu")
        at_P = torch.arange(int(shared_b1.max()), device="cpu")
        own_bc = start_b1 + torch.minimum(at_c, length_b1 - 1)
        prompt_bP = first_b1 + torch.minimum(at_P, (shared_b1 - 1).clamp(min=0))
        real_bc = at_c < length_b1
        self.query.append(own_bc.flatten())
        self.key.append(torch.cat([prompt_bP, own_bc], 1).flatten())
        self.real.append(real_bc.flatten())
        self.own.append(torch.cat([torch.zeros_like(prompt_bP, dtype=torch.bool), real_bc], 1).flatten())
        queries = slice(self.asked, self.asked + len(self.query[-1]))
        keys = slice(self.told, self.told + len(self.key[-1]))
        self.asked, self.told = queries.stop, keys.stop
        return queries, keys

    def plan(
        self, buckets: tuple[Bucket, ...], shared_M: Tensor, dtype: torch.dtype, device: torch.device
    ) -> AttentionPlan:
        query_S, key_S, real_S, own_S = (torch.cat(each) for each in (self.query, self.key, self.real, self.own))
        at_P = torch.arange(int(shared_M.max()), device="cpu")
        return AttentionPlan(
            buckets,
            query_S.to(device),
            key_S.to(device),
            real_S[:, None].to(device, dtype),
            _places(query_S, real_S).to(device),
            _places(key_S, own_S).to(device),
            (at_P < shared_M[:, None]).flatten().nonzero()[:, 0].to(device),
            len(shared_M),
            len(at_P),
        )


def _places(token_S: Tensor, chosen_S: Tensor) -> Tensor:
    """[T]: the chosen slot of each token."""
    slots = chosen_S.nonzero()[:, 0]
    return torch.empty_like(slots).index_copy_(0, token_S[slots], slots)


def _bias(longest: int, shared_b1: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """[b, 1, c, P + c], or of one row where all are the same: 0 where a query sees a key, -inf where not."""
    if int(shared_b1.min()) == int(shared_b1.max()):
        shared_b1 = shared_b1[:1]
    own_bc = shared_b1 + torch.arange(longest, device="cpu")
    at_P = torch.arange(int(shared_b1.max()), device="cpu").expand(len(shared_b1), -1)
    ahead_bcn = own_bc[:, :, None] - torch.cat([at_P, own_bc], 1)[:, None]
    exists_bn = torch.cat([at_P < shared_b1, torch.ones_like(own_bc, dtype=torch.bool)], 1)
    seen_bcn = exists_bn[:, None] & (ahead_bcn >= 0)
    if window is not None:
        seen_bcn &= ahead_bcn < window
    return torch.zeros(seen_bcn.shape, dtype=dtype, device="cpu").masked_fill_(~seen_bcn, -torch.inf)[:, None]
