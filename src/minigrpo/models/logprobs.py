"""Log-probabilities of sampled tokens without the [tokens, vocabulary] tensor.

Logits exist for one chunk of tokens at a time: 8 x 1000 tokens at a vocabulary of 152k would be 5 GB at once. What the
backward pass needs of them depends on the head. A frozen one (LoRA) has a gradient in the hidden state alone, D numbers
a token, which the forward pass writes down while it has the logits; a trained one recomputes them.

Shapes: N tokens, n tokens of a chunk, V vocabulary, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigrpo.models.onednn import LayerBlocks, blocked_linear, kept_blocks, linear

CHUNK_LOGITS = 20 << 20
"""Logits that exist at a time: 138 rows of 152k tokens, 84 MB in float32. With 55 rows a product takes a fifth more."""
CACHED_LOGITS = 1 << 20
"""Logits computed at a time, so that they stay in the cache."""
GPU_CHUNK_LOGITS = 32 << 20
"""Logits that exist at a time on a GPU, 128 MB in float32: there a launch costs more than a cache saves."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output head as a formula: logits = (hidden @ weight.T + bias) * scale, perhaps capped, / temperature."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None
    temperature: float
    blocks: LayerBlocks | None = None

    @classmethod
    def of(cls, model: Any, temperature: float) -> OutputHead:
        """Read the head of a causal language model: Granite divides its logits, Cohere multiplies, Gemma caps them."""
        head, config = model.get_output_embeddings(), model.config
        assert isinstance(head, nn.Linear), f"an output head of kind {type(head).__name__} is not known"
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(head.weight, head.bias, float(scale), cap, temperature, kept_blocks(head))

    @property
    def is_frozen(self) -> bool:
        """Tell whether nothing is trained and no cap applies.

        Then d logp / d hidden is (W[label] - E[W]) * scale / temperature.
        """
        trained = self.weight_VD.requires_grad or (self.bias_V is not None and self.bias_V.requires_grad)
        return self.cap is None and not trained

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """Return logits [n, V] at this temperature, in float32 at least."""
        return self.scaled_logits(self.raw_logits(hidden_nD))

    def raw_logits(self, hidden_nD: Tensor) -> Tensor:
        """Return logits [n, V] in the weights' own type, before scale, cap and temperature."""
        x_nD = hidden_nD.to(self.weight_VD.dtype)
        if self.blocks is None:
            return linear(x_nD, self.weight_VD, self.bias_V)
        return blocked_linear(x_nD, self.blocks.forward_OI, self.bias_V)

    def scaled_logits(self, raw_nV: Tensor) -> Tensor:
        """Apply scale, cap and temperature to raw logits. Returns the same tensor where nothing changes."""
        logits_nV = raw_nV.to(torch.promote_types(raw_nV.dtype, torch.float32))
        if self.cap is not None:
            return torch.tanh(logits_nV * (self.scale / self.cap)) * (self.cap / self.temperature)
        factor = self.scale / self.temperature
        return logits_nV if factor == 1 else logits_nV * factor

    def hidden_grad(self, grad_nV: Tensor, hidden_nD: Tensor) -> Tensor:
        """Turn a gradient of the logits into one of the hidden states, where there is no cap."""
        grad_nV = grad_nV.to(self.weight_VD.dtype)
        if self.blocks is None or self.blocks.backward_IO is None:
            hidden_grad_nD = linear(grad_nV, self.weight_VD.T)
        else:
            hidden_grad_nD = blocked_linear(grad_nV, self.blocks.backward_IO)
        return hidden_grad_nD.mul_(self.scale / self.temperature).to(hidden_nD.dtype)


class Float32Head(nn.Linear):
    """An output head that takes 16-bit hidden states and works in float32. ScaleRL, arXiv 2510.13786, section 3.2."""

    @classmethod
    def of(cls, head: nn.Linear) -> Float32Head:
        """Make a frozen copy: the head of a model with tied embeddings is its embedding, which stays as it is."""
        copy = cls(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        copy.weight = nn.Parameter(head.weight.detach().float(), requires_grad=False)
        if head.bias is not None:
            copy.bias = nn.Parameter(head.bias.detach().float(), requires_grad=False)
        return copy

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.float())


