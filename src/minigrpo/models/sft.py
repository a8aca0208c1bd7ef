"""Supervised fine-tuning on written answers: it trains the embedded model, and warms up any other.

Everything that is trainable learns: all parameters of a bare model, the adapter of a model under LoRA. The loss is the
mean over all answer tokens of a step, so that how a step is cut into passes does not change its gradient.

Not covered: dropout. An adapter's masks are named by the tokens of GRPO's passes, so they are to be off meanwhile.

Shapes: B examples, T positions of the longest, N answer tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigrpo.models.logprobs import OutputHead, score_tokens
from minigrpo.models.lora import own_model
from minigrpo.models.loss_scale import LossScale
from minigrpo.utils.memory import empty_cache, ran_out


@dataclass(frozen=True, slots=True)
class SftExample:
    """A prompt and its answer. Only the answer is learned; without a stop token at its end, stopping is not."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class SftSchedule:
    """`rows` examples a step; the learning rate rises over the first steps, then falls along half a cosine.

    Learning ends before `steps` once the loss, in nats a token, smoothed over some twenty steps, falls below
    `target_loss`.
    """

    steps: int
    rows: int
    lr: float
    warmup: int = 30
    target_loss: float = 0.0

    def lr_at(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, slots=True)
class PassLimit:
    """The most that one pass may hold, padding included: tokens of the rows, and positions that need logits.

    A frozen head needs no such bound: it has the logits of a few positions at a time.
    """

    tokens: int
    logits: int

    def holds(self, examples: Sequence[SftExample]) -> bool:
        longest = max(map(len, examples))
        kept = longest - min(len(example.prompt_ids) for example in examples)
        return len(examples) * longest <= self.tokens and len(examples) * kept <= self.logits

    @classmethod
    def half_of(cls, examples: Sequence[SftExample], limit: PassLimit | None) -> PassLimit:
        """Return half of what the largest pass over these examples has held."""
        largest = max(len(part) * max(map(len, part)) for part in split_passes(examples, limit))
        return cls(largest // 2, min(limit.logits if limit else largest, largest) // 2)


def train_sft(
    model: Any,
    examples: Sequence[SftExample],
    schedule: SftSchedule,
    *,
    seed: int = 0,
    limit: PassLimit | None = None,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Train any causal model on the answers, in place; return the smoothed loss. No `limit`: one pass a step. Where
    memory runs out, the step is begun again in smaller passes, and so are all later ones."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    order = random.Random(seed)
    queue: list[SftExample] = []
    smooth, scale = math.nan, LossScale.of(_compute_dtype(model))
    for step in range(schedule.steps):
        while len(queue) < schedule.rows:
            queue += order.sample(examples, len(examples))
        batch, queue = queue[: schedule.rows], queue[schedule.rows :]
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        loss, scale, limit = accumulate_scaled(model, batch, limit, scale)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
        if report is not None:
            report(step + 1, smooth)
        if smooth < schedule.target_loss:
            break
    return smooth


def accumulate_scaled(
    model: Any, examples: Sequence[SftExample], limit: PassLimit | None, scale: LossScale
) -> tuple[float, LossScale, PassLimit | None]:
    """Run `accumulate_sft` with a loss scale, which float16 needs; repeat with a smaller one after an overflow, and in
    smaller passes where memory runs out. Return the loss, and scale and limit to go on with."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    while True:
        loss, limit = _accumulate_within_memory(model, examples, limit, scale)
        scale.unscale(trainable)
        finite = not scale.adapts or all(bool(p.grad.isfinite().all()) for p in trainable if p.grad is not None)
        if finite or not scale.can_fall or not math.isfinite(loss):
            return loss, scale.after_success(), limit
        scale = scale.after_overflow()
        model.zero_grad()


def _accumulate_within_memory(
    model: Any, examples: Sequence[SftExample], limit: PassLimit | None, scale: LossScale
) -> tuple[float, PassLimit | None]:
    """Run `accumulate_sft`, on a GPU once more where memory ran out, then in smaller passes as long as they can be
    cut."""
    emptied = False
    while True:
        try:
            return accumulate_sft(model, examples, limit, scale), limit
        except (RuntimeError, MemoryError) as fault:
            place = ran_out(fault)
            if not place or all(len(part) == 1 for part in split_passes(examples, limit)):
                raise
        model.zero_grad()
        empty_cache()
        if place == "CPU" or emptied:
            limit = PassLimit.half_of(examples, limit)
        emptied = True


def _compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype of activations: an adapter may have a wider one than the weights that it adapts."""
    weights = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return torch.float16 if torch.float16 in weights else weights[0]


def accumulate_sft(
    model: Any, examples: Sequence[SftExample], limit: PassLimit | None = None, scale: LossScale | None = None
) -> float:
    """Add the gradient of the mean loss over all answer tokens, pass by pass, scaled; return the loss, unscaled."""
    tokens, total = _answer_tokens(examples), 0.0
    for micro_batch in split_passes(examples, limit):
        loss = _summed_loss(model, micro_batch) / tokens
        (scale.scaled(loss) if scale else loss).backward()
        total += loss.item()
    return total


@torch.no_grad()
def mean_sft_loss(model: Any, examples: Sequence[SftExample], limit: PassLimit | None = None) -> float:
    """Return the loss in nats per answer token, without a gradient."""
    total = sum(_summed_loss(model, micro_batch).item() for micro_batch in split_passes(examples, limit))
    return total / _answer_tokens(examples)


def sft_loss(model: Any, examples: Sequence[SftExample]) -> Tensor:
    """Return the mean negative log-probability of the answers' tokens, from one pass."""
    return _summed_loss(model, examples) / _answer_tokens(examples)


def _answer_tokens(examples: Sequence[SftExample]) -> int:
    return sum(len(example.answer_ids) for example in examples)


def split_passes(examples: Sequence[SftExample], limit: PassLimit | None) -> Iterator[list[SftExample]]:
    """Yield the examples in as few passes as `limit` allows; one that exceeds it alone is a pass of its own."""
    if limit is None or limit.holds(examples):
        yield list(examples)
        return
    micro_batch: list[SftExample] = []
    # Longest first: rows of like length waste little on padding, and memory runs out at once or not at all.
    for example in sorted(examples, key=len, reverse=True):
        if micro_batch and not limit.holds([*micro_batch, example]):
            yield micro_batch
            micro_batch = []
        micro_batch.append(example)
    yield micro_batch


def _summed_loss(model: Any, examples: Sequence[SftExample]) -> Tensor:
    """Return the summed negative log-probability of all answer tokens."""
    rows = [(*example.prompt_ids, *example.answer_ids) for example in examples]
    longest = max(len(row) for row in rows)
    # Padded on the right, so a causal model needs no mask: nothing real comes after the padding.
    tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
    labels_BT = torch.full_like(tokens_BT, -100)
    for row, example in enumerate(examples):
        start, end = len(example.prompt_ids), len(rows[row])
        labels_BT[row, start:end] = tokens_BT[row, start:end]
    head = OutputHead.of(model, temperature=1.0)
    if head.is_frozen:
        return _loss_under_frozen_head(model, head, tokens_BT[:, :-1], labels_BT[:, 1:])
    # Positions before every answer need no logits.
    kept = longest - min(len(example.prompt_ids) for example in examples)
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False, logits_to_keep=kept).logits
    logits_NV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits_NV, labels_BT[:, -kept:].flatten(), reduction="sum")


def _loss_under_frozen_head(model: Any, head: OutputHead, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the same from logits of a few answer tokens at a time, which never exist for a whole pass."""
    hidden_BTD = own_model(model).get_decoder()(input_ids=tokens_BT, use_cache=False).last_hidden_state
    answer_BT = labels_BT != -100
    logprobs_N, _ = score_tokens(
        hidden_BTD[answer_BT], labels_BT[answer_BT], head, on_gpu=hidden_BTD.device.type != "cpu"
    )
    return -logprobs_N.sum()
