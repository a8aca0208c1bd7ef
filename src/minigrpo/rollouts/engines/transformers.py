"""The transformers engine: any causal language model, through its own generate and cache. Slower, never wrong.

The draw is ours all the same (a stream per completion, log-probabilities of what was sampled): a logits processor
draws the token and leaves generate no other choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigrpo.models.context_window import check_room, context_length
from minigrpo.rollouts.engines.sampling import ProgressCounter, draw, refuse_broken_logits
from minigrpo.types import Completion, Progress, Ready, Rendered, Sampling
from minigrpo.utils.rng import name_key, uniform


class TransformersEngine:
    """Samples from the policy's own modules, so `update` copies nothing."""

    is_exact = True

    def __init__(self, policy: Any, *, stop_ids: Sequence[int], rows: int) -> None:
        self.policy = policy
        self.stop_ids = sorted(stop_ids)
        self.rows = rows

    def update(self, policy: Any) -> None:
        self.policy = policy

    def generate(
        self,
        prompts: Sequence[Rendered],
        n: int,
        sampling: Sampling,
        ready: Ready | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[tuple[Completion, ...]]:
        check_room(prompts, sampling.max_tokens, context_length(self.policy.model))
        at_once = max(1, self.rows // n)
        counter = ProgressCounter(progress)
        answers: list[tuple[Completion, ...]] = []
        for start in range(0, len(prompts), at_once):
            flat = self._generate_batch(prompts[start : start + at_once], n, sampling, counter)
            own = [tuple(flat[first : first + n]) for first in range(0, len(flat), n)]
            for index, siblings in enumerate(own):
                refuse_broken_logits(prompts[start + index].prompt.id, [sibling.logprobs for sibling in siblings])
                if ready:
                    ready(start + index, siblings)
            answers += own
        return answers

    @torch.no_grad()
    def _generate_batch(
        self, prompts: Sequence[Rendered], n: int, sampling: Sampling, counter: ProgressCounter
    ) -> list[Completion]:
        from transformers import GenerationConfig

        policy = self.policy
        longest = max(len(prompt.ids) for prompt in prompts)
        rows = [prompt.ids for prompt in prompts for _ in range(n)]
        ids_BP = torch.tensor([(*[0] * (longest - len(row)), *row) for row in rows], device=policy.device)
        mask_BP = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=policy.device)
        streams = [name_key(sampling.seed, p.prompt.id, sibling) for p in prompts for sibling in range(n)]
        processor = _DrawProcessor(torch.tensor(streams, device=policy.device), sampling.temperature, counter)
        # A fresh config: the base's own settings (top-k, repetition penalty) would sample from another
        # distribution than the one that is scored.
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
        )
        with policy.sampling_mode():
            out = policy.model.generate(
                input_ids=ids_BP, attention_mask=mask_BP, logits_processor=[processor], generation_config=config
            )
        logprobs_BC = torch.stack(processor.logprobs, 1).tolist()
        counter.add(0, len(rows))
        return [self._completion(row, lps) for row, lps in zip(out[:, longest:].tolist(), logprobs_BC, strict=True)]

    def _completion(self, ids: list[int], logprobs: list[float]) -> Completion:
        end = next((index + 1 for index, token in enumerate(ids) if token in self.stop_ids), None)
        kept = tuple(ids[:end])
        text = self.policy.tokenizer.decode(kept, skip_special_tokens=True)
        return Completion(text, kept, tuple(logprobs[: len(kept)]), "length" if end is None else "stop")


class _DrawProcessor:
    """A logits processor that draws the token and makes all others impossible."""

    def __init__(self, stream_B: Tensor, temperature: float, counter: ProgressCounter) -> None:
        self.stream_B, self.counter = stream_B, counter
        self.temperature = temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        tokens_B, logprobs_B = draw(scores_BV, uniform(self.stream_B + len(self.logprobs)), self.temperature)
        self.logprobs.append(logprobs_B)
        self.counter.add(len(tokens_B), 0)  # ended rows go on, padded, until the last one ends
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, tokens_B[:, None], 0.0)
