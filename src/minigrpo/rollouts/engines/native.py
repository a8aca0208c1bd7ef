"""The native engine: rollouts in the trainer's process, from the policy's own weights.

Each prompt passes through the model once, for all its G siblings. A row that ends is evicted at once: the last active
row moves into its slot, so the active rows are always the front of the cache (engines/kv_cache.py).

Shapes: n active rows, B rows at first, M prompts, P longest shared prompt (without its last token), K key/value heads,
D head width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minigrpo.distributed.shards import gather_module
from minigrpo.models.context_window import check_room, context_length
from minigrpo.models.onednn import gains_by_blocks
from minigrpo.rollouts.engines.decoder import Decoder, Rope
from minigrpo.rollouts.engines.kv_cache import cache_class
from minigrpo.rollouts.engines.prompts import PackedPrompts, PaddedPrompts, PromptLayout, shared_beginning
from minigrpo.rollouts.engines.sampling import ProgressCounter, draw, refuse_broken_logits, split_prompts
from minigrpo.types import Completion, Progress, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key, uniform, with_float64
from minigrpo.utils.spinning import spin_while_free
from minigrpo.utils.transfer import to_device

StopRule = Callable[[Tensor, Tensor, int], Tensor]
"""(tokens_n, row_n, tokens so far) -> which rows end here. `row_n` counts completions of the call, prompt by prompt."""

PREFILL_TOKENS = 8192
"""Prompt tokens in one forward pass."""
DRAWS_AHEAD = 64
"""Positions whose random numbers are generated at once."""


class NativeEngine:
    """Samples from one policy; `update` copies the policy's current weights.

    `blocks`: copy weights into oneDNN's blocks, where that is quicker. It takes their memory once more, and changes no
    bit of what is sampled.
    """

    is_exact = True

    def __init__(
        self,
        policy: Any,
        *,
        stop_ids: Sequence[int],
        rows: int,
        stop_rule: StopRule | None = None,
        blocks: bool = False,
    ) -> None:
        from minigrpo.models.policy import decoder_of

        model: Any = decoder_of(policy.model)
        self.blocks = blocks and gains_by_blocks(model.dtype, model.device.type)
        self.decoder = Decoder(model, policy.model.get_output_embeddings(), blocks=self.blocks)
        self.tokenizer = policy.tokenizer
        self.context = context_length(policy.model)
        self.rows = rows
        # On a GPU the update would wait for the same kernels, and the plan has no memory for both.
        self.keeps_weights = self.decoder.device.type == "cpu"
        self.stop_ids_s = torch.tensor(sorted(stop_ids), device=self.decoder.device)
        self.stop_rule = stop_rule or (lambda tokens_n, row_n, so_far: torch.isin(tokens_n, self.stop_ids_s))

    def update(self, policy: Any) -> None:
        gather_module(policy.model)  # embedding, last norm and head are read where they are, not copied
        self.decoder.refresh()

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Return n completions of each prompt, in order; at most `rows` completions are decoded at once."""
        check_room(prompts, sampling.max_tokens, self.context)
        answers: list[tuple[Completion, ...]] = []
        counter = ProgressCounter(progress)
        with spin_while_free():
            for start, chunk in split_prompts(prompts, n, self.rows):
                batch = DecodeBatch(self.decoder, chunk, n, sampling, counter)
                rule: StopRule = lambda t, row, c, first=start * n: self.stop_rule(t, row + first, c)  # type: ignore[misc]  # noqa: E731
                answers += self._decode_batch(batch, rule, start, ready)
        return answers

    def _decode_batch(
        self, batch: DecodeBatch, rule: StopRule, start: int, ready: Ready | None
    ) -> list[tuple[Completion, ...]]:
        """Return the completions of a batch; call `ready` for each prompt when its last row ends."""
        if ready is None:
            batch.run(rule)
            return self._completions(batch, 0, batch.prompts)
        done: dict[int, tuple[Completion, ...]] = {}

        def notify(index: int) -> None:
            done[index] = self._completions(batch, index, index + 1)[0]
            ready(start + index, done[index])

        batch.run(rule, notify)
        return [done[index] for index in range(batch.prompts)]

    def _completions(self, batch: DecodeBatch, first: int, end: int) -> list[tuple[Completion, ...]]:
        """Return the completions of prompts `first` .. `end` - 1, all of whose rows have ended."""
        n = batch.siblings
        rows = slice(first * n, end * n)
        lengths = batch.lengths_B[rows].tolist()
        longest = max(lengths)
        ids = [row[:length] for row, length in zip(batch.tokens_CB[:longest, rows].T.tolist(), lengths, strict=True)]
        logprobs = [
            row[:length] for row, length in zip(batch.logprobs_CB[:longest, rows].T.tolist(), lengths, strict=True)
        ]
        for index in range(first, end):
            own = slice((index - first) * n, (index - first + 1) * n)
            refuse_broken_logits(batch.prompt_ids[index], logprobs[own])
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        stopped = batch.stopped_B[rows].tolist()
        flat = [
            Completion(text, tuple(row), tuple(lps), "stop" if stop else "length")
            for text, row, lps, stop in zip(texts, ids, logprobs, stopped, strict=True)
        ]
        return [tuple(flat[start : start + n]) for start in range(0, len(flat), n)]


