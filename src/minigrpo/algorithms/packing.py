"""Groups -> one row of tokens in which every prompt stands once. The arithmetic of "one group, one sequence".

The log-probability of a completion's token n depends on the prompt and on the tokens before n. So a completion is fed
as [last prompt token, c0, ..., c(n-2)]: each position is scored, none is wasted, and what siblings share is the prompt
without its last token. A row holds the shared prompts of all its groups first, then all completions:

    | shared prompt 1 | shared prompt 2 | c11 c12 .. c1G | c21 .. c2G |
                                         ^ scored: N tokens, contiguous

Shapes: M groups in a row, G siblings, S shared prompt tokens, N scored tokens, T = S + N. Masks come from lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigrpo.algorithms.advantages import Rewards
from minigrpo.algorithms.objective import Objective, per_token
from minigrpo.types import Group


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """Some or all siblings of one group, as token ids. `group` and `siblings` are their places in the batch."""

    group: int
    prompt_ids: tuple[int, ...]
    siblings: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.completions))

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model."""
        return len(self.prompt_ids) - 1 + sum(self.lengths)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the tokens of a row belong: the lengths from which positions and attention follow."""

    shared_M: tuple[int, ...]
    own_MG: tuple[tuple[int, ...], ...]

    @property
    def own_B(self) -> tuple[int, ...]:
        return tuple(n for own_G in self.own_MG for n in own_G)

    @property
    def shared_tokens(self) -> int:
        return sum(self.shared_M)

    @property
    def siblings(self) -> int:
        return len(self.own_MG[0])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch: bundles with equally many siblings each, and what the loss needs to know of their N tokens.

    `shares_N`: what each token counts in a plain mean over the batch (the entropy bonus), 0 where it is left out.
    `chosen_N`: the tokens that the policy learns from, where those are not all.
    """

    bundles: tuple[PackedGroup, ...]
    advantages_N: Tensor
    weights_N: Tensor
    shares_N: Tensor
    engine_N: Tensor
    old_N: Tensor | None = None
    ref_N: Tensor | None = None
    chosen_N: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(bundle.tokens for bundle in self.bundles)

    @property
    def lengths(self) -> list[int]:
        """Of the completions, whose sum is N."""
        return [n for bundle in self.bundles for n in bundle.lengths]

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(
            tuple(len(bundle.prompt_ids) - 1 for bundle in self.bundles),
            tuple(bundle.lengths for bundle in self.bundles),
        )

    @property
    def labels(self) -> list[int]:
        """The N sampled tokens."""
        return [token for bundle in self.bundles for completion in bundle.completions for token in completion]

    def row(self) -> tuple[list[int], list[int]]:
        """T input ids and their positions; positions go on from the prompt for every completion."""
        ids = [token for bundle in self.bundles for token in bundle.prompt_ids[:-1]]
        positions = [place for bundle in self.bundles for place in range(len(bundle.prompt_ids) - 1)]
        for bundle in self.bundles:
            start = len(bundle.prompt_ids) - 1
            for completion in bundle.completions:
                ids += (bundle.prompt_ids[-1], *completion[:-1])
                positions += range(start, start + len(completion))
        return ids, positions

    def names(self) -> Tensor:
        """[T, 3] (group, sibling or -1 for the shared prompt, position): a token has the same name in any row."""
        names = [(b.group, -1, place) for b in self.bundles for place in range(len(b.prompt_ids) - 1)]
        for bundle in self.bundles:
            start = len(bundle.prompt_ids) - 1
            for sibling, completion in zip(bundle.siblings, bundle.completions, strict=True):
                names += [(bundle.group, sibling, start + n) for n in range(len(completion))]
        return torch.tensor(names).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class Batch:
    """All groups of a step with their advantages and weights, which no later cut changes."""

    groups: tuple[Group, ...]
    advantages_PG: Tensor
    weights_PG: Tensor
    shares_PG: Tensor
    needs_all: bool

    @property
    def teaches_P(self) -> Tensor:
        """Which groups pull the policy by their advantages."""
        return ((self.advantages_PG != 0) & (self.weights_PG != 0)).any(1)

    @property
    def teaches(self) -> bool:
        """Whether siblings differ anywhere."""
        return bool(self.teaches_P.any())

    @property
    def moves(self) -> bool:
        """Whether any completion pulls the policy anywhere."""
        return self.teaches or (self.needs_all and bool((self.weights_PG != 0).any()))

    def split(self, tokens_per_pass: int) -> Iterator[MicroBatch]:
        """Micro-batches of at most `tokens_per_pass` tokens (a single completion may exceed it: it cannot be cut).

        A group whose siblings all tie has zero gradient and is left out, unless a KL term or an entropy bonus
        pulls on it.
        """
        waiting: list[PackedGroup] = []
        for bundle in self._bundles():
            if waiting and sum(b.tokens for b in waiting) + bundle.tokens > tokens_per_pass:
                yield self._part(waiting)
                waiting = []
            if bundle.tokens > tokens_per_pass:
                yield from (self._part([piece]) for piece in split_group(bundle, tokens_per_pass))
            else:
                waiting.append(bundle)
        if waiting:
            yield self._part(waiting)

    def _bundles(self) -> Iterator[PackedGroup]:
        for index, (group, teaches) in enumerate(zip(self.groups, self.teaches_P.tolist(), strict=True)):
            if teaches or self.needs_all:
                ids = tuple(completion.token_ids for completion in group.completions)
                yield PackedGroup(index, group.prompt_ids, tuple(range(len(ids))), ids)

    def _part(self, bundles: Sequence[PackedGroup]) -> MicroBatch:
        places = [(b.group, sibling) for b in bundles for sibling in b.siblings]
        lengths_B = torch.tensor([n for b in bundles for n in b.lengths])
        advantages_B = torch.stack([self.advantages_PG[place] for place in places])
        weights_B = torch.stack([self.weights_PG[place] for place in places])
        shares_B = torch.stack([self.shares_PG[place] for place in places])
        engine = [lp for group, sibling in places for lp in self.groups[group].completions[sibling].logprobs]
        return MicroBatch(
            tuple(bundles),
            advantages_B.repeat_interleave(lengths_B),
            weights_B.repeat_interleave(lengths_B),
            shares_B.repeat_interleave(lengths_B),
            torch.tensor(engine, dtype=advantages_B.dtype),
        )


