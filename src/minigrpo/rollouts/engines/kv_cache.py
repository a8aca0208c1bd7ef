"""Keys and values of active rows, and attention over them, in two layouts:

    SharedPrompts  each prompt is held once. The queries of siblings stand side by side in a grid and meet its keys in
                   one product; a second one meets the row's own tokens. The least memory, and the least to read.
    OwnPrompts     each row holds its prompt and its own tokens in one piece: two products and no grid. Where all of
                   it is small, what a token costs is the number of calls.

`cache_class` chooses. Rows that end are evicted: the last active rows move into their slots, so active rows
are always the front.

Shapes: n active rows, B rows at first, M prompts, G siblings, P longest shared prompt (without its last token), C own
slots, t own tokens before this one, H query heads, K key/value heads, R = H / K, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from minigrpo.rollouts.engines.decoder import Decoder, Layer
from minigrpo.utils.transfer import to_device

FIRST_SLOTS = 64
MAX_COPIED_BYTES = 1 << 23
"""Bytes of all rows' prompts in one layer up to which copies are quicker to read than a grid is to lay out (CPU)."""


class Cache(Protocol):
    def assign(self, row_n: Tensor) -> None:
        """Assign completions `row_n` to the active rows. Called at the start and after every `evict`."""

    def grow(self, t: int) -> None:
        """Make room for the t-th token of every row."""

    def attend(self, index: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store one token's key and value [n, K, D]; return the attention of its queries [n, H, D]: [n, H * D]."""

    def evict(self, gaps: Tensor, movers: Tensor, t: int) -> None:
        """Move rows `movers` into the slots of rows `gaps`; each holds t tokens of its own."""


def cache_class(
    decoder: Decoder, lengths_M: Sequence[int], siblings: int, max_tokens: int, device: str
) -> type[SharedPrompts] | type[OwnPrompts]:
    """Return the faster layout for prompts of these lengths, each with `siblings` rows of up to `max_tokens` tokens.

    On a GPU prompts stay shared: memory is scarce there, and a small model runs in CUDA graphs
    (engines/cuda_graph.py).
    """
    longest = max(lengths_M)
    copied_bytes = 2 * decoder.kv_heads * decoder.width * decoder.dtype.itemsize * longest * len(lengths_M) * siblings
    windowed = any(layer.window is not None and layer.window < longest + max_tokens + 1 for layer in decoder.layers)
    return OwnPrompts if device == "cpu" and 0 < copied_bytes <= MAX_COPIED_BYTES and not windowed else SharedPrompts


class OwnPrompts:
    """Keys [L, B * K, D, P + C], transposed for their product, and values [L, B * K, P + C, D].

    Own tokens begin behind the longest prompt; the gap between is masked: `bias` [B * K, 1, P + C] is -inf there.
    """

    def __init__(
        self, decoder: Decoder, shared: Tensor, lengths_M: Sequence[int], siblings: int, max_tokens: int
    ) -> None:
        self.decoder, self.max_tokens = decoder, max_tokens
        L, _, M, K, P, D = shared.shape
        self.P, slots = P, min(FIRST_SLOTS, max_tokens)
        keys = shared.new_empty(L, M, siblings, K, D, P + slots)
        values = shared.new_empty(L, M, siblings, K, P + slots, D)
        keys[..., :P], values[..., :P, :] = shared[:, 0].mT.unsqueeze(2), shared[:, 1].unsqueeze(2)
        self.keys, self.values = keys.flatten(1, 3), values.flatten(1, 3)
        lengths_n1 = torch.tensor(lengths_M, device=shared.device).repeat_interleave(siblings * K)[:, None]
        at_S = torch.arange(P + max_tokens, device=shared.device)
        self.bias = _mask_bias((at_S < lengths_n1) | (at_S >= P))[:, None].to(decoder.dtype)

    def assign(self, row_n: Tensor) -> None:
        self.n = len(row_n) * self.decoder.kv_heads

    def grow(self, t: int) -> None:
        n, end = self.n, self.P + t + 1
        if end > self.values.shape[2]:
            extra = min(t, self.max_tokens - t)
            self.keys, self.values = pad(self.keys[:, :n], (0, extra)), pad(self.values[:, :n], (0, 0, 0, extra))
        self.visible = self.keys[:, :n, :, :end], self.values[:, :n, :end], self.bias[:n, :, :end]
        rows = (-1, self.decoder.kv_heads)
        self.slot = self.keys[:, :n, :, end - 1].unflatten(1, rows), self.values[:, :n, end - 1].unflatten(1, rows)

    def attend(self, index: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values, bias = self.visible
        self.slot[0][index], self.slot[1][index] = key, value
        query_nRD = query.reshape(self.n, -1, self.decoder.width)
        scores = torch.baddbmm(bias, query_nRD, keys[index], alpha=layer.scaling)
        probs = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.bmm(probs, values[index]).view(len(query), -1)

    def evict(self, gaps: Tensor, movers: Tensor, t: int) -> None:
        K, end = self.decoder.kv_heads, self.P + t
        # One by one: as a rule few leave at once, and an indexed copy is dear.
        for gap, mover in zip((gaps * K).tolist(), (movers * K).tolist(), strict=True):
            target, source = slice(gap, gap + K), slice(mover, mover + K)
            self.keys[:, target, :, :end] = self.keys[:, source, :, :end]
            self.values[:, target, :end] = self.values[:, source, :end]
            self.bias[target] = self.bias[source]


class SharedPrompts:
    """Prompts [L, 2, M, K, P, D], only those that an active row reads; own tokens [L, 2, B, K, C, D]."""

    def __init__(
        self, decoder: Decoder, shared: Tensor, lengths_M: Sequence[int], siblings: int, max_tokens: int
    ) -> None:
        self.decoder, self.shared, self.siblings, self.max_tokens = decoder, shared, siblings, max_tokens
        L, _, M, K, _, D = shared.shape
        self.own = shared.new_empty(L, 2, M * siblings, K, min(FIRST_SLOTS, max_tokens), D)
        self.lengths_M = to_device(torch.tensor(lengths_M), shared.device)
        self.prompt_M = torch.arange(M, device=shared.device)

    def assign(self, row_n: Tensor) -> None:
        group_n = row_n // self.siblings
        if 2 * len(row_n) <= len(self.prompt_M) * self.siblings:
            self._evict_prompts(torch.unique(group_n))
        # Where each row stands in the grid [prompts held, G].
        self.grid_n = torch.searchsorted(self.prompt_M, group_n) * self.siblings + row_n % self.siblings
        self.lengths_n1 = self.lengths_M[group_n][:, None]
        self.at_P = torch.arange(self.shared.shape[4], device=row_n.device)
        self.bias_nP = _mask_bias(self.at_P < self.lengths_n1)[:, None, None]

    def _evict_prompts(self, active_M: Tensor) -> None:
        """Evict prompts that no active row reads, once they are half of all."""
        if 2 * len(active_M) <= len(self.prompt_M):
            self.shared = self.shared[:, :, torch.searchsorted(self.prompt_M, active_M)]
            self.prompt_M = active_M

    def grow(self, t: int) -> None:
        self.n, self.t = len(self.grid_n), t
        if t == self.own.shape[4]:
            self.own = pad(self.own[:, :, : self.n], (0, 0, 0, min(t, self.max_tokens - t)))
        self._windows: dict[int, Tensor] = {}

    def attend(self, index: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n, t = self.n, self.t
        own_key, own_value = self.own[index, 0, :n], self.own[index, 1, :n]
        own_key[:, :, t], own_value[:, :, t] = key, value
        query_nKRD = query.unflatten(1, (self.decoder.kv_heads, -1)) * layer.scaling
        own_scores = query_nKRD @ own_key[:, :, : t + 1].mT
        shared_scores = self._from_grid(self._to_grid(query_nKRD) @ self.shared[index, 0].mT)
        scores = torch.cat([shared_scores.float() + self.bias_nP, own_scores.float()], -1)
        if layer.window is not None and len(self.at_P) + t >= layer.window:
            scores = scores + self._window(layer.window)
        shared_probs, own_probs = scores.softmax(-1).to(query.dtype).split([len(self.at_P), t + 1], -1)
        attended = own_probs @ own_value[:, :, : t + 1]
        attended = attended + self._from_grid(self._to_grid(shared_probs) @ self.shared[index, 1])
        return attended.flatten(1)

    def _window(self, window: int) -> Tensor:
        """Return a mask [n, 1, 1, P + t + 1], -inf where a key is outside the sliding window; layers share it."""
        if window not in self._windows:
            own_n1 = self.lengths_n1 + torch.arange(self.t + 1, device=self.at_P.device)
            position_nS = torch.cat([self.at_P.expand(self.n, -1), own_n1], 1)
            self._windows[window] = _mask_bias(self.lengths_n1 + self.t - position_nS < window)[:, None, None]
        return self._windows[window]

    def _to_grid(self, x_nKRE: Tensor) -> Tensor:
        """Put rows beside their siblings: [n, K, R, E] -> [M, K, G * R, E], zeros where a sibling has ended."""
        M, G = len(self.prompt_M), self.siblings
        grid = x_nKRE.new_zeros(M * G, *x_nKRE.shape[1:]).index_copy_(0, self.grid_n, x_nKRE)
        return grid.unflatten(0, (M, G)).transpose(1, 2).flatten(2, 3)

    def _from_grid(self, grid_MKgE: Tensor) -> Tensor:
        """Invert `_to_grid`."""
        spread = grid_MKgE.unflatten(2, (self.siblings, -1)).transpose(1, 2).flatten(0, 1)
        return spread.index_select(0, self.grid_n)

    def evict(self, gaps: Tensor, movers: Tensor, t: int) -> None:
        self.own[:, :, gaps, :, :t] = self.own[:, :, movers, :, :t]


def _mask_bias(visible: Tensor) -> Tensor:
    """Return 0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
