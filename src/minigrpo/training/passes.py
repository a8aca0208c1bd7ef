"""Which passes through the model this process makes in an update: all of them, or its share of those of all ranks."""

from __future__ import annotations

from minigrpo.algorithms.packing import EMPTY_MICRO_BATCH, Batch, MicroBatch
from minigrpo.distributed.ranks import Ranks
from minigrpo.models.policy import Policy


def own_micro_batches(policy: Policy, batch: Batch, tokens_per_pass: int, ranks: Ranks) -> list[MicroBatch]:
    """Return the micro-batches of this process; none where no group teaches anything.

    A pass through a sharded model takes all ranks, so there all make as many: who has fewer adds some that are empty.
    """
    groups = ranks.own(batch.packed_groups(), cost=lambda group: group.tokens)
    own = list(batch.split(tokens_per_pass, groups)) if batch.has_gradient else []
    return own + [EMPTY_MICRO_BATCH] * (ranks.most(len(own)) - len(own)) if policy.is_sharded else own
