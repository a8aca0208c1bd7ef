"""Pack groups into one row of tokens in which every prompt stands once.

The log-probability of a completion's token n depends on the prompt and on the tokens before n. So a completion is fed
as [last prompt token, c0, ..., c(n-2)]: each position is scored, none is wasted, and what siblings share is the prompt
without its last token. A row holds the shared prompts of all its groups first, then all completions:

    | shared prompt 1 | shared prompt 2 | c11 c12 .. c1G | c21 .. c2G |
                                         ^ scored: N tokens, contiguous

Where all prompts of a batch begin alike (a system message, rules, a worked example), that beginning may stand once for
all of them, in front.

Shapes: M groups in a row, G siblings, S shared prompt tokens, N scored tokens, T = S + N. Masks come from lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.advantages import Rewards
from minigrpo.algorithms.objective import Objective, per_token_weights
from minigrpo.types import Group
from minigrpo.utils.transfer import to_device


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """Some or all siblings of one group, as token ids. `index` and `siblings` are their positions in the batch.

    `sampler`: the server that sampled them, where there are several.
    """

    index: int
    prompt_ids: tuple[int, ...]
    siblings: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    sampler: str = ""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.completions))

    @property
    def tokens(self) -> int:
        """Count the tokens that pass through the model."""
        return len(self.prompt_ids) - 1 + sum(self.lengths)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """The lengths in a packed row, from which positions and attention follow.

    `shared_M`: shared prompt tokens of each group; `own_MG`: tokens of each completion. `common`: how many tokens all
    prompts begin with, which stand once, in front; then comes what each prompt has behind them.
    """

    shared_M: tuple[int, ...]
    own_MG: tuple[tuple[int, ...], ...]
    common: int = 0

    @property
    def own_B(self) -> tuple[int, ...]:
        return tuple(n for own_G in self.own_MG for n in own_G)

    @property
    def shared_tokens(self) -> int:
        """Count the tokens in front of those that are scored."""
        return self.common + sum(self.rest_M)

    @property
    def rest_M(self) -> tuple[int, ...]:
        """Return the shared prompt tokens of each group behind the common ones."""
        return tuple(shared - self.common for shared in self.shared_M)

    @property
    def siblings(self) -> int:
        return len(self.own_MG[0])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups with equally many siblings each, and what the loss needs to know of their N tokens.

    `shares_N`: the weight of each token in a plain mean over the batch (the entropy bonus), 0 where it is left out.
    `chosen_N`: the tokens that the policy learns from, where those are not all. `common`: how many tokens all prompts
    of the batch begin with, where that is worth a place of its own in the row (`Batch.common`).
    """

    groups: tuple[PackedGroup, ...]
    advantages_N: Tensor
    weights_N: Tensor
    shares_N: Tensor
    engine_N: Tensor
    old_N: Tensor | None = None
    ref_N: Tensor | None = None
    chosen_N: Tensor | None = None
    common: int = 0

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)

    @property
    def is_empty(self) -> bool:
        """Tell whether none of its tokens is of the batch."""
        return self.groups is EMPTY_MICRO_BATCH.groups

    def beside(self, scores_N: Tensor) -> MicroBatch:
        """Return it with what the loss needs on the device of these scores and in their type, in one copy."""
        all_names = ("advantages_N", "weights_N", "shares_N", "engine_N")
        names = [name for name in all_names if getattr(self, name).device != scores_N.device]
        if not names:
            return self
        stacked = torch.stack([getattr(self, name).to(scores_N.dtype) for name in names])
        moved: dict[str, Any] = dict(zip(names, to_device(stacked, scores_N.device), strict=True))
        return replace(self, **moved)

    @property
    def lengths(self) -> list[int]:
        """Return the length of each completion; they sum to N."""
        return [n for group in self.groups for n in group.lengths]

    def layout(self, *, once: bool) -> PackedLayout:
        """Return the lengths of the row. `once`: what all prompts begin with stands once, where there are several."""
        return PackedLayout(
            tuple(len(group.prompt_ids) - 1 for group in self.groups),
            tuple(group.lengths for group in self.groups),
            self.common if once and len(self.groups) > 1 else 0,
        )

    @property
    def labels(self) -> list[int]:
        """Return the N sampled tokens."""
        return [token for group in self.groups for completion in group.completions for token in completion]

    def input_row(self, common: int) -> tuple[list[int], list[int]]:
        """Return T input ids and their positions; those of every completion continue its prompt's. `common`: the
        layout's.
        """
        ids, positions = list(self.groups[0].prompt_ids[:common]), list(range(common))
        for group in self.groups:
            ids += group.prompt_ids[common:-1]
            positions += range(common, len(group.prompt_ids) - 1)
        for group in self.groups:
            start = len(group.prompt_ids) - 1
            for completion in group.completions:
                ids += (group.prompt_ids[-1], *completion[:-1])
                positions += range(start, start + len(completion))
        return ids, positions

    def token_names(self, common: int) -> Tensor:
        """Return [T, 3]: (group, sibling or -1 for the shared prompt, position), the same for a token in any row.

        A token that all prompts of the batch begin with has the group -1, however often it stands in the row.
        """
        names = [(-1, -1, n) for n in range(common)]
        for group in self.groups:
            shared = range(common, len(group.prompt_ids) - 1)
            names += [(-1 if n < self.common else group.index, -1, n) for n in shared]
        for group in self.groups:
            start = len(group.prompt_ids) - 1
            for sibling, completion in zip(group.siblings, group.completions, strict=True):
                names += [(group.index, sibling, start + n) for n in range(len(completion))]
        return torch.tensor(names).reshape(-1, 3)


