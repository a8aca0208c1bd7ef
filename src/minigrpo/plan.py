"""How many tokens fit into one training pass: measured on this model and this machine, not guessed.

A forward pass over a short row tells how many bytes the backward pass would keep for each token; half of the free
memory is spent on them. (A plan of the whole run's memory is more than this and builds on it.)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minigrpo.config import Recipe
from minigrpo.packing import Bundle, Part
from minigrpo.policy import Policy

PROBE_TOKENS = 64
SHARE = 0.5
# Beyond this a longer row makes matrix products no faster, and only takes memory.
MOST = 32768
LEAST = 256


def tokens_per_pass(policy: Policy, recipe: Recipe) -> int:
    """A power of two, so that a little more or less free memory gives the same plan."""
    if recipe.train.tokens_per_pass:
        return recipe.train.tokens_per_pass
    fits = SHARE * free_memory(policy.device) / bytes_per_token(policy)
    budget = LEAST
    while budget * 2 <= min(fits, MOST):
        budget *= 2
    return budget


def probe_part(policy: Policy, prompt: int, completions: int, length: int) -> Part:
    """A micro-batch of one group of the given shape, its tokens taken from the vocabulary in turn."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    ids = [n % vocabulary for n in range(prompt + completions * length)]
    answers = tuple(tuple(ids[prompt + g * length : prompt + (g + 1) * length]) for g in range(completions))
    bundle = Bundle(0, tuple(ids[:prompt]), tuple(range(completions)), answers)
    tokens = completions * length
    equal_N = torch.full((tokens,), 1 / tokens)
    return Part((bundle,), torch.ones(tokens), equal_N, equal_N, torch.zeros(tokens))


def bytes_per_token(policy: Policy) -> float:
    """What a forward pass keeps for its backward pass, weights aside, per token of the row."""
    part = probe_part(policy, PROBE_TOKENS // 2, 2, PROBE_TOKENS // 4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy.logprobs(part, step=0)
    return max(1.0, sum(kept.values()) / part.tokens)


def free_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or what the system could hand to one more process (in a container, its limit)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available(), _cgroup_room())


def _available() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 4 << 30  # not Linux: a modest guess is better than none
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable:"))


def _cgroup_room() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)
