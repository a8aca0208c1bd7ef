"""Supervised learning of written answers: what the embedded model grew up with, and the warm start of any other.

Everything that is trainable learns: all parameters of a bare model, the adapter of a model under LoRA. The loss is the
mean over all answer tokens of a step, so that how a step is cut into passes does not change its gradient.

Not covered: dropout. An adapter's masks are named by the tokens of GRPO's passes, so they are to be off meanwhile.

Shapes: B lessons, T positions of the longest, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigrpo.models.loss_scale import LossScale


@dataclass(frozen=True, slots=True)
class Lesson:
    """What to say after a prompt. Only the answer is learned; it ends with the stop token, or stopping is not."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class Schedule:
    """`rows` lessons a step; the learning rate rises over the first steps, then falls along half a cosine.

    Learning ends before `steps` once the loss, in nats a token, smoothed over some twenty steps, is below `enough`.
    """

    steps: int
    rows: int
    lr: float
    warmup: int = 30
    enough: float = 0.0

    def lr_at(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, slots=True)
class Room:
    """What fits into one pass, padding included: tokens of the rows, and positions that need logits."""

    tokens: int
    logits: int

    def holds(self, lessons: Sequence[Lesson]) -> bool:
        longest = max(map(len, lessons))
        kept = longest - min(len(lesson.prompt_ids) for lesson in lessons)
        return len(lessons) * longest <= self.tokens and len(lessons) * kept <= self.logits


def warm_start(
    model: Any,
    lessons: Sequence[Lesson],
    schedule: Schedule,
    *,
    seed: int = 0,
    room: Room | None = None,
    report: Callable[[int, float], None] | None = None,
) -> float:
    """Teach any causal model the answers, in place. Returns the last loss, smoothed. No `room`: a step is one pass."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    order = random.Random(seed)
    queue: list[Lesson] = []
    smooth, scale = math.nan, LossScale.of(dtype_of(model))
    for step in range(schedule.steps):
        while len(queue) < schedule.rows:
            queue += order.sample(lessons, len(lessons))
        batch, queue = queue[: schedule.rows], queue[schedule.rows :]
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        loss, scale = scaled_gradient(model, batch, room, scale)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
        if report is not None:
            report(step + 1, smooth)
        if smooth < schedule.enough:
            break
    return smooth


def scaled_gradient(
    model: Any, lessons: Sequence[Lesson], room: Room | None, scale: LossScale
) -> tuple[float, LossScale]:
    """`accumulate` with a loss scale, which float16 needs: again with a smaller one where it overflowed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    while True:
        loss = accumulate(model, lessons, room, scale)
        scale.down(trainable)
        finite = not scale.adapts or all(bool(p.grad.isfinite().all()) for p in trainable if p.grad is not None)
        if finite or not scale.can_fall or not math.isfinite(loss):
            return loss, scale.after_good()
        scale = scale.after_overflow()
        model.zero_grad()


def dtype_of(model: Any) -> torch.dtype:
    """What activations are computed in: an adapter may be finer than the weights that it adapts."""
    weights = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return torch.float16 if torch.float16 in weights else weights[0]


def accumulate(
    model: Any, lessons: Sequence[Lesson], room: Room | None = None, scale: LossScale | None = None
) -> float:
    """Add the gradient of the mean loss over all answer tokens, pass by pass, scaled; returns the loss, unscaled."""
    tokens, total = answer_tokens(lessons), 0.0
    for part in passes(lessons, room):
        loss = summed_loss(model, part) / tokens
        (scale.up(loss) if scale else loss).backward()
        total += loss.item()
    return total


@torch.no_grad()
def mean_loss(model: Any, lessons: Sequence[Lesson], room: Room | None = None) -> float:
    """Nats per answer token, without a gradient."""
    return sum(summed_loss(model, part).item() for part in passes(lessons, room)) / answer_tokens(lessons)


def imitation_loss(model: Any, lessons: Sequence[Lesson]) -> Tensor:
    """Mean negative log-probability of the answers' tokens, in one pass."""
    return summed_loss(model, lessons) / answer_tokens(lessons)


def answer_tokens(lessons: Sequence[Lesson]) -> int:
    return sum(len(lesson.answer_ids) for lesson in lessons)


def passes(lessons: Sequence[Lesson], room: Room | None) -> Iterator[list[Lesson]]:
    """The lessons in as few passes as there is room for; one that has no room even alone is a pass of its own."""
    if room is None or room.holds(lessons):
        yield list(lessons)
        return
    part: list[Lesson] = []
    # Longest first: rows of like length waste little on padding, and memory runs out at once or not at all.
    for lesson in sorted(lessons, key=len, reverse=True):
        if part and not room.holds([*part, lesson]):
            yield part
            part = []
        part.append(lesson)
    yield part


def summed_loss(model: Any, lessons: Sequence[Lesson]) -> Tensor:
    """Negative log-probability of all answer tokens together."""
    rows = [(*lesson.prompt_ids, *lesson.answer_ids) for lesson in lessons]
    longest = max(len(row) for row in rows)
    # Padded on the right, so a causal model needs no mask: nothing real comes after the padding.
    tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=model.device)
    labels_BT = torch.full_like(tokens_BT, -100)
    for row, lesson in enumerate(lessons):
        start, end = len(lesson.prompt_ids), len(rows[row])
        labels_BT[row, start:end] = tokens_BT[row, start:end]
    kept = longest - min(len(lesson.prompt_ids) for lesson in lessons)  # positions before every answer need no logits
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False, logits_to_keep=kept).logits
    logits_NV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits_NV, labels_BT[:, -kept:].flatten(), reduction="sum")