_NOTHING = torch.zeros(1)
EMPTY_MICRO_BATCH = MicroBatch((PackedGroup(-1, (0, 0), (0,), ((0,),)),), _NOTHING, _NOTHING, _NOTHING, _NOTHING)
"""A pass over one token that weighs nothing, whose gradient is zero."""


LEAST_SAVED = 1 / 20
"""Share of all tokens that a common beginning must save: it costs some calls a layer."""


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with: what the first and the last in order have in common."""
    ids_M = [tuple(ids) for ids in rows]
    first, last = min(ids_M), max(ids_M)
    return next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


@dataclass(frozen=True)
class Batch:
    """All groups of a step with their advantages and weights, which no later split changes."""

    groups: tuple[Group, ...]
    advantages_PG: Tensor
    weights_PG: Tensor
    shares_PG: Tensor
    needs_all: bool

    @property
    def informative_P(self) -> Tensor:
        """Tell which groups have a gradient from their advantages."""
        return ((self.advantages_PG != 0) & (self.weights_PG != 0)).any(1)

    @property
    def is_informative(self) -> bool:
        """Tell whether any group has a gradient from its advantages."""
        return bool(self.informative_P.any())

    @property
    def has_gradient(self) -> bool:
        """Tell whether the batch has any gradient at all, that of a KL term or an entropy bonus included."""
        return self.is_informative or (self.needs_all and bool((self.weights_PG != 0).any()))

    @cached_property
    def common(self) -> int:
        """Return how many tokens the prompts of all groups with a gradient begin with, 0 where reading them once would
        save less than LEAST_SAVED of all tokens. No split changes it.
        """
        groups = self.packed_groups()
        if len(groups) < 2:
            return 0
        common = common_length([group.prompt_ids[:-1] for group in groups])
        saved = common * (len(groups) - 1)
        return common if saved >= LEAST_SAVED * sum(group.tokens for group in groups) else 0

    def split(self, tokens_per_pass: int, groups: Sequence[PackedGroup] | None = None) -> Iterator[MicroBatch]:
        """Yield micro-batches of at most `tokens_per_pass` tokens. A single completion may exceed it.

        `groups`: those of `packed_groups` that are wanted; None: all. Every prompt counts whole, also where a row has
        what all begin with once: attention copies each prompt's keys and values whole, and so the memory plan counts.
        """
        waiting: list[PackedGroup] = []
        for group in self.packed_groups() if groups is None else groups:
            if waiting and sum(g.tokens for g in (*waiting, group)) > tokens_per_pass:
                yield self._micro_batch(waiting)
                waiting = []
            if group.tokens > tokens_per_pass:
                yield from (self._micro_batch([part]) for part in split_group(group, tokens_per_pass))
            else:
                waiting.append(group)
        if waiting:
            yield self._micro_batch(waiting)

    def packed_groups(self) -> list[PackedGroup]:
        """Return the groups that have a gradient, as token ids.

        A group whose siblings all tie has none and is left out, unless a KL term or an entropy bonus applies to it.
        """
        packed = []
        for index, (group, informative) in enumerate(zip(self.groups, self.informative_P.tolist(), strict=True)):
            if informative or self.needs_all:
                ids = tuple(completion.token_ids for completion in group.completions)
                sampler = group.completions[0].sampler  # a prompt is asked of one server, with all its siblings
                packed.append(PackedGroup(index, group.prompt_ids, tuple(range(len(ids))), ids, sampler))
        return packed

    def _micro_batch(self, groups: Sequence[PackedGroup]) -> MicroBatch:
        places = [(group.index, sibling) for group in groups for sibling in group.siblings]
        lengths_B = torch.tensor([n for group in groups for n in group.lengths])
        advantages_B = torch.stack([self.advantages_PG[place] for place in places])
        weights_B = torch.stack([self.weights_PG[place] for place in places])
        shares_B = torch.stack([self.shares_PG[place] for place in places])
        engine = [lp for group, sibling in places for lp in self.groups[group].completions[sibling].logprobs]
        return MicroBatch(
            tuple(groups),
            advantages_B.repeat_interleave(lengths_B),
            weights_B.repeat_interleave(lengths_B),
            shares_B.repeat_interleave(lengths_B),
            torch.tensor(engine, dtype=advantages_B.dtype),
            common=self.common,
        )


def pack(groups: Sequence[Group], objective: Objective, longest: int) -> Batch:
    """Compute advantages from rewards and weights from lengths. `longest`: the completion limit in tokens."""
    return weigh(groups, objective.advantages(Rewards.of(groups), objective.tie), objective, longest)


def weigh(groups: Sequence[Group], advantages_PG: Tensor, objective: Objective, longest: int) -> Batch:
    """Weigh the tokens of each completion once, over the whole batch. `longest`: the completion limit in tokens."""
    completions = [completion for group in groups for completion in group.completions]
    lengths_B = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    kept = [not (objective.mask_truncated and completion.finish == "length") for completion in completions]
    kept_B = torch.tensor(kept, dtype=torch.float64)
    return Batch(
        tuple(groups),
        advantages_PG,
        objective.weights(lengths_B, kept_B, longest).view_as(advantages_PG),
        per_token_weights(lengths_B, kept_B, longest).view_as(advantages_PG),
        needs_all=objective.needs_all,
    )


def split_group(group: PackedGroup, tokens_per_pass: int) -> Iterator[PackedGroup]:
    """Split a group that is too long for one pass by its siblings; each part includes the prompt again."""
    start = 0
    while start < len(group.siblings):
        stop, room = start, tokens_per_pass - (len(group.prompt_ids) - 1)
        while stop < len(group.siblings) and (stop == start or group.lengths[stop] <= room):
            room -= group.lengths[stop]
            stop += 1
        yield replace(group, siblings=group.siblings[start:stop], completions=group.completions[start:stop])
        start = stop
