"""Draw tokens: one uniform number a row, no sorting of the vocabulary. Refuse logits that are not finite. Split
prompts.

Shapes: n rows, V vocabulary, S blocks of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minigrpo.errors import ModelError
from minigrpo.types import Completion, Progress, Ready, Rendered
from minigrpo.utils.rng import with_float64

BLOCK = 1024
"""Tokens whose probabilities are summed together, where the vocabulary is larger than this."""
ROWS_IN_CACHE_BYTES = 5 << 20
"""On a CPU rows are drawn a few at a time, so that their probabilities (float32) stay in the processor's cache: 8 rows
of 152k tokens."""


def draw(logits_nV: Tensor, uniform_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return tokens_n and their log-probabilities (nats, float32) under softmax(logits / temperature).

    Temperature 0 takes the likeliest token and reports its log-probability at temperature 1. Otherwise the inverse of
    the cumulative distribution at `uniform_n` (float64 in [0, 1)): the block is found from block sums, then the token
    within it. Sums over more than a block are in float64, so that rounding over 152k entries does not shift what is
    drawn.

    Where a row's logits hold NaN or +inf, its log-probability is not finite, whatever the token, which stays within the
    vocabulary: `refuse_broken_logits` ends such a completion. -inf is a token that cannot be drawn.
    """
    there, logits_nV = logits_nV.device, with_float64(logits_nV)
    at_once = max(1, ROWS_IN_CACHE_BYTES // (4 * logits_nV.shape[1]))
    if logits_nV.device.type != "cpu" or len(logits_nV) <= at_once:
        tokens_n, logprobs_n = _draw_rows(logits_nV, uniform_n, temperature)
        return tokens_n.to(there), logprobs_n.to(there)
    parts = [
        _draw_rows(logits, uniform, temperature)
        for logits, uniform in zip(logits_nV.split(at_once), uniform_n.split(at_once), strict=True)
    ]
    tokens_n, logprobs_n = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return tokens_n.to(there), logprobs_n.to(there)


def _draw_rows(logits_nV: Tensor, uniform_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_nV = logits_nV.float()
    if temperature == 0:
        tokens_n = logits_nV.argmax(-1)
        return tokens_n, _gather_tokens(logits_nV, tokens_n) - logits_nV.logsumexp(-1)
    scaled_nV = logits_nV if temperature == 1 else logits_nV / temperature
    peak_n1 = scaled_nV.amax(-1, True)
    mass_nV = (scaled_nV - peak_n1).exp_()
    tokens_n, total_n = (_draw_flat if mass_nV.shape[1] <= BLOCK else _draw_blocked)(mass_nV, uniform_n)
    # Where sums are NaN, no sum exceeds the goal, and the search ends beyond the vocabulary.
    tokens_n = tokens_n.clamp_(max=logits_nV.shape[1] - 1)
    return tokens_n, _gather_tokens(scaled_nV, tokens_n) - peak_n1[:, 0] - total_n.log().float()


def _draw_flat(mass_nV: Tensor, uniform_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens and the total mass.

    No number is nearer to 1 than 1 - 2^-53, so the goal is less than the last sum.
    """
    upto_nV = mass_nV.cumsum(-1, dtype=torch.float64)
    total_n = upto_nV[:, -1]
    return torch.searchsorted(upto_nV, (uniform_n * total_n)[:, None], right=True)[:, 0], total_n


def _first_exceeding(upto_nV: Tensor, goal_n1: Tensor) -> Tensor:
    """Return the first entry whose sum exceeds the goal, or the last with any mass where rounding puts the goal past
    the end.
    """
    last_n1 = torch.searchsorted(upto_nV, upto_nV[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(upto_nV, goal_n1, right=True), last_n1)


def _draw_blocked(mass_nV: Tensor, uniform_n: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from a large vocabulary: first the block, by block sums, then the token within it."""
    V = mass_nV.shape[1]
    whole = V // BLOCK * BLOCK
    sums_nS = mass_nV[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < V:
        sums_nS = torch.cat([sums_nS, mass_nV[:, whole:].sum(-1, keepdim=True)], -1)
    upto_nS = sums_nS.cumsum(-1, dtype=torch.float64)
    total_n = upto_nS[:, -1]
    goal_n1 = (uniform_n * total_n)[:, None]
    block_n1 = torch.searchsorted(upto_nS, goal_n1, right=True).clamp(max=upto_nS.shape[1] - 1)
    before_n1 = upto_nS.gather(1, (block_n1 - 1).clamp(min=0)) * (block_n1 > 0)
    token_nb = block_n1 * BLOCK + torch.arange(BLOCK, device=mass_nV.device)
    chosen_nb = mass_nV.gather(1, token_nb.clamp(max=V - 1)).masked_fill_(token_nb >= V, 0)
    inside_n1 = _first_exceeding(chosen_nb.cumsum(-1, dtype=torch.float64), goal_n1 - before_n1)
    return (block_n1 * BLOCK + inside_n1)[:, 0], total_n


class ProgressCounter:
    """Counts the tokens and ended completions of one call, and reports them. Called by engines as they decode."""

    def __init__(self, progress: Progress | None, ready: Ready | None = None) -> None:
        self.progress, self.ready = progress, ready
        self.tokens = self.ended = self.shown = 0

    def add(self, tokens: int, ended: int) -> None:
        self.tokens += tokens
        self.ended += ended
        self.show()

    def show(self, more_tokens: int = 0) -> None:
        """Report the counts, with tokens of completions that still go on."""
        self.shown = max(self.shown, self.tokens + more_tokens)
        if self.progress:
            self.progress(self.shown, self.ended)

    def add_completions(self, completions: Sequence[Completion]) -> None:
        self.add(sum(len(completion.token_ids) for completion in completions), len(completions))

    def finish(self, index: int, completions: tuple[Completion, ...]) -> None:
        """Count a prompt's completions, all of which have ended, and hand them over."""
        self.add_completions(completions)
        if self.ready:
            self.ready(index, completions)


def refuse_broken_logits(prompt_id: str, siblings: Sequence[Sequence[float]]) -> None:
    """Raise ModelError where a log-probability of a sampled token is not finite: then the logits were not, either.

    `siblings`: log-probabilities of each completion's tokens, in sibling order.
    """
    for sibling, logprobs in enumerate(siblings, 1):
        if not math.isfinite(sum(logprobs)):
            place = next(n for n, logprob in enumerate(logprobs, 1) if not math.isfinite(logprob))
            raise ModelError(
                f"The model's logits for prompt {prompt_id}, completion {sibling}, token {place} are not finite, so no "
                "token can be drawn from them. In float16 activations may overflow: --model.dtype bfloat16 or float32. "
                "Else the weights are damaged, or training has broken them: go back to an earlier checkpoint."
            )


def _gather_tokens(values_nV: Tensor, tokens_n: Tensor) -> Tensor:
    return values_nV.gather(-1, tokens_n[:, None])[:, 0]


def split_prompts(prompts: Sequence[Rendered], n: int, rows: int) -> Iterator[tuple[int, Sequence[Rendered]]]:
    """Yield (index of the first prompt, prompts) of as few parts as `rows` rows of n completions allow."""
    at_once = max(1, rows // n)
    for start in range(0, len(prompts), at_once):
        yield start, prompts[start : start + at_once]
