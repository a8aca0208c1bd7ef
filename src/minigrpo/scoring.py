"""Log-probabilities of sampled tokens without the [tokens, vocabulary] tensor.

Logits exist for one chunk of tokens at a time, in the forward pass and again, recomputed, in the backward pass:
8 x 1000 tokens at a vocabulary of 152k would be 5 GB at once.

Shapes: N tokens, n tokens of a chunk, V vocabulary, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_ENTRIES = 8 << 20
"""Logits held at a time: 32 MB in float32."""


@dataclass(frozen=True, slots=True)
class HeadCall:
    """An output head as arithmetic: logits = (hidden @ weight.T + bias) * scale, perhaps capped, / temperature."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None
    temperature: float

    @classmethod
    def of(cls, model: Any, temperature: float) -> HeadCall:
        """Read from a causal language model: Granite divides its logits, Cohere multiplies, Gemma caps them."""
        head, config = model.get_output_embeddings(), model.config
        assert isinstance(head, nn.Linear), f"an output head of kind {type(head).__name__} is not known"
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, head.bias, float(scale), cap, temperature)

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """[n, V] at this temperature, in float32 at least."""
        logits_nV = nn.functional.linear(hidden_nD, self.weight_VD, self.bias_V)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        if self.cap is not None:
            logits_nV = torch.tanh(logits_nV * (self.scale / self.cap)) * (self.cap / self.temperature)
            return logits_nV
        return logits_nV * (self.scale / self.temperature)


def score(hidden_ND: Tensor, labels_N: Tensor, head: HeadCall) -> tuple[Tensor, Tensor]:
    """logprobs_N of the labels (differentiable in hidden states and head) and entropy_N (not), in nats."""
    size = max(1, CHUNK_ENTRIES // head.weight_VD.shape[0])
    logprobs, entropies = [], []
    for hidden_nD, labels_n in zip(hidden_ND.split(size), labels_N.split(size), strict=True):
        logprobs_n, entropy_n = _Chunk.apply(hidden_nD, head.weight_VD, head.bias_V, labels_n, head)
        logprobs.append(logprobs_n)
        entropies.append(entropy_n)
    return torch.cat(logprobs), torch.cat(entropies)


class _Chunk(torch.autograd.Function):
    """Keeps hidden states and labels; the backward pass makes the logits anew."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_n: Tensor, head: HeadCall
    ) -> tuple[Tensor, Tensor]:
        logits_nV = head.logits(hidden_nD)
        normaliser_n = logits_nV.logsumexp(-1)
        logprobs_n = logits_nV.gather(-1, labels_n[:, None])[:, 0] - normaliser_n
        # Weight and bias stay in `head`: they are the model's own and outlive the graph.
        ctx.save_for_backward(hidden_nD, labels_n)
        ctx.head = head
        probs_nV = torch.exp(logits_nV - normaliser_n[:, None])
        entropy_n = normaliser_n - (probs_nV * logits_nV).sum(-1)
        ctx.mark_non_differentiable(entropy_n)
        return logprobs_n, entropy_n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nD, labels_n = ctx.saved_tensors
        head: HeadCall = ctx.head
        needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        with torch.no_grad():
            logits_nV = head.logits(hidden_nD)
            # d logp / d logits = onehot - softmax
            slope_nV = logits_nV.softmax(-1).neg_()
            slope_nV.scatter_add_(-1, labels_n[:, None], torch.ones_like(slope_nV[:, :1]))
            slope_nV *= gradients[0][:, None]
            if head.cap is None:
                slope_nV *= head.scale / head.temperature
            else:
                squashed_nV = logits_nV * (head.temperature / head.cap)
                slope_nV *= (1 - squashed_nV.square()) * (head.scale / head.temperature)
            slope_nV = slope_nV.to(hidden_nD.dtype)
            return (
                slope_nV @ head.weight_VD,
                slope_nV.T @ hidden_nD if needs_weight else None,
                slope_nV.sum(0) if needs_bias else None,
                None,
                None,
            )
