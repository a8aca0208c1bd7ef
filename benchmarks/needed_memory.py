"""Count from shapes what the proof and TRL's steps take, before a model is loaded (minigrpo.training.memory.meta)."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.ours import recipe_of
from benchmarks.sides import BenchmarkError, Setup
from benchmarks.workloads import task_of
from minigrpo.config.schema import Recipe
from minigrpo.models.context_window import longest_prompt
from minigrpo.models.loading import open_config, open_tokenizer
from minigrpo.models.policy import Policy
from minigrpo.training.memory.meta import (
    META,
    MemoryCounter,
    meta_policy,
    policy_tensors,
    training_pass,
    uniform_micro_batch,
)
from minigrpo.training.memory.rollout_cost import RolloutShape, transformers_rollout_cost
from minigrpo.utils.memory import free_memory

SPARE = 1.1
"""Times what is counted, what a device needs free: kernels borrow memory, and an allocator cannot use every gap."""

BESIDE = 0.25
"""Share of main memory that stays for minigrpo: 4.8 of 24 GB were the most of any workload, where TRL took 15.1."""


def must_recompute(setup: Setup, recipe: Recipe) -> bool:
    """Tell whether the proof fits on the device only with activations recomputed.

    Raise BenchmarkError where it does not even then.
    """
    config, prompt = facts_of(setup, prompts=1)
    free, need = free_memory(torch.device(setup.device)), 0
    for recompute in (False, True):
        need = int(SPARE * proof_bytes(config, recipe, prompt, setup.device, recompute=recompute))
        if need <= free:
            return recompute
    raise BenchmarkError(
        f"The proof of workload {setup.workload.name} computes in float32: it takes {need / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free on {setup.device}. Take a smaller workload or a larger device, or leave the "
        "proof out: --no-proof"
    )


def passes_that_fit(setup: Setup) -> int:
    """Return in how many passes TRL takes a step: as few as there is room for on the device.

    Raise BenchmarkError where there is none for one row.
    """
    config, prompt = facts_of(setup)
    recipe = recipe_of(setup)
    # Autocast keeps much of a pass in both types. A step of `half` takes 12.6 GiB with it on a CPU: 7.1 are counted in
    # bfloat16, 13.0 in float32.
    dtype = torch.float32 if "autocast" in setup.dtype else getattr(torch, recipe.model.dtype)
    policy = meta_policy(config, recipe, dtype, device=setup.device)
    moments = 2 * sum(parameter.nbytes for parameter in policy.trainable)
    held = sum(tensor.nbytes for tensor in policy_tensors(policy)) + moments
    rows, limit = setup.workload.prompts * setup.workload.completions, setup.workload.limit
    free, need = free_memory(torch.device(setup.device)), 0
    free = int(free * (1 - BESIDE)) if setup.device == "cpu" else free
    for passes in (number for number in range(1, rows + 1) if rows % number == 0):
        shape = RolloutShape(rows // passes, 1, prompt, limit)
        need = int(SPARE * (held + plain_pass_bytes(policy, shape, setup.device)))
        if need <= free:
            return passes
    raise BenchmarkError(
        f"TRL takes {need / 1e9:.1f} GB for workload {setup.workload.name} with one completion a pass, and "
        f"{free / 1e9:.1f} GB are free on {setup.device}. Take a smaller workload or a larger device, or minigrpo "
        "alone: --trl without a name"
    )


def facts_of(setup: Setup, prompts: int | None = None) -> tuple[Any, int]:
    """Return the model's config, and the tokens of the longest of so many prompts."""
    asked = task_of(setup.workload, setup.folder).prompts("train")[:prompts]
    return open_config(setup.folder), longest_prompt(asked, open_tokenizer(setup.folder))


def proof_bytes(config: Any, recipe: Recipe, prompt: int, device: str, *, recompute: bool) -> int:
    """Count what the proof takes at its peak on `device` (cpu, cuda) for a model of this config.

    All completions are taken to reach the limit. `prompt`: tokens of the first prompt.
    """
    policy = meta_policy(config, recipe, torch.float32, device=device, recompute=recompute)
    siblings, limit = recipe.rollout.completions, recipe.rollout.max_tokens
    vector = sum(parameter.nbytes for parameter in policy.trainable)
    shape = RolloutShape(1, siblings, prompt, limit)
    moments = (
        transformers_rollout_cost(policy, shape, recipe.rollout.temperature, device).peak,
        training_pass(policy, uniform_micro_batch(prompt, siblings, limit), device).peak,
        vector + plain_pass_bytes(policy, shape, device),  # our gradient is kept meanwhile
        3 * vector,  # both gradients and their difference
    )
    return sum(tensor.nbytes for tensor in policy_tensors(policy)) + max(moments)


def plain_pass_bytes(policy: Policy, shape: RolloutShape, device: str) -> int:
    """Count a pass that reads a prompt for each row, forward and backward, on top of weights and gradients.

    All completions have their logits at once. TRL's head on a GPU goes in tiles of 32,768 entries of the vocabulary,
    over prompts and completions: that takes less where the vocabulary is larger than 32,768 times all tokens over those
    of completions, as in every workload for a GPU, and more in `mini`, whose megabytes decide nothing.
    """
    counter = MemoryCounter(policy_tensors(policy), device)
    with counter, policy.plain_attention(), META:
        ids_BT = torch.zeros(shape.rows, shape.prompt + shape.completion, dtype=torch.long)
        logits_BCV = policy.model(input_ids=ids_BT, logits_to_keep=shape.completion, use_cache=False).logits
        logits_BCV.log_softmax(-1).gather(-1, ids_BT[:, -shape.completion :, None]).sum().backward()
    return counter.peak
