"""The native engine: rollouts in the trainer's process, from the policy's own weights.

Each prompt passes through the model once, for all its G siblings. Rows that finish leave at once: the last active row
moves into the gap, so what remains is always the front of the cache (engines/kv_cache.py).

Shapes: n active rows, B rows at first, M prompts, P longest shared prompt (without its last token), K key/value heads,
D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minigrpo.models.context import check_room, context_length
from minigrpo.rollouts.engines.decoder import Decoder, Rope
from minigrpo.rollouts.engines.kv_cache import cache_class
from minigrpo.rollouts.engines.sampling import draw, waves
from minigrpo.types import Completion, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key, uniform

StopRule = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens_n, row_n, tokens so far) -> which rows end here. `row_n` counts completions of the call, prompt by prompt."""

PREFILL_TOKENS = 8192
"""Prompt tokens that pass through the model at once."""
DRAWS = 64
"""Positions whose random numbers are made at once."""


class NativeEngine:
    """Samples from the policy that it was made for; `update` takes over the policy's weights of that moment."""

    def __init__(self, policy: Any, *, stop_ids: Sequence[int], rows: int, stop_rule: StopRule | None = None) -> None:
        from minigrpo.models.policy import decoder_of

        self.lean = Decoder(decoder_of(policy.model), policy.model.get_output_embeddings())
        self.tokenizer = policy.tokenizer
        self.context = context_length(policy.model)
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
        answers: list[tuple[Completion, ...]] = []
        for start, part in waves(prompts, n, self.rows):
            wave = DecodeBatch(self.lean, part, n, sampling)
            rule: StopRule = lambda t, row, c, first=start * n: self.stop_rule(t, row + first, c)  # type: ignore[misc]  # noqa: E731
            answers += self._answers(wave, rule, start, ready)
        return answers

    def _answers(
        self, wave: DecodeBatch, rule: StopRule, start: int, ready: Ready | None
    ) -> list[tuple[Completion, ...]]:
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

    def _completions(self, wave: DecodeBatch, first: int, end: int) -> list[tuple[Completion, ...]]:
        """Of the prompts from `first` up to `end`, all of whose rows have ended."""
        n = wave.siblings
        rows = slice(first * n, end * n)
        lengths = wave.lengths_B[rows].tolist()
        longest = max(lengths)
        ids = [row[:length] for row, length in zip(wave.tokens_CB[:longest, rows].T.tolist(), lengths, strict=True)]
        logprobs = [
            row[:length] for row, length in zip(wave.logprobs_CB[:longest, rows].T.tolist(), lengths, strict=True)
        ]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        stopped = wave.stopped_B[rows].tolist()
        flat = [
            Completion(text, tuple(row), tuple(lps), "stop" if stop else "length")
            for text, row, lps, stop in zip(texts, ids, logprobs, stopped, strict=True)
        ]
        return [tuple(flat[start : start + n]) for start in range(0, len(flat), n)]


