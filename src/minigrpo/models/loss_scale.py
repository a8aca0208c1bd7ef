"""float16 without losing small gradients: the loss is scaled up before the backward pass, the gradient down after it.

float16 knows nothing below 6e-8 and nothing above 65504. A token of a batch of 5,000 weighs 1 / 5,000, and what flows
back from it through 16-bit layers would vanish; scaled by a power of two it survives, and dividing by the same power
is exact. The scale adapts: it doubles after GROWTH_INTERVAL updates without overflow, and halves after an overflow.
After Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2. bfloat16 and float32 need none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

INITIAL_SCALE, MIN_SCALE, MAX_SCALE = 2.0**16, 1.0, 2.0**24
GROWTH_INTERVAL = 100
"""A run takes a few hundred updates. A scale that was raised too far costs one repeated pass."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """A power of two, and `good`: updates in a row without overflow. One that does not adapt stays 1."""

    scale: float = 1.0
    good: int = 0
    adapts: bool = False

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale:
        return cls(INITIAL_SCALE, 0, True) if dtype == torch.float16 else cls()

    @property
    def can_fall(self) -> bool:
        return self.adapts and self.scale > MIN_SCALE

    def after_success(self) -> LossScale:
        if not self.adapts:
            return self
        grown = self.good + 1 >= GROWTH_INTERVAL
        return (
            replace(self, scale=min(self.scale * 2, MAX_SCALE), good=0) if grown else replace(self, good=self.good + 1)
        )

    def after_overflow(self) -> LossScale:
        return replace(self, scale=max(self.scale / 2, MIN_SCALE), good=0) if self.adapts else self

    def scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scale == 1 else loss * self.scale

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the accumulated gradients by the scale, in place."""
        if self.scale != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scale)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {"scale": self.scale, "good": self.good}

    def restored(self, state: dict[str, Any]) -> LossScale:
        """Return the scale of a checkpoint; one that does not adapt stays as it is."""
        return replace(self, **state) if self.adapts else self
