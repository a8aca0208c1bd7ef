"""Attention over a row that holds each prompt once: a prompt sees itself, a completion its prompt and itself.

transformers calls `shared_prompt_attention` in every layer of a model whose attention implementation is
SHARED_PROMPT_ATTENTION, with the `layout` and the `backend` that were given to the model's forward. The result equals
G padded rows, token for token. On a CPU cpu.py does the work; the rest of this module is for torch's fused kernels.

Shapes: M groups, G siblings, B = M * G, H query heads, D head width, S shared prompt tokens, N completion tokens,
T = S + N; P and C are the longest shared prompt and completion of the row. Padding exists only inside this function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigrpo.algorithms.packing import PackedLayout
from minigrpo.models.attention import cpu
from minigrpo.utils.transfer import to_device

SHARED_PROMPT_ATTENTION = "minigrpo_shared_prompt"

CACHED_MASKS = 4
"""Shapes of pass whose masks are cached."""


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """What computes attention: a kernel with torch's signature, or cpu.py on the devices in `segments_on`.

    On a CPU plain products over segments of similar length are fastest; elsewhere torch's fused kernels are.
    `plain` is the implementation that transformers is to use where a row holds one text, by its registered name.
    """

    kernel: Callable[..., Tensor] = scaled_dot_product_attention
    segments_on: frozenset[str] = frozenset({"cpu"})
    plain: str = "sdpa"


TORCH_BACKEND = AttentionBackend()


def register_shared_prompt_attention() -> None:
    """Register SHARED_PROMPT_ATTENTION with transformers.

    The name must stay out of AttentionMaskInterface: transformers then builds no mask, where its own would take the
    restarting positions for separate sequences and cut the prompt off.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED_PROMPT_ATTENTION, shared_prompt_attention)


