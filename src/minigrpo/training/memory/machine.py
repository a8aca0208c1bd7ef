"""Fit the memory plan to a device: free and held memory, and how many tokens a forward pass may have.

`planner` counts what a run takes. Where a model cannot be counted without running it, a
forward pass over a short row is measured instead, and half of the free memory is spent on what it keeps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minigrpo.algorithms.packing import MicroBatch
from minigrpo.config.schema import Recipe, TrainConfig
from minigrpo.distributed.place import Place
from minigrpo.models.policy import Policy, recompute_activations
from minigrpo.training.memory.meta import UnplannableError, uniform_micro_batch
from minigrpo.training.memory.planner import (
    CUDA_CONTEXT_BYTES,
    MAX_TOKENS,
    MIN_TOKENS,
    OPEN_ENGINE,
    OPEN_POLICY,
    Device,
    Plan,
    make_plan,
)
from minigrpo.utils.memory import free_memory, resident_bytes

PROBE_TOKENS = 64
PROBE_SHARE = 0.5


def tokens_per_pass(policy: Policy, recipe: Recipe, prompt: int = PROBE_TOKENS) -> int:
    """Return the recipe's or the plan's tokens per pass; turn on recomputed activations if the plan needs them.

    The plan's is a power of two, so that small changes of free memory give the same. `prompt`: longest, in tokens.
    Caches that the engine keeps are planned for, so they are released first (rollouts/engines/registry.py).
    """
    try:
        plan = plan_of(policy, recipe, prompt)
    except UnplannableError:
        return recipe.train.tokens_per_pass or measure_tokens(policy)
    if plan.recompute and not recomputes(policy):
        recompute_activations(policy.model)
    return plan.tokens_per_pass


def plan_of(policy: Policy, recipe: Recipe, prompt: int, *, engine: bool = True) -> Plan:
    """Return the plan of the updates of a loaded policy.

    `engine`: whether its engine is loaded, too; the caches that it keeps during updates are not there yet.
    """
    opened_device = this_device(recipe.train, policy.device, policy.dtype)
    opened = (*OPEN_POLICY, *OPEN_ENGINE) if engine else OPEN_POLICY
    return make_plan(policy.model.config, recipe, replace(opened_device, opened=opened), prompt, rollout=not engine)


def plan_of_run(policy: Policy, recipe: Recipe, prompt: int) -> Plan | None:
    """Return the plan of rollouts and updates with policy and engine loaded; None where a model cannot be counted."""
    opened_device = this_device(recipe.train, policy.device, policy.dtype)
    try:
        return make_plan(
            policy.model.config, recipe, replace(opened_device, opened=(*OPEN_POLICY, *OPEN_ENGINE)), prompt
        )
    except UnplannableError:
        return None


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How many completions to decode side by side; whether the engine copies weights into blocks; and training passes.

    Blocks change no bit of what is computed.
    """

    rows: int
    blocks: bool = False
    training_blocks: bool = False


def planned_sampling(policy: Policy, recipe: Recipe, prompt: int) -> SamplingPlan:
    """Return as many rows as the recipe asks for, or fewer, as memory admits. The blocks get what is left."""
    policy_alone = replace(this_device(recipe.train, policy.device, policy.dtype), opened=OPEN_POLICY)
    try:
        plan = make_plan(policy.model.config, recipe, policy_alone, prompt)
    except UnplannableError:
        return SamplingPlan(recipe.rollout.rows)
    return SamplingPlan(plan.rows, plan.blocks, plan.training_blocks)


def this_device(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Device:
    """Return this machine as a Device, limited to train.memory. Ranks of one machine share its main memory."""
    limit = int(config.memory * 1e9) if config.memory else None
    place = Place.of(os.environ)
    sharers = place.local_size if place and device.type != "cuda" else 1
    free = free_memory(device) // sharers
    return Device(device.type, dtype, free, limit, resident_bytes(), ranks=Place.size_of(os.environ))


def gpu_of_size(gigabytes: float, dtype: torch.dtype) -> Device:
    """Return a Device for a GPU of that size, which need not be present."""
    return Device("cuda", dtype, max(0, int(gigabytes * 1e9) - CUDA_CONTEXT_BYTES))


def recomputes(policy: Any) -> bool:
    """Return whether activations are recomputed; the flag's name differs between versions of transformers."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(policy.model, name) for name in names if hasattr(policy.model, name)), False))


def measure_tokens(policy: Policy) -> int:
    """Return tokens per pass by measurement, for a model whose shapes depend on values."""
    fits = PROBE_SHARE * free_memory(policy.device) / bytes_per_token(policy)
    budget = MIN_TOKENS
    while budget * 2 <= min(fits, MAX_TOKENS):
        budget *= 2
    return budget


def probe_micro_batch(policy: Policy, prompt: int, completions: int, length: int) -> MicroBatch:
    """Return a micro-batch of one group of the given shape, with tokens from the vocabulary in turn."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    return uniform_micro_batch(prompt, completions, length, vocabulary=vocabulary)


def bytes_per_token(policy: Policy) -> float:
    """Return the bytes per token that a forward pass keeps for its backward pass, without weights."""
    micro_batch = probe_micro_batch(policy, PROBE_TOKENS // 2, 2, PROBE_TOKENS // 4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    kept: dict[int, int] = {}

    def record_storage(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record_storage, lambda tensor: tensor):
        policy.logprobs(micro_batch, step=0)
    return max(1.0, sum(kept.values()) / micro_batch.tokens)