class DecodeBatch:
    """Prompts decoded together, with all state that changes while they are."""

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Rendered], n: int, sampling: Sampling, counter: ProgressCounter
    ) -> None:
        self.decoder, self.sampling, self.siblings, self.counter = decoder, sampling, n, counter
        device = decoder.device
        M, B = len(prompts), len(prompts) * n
        self.prompts = M
        self.prompt_ids = [prompt.prompt.id for prompt in prompts]
        lengths_M = [len(prompt.ids) - 1 for prompt in prompts]
        self.rope = decoder.rope_table(max(lengths_M) + sampling.max_tokens)
        streams = [name_key(sampling.seed, p.prompt.id, sibling) for p in prompts for sibling in range(n)]
        self.stream_B = to_device(torch.tensor(streams), device)
        self.tokens_CB = torch.zeros(sampling.max_tokens, B, dtype=torch.long, device=device)
        self.logprobs_CB = torch.zeros(sampling.max_tokens, B, device=device)
        self.lengths_B = torch.full((B,), sampling.max_tokens, device=device)
        self.stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        # Slots 0 .. n - 1 are the active rows; slot i holds completion row_n[i], whose next token is at place_n[i].
        self.row_n = torch.arange(B, device=device)
        self.input_n = to_device(torch.tensor([p.ids[-1] for p in prompts for _ in range(n)]), device)
        self.position_n = to_device(torch.tensor(lengths_M), device).repeat_interleave(n)
        cache_type = cache_class(decoder, lengths_M, n, sampling.max_tokens, device.type)
        self.cache = cache_type(decoder, self._prefill(prompts, max(lengths_M)), lengths_M, n, sampling.max_tokens)
        self.cache.assign(self.row_n)

    def _prefill(self, prompts: Sequence[Rendered], P: int) -> Tensor:
        decoder = self.decoder
        shape = (len(decoder.layers), 2, len(prompts), decoder.kv_heads, P, decoder.width)
        shared = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        if P:
            prefill_prompts(decoder, prompts, self.rope, shared)
        return shared

    @torch.no_grad()
    def run(self, stop_rule: StopRule, notify: Callable[[int], None] | None = None) -> None:
        """Decode until every row has ended; call `notify` with each prompt whose last row has."""
        active_M = [self.siblings] * self.prompts
        for so_far in range(self.sampling.max_tokens):
            self.cache.grow(so_far)
            logits_nV = self.decoder.decode(self.input_n, self.rope.at(self.position_n), self.cache.attend)
            tokens_n, logprobs_n = draw(logits_nV, self._uniform(so_far), self.sampling.temperature)
            self.tokens_CB[so_far].index_copy_(0, self.row_n, tokens_n)
            self.logprobs_CB[so_far].index_copy_(0, self.row_n, logprobs_n)
            # A row with broken logits ends, too: its completion is refused when it is collected.
            ended_n = stop_rule(tokens_n, self.row_n, so_far + 1) | ~logprobs_n.isfinite()
            self.input_n = tokens_n
            self.position_n += 1
            rows = len(self.row_n)
            if bool(ended_n.any()):
                ended = self.row_n[ended_n]
                self.stopped_B[ended] = True
                self.lengths_B[ended] = so_far + 1
                self._evict(ended_n, so_far + 1)
                for index in self._finished_prompts(ended, active_M) if notify else ():
                    notify(index)  # type: ignore[misc]
            last = so_far + 1 == self.sampling.max_tokens
            self.counter.add(rows, rows if last else rows - len(self.row_n))
            if not len(self.row_n):
                return
        for index in [index for index, rows in enumerate(active_M) if rows] if notify else ():
            notify(index)  # type: ignore[misc]

    def _uniform(self, so_far: int) -> Tensor:
        """Return one number in [0, 1) for each active row, determined by its stream and the position."""
        if so_far % DRAWS_AHEAD == 0:
            at_C1 = torch.arange(so_far, so_far + DRAWS_AHEAD, device=self.decoder.device)[:, None]
            self._uniform_CB = uniform(self.stream_B + at_C1)
        return self._uniform_CB[so_far % DRAWS_AHEAD].index_select(0, with_float64(self.row_n))

    def _finished_prompts(self, ended: Tensor, active_M: list[int]) -> list[int]:
        """Return the prompts whose last row has just ended; `active_M` counts active rows by prompt."""
        indices = [row // self.siblings for row in ended.tolist()]
        for index in indices:
            active_M[index] -= 1
        return sorted({index for index in indices if not active_M[index]})

    def _evict(self, ended_n: Tensor, so_far: int) -> None:
        """Evict ended rows: the last active rows move into their slots."""
        n = int((~ended_n).sum())
        gaps, movers = ended_n[:n].nonzero()[:, 0], (~ended_n[n:]).nonzero()[:, 0] + n
        self.cache.evict(gaps, movers, so_far)
        for rows in (self.row_n, self.input_n, self.position_n):
            rows[gaps] = rows[movers]
        self.row_n, self.input_n, self.position_n = self.row_n[:n], self.input_n[:n], self.position_n[:n]
        if n:
            self.cache.assign(self.row_n)


def prefill_prompts(decoder: Decoder, prompts: Sequence[Rendered], rope: Rope, shared: Tensor) -> None:
    """Fill `shared` [L, 2, M, K, P, D] with each prompt without its last token; padding behind it is masked."""
    ids_M = [prompt.ids[:-1] for prompt in prompts]
    P = max(map(len, ids_M))
    at_once = max(1, PREFILL_TOKENS // P)
    common = shared_beginning(ids_M, decoder.products)
    if common:
        first = PaddedPrompts.of([ids_M[0][:common]], decoder.device)
        decoder.prefill(first, rope, shared[:, :, :1, :, :common])
        shared[:, :, 1:, :, :common] = shared[:, :, :1, :, :common]
    for start in range(0, len(prompts), at_once):
        span = slice(start, min(start + at_once, len(prompts)))
        longest = max(map(len, ids_M[span]))
        if common is None:
            layout: PromptLayout = PaddedPrompts.of(ids_M[span], decoder.device)
        elif longest == common:
            continue
        else:
            layout = PackedPrompts.of(ids_M[span], common, decoder.device)
        decoder.prefill(layout, rope, shared[:, :, span, :, :longest])
