"""Train on the tokens of highest entropy alone ("Beyond the 80/20 Rule", arXiv 2506.01939).

Shapes: N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from minigrpo.algorithms.entropy import chosen_tokens
from minigrpo.algorithms.objective import Objective
from minigrpo.algorithms.packing import MicroBatch
from minigrpo.distributed.ranks import ALONE, Ranks
from minigrpo.models.policy import Policy
from minigrpo.training.oom import clear_gradients, retry_on_oom


def select_top_entropy(
    policy: Policy,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    tokens_per_pass: int,
    *,
    step: int,
    ranks: Ranks = ALONE,
) -> tuple[list[MicroBatch], int]:
    """Mark the tokens to learn from, in smaller passes where memory runs out. Return them and the tokens per pass."""
    mark = partial(mark_top_entropy, policy, objective, step=step, ranks=ranks)
    clear = partial(clear_gradients, policy)
    return retry_on_oom(mark, micro_batches, tokens_per_pass, clear=clear, can_cut=not policy.is_sharded)


def mark_top_entropy(
    policy: Policy, objective: Objective, micro_batches: Sequence[MicroBatch], step: int, *, ranks: Ranks = ALONE
) -> list[MicroBatch]:
    """Set `chosen_N` to the tokens of highest entropy of the whole batch; only a pass over all of it can tell them.

    The micro-batches are this rank's: entropies and the count of what is chosen are exchanged, once memory held a pass.
    """
    with torch.no_grad():
        entropies = [policy.logprobs(micro_batch, step=step).entropy_N for micro_batch in micro_batches]
    pairs = zip(micro_batches, entropies, strict=True)
    counted = [(micro_batch.shares_N > 0).to(entropy_N.device) for micro_batch, entropy_N in pairs]
    chosen = chosen_tokens(entropies, counted, objective.top_entropy, of_batch=ranks.join_numbers)
    count = sum(ranks.gather("figures", sum(int(chosen_N.sum()) for chosen_N in chosen)))
    return [
        replace(micro_batch, chosen_N=chosen_N, shares_N=chosen_N / count)
        for micro_batch, chosen_N in zip(micro_batches, chosen, strict=True)
    ]