def pack(groups: Sequence[Group], objective: Objective, longest: int) -> Batch:
    """Rewards -> advantages, lengths -> weights, once over the whole batch. `longest`: the completion limit."""
    completions = [completion for group in groups for completion in group.completions]
    lengths_B = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.float64)
    kept = [not (objective.mask_truncated and completion.finish == "length") for completion in completions]
    kept_B = torch.tensor(kept, dtype=torch.float64)
    advantages_PG = objective.advantages(Rewards.of(groups), objective.tie)
    return Batch(
        tuple(groups),
        advantages_PG,
        objective.weights(lengths_B, kept_B, longest).view_as(advantages_PG),
        per_token(lengths_B, kept_B, longest).view_as(advantages_PG),
        needs_all=objective.needs_all,
    )


def split_group(bundle: PackedGroup, tokens_per_pass: int) -> Iterator[PackedGroup]:
    """A group too long for one pass, as pieces of its siblings; each piece pays for the prompt again."""
    start = 0
    while start < len(bundle.siblings):
        stop, room = start, tokens_per_pass - (len(bundle.prompt_ids) - 1)
        while stop < len(bundle.siblings) and (stop == start or bundle.lengths[stop] <= room):
            room -= bundle.lengths[stop]
            stop += 1
        yield PackedGroup(bundle.group, bundle.prompt_ids, bundle.siblings[start:stop], bundle.completions[start:stop])
        start = stop
