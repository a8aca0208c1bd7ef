"""Plans on cards that are not here: as torch would describe them, number type and memory follow from the card."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from minigrpo.config.load import load_recipe
from minigrpo.training.memory.estimate import forecast

GB = 10**9


@dataclass(frozen=True)
class Card:
    """What torch says of a GPU. `cached`: bytes that torch has reserved in this process and does not use."""

    bytes: int
    true_bfloat16: bool
    free: int
    cached: int = 0


T4 = Card(15 * GB, False, 15 * GB)
H100 = Card(80 * GB, True, 79 * GB)


def pretend(card: Card, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: card.true_bfloat16)
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (card.free, card.bytes))
    patch.setattr(torch.cuda, "memory_reserved", lambda device=None: card.bytes - card.free)
    patch.setattr(torch.cuda, "memory_allocated", lambda device=None: card.bytes - card.free - card.cached)


@pytest.mark.parametrize("card", [T4, H100], ids=["T4", "H100"])
def test_the_plan_of_a_gpu_has_the_number_type_that_its_run_will_have(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(card, monkeypatch)
    knobs = {"rollout.prompts": 2, "rollout.completions": 2, "rollout.max_tokens": 16}
    found = {full: forecast(load_recipe("quickstart", {**knobs, "train.full": full})) for full in (True, False)}
    assert {full: plan.dtype for full, plan in found.items()} == {
        True: "float32",
        False: "bfloat16" if card.true_bfloat16 else "float16",
    }
    assert {plan.device for plan in found.values()} == {"cuda"}
