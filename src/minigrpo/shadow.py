"""A policy without weights, made from a config alone, and what its training and its engine would take.

It is the policy's own code on tensors without contents, so no formula has to follow when a layer changes. What cannot
be run like this, because its shapes depend on values (a mixture of experts), raises UnplannableError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo import attention, stretches
from minigrpo.config import Recipe
from minigrpo.loading import Loaded, model_class
from minigrpo.lora import add_lora
from minigrpo.packing import Bundle, Part
from minigrpo.policy import Policy, decoder, learn_everything, recompute_activations
from minigrpo.scoring import Float32Head
from minigrpo.tally import META, Tally, backend_of


class UnplannableError(Exception):
    """The model's shapes depend on values, so its memory cannot be told without running it."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Bytes of one micro-batch: `kept` for the backward pass at the end of the forward one, `passing` what comes on
    top at the highest moment, which is in `phase`.
    """

    tokens: int
    kept: int
    passing: int
    phase: str

    @property
    def peak(self) -> int:
        return self.kept + self.passing


def shadow(config: Any, recipe: Recipe, dtype: torch.dtype, *, device: str = "cpu", recompute: bool = False) -> Policy:
    """The recipe's policy with every tensor on "meta", and attention as torch computes it on `device` (cpu, cuda).

    Raises RecipeError where lora.targets fits no layer, ModelError where the weights could not be trained.
    """
    with META:
        model = model_class(config).from_config(config, dtype=dtype).eval()
        if recipe.model.head_float32 and dtype != torch.float32:
            model.set_output_embeddings(Float32Head.of(model.get_output_embeddings()))
        policy = Policy(
            Loaded(model, None, "shadow"),
            temperature=recipe.rollout.temperature,
            seed=recipe.seed,
            backend=backend_of(device),
        )
        policy.model.requires_grad_(False)
        if recipe.train.full:
            learn_everything(policy.model)
        else:
            policy.model, policy.dropouts = add_lora(policy.model, recipe.lora, seed=recipe.seed)
    if recompute:
        recompute_activations(policy.model)
    for parameter in policy.trainable:
        parameter.grad = torch.empty_like(parameter)  # from the second micro-batch on they are there
    return policy


def held_by(policy: Policy) -> list[Tensor]:
    """What the policy's own lines account for."""
    gradients = [parameter.grad for parameter in policy.trainable if parameter.grad is not None]
    return [*policy.model.parameters(), *policy.model.buffers(), *gradients]


def uniform_part(prompt: int, completions: int, length: int, *, groups: int = 1, vocabulary: int = 2) -> Part:
    """A micro-batch whose groups all have that shape, its tokens taken from the vocabulary in turn."""

    def ids(start: int, n: int) -> tuple[int, ...]:
        return tuple((start + at) % vocabulary for at in range(n))

    answers = tuple(ids(g, length) for g in range(completions))
    bundles = tuple(Bundle(place, ids(place, prompt), tuple(range(completions)), answers) for place in range(groups))
    tokens = groups * completions * length
    equal_N = torch.full((tokens,), 1 / tokens)
    return Part(bundles, torch.ones(tokens), equal_N, equal_N, torch.zeros(tokens))


def training_pass(policy: Policy, part: Part, device: str, *, entropy_learns: bool = False) -> Pass:
    """One micro-batch, forward and backward, on `device` (cpu or cuda)."""
    for held in (attention._own_mask, attention._shared_mask, stretches.plan_of):
        held.cache_clear()  # what is still there from another count would cost nothing
    tally = Tally(held_by(policy), device)
    with tally:
        try:
            tally.phase = "forward pass"
            scores = policy.logprobs(part, step=0, entropy_learns=entropy_learns)
            loss = scores.logprobs_N.sum() + (scores.entropy_N.sum() if entropy_learns else 0.0)
            kept = tally.now
            tally.phase = "backward pass"
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        except (NotImplementedError, RuntimeError) as fault:
            raise UnplannableError(str(fault).splitlines()[0]) from fault
    return Pass(part.tokens, kept, tally.peak - kept, tally.peak_phase)


def quantised_share(policy: Policy) -> tuple[int, int]:
    """(bytes spared by holding the frozen layers in 4 bit, bytes of the largest of them unpacked).

    NF4 with double quantisation (QLoRA, arXiv 2305.14314): half a byte a weight, a byte for each 64 weights, and 4
    bytes for each 256 of those. Embeddings, head and norms stay as they are.
    """
    layers = [m.base_layer if hasattr(m, "base_layer") else m for m in decoder(policy.model).modules()]
    weights = {id(m): m.weight for m in layers if type(m) is nn.Linear and not m.weight.requires_grad}.values()
    spared = sum(w.nbytes - int(w.numel() * (1 / 2 + 1 / 64 + 4 / (64 * 256))) for w in weights)
    return spared, max((w.nbytes for w in weights), default=0)
