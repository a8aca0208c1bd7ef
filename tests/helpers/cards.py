"""GPUs that are not here, as torch would describe them: for what is decided before anything is computed on one."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

GB = 10**9


@dataclass(frozen=True)
class Card:
    """What torch says of a GPU, in bytes. `cached`: reserved by torch in this process, and not used."""

    bytes: int
    true_bfloat16: bool
    free: int
    cached: int = 0
    integrated: bool = False


T4 = Card(15 * GB, False, 15 * GB)
H100 = Card(80 * GB, True, 79 * GB)


def pretend(card: Card, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: card.true_bfloat16)
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (card.free, card.bytes))
    patch.setattr(torch.cuda, "memory_reserved", lambda device=None: card.bytes - card.free)
    patch.setattr(torch.cuda, "memory_allocated", lambda device=None: card.bytes - card.free - card.cached)
    facts = SimpleNamespace(is_integrated=card.integrated, total_memory=card.bytes)
    patch.setattr(torch.cuda, "get_device_properties", lambda device=None: facts)
