"""Prompts on their way into the cache: what all of them begin with is read once, and padding is not read at all.

Two layouts of the tokens that pass through the layers; keys and values end in the same places of the cache:

    PaddedPrompts  each prompt padded to the longest: the fewest calls
    PackedPrompts  prompts end to end, without padding, behind a beginning that is in the cache already

A system message with a worked example is often most of each prompt, and one long question pads all others.
`shared_beginning` decides by what packing saves.

Shapes: M prompts, P longest prompt, F tokens that all begin with, S longest rest, T tokens of all rests together,
H heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minigrpo.algorithms.packing import common_length
from minigrpo.utils.transfer import to_device

WORTH_PACKING = 10**9
"""Multiplications that packing must save: some 10 ms on two cores, where its own calls take one or two."""
LEAST_SAVED = 1 / 20
"""Share of the tokens that packing must save, too: attention lays them out by prompt all the same, which takes up to
4 % more memory where nothing is saved. The memory plan counts padded prompts."""


class PromptLayout(Protocol):
    @property
    def ids(self) -> Tensor:
        """The tokens that are read now, in the layout's own shape."""

    @property
    def positions(self) -> Tensor:
        """Where in its prompt each of them stands; one row for all prompts where they are padded."""

    @property
    def start(self) -> int:
        """The first position of the cache that is read now; earlier ones hold what was read before."""

    def store(self, cache: Tensor, key: Tensor, value: Tensor) -> None:
        """Put keys and values [..., K, D] into a layer's cache [2, M, K, P, D]."""

    def spread(self, x: Tensor) -> Tensor:
        """Lay out [..., H, D] by prompt: [M, H, S, D]."""

    def gather(self, x_MHSD: Tensor) -> Tensor:
        """Invert `spread`: [..., H * D]."""


@dataclass(frozen=True, slots=True)
class PaddedPrompts:
    """All prompts padded to P tokens; what stands in the cache behind a prompt is never looked at."""

    ids: Tensor
    positions: Tensor
    start: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> PaddedPrompts:
        longest = max(map(len, prompts))
        padded = [(*ids, *[0] * (longest - len(ids))) for ids in prompts]
        return cls(to_device(torch.tensor(padded), device), torch.arange(longest, device=device))

    def store(self, cache: Tensor, key: Tensor, value: Tensor) -> None:
        cache[0], cache[1] = key.transpose(1, 2), value.transpose(1, 2)

    def spread(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def gather(self, x_MHSD: Tensor) -> Tensor:
        return x_MHSD.transpose(1, 2).flatten(-2)


@dataclass(frozen=True, slots=True)
class PackedPrompts:
    """The prompts' tokens from `start` on, end to end: token t stands at `positions[t]` of prompt `row_T[t]`."""

    ids: Tensor
    positions: Tensor
    row_T: Tensor
    prompts: int
    longest: int
    start: int = 0

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], start: int, device: torch.device) -> PackedPrompts:
        """Lay out what each prompt has from `start` on; some prompt must have more tokens than that."""
        rests = [len(ids) - start for ids in prompts]
        ids = torch.tensor([token for each in prompts for token in each[start:]])
        positions = torch.cat([torch.arange(start, start + length) for length in rests])
        row_T = torch.arange(len(prompts)).repeat_interleave(torch.tensor(rests))
        return cls(
            to_device(ids, device),
            to_device(positions, device),
            to_device(row_T, device),
            len(prompts),
            max(rests),
            start,
        )

    def store(self, cache: Tensor, key: Tensor, value: Tensor) -> None:
        cache[0].transpose(1, 2)[self.row_T, self.positions] = key
        cache[1].transpose(1, 2)[self.row_T, self.positions] = value

    def spread(self, x: Tensor) -> Tensor:
        grid = x.new_zeros(self.prompts * self.longest, *x.shape[1:]).index_copy_(0, self._place_T, x)
        return grid.unflatten(0, (self.prompts, self.longest)).transpose(1, 2)

    def gather(self, x_MHSD: Tensor) -> Tensor:
        return x_MHSD.transpose(1, 2).flatten(0, 1).index_select(0, self._place_T).flatten(-2)

    @property
    def _place_T(self) -> Tensor:
        return self.row_T * self.longest + self.positions - self.start


def shared_beginning(prompts: Sequence[Sequence[int]], products: int) -> int | None:
    """Return how many tokens to read once for all prompts; None where all are to be padded and read whole.

    `products`: multiplications that a token takes. At least one token is left of the longest prompt.
    """
    longest = max(map(len, prompts))
    common = min(common_length(prompts), longest - 1) if len(prompts) > 1 else 0
    packed = common + sum(len(ids) - common for ids in prompts)
    padded = len(prompts) * longest
    saved = padded - packed
    return common if saved * products >= WORTH_PACKING and saved >= LEAST_SAVED * padded else None
