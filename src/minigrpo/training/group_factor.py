"""Multiply the advantages of chosen groups: what if this group had not been learned from, or had been turned round?

The groups are named by their prompts (`groups.factor`). Sampling, grading and the weights of the other completions stay
as they are, so that whatever differs afterwards comes from these groups.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minigrpo.errors import RecipeError
from minigrpo.types import Group, Prompt


def scale_groups(advantages_PG: Tensor, groups: Sequence[Group], factors: Mapping[str, float], step: int) -> Tensor:
    """Return the advantages times the factor of each group: that of PROMPT@STEP, else of PROMPT, else 1.

    `step`: its number in the logs, from 1.
    """
    if not factors:
        return advantages_PG
    found = [factors.get(f"{group.prompt.id}@{step}", factors.get(group.prompt.id, 1.0)) for group in groups]
    return advantages_PG * torch.tensor(found, dtype=advantages_PG.dtype)[:, None]


def check_factors(factors: Mapping[str, float], prompts: Sequence[Prompt]) -> None:
    """Raise RecipeError for a name that is no training prompt: it would change nothing, in silence."""
    known = {prompt.id for prompt in prompts}
    for name in factors:
        if name in known or name.rpartition("@")[0] in known:
            continue
        near = difflib.get_close_matches(name.partition("@")[0], known, n=1)
        raise RecipeError(
            f"groups.factor names {name!r}, which is no training prompt. "
            + (f"Did you mean {near[0]}? " if near else "")
            + 'groups.jsonl has the ids, under "prompt"; PROMPT@STEP is one step of it.'
        )