def score_tokens(
    hidden_ND: Tensor, labels_N: Tensor, head: OutputHead, *, entropy_learns: bool = False, on_gpu: bool = False
) -> tuple[Tensor, Tensor]:
    """Return logprobs_N of the labels (differentiable in hidden states and head) and entropy_N, in nats.

    `entropy_learns`: the entropy is differentiable as well; it costs a second gradient per token. `on_gpu`: in few
    large pieces.
    """
    V = head.weight_VD.shape[0]
    size = max(1, (GPU_CHUNK_LOGITS if on_gpu else CHUNK_LOGITS) // V)
    at_once = size if on_gpu else max(1, CACHED_LOGITS // V)
    logprobs, entropies = [], []
    for hidden_nD, labels_n in zip(hidden_ND.split(size), labels_N.split(size), strict=True):
        if head.is_frozen:
            logprobs_n, entropy_n = _FrozenHeadChunk.apply(hidden_nD, labels_n, head, entropy_learns, at_once)
        else:
            logprobs_n, entropy_n = _TrainedHeadChunk.apply(
                hidden_nD, head.weight_VD, head.bias_V, labels_n, _TrainedHead(head, entropy_learns)
            )
        logprobs.append(logprobs_n)
        entropies.append(entropy_n)
    return torch.cat(logprobs), torch.cat(entropies)


def logprob_grad(probs_nV: Tensor, labels_n: Tensor) -> Tensor:
    """Return d logp / d logits = onehot - softmax. Overwrites `probs_nV`."""
    grad_nV = probs_nV.neg_()
    return grad_nV.scatter_add_(-1, labels_n[:, None], torch.ones_like(grad_nV[:, :1]))


def entropy_grad(logits_nV: Tensor, probs_nV: Tensor, entropy_n: Tensor) -> Tensor:
    """Return d H / d logits = -p (log p + H)."""
    normaliser_n = logits_nV.logsumexp(-1)
    return probs_nV * ((normaliser_n - entropy_n)[:, None] - logits_nV)


class _FrozenHeadChunk(torch.autograd.Function):
    """Keeps d logp / d hidden, [n, D]; the backward pass is one multiplication."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, labels_n: Tensor, head: OutputHead, entropy_learns: bool, at_once: int
    ) -> tuple[Tensor, Tensor]:
        # On a CPU a few rows at once: the result is the same, and what is read repeatedly stays in the processor's
        # cache. The gradients take the place of the logits that they were computed from.
        raw_nV, n = head.raw_logits(hidden_nD), len(labels_n)
        logit_grads = [raw_nV, *([torch.empty_like(raw_nV)] if entropy_learns else [])]
        scored = []
        for rows in (slice(start, start + at_once) for start in range(0, max(1, n), at_once)):
            logits_rV = head.scaled_logits(raw_nV[rows])
            *figures, probs_rV = _score_logits(logits_rV, labels_n[rows])
            scored.append(figures)
            if ctx.needs_input_grad[0]:
                if entropy_learns:
                    logit_grads[1][rows] = entropy_grad(logits_rV, probs_rV, figures[1])
                logit_grads[0][rows] = logprob_grad(probs_rV, labels_n[rows])
        logprobs_n, entropy_n = (torch.cat(parts) for parts in zip(*scored, strict=True))
        if not entropy_learns:
            ctx.mark_non_differentiable(entropy_n)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*(head.hidden_grad(grad_nV, hidden_nD) for grad_nV in logit_grads))
        return logprobs_n, entropy_n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        pairs = zip(ctx.saved_tensors, gradients, strict=False)
        hidden_grads = [(hidden_grad_nD * grad_n[:, None]).to(hidden_grad_nD.dtype) for hidden_grad_nD, grad_n in pairs]
        return sum(hidden_grads[1:], hidden_grads[0]), None, None, None, None


def _score_logits(logits_nV: Tensor, labels_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprobs_n, entropy_n and the probabilities."""
    peak_n1 = logits_nV.amax(-1, True)
    probs_nV = (logits_nV - peak_n1).exp_()
    sum_n1 = probs_nV.sum(-1, True)
    probs_nV /= sum_n1
    normaliser_n = (peak_n1 + sum_n1.log())[:, 0]
    logprobs_n = logits_nV.gather(-1, labels_n[:, None])[:, 0] - normaliser_n
    return logprobs_n, normaliser_n - torch.linalg.vecdot(probs_nV, logits_nV), probs_nV


@dataclass(frozen=True, slots=True)
class _TrainedHead:
    """A head in training, and whether the entropy is part of the loss."""

    head: OutputHead
    entropy: bool


class _TrainedHeadChunk(torch.autograd.Function):
    """Keeps hidden states and labels; the backward pass recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_n: Tensor, trained: _TrainedHead
    ) -> tuple[Tensor, Tensor]:
        logprobs_n, entropy_n, _ = _score_logits(trained.head.logits(hidden_nD), labels_n)
        # Weight and bias stay in `head`: they are the model's own and outlive the graph.
        ctx.save_for_backward(hidden_nD, labels_n)
        ctx.trained = trained
        if not trained.entropy:
            ctx.mark_non_differentiable(entropy_n)
        return logprobs_n, entropy_n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nD, labels_n = ctx.saved_tensors
        head: OutputHead = ctx.trained.head
        needs_weight, needs_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        with torch.no_grad():
            logits_nV = head.logits(hidden_nD)
            _, entropy_n, probs_nV = _score_logits(logits_nV, labels_n)
            entropy_grad_nV = (
                entropy_grad(logits_nV, probs_nV, entropy_n) * gradients[1][:, None] if ctx.trained.entropy else 0
            )
            grad_nV = logprob_grad(probs_nV, labels_n) * gradients[0][:, None] + entropy_grad_nV
            if head.cap is None:
                grad_nV *= head.scale / head.temperature
            else:
                squashed_nV = logits_nV * (head.temperature / head.cap)
                grad_nV *= (1 - squashed_nV.square()) * (head.scale / head.temperature)
            grad_nV = grad_nV.to(head.weight_VD.dtype)
            return (
                (grad_nV @ head.weight_VD).to(hidden_nD.dtype),
                grad_nV.T @ hidden_nD.to(grad_nV.dtype) if needs_weight else None,
                grad_nV.sum(0) if needs_bias else None,
                None,
                None,
            )