class DecodeBatch:
    """Prompts decoded together, and everything that changes while they are."""

    def __init__(self, lean: Decoder, prompts: Sequence[Rendered], n: int, sampling: Sampling) -> None:
        self.lean, self.sampling, self.siblings = lean, sampling, n
        device = lean.device
        M, B = len(prompts), len(prompts) * n
        self.prompts = M
        lengths_M = [len(prompt.ids) - 1 for prompt in prompts]
        self.turn = lean.turns(max(lengths_M) + sampling.max_tokens)
        streams = [name_key(sampling.seed, p.prompt.id, sibling) for p in prompts for sibling in range(n)]
        self.stream_B = torch.tensor(streams, device=device)
        self.tokens_CB = torch.zeros(sampling.max_tokens, B, dtype=torch.long, device=device)
        self.logprobs_CB = torch.zeros(sampling.max_tokens, B, device=device)
        self.lengths_B = torch.full((B,), sampling.max_tokens, device=device)
        self.stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        # Slots 0 .. n - 1 are the active rows; slot i holds completion row_n[i], whose next token is at place_n[i].
        self.row_n = torch.arange(B, device=device)
        self.feed_n = torch.tensor([p.ids[-1] for p in prompts for _ in range(n)], device=device)
        self.place_n = torch.tensor(lengths_M, device=device).repeat_interleave(n)
        form = cache_class(lean, lengths_M, n, sampling.max_tokens, device.type)
        self.cache = form(lean, self._prefill(prompts, max(lengths_M)), lengths_M, n, sampling.max_tokens)
        self.cache.seat(self.row_n)

    def _prefill(self, prompts: Sequence[Rendered], P: int) -> Tensor:
        lean = self.lean
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
            self.cache.look(so_far)
            logits_nV = self.lean.decode(self.feed_n, self.turn.at(self.place_n), self.cache.attend)
            tokens_n, logprobs_n = draw(logits_nV, self._uniform(so_far), self.sampling.temperature)
            self.tokens_CB[so_far].index_copy_(0, self.row_n, tokens_n)
            self.logprobs_CB[so_far].index_copy_(0, self.row_n, logprobs_n)
            ended_n = stops(tokens_n, self.row_n, so_far + 1)
            self.feed_n = tokens_n
            self.place_n += 1
            if bool(ended_n.any()):
                ended = self.row_n[ended_n]
                self.stopped_B[ended] = True
                self.lengths_B[ended] = so_far + 1
                self._drop(ended_n, so_far + 1)
                for place in self._closed(ended, open_M) if tell else ():
                    tell(place)  # type: ignore[misc]
            if not len(self.row_n):
                return
        for place in [place for place, rows in enumerate(open_M) if rows] if tell else ():
            tell(place)  # type: ignore[misc]

    def _uniform(self, so_far: int) -> Tensor:
        """One number in [0, 1) for each active row, named by its stream and the position."""
        if so_far % DRAWS == 0:
            at_C1 = torch.arange(so_far, so_far + DRAWS, device=self.lean.device)[:, None]
            self._uniform_CB = uniform(self.stream_B + at_C1)
        return self._uniform_CB[so_far % DRAWS].index_select(0, self.row_n)

    def _closed(self, ended: Tensor, open_M: list[int]) -> list[int]:
        """Prompts that lost their last row just now; `open_M` counts rows that go on, by prompt."""
        places = [row // self.siblings for row in ended.tolist()]
        for place in places:
            open_M[place] -= 1
        return sorted({place for place in places if not open_M[place]})

    def _drop(self, ended_n: Tensor, so_far: int) -> None:
        """Ended rows leave: the last active rows move into their slots."""
        n = int((~ended_n).sum())
        gaps, movers = ended_n[:n].nonzero()[:, 0], (~ended_n[n:]).nonzero()[:, 0] + n
        self.cache.drop(gaps, movers, so_far)
        for rows in (self.row_n, self.feed_n, self.place_n):
            rows[gaps] = rows[movers]
        self.row_n, self.feed_n, self.place_n = self.row_n[:n], self.feed_n[:n], self.place_n[:n]
        if n:
            self.cache.seat(self.row_n)


def read_prompts(lean: Decoder, prompts: Sequence[Rendered], turn: Rope, shared: Tensor) -> None:
    """Fill `shared` [L, 2, M, K, P, D] with each prompt but for its last token; padding behind it is never seen."""
    P = max(len(prompt.ids) for prompt in prompts) - 1
    padded = [(*prompt.ids[:-1], *[0] * (P + 1 - len(prompt.ids))) for prompt in prompts]
    ids_MP = torch.tensor(padded, device=lean.device)
    at_once = max(1, PREFILL_TOKENS // P)
    for start in range(0, len(prompts), at_once):
        span = slice(start, min(start + at_once, len(prompts)))
        lean.prefill(ids_MP[span], turn, shared[:, :, span, :, :P])
