"""Attention over a packed row on a CPU, segment by segment, by plain matrix products.

A segment is a prompt, which sees itself, or a completion, which sees its prompt and itself. Where all prompts begin
with the same tokens, which stand once, these are a segment, too, and what is left of each prompt sees them and itself.
Segments of like length lie side by side in a bucket, the keys of what they read before their own, and a bucket is two
batched products with a softmax between them. A few segments are worked on at a time, so that their scores never leave
the processor's cache; a fused kernel, which holds none, pays for it with many small products, one after the other.
Small probabilities are kept for the backward pass, others are made again.

Prompts' keys are copied for each sibling, so their gradients are summed over siblings, one after the other: the same
sum in every run. Padding stands behind: a pad is a copy of some token, ahead of all that is real, and its gradient is
zero.

Shapes: T tokens, M groups, S slots (tokens and padding), E = H * D or 2 * K * D channels of a slot, H query heads,
K key/value heads, R = H / K, D head width; b segments of a bucket, c the longest, P the longest prompt before them,
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

SCORES_IN_CACHE = 1 << 19
"""Attention scores computed at a time, so that they stay in the cache."""
MAX_KEPT_PROBS_BYTES = 1 << 23
"""Probabilities of a layer are kept for the backward pass up to this many bytes."""
CACHED_PLANS = 2
"""Attention plans that are cached: of the current shape of pass, and of the one before it."""


@dataclass(frozen=True, slots=True)
class AttentionHeads:
    kv: int
    repeats: int
    width: int
    scale: float


@dataclass(frozen=True, slots=True)
class SegmentBucket:
    """Segments of similar length, padded to the longest.

    `queries`, `keys`: the bucket's slots among all. `bias_b1cn`: -inf where a query must not see a key.
    `owners_b`: which prompt each segment reads; None: none has a prompt.
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
        """Count the attention scores of one query head."""
        return self.rows * self.longest * (self.prefix + self.longest)

    def chunks(self, heads: AttentionHeads) -> Iterator[slice]:
        """Yield slices of B whose scores fit the cache: whole segments, or single key heads of long ones."""
        size = SCORES_IN_CACHE * self.rows // (self.scores * heads.repeats)
        size, end = size // heads.kv * heads.kv or 1, self.rows * heads.kv
        return (slice(start, min(start + size, end)) for start in range(0, end, size))

    def probs(
        self, query_BnD: Tensor, key_BnD: Tensor, chunk: slice, heads: AttentionHeads, out: Tensor | None = None
    ) -> Tensor:
        """Return the chunk's attention probabilities, [B, R * c, P + c]."""
        scores = torch.baddbmm(_unread_input(query_BnD), query_BnD[chunk], key_BnD[chunk].mT, beta=0, alpha=heads.scale)
        K = heads.kv if len(scores) % heads.kv == 0 else 1
        bias = self.bias_b1cn[chunk.start // heads.kv : -(-chunk.stop // heads.kv)]
        scores.view(len(bias), K * heads.repeats, self.longest, -1).add_(bias)
        return torch.softmax(scores, -1) if out is None else torch.softmax(scores, -1, out=out)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where each token of a row stands in the buckets.

    `query_S`, `key_S`: the token of each slot; `real_S1`: 0 for padding, else 1.
    `query_slot_T`, `key_slot_T`: the slots of a token as query and as key. `common`: tokens that all prompts begin
    with, the first of the T; `shared_P`: where those behind them, the prompts' own, stand in [prompts, longest].
    """

    buckets: tuple[SegmentBucket, ...]
    query_S: Tensor
    key_S: Tensor
    real_S1: Tensor
    query_slot_T: Tensor
    key_slot_T: Tensor
    shared_P: Tensor
    prompts: int
    longest: int
    common: int


def segment_attention(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    layout: PackedLayout,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Return the attention output, [T, H, D]; differentiable."""
    H, D, K = query_THD.shape[1], query_THD.shape[2], key_TKD.shape[1]
    longest = max(shared + own for shared, own_G in zip(layout.shared_M, layout.own_MG, strict=True) for own in own_G)
    window = None if window is None or window >= longest else window
    plan = attention_plan(layout, window, query_THD.dtype, query_THD.device)
    heads = AttentionHeads(K, H // K, D, D**-0.5 if scale is None else scale)
    out_THD: Tensor = _SegmentAttention.apply(query_THD, key_TKD, value_TKD, plan, heads)
    return out_THD


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, plan: AttentionPlan, heads: AttentionHeads
    ) -> Tensor:
        inputs = _gather_inputs(plan, heads, query_THD, key_TKD, value_TKD)
        probs_bytes = (
            heads.kv * heads.repeats * sum(bucket.scores for bucket in plan.buckets) * query_THD.dtype.itemsize
        )
        keeps_probs = probs_bytes <= MAX_KEPT_PROBS_BYTES and any(ctx.needs_input_grad)
        out_SE, kept = query_THD.new_empty(len(plan.query_S), query_THD[0].numel()), []
        for bucket, (query, key, value) in zip(plan.buckets, inputs, strict=True):
            probs = query.new_empty(len(query), query.shape[1], key.shape[1]) if keeps_probs else None
            out = torch.empty_like(query)
            for chunk in bucket.chunks(heads):
                probs_chunk = bucket.probs(query, key, chunk, heads, None if probs is None else probs[chunk])
                torch.bmm(probs_chunk, value[chunk], out=out[chunk])
            _merge_heads(out_SE[bucket.queries], out, bucket.rows, heads.kv, heads.repeats)
            kept += [query, key, value, probs]
        ctx.save_for_backward(*(kept if keeps_probs else (query_THD, key_TKD, value_TKD)))
        ctx.plan, ctx.heads, ctx.keeps_probs = plan, heads, keeps_probs
        return out_SE.index_select(0, plan.query_slot_T).view_as(query_THD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan, heads, saved = ctx.plan, ctx.heads, ctx.saved_tensors
        grad_SE = gradients[0].flatten(1).index_select(0, plan.query_S).mul_(plan.real_S1)
        query_SE = torch.empty_like(grad_SE)
        keys_SE = grad_SE.new_empty(len(plan.key_S), 2 * heads.kv * heads.width)
        kept = (
            [saved[i : i + 4] for i in range(0, len(saved), 4)]
            if ctx.keeps_probs
            else _gather_inputs(plan, heads, *saved)
        )
        for bucket, (query, key, value, *probs) in zip(plan.buckets, kept, strict=True):
            (grad,) = _split_heads(grad_SE[bucket.queries], bucket.rows, 1, heads.kv, heads.repeats)
            grad_query, grad_keys = torch.empty_like(query), key.new_empty(2, *key.shape)
            for chunk in bucket.chunks(heads):
                probs_chunk = probs[0][chunk] if probs else bucket.probs(query, key, chunk, heads)
                torch.bmm(probs_chunk.mT, grad[chunk], out=grad_keys[1, chunk])
                grad_scores = torch.bmm(grad[chunk], value[chunk].mT)
                grad_scores = torch._softmax_backward_data(grad_scores, probs_chunk, -1, grad_scores.dtype)
                for out, left, right in ((grad_query, grad_scores, key), (grad_keys[0], grad_scores.mT, query)):
                    torch.baddbmm(_unread_input(left), left, right[chunk], beta=0, alpha=heads.scale, out=out[chunk])
            _merge_heads(query_SE[bucket.queries], grad_query, bucket.rows, heads.kv, heads.repeats)
            _merge_heads(keys_SE[bucket.keys], grad_keys, bucket.rows, heads.kv, 1)
        grad_keys = _scatter_add_key_grads(plan, keys_SE).unflatten(1, (2, heads.kv, -1))
        grad_query = query_SE.index_select(0, plan.query_slot_T).view_as(gradients[0])
        return grad_query, grad_keys[:, 0], grad_keys[:, 1], None, None


def _gather_inputs(
    plan: AttentionPlan, heads: AttentionHeads, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each bucket the queries [B, R * c, D] and the keys and values [B, P + c, D]."""
    query_SE = query_THD.flatten(1).index_select(0, plan.query_S)
    keys_SE = torch.cat([key_TKD.flatten(1), value_TKD.flatten(1)], 1).index_select(0, plan.key_S)
    gathered = []
    for bucket in plan.buckets:
        (query,) = _split_heads(query_SE[bucket.queries], bucket.rows, 1, heads.kv, heads.repeats)
        key, value = _split_heads(keys_SE[bucket.keys], bucket.rows, 2, heads.kv, 1)
        gathered.append((query, key, value))
    return gathered


def _split_heads(x_SE: Tensor, rows: int, parts: int, kv: int, repeats: int) -> Tensor:
    """Reshape a bucket's slots to [parts, B, repeats * n, D]."""
    x_bnpKRD = x_SE.view(rows, len(x_SE) // rows, parts, kv, repeats, -1)
    return x_bnpKRD.permute(2, 0, 3, 4, 1, 5).reshape(parts, rows * kv, -1, x_bnpKRD.shape[-1])


def _merge_heads(to_SE: Tensor, x_pBnD: Tensor, rows: int, kv: int, repeats: int) -> None:
    """Write to a bucket's slots: the inverse of _split_heads."""
    x_pbKRnD = x_pBnD.view(-1, rows, kv, repeats, len(to_SE) // rows, x_pBnD.shape[-1])
    to_SE.view(rows, len(to_SE) // rows, -1, kv, repeats, x_pBnD.shape[-1]).copy_(x_pbKRnD.permute(1, 4, 0, 2, 3, 5))


def _scatter_add_key_grads(plan: AttentionPlan, keys_SE: Tensor) -> Tensor:
    """Sum the gradients of key slots by token, [T, 2 * K * D]: a prompt's token gets those of all its readers."""
    keys_TE = keys_SE.index_select(0, plan.key_slot_T)
    reading = [(bucket, bucket.owners_b) for bucket in plan.buckets if bucket.owners_b is not None]
    if not reading:
        return keys_TE
    wide = torch.promote_types(keys_SE.dtype, torch.float32)
    shared_MPE = keys_SE.new_zeros(plan.prompts, plan.longest, keys_SE.shape[1], dtype=wide)
    for bucket, owners_b in reading:
        read_bPE = keys_SE[bucket.keys].unflatten(0, (bucket.rows, -1))[:, : bucket.prefix]
        shared_MPE[:, : bucket.prefix].index_add_(0, owners_b, read_bPE.to(wide))
    F, own = plan.common, len(plan.shared_P)
    keys_TE[F : F + own] += shared_MPE.flatten(0, 1).index_select(0, plan.shared_P)
    if F:
        keys_TE[:F] += shared_MPE[:, :F].sum(0)
    return keys_TE


def _unread_input(x: Tensor) -> Tensor:
    """Return an input that baddbmm does not read at beta=0; it is called for its scale."""
    return x.new_empty(1, 1, 1)


@lru_cache(maxsize=CACHED_PLANS)
def attention_plan(layout: PackedLayout, window: int | None, dtype: torch.dtype, device: torch.device) -> AttentionPlan:
    """Return the plan of a layout; cached, so the layers of one pass share it."""
    shared_M, rest_M, own_B, F = layout.shared_M, layout.rest_M, layout.own_B, layout.common
    M, front = len(shared_M), 1 if F else 0
    # One segment for what is common, one for the rest of each prompt, one for each completion.
    lengths = torch.tensor([F] * front + [*rest_M, *own_B], device="cpu")
    starts = lengths.cumsum(0) - lengths
    owner_of = [0] * front + [*range(M), *(i // layout.siblings for i in range(len(own_B)))]
    before = [0] * front + [F] * M + [shared_M[owner] for owner in owner_of[front + M :]]
    prompts = [front + m for m in range(M) if rest_M[m]]
    chosen = [[0]] * front
    chosen += [[prompts[i] for i in each] for each in bucket_by_length([rest_M[i - front] for i in prompts])]
    chosen += [[front + M + i for i in each] for each in bucket_by_length(own_B)]
    buckets, slots = [], _SlotBuilder(F)
    for each in chosen:
        owners, shared_b1 = [owner_of[i] for i in each], torch.tensor([before[i] for i in each], device="cpu")[:, None]
        rest_b1 = starts[[front + owner for owner in owners]][:, None]
        queries, keys = slots.add(starts[each][:, None], lengths[each][:, None], rest_b1, shared_b1)
        c, P = max(lengths[each].tolist()), max(shared_b1.flatten().tolist())
        owners_b = torch.tensor(owners, device=device) if P else None
        bias = _attention_bias(c, shared_b1, window, dtype).to(device).expand(len(each), -1, -1, -1)
        buckets.append(SegmentBucket(len(each), c, P, queries, keys, bias, owners_b))
    return slots.plan(tuple(buckets), torch.tensor(shared_M, device="cpu"), dtype, device)


def bucket_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Bucket segment indices by length: in each, the shortest has more than five sevenths of the longest."""
    left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    lists: list[list[int]] = []
    while left:
        longest = lengths[left[0]]
        lists.append(sorted(i for i in left if 7 * lengths[i] > 5 * longest or longest <= 8))
        left = left[len(lists[-1]) :]
    return lists


class _SlotBuilder:
    """Collects the slots of one bucket after the other. `common`: tokens that all prompts begin with."""

    def __init__(self, common: int) -> None:
        self.common = common
        self.query: list[Tensor] = []
        self.key: list[Tensor] = []
        self.real: list[Tensor] = []
        self.own: list[Tensor] = []
        self.queries = self.keys = 0

    def add(self, start_b1: Tensor, length_b1: Tensor, rest_b1: Tensor, shared_b1: Tensor) -> tuple[slice, slice]:
        """Add segments that begin at `start` and read `shared` tokens before their own: the common ones, then those
        from `rest` on. Return their query and key slots.
        """
        position_c = torch.arange(int(length_b1.max()), device="cpu")
        position_P = torch.arange(int(shared_b1.max()), device="cpu")
        own_bc = start_b1 + torch.minimum(position_c, length_b1 - 1)
        within_bP = torch.minimum(position_P, (shared_b1 - 1).clamp(min=0))
        prompt_bP = torch.where(within_bP < self.common, within_bP, rest_b1 + within_bP - self.common)
        real_bc = position_c < length_b1
        self.query.append(own_bc.flatten())
        self.key.append(torch.cat([prompt_bP, own_bc], 1).flatten())
        self.real.append(real_bc.flatten())
        self.own.append(torch.cat([torch.zeros_like(prompt_bP, dtype=torch.bool), real_bc], 1).flatten())
        queries = slice(self.queries, self.queries + len(self.query[-1]))
        keys = slice(self.keys, self.keys + len(self.key[-1]))
        self.queries, self.keys = queries.stop, keys.stop
        return queries, keys

    def plan(
        self, buckets: tuple[SegmentBucket, ...], shared_M: Tensor, dtype: torch.dtype, device: torch.device
    ) -> AttentionPlan:
        query_S, key_S, real_S, own_S = (torch.cat(each) for each in (self.query, self.key, self.real, self.own))
        position_P = torch.arange(int(shared_M.max()), device="cpu")
        own_MP = (position_P >= self.common) & (position_P < shared_M[:, None])
        return AttentionPlan(
            buckets,
            query_S.to(device),
            key_S.to(device),
            real_S[:, None].to(device, dtype),
            _slot_of_token(query_S, real_S).to(device),
            _slot_of_token(key_S, own_S).to(device),
            own_MP.flatten().nonzero()[:, 0].to(device),
            len(shared_M),
            len(position_P),
            self.common,
        )


def _slot_of_token(token_S: Tensor, chosen_S: Tensor) -> Tensor:
    """Return the chosen slot of each token, [T]."""
    slots = chosen_S.nonzero()[:, 0]
    return torch.empty_like(slots).index_copy_(0, token_S[slots], slots)


def _attention_bias(longest: int, shared_b1: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return [b, 1, c, P + c] (b = 1 where all segments have the same): 0 where a query sees a key, -inf where not."""
    if int(shared_b1.min()) == int(shared_b1.max()):
        shared_b1 = shared_b1[:1]
    own_bc = shared_b1 + torch.arange(longest, device="cpu")
    position_P = torch.arange(int(shared_b1.max()), device="cpu").expand(len(shared_b1), -1)
    distance_bcn = own_bc[:, :, None] - torch.cat([position_P, own_bc], 1)[:, None]
    exists_bn = torch.cat([position_P < shared_b1, torch.ones_like(own_bc, dtype=torch.bool)], 1)
    seen_bcn = exists_bn[:, None] & (distance_bcn >= 0)
    if window is not None:
        seen_bcn &= distance_bcn < window
    return torch.zeros(seen_bcn.shape, dtype=dtype, device="cpu").masked_fill_(~seen_bcn, -torch.inf)[:, None]