def shared_prompt_attention(
    module: Any,
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackedLayout,
    backend: AttentionBackend = TORCH_BACKEND,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the output [1, T, H, D] and no weights. Keys and values may have fewer heads than queries (GQA)."""
    assert attention_mask is None, "a mask would be ignored here: lengths come from the layout"
    if query_1HTD.device.type in backend.segments_on:
        query_THD, key_TKD, value_TKD = (x_1HTD[0].transpose(0, 1) for x_1HTD in (query_1HTD, key_1HTD, value_1HTD))
        attended_THD = cpu.segment_attention(
            query_THD, key_TKD, value_TKD, layout=layout, scale=scaling, window=sliding_window
        )
        return attended_THD[None], None
    assert not layout.common, "only cpu.py reads a common beginning once"
    groups = query_1HTD.shape[1] // key_1HTD.shape[1]
    query_THD = query_1HTD[0].transpose(0, 1)
    key_THD = key_1HTD[0].repeat_interleave(groups, 0).transpose(0, 1)
    value_THD = value_1HTD[0].repeat_interleave(groups, 0).transpose(0, 1)
    S, G = layout.shared_tokens, layout.siblings
    own_B = layout.own_B
    outputs = []
    if S:
        shared_query, shared_key, shared_value = (
            _pad(x_THD[:S], layout.shared_M) for x_THD in (query_THD, key_THD, value_THD)
        )
        mask = _shared_mask(layout, sliding_window, query_THD.device)
        attended = backend.kernel(
            shared_query, shared_key, shared_value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        outputs.append(_unpad(attended, layout.shared_M))
    own_key_BHCD, own_value_BHCD = (_pad(x_THD[S:], own_B) for x_THD in (key_THD, value_THD))
    own_query_BHCD = _pad(query_THD[S:], own_B)
    if S:
        own_key_BHCD = torch.cat([_repeat_for_siblings(shared_key, G), own_key_BHCD], 2)
        own_value_BHCD = torch.cat([_repeat_for_siblings(shared_value, G), own_value_BHCD], 2)
    mask = _own_mask(layout, sliding_window, query_THD.device)
    attended = backend.kernel(own_query_BHCD, own_key_BHCD, own_value_BHCD, attn_mask=mask, scale=scaling)
    outputs.append(_unpad(attended, own_B))
    return torch.cat(outputs).unsqueeze(0), None


def _pad(x_THD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Pad consecutive segments of tokens with zeros on the right: [segments, H, longest, D]."""
    slots = len(lengths) * max(lengths)
    x_SHD = x_THD if slots == len(x_THD) else _Scatter.apply(x_THD, _slot_of_token(lengths, x_THD.device), slots)
    return x_SHD.unflatten(0, (len(lengths), max(lengths))).transpose(1, 2)


def _unpad(x_BHCD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Undo _pad: return [T, H, D]."""
    x_SHD = x_BHCD.transpose(1, 2).flatten(0, 1)
    return x_SHD if sum(lengths) == len(x_SHD) else _Gather.apply(x_SHD, _slot_of_token(lengths, x_SHD.device))


class _Scatter(torch.autograd.Function):
    """Scatters rows to slots among zeros. No slot occurs twice: both directions are exact copies."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, slots_T: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(slots_T)
        return x_THD.new_zeros(slots, *x_THD.shape[1:]).index_copy_(0, slots_T, x_THD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """Gathers the rows at the given slots: the inverse of _Scatter."""

    @staticmethod
    def forward(ctx: Any, x_SHD: Tensor, slots_T: Tensor) -> Tensor:
        ctx.save_for_backward(slots_T)
        ctx.slots = len(x_SHD)
        return x_SHD.index_select(0, slots_T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient_THD = gradients[0]
        spread = gradient_THD.new_zeros(ctx.slots, *gradient_THD.shape[1:])
        return spread.index_copy_(0, ctx.saved_tensors[0], gradient_THD), None


@lru_cache(maxsize=8)
def _slot_of_token(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the T slots, among segments * longest, that hold a token."""
    slots = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return to_device(slots.flatten().nonzero().flatten(), device)


def _repeat_for_siblings(x_MHPD: Tensor, siblings: int) -> Tensor:
    """Repeat each prompt for its siblings, [M * G, H, P, D].

    Expanded, not indexed: the gradient is then a plain sum, the same in every run.
    """
    M, H, P, D = x_MHPD.shape
    return x_MHPD.unsqueeze(1).expand(M, siblings, H, P, D).reshape(M * siblings, H, P, D)


@lru_cache(maxsize=CACHED_MASKS)
def _shared_mask(layout: PackedLayout, window: int | None, device: torch.device) -> Tensor | None:
    """Return the prompts' mask, or None where causal attention is enough: no token sees padding on the right."""
    longest = max(layout.shared_M)
    if window is None or longest <= window:
        return None
    position = torch.arange(longest, device=device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


@lru_cache(maxsize=CACHED_MASKS)
def _own_mask(layout: PackedLayout, window: int | None, device: torch.device) -> Tensor:
    """Return [B, 1, C, P + C], True where a completion's token sees a key; cached for the layers of one pass."""
    G, own_B = layout.siblings, layout.own_B
    P, C = max(layout.shared_M), max(own_B)
    shared_B1 = to_device(torch.tensor(layout.shared_M), device).repeat_interleave(G)[:, None]
    own_position_C = torch.arange(C, device=device)
    shared_position_P = torch.arange(P, device=device)
    query_position_BC1 = (shared_B1 + own_position_C)[..., None]
    key_position_BK = torch.cat([shared_position_P.expand(len(own_B), P), shared_B1 + own_position_C], 1)
    exists_BK = torch.cat(
        [shared_position_P < shared_B1, torch.ones(len(own_B), C, dtype=torch.bool, device=device)], 1
    )
    distance_BCK = query_position_BC1 - key_position_BK[:, None]
    allowed = exists_BK[:, None] & (distance_BCK >= 0)
    if window is not None:
        allowed &= distance_BCK < window
    return allowed[:, None]
