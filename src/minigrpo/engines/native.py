"""The native engine: rollouts in the trainer's process, from the policy's own weights.

Each prompt passes through the model once; its keys and values are shared by the G siblings, never copied. Rows that
finish leave at once: the last active row moves into the gap, so what remains is always the front of the cache.

Shapes: n active rows, M prompts in the cache, G siblings, P longest shared prompt, C own slots, H query heads,
K key/value heads, R = H / K, D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minigrpo.engines.context import check_room, context_of
from minigrpo.engines.lean import Layer, Lean, Turn
from minigrpo.engines.sampling import draw
from minigrpo.noise import name_key, uniform
from minigrpo.types import Completion, Ready, Rendered, Sampling

StopRule = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens_n, row_n, tokens so far) -> which rows end here. `row_n` counts completions of the call, prompt by prompt."""

PREFILL_TOKENS = 8192
"""Prompt tokens that pass through the model at once."""
FIRST_SLOTS = 64


class NativeEngine:
    """Samples from the policy that it was made for; `update` takes over the policy's weights of that moment."""

    def __init__(self, policy: Any, *, stop_ids: Sequence[int], rows: int, stop_rule: StopRule | None = None) -> None:
        from minigrpo.policy import decoder

        self.lean = Lean(decoder(policy.model), policy.model.get_output_embeddings())
        self.tokenizer = policy.tokenizer
        self.context = context_of(policy.model)
        self.rows = rows
        self.stop_ids_s = torch.tensor(sorted(stop_ids), device=self.lean.device)
        self.stop_rule = stop_rule or (lambda tokens_n, row_n, so_far: torch.isin(tokens_n, self.stop_ids_s))

    def update(self, policy: Any) -> None:
        self.lean.refresh()

    def generate(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, ready: Ready | None = None
    ) -> list[tuple[Completion, ...]]:
        """n completions of each prompt, in order; as many prompts at a time as `rows` admits."""
        check_room(prompts, sampling.max_tokens, self.context)
        at_once = max(1, self.rows // n)
        answers: list[tuple[Completion, ...]] = []
        for start in range(0, len(prompts), at_once):
            wave = _Wave(self.lean, prompts[start : start + at_once], n, sampling)
            rule: StopRule = lambda t, row, c, first=start * n: self.stop_rule(t, row + first, c)  # type: ignore[misc]  # noqa: E731
            answers += self._answers(wave, rule, start, ready)
        return answers

    def _answers(self, wave: _Wave, rule: StopRule, start: int, ready: Ready | None) -> list[tuple[Completion, ...]]:
        """What a wave says; `ready` is told of each prompt as its last row ends."""
        if ready is None:
            wave.run(rule)
            return self._completions(wave, 0, wave.prompts)
        done: dict[int, tuple[Completion, ...]] = {}

        def tell(place: int) -> None:
            done[place] = self._completions(wave, place, place + 1)[0]
            ready(start + place, done[place])

        wave.run(rule, tell)
        return [done[place] for place in range(wave.prompts)]

    def _completions(self, wave: _Wave, first: int, end: int) -> list[tuple[Completion, ...]]:
        """Of the prompts from `first` up to `end`, all of whose rows have ended."""
        n = wave.siblings
        rows = slice(first * n, end * n)
        lengths = wave.lengths_B[rows].tolist()
        longest = max(lengths)
        ids = [row[:length] for row, length in zip(wave.tokens_BC[rows, :longest].tolist(), lengths, strict=True)]
        logprobs = [
            row[:length] for row, length in zip(wave.logprobs_BC[rows, :longest].tolist(), lengths, strict=True)
        ]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        stopped = wave.stopped_B[rows].tolist()
        flat = [
            Completion(text, tuple(row), tuple(lps), "stop" if stop else "length")
            for text, row, lps, stop in zip(texts, ids, logprobs, stopped, strict=True)
        ]
        return [tuple(flat[start : start + n]) for start in range(0, len(flat), n)]


class _Wave:
    """Prompts decoded together, and everything that changes while they are."""

    def __init__(self, lean: Lean, prompts: Sequence[Rendered], n: int, sampling: Sampling) -> None:
        self.lean, self.sampling, self.siblings = lean, sampling, n
        device = lean.device
        M, B = len(prompts), len(prompts) * n
        self.prompts = M
        shared_M = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=device)
        self.shared_M = shared_M
        self.turn = lean.turns(int(shared_M.max()) + sampling.max_tokens)
        streams = [name_key(sampling.seed, p.prompt.id, sibling) for p in prompts for sibling in range(n)]
        self.stream_B = torch.tensor(streams, device=device)
        self.tokens_BC = torch.zeros(B, sampling.max_tokens, dtype=torch.long, device=device)
        self.logprobs_BC = torch.zeros(B, sampling.max_tokens, device=device)
        self.lengths_B = torch.zeros(B, dtype=torch.long, device=device)
        self.stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        # Slots 0 .. n - 1 are the active rows; slot i holds completion row_n[i].
        self.row_n = torch.arange(B, device=device)
        self.feed_n = torch.tensor([p.ids[-1] for p in prompts for _ in range(n)], device=device)
        # The prompts that still have active rows, by their place in the shared cache.
        self.place_M = torch.arange(M, device=device)
        self.longest_window = max((layer.window or 0 for layer in lean.layers), default=0)
        self.shared = self._prefill(prompts)
        slots = min(FIRST_SLOTS, sampling.max_tokens)
        shape = (len(lean.layers), 2, B, lean.kv_heads, slots, lean.width)
        self.own = torch.empty(shape, dtype=lean.dtype, device=device)

    def _prefill(self, prompts: Sequence[Rendered]) -> Tensor:
        lean, P = self.lean, int(self.shared_M.max())
        shape = (len(lean.layers), 2, len(prompts), lean.kv_heads, P, lean.width)
        shared = torch.zeros(shape, dtype=lean.dtype, device=lean.device)
        if P:
            read_prompts(lean, prompts, self.turn, shared)
        return shared

    @torch.no_grad()
    def run(self, stops: StopRule, tell: Callable[[int], None] | None = None) -> None:
        """Decode until every row has ended; `tell` hears of each prompt whose last row has."""
        open_M = [self.siblings] * self.prompts
        for so_far in range(self.sampling.max_tokens):
            self._look(so_far)
            logits_nV = self.lean.decode(self.feed_n, self._turn_now, self._attend)
            uniform_n = uniform(self.stream_B[self.row_n] + so_far)
            tokens_n, logprobs_n = draw(logits_nV, uniform_n, self.sampling.temperature)
            self.tokens_BC[self.row_n, so_far] = tokens_n
            self.logprobs_BC[self.row_n, so_far] = logprobs_n
            self.lengths_B[self.row_n] = so_far + 1
            ended_n = stops(tokens_n, self.row_n, so_far + 1)
            self.feed_n = tokens_n
            if bool(ended_n.any()):
                ended = self.row_n[ended_n]
                self.stopped_B[ended] = True
                self._drop(ended_n, so_far + 1)
                for place in self._closed(ended, open_M) if tell else ():
                    tell(place)  # type: ignore[misc]
            if not len(self.row_n):
                return
        for place in [place for place, rows in enumerate(open_M) if rows] if tell else ():
            tell(place)  # type: ignore[misc]

    def _closed(self, ended: Tensor, open_M: list[int]) -> list[int]:
        """Prompts that lost their last row just now; `open_M` counts rows that go on, by prompt."""
        places = [row // self.siblings for row in ended.tolist()]
        for place in places:
            open_M[place] -= 1
        return sorted({place for place in places if not open_M[place]})

    def _look(self, so_far: int) -> None:
        """What holds for this step in every layer: places, masks, room in the cache."""
        if so_far == self.own.shape[4]:
            room = min(so_far, self.sampling.max_tokens - so_far)
            self.own = torch.nn.functional.pad(self.own[:, :, : len(self.row_n)], (0, 0, 0, room))
        self.so_far = so_far
        group_n = self.row_n // self.siblings
        shared_n = self.shared_M[group_n]
        self._turn_now: Turn = self.turn.at(shared_n + so_far)
        # Where each row stands in the grid [prompts in the cache, G].
        self._grid_n = torch.searchsorted(self.place_M, group_n) * self.siblings + self.row_n % self.siblings
        at_P = torch.arange(self.shared.shape[4], device=self.lean.device)
        self._shared_ok = at_P < shared_n[:, None]
        self._reach_n = shared_n + so_far
        self._bias: dict[int | None, Tensor] = {}

    def _shared_bias(self, window: int | None) -> Tensor:
        """[n, 1, 1, P + C]: 0 where a row may look, -inf where not: beyond its prompt, or out of its window."""
        reaches_all = window is None or int(self.shared.shape[4]) + self.so_far < window
        window = None if reaches_all else window
        if window not in self._bias:
            ok = torch.cat([self._shared_ok, self._shared_ok.new_ones(len(self.row_n), self.so_far + 1)], 1)
            if window is not None:
                P = self.shared.shape[4]
                at = torch.arange(P + self.so_far + 1, device=self.lean.device)
                key_place = torch.where(at < P, at, self._reach_n[:, None] - self.so_far + at - P)
                ok &= self._reach_n[:, None] - key_place < window
            self._bias[window] = torch.zeros(ok.shape, device=ok.device).masked_fill(~ok, -torch.inf)[:, None, None]
        return self._bias[window]

    def _attend(self, index: int, layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [n, H, D] over the shared prompt and the row's own tokens: [n, H * D]."""
        n, t = len(query), self.so_far
        own_key, own_value = self.own[index, 0, :n], self.own[index, 1, :n]
        own_key[:, :, t], own_value[:, :, t] = key, value
        query_nKRD = query.unflatten(1, (self.lean.kv_heads, -1)) * layer.scaling
        own_scores = query_nKRD @ own_key[:, :, : t + 1].mT
        shared_scores = self._from_grid(self._to_grid(query_nKRD) @ self.shared[index, 0].mT)
        scores = torch.cat([shared_scores, own_scores], -1).float() + self._shared_bias(layer.window)
        shared_probs, own_probs = scores.softmax(-1).to(query.dtype).split([self.shared.shape[4], t + 1], -1)
        attended = own_probs @ own_value[:, :, : t + 1]
        attended = attended + self._from_grid(self._to_grid(shared_probs) @ self.shared[index, 1])
        return attended.flatten(1)

    def _to_grid(self, x_nKRE: Tensor) -> Tensor:
        """Rows beside their siblings: [n, K, R, E] -> [M, K, G * R, E], zeros where a sibling has ended."""
        M, G = len(self.place_M), self.siblings
        grid = x_nKRE.new_zeros(M * G, *x_nKRE.shape[1:]).index_copy_(0, self._grid_n, x_nKRE)
        return grid.unflatten(0, (M, G)).transpose(1, 2).flatten(2, 3)

    def _from_grid(self, grid_MKgE: Tensor) -> Tensor:
        """The inverse of _to_grid."""
        spread = grid_MKgE.unflatten(2, (self.siblings, -1)).transpose(1, 2).flatten(0, 1)
        return spread.index_select(0, self._grid_n)

    def _drop(self, ended_n: Tensor, so_far: int) -> None:
        """Ended rows leave: the last active rows move into their slots; prompts that nobody reads leave by halves."""
        n = int((~ended_n).sum())
        gaps, movers = ended_n[:n].nonzero()[:, 0], (~ended_n[n:]).nonzero()[:, 0] + n
        self.own[:, :, gaps, :, :so_far] = self.own[:, :, movers, :, :so_far]
        for rows in (self.row_n, self.feed_n):
            rows[gaps] = rows[movers]
        self.row_n, self.feed_n = self.row_n[:n], self.feed_n[:n]
        alive_M = torch.unique(self.row_n // self.siblings)
        if n and len(alive_M) <= len(self.place_M) // 2:
            self.shared = self.shared[:, :, torch.searchsorted(self.place_M, alive_M)]
            self.place_M = alive_M


def read_prompts(lean: Lean, prompts: Sequence[Rendered], turn: Turn, shared: Tensor) -> None:
    """Fill `shared` [L, 2, M, K, P, D] with each prompt but for its last token; padding behind it is never seen."""
    P = max(len(prompt.ids) for prompt in prompts) - 1
    padded = [(*prompt.ids[:-1], *[0] * (P + 1 - len(prompt.ids))) for prompt in prompts]
    ids_MP = torch.tensor(padded, device=lean.device)
    at_once = max(1, PREFILL_TOKENS // P)
    for start in range(0, len(prompts), at_once):
        span = slice(start, min(start + at_once, len(prompts)))
        lean.prefill(ids_MP[span], turn, shared[:, :, span, :, :P])
