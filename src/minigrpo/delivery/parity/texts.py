"""Held texts on which models are compared, and next-token distributions on them: the input of every proof of parity.

The texts are the policy's completions at the end of training; else right answers of its task; else what it answers now.
They are kept as token ids, so that every stage is asked about the same ids.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigrpo.errors import ArtifactError, TaskError
from minigrpo.models.chat_template import PROBE_QUESTION, render
from minigrpo.rollouts.groups import prompts_of
from minigrpo.runs.logger import read_groups
from minigrpo.runs.rundir import RunDir
from minigrpo.types import Prompt, Task

MAX_TEXTS, MAX_SCORED_TOKENS, MAX_TEXT_TOKENS = 16, 512, 96
"""Largest number of texts, of scored positions in all of them, and of scored positions in one."""
MAX_LOGPROBS = 1 << 27
"""Log-probabilities kept in memory at once: half a GiB."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A prompt and a completion as token ids; tokens from `start` on are scored."""

    ids: tuple[int, ...]
    start: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class HeldTexts:
    """The texts of a proof. `source`: where they come from, in words for the user."""

    texts: tuple[ScoredText, ...]
    source: str


def held_texts(run: RunDir | None, task: Task | None, tokenizer: Any, vocabulary: int) -> HeldTexts | None:
    """Return texts of the run's last step, or the task's right answers; None where there are neither."""
    pairs = list(_last_completions(run)) if run else []
    source = "completions of the last training step"
    if not pairs and task is not None and task.gold is not None:
        try:
            prompts = prompts_of(task, "test", MAX_TEXTS)
        except TaskError:
            prompts = []
        pairs = [(prompt, task.gold(prompt), True) for prompt in prompts]
        source = "right answers of the task"
    texts = [held for pair in pairs[:MAX_TEXTS] if (held := _tokenize_text(*pair, tokenizer)).scored]
    return HeldTexts(_truncate_texts(texts, vocabulary), source) if texts else None


def sampled_texts(model: Any, tokenizer: Any, task: Task | None, vocabulary: int) -> HeldTexts:
    """Return the model's greedy answers to a few prompts."""
    found = prompts_of(task, "test", 4) if task is not None else [Prompt("question", (PROBE_QUESTION,))]
    texts = []
    for prompt in found:
        ids = render(tokenizer, prompt).ids
        asked = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            said = model.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=MAX_TEXT_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        texts.append(ScoredText(tuple(said[0].tolist()), len(ids)))
    return HeldTexts(_truncate_texts(texts, vocabulary), "likeliest answers of the trained policy")


def text_logprobs(model: Any, texts: Sequence[ScoredText]) -> Iterator[Tensor]:
    """Yield log-probabilities [N, V] of each text in float32, on the CPU."""
    for held in texts:
        ids = torch.tensor([held.ids[:-1]], device=model.device)
        with torch.no_grad():
            logits_NV = model(input_ids=ids, use_cache=False).logits[0, held.start - 1 :]
        yield logits_NV.float().log_softmax(-1).cpu()


def _truncate_texts(texts: Sequence[ScoredText], vocabulary: int) -> tuple[ScoredText, ...]:
    """Return as many of the first texts as the limits allow; the last may be cut short."""
    room = max(8, min(MAX_SCORED_TOKENS, MAX_LOGPROBS // vocabulary))
    kept: list[ScoredText] = []
    for held in texts[:MAX_TEXTS]:
        count = min(held.scored, MAX_TEXT_TOKENS, room)
        if count:
            kept.append(ScoredText(held.ids[: held.start + count], held.start))
            room -= count
    return tuple(kept)


def _tokenize_text(prompt: Prompt, text: str, ended: bool, tokenizer: Any) -> ScoredText:
    ids = render(tokenizer, prompt).ids
    said = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ScoredText((*ids, *said, *((tokenizer.eos_token_id,) if ended else ())), len(ids))


def _last_completions(run: RunDir) -> Iterator[tuple[Prompt, str, bool]]:
    """Yield (prompt, text, whether it ended by itself) of the last logged step: the first sibling of each group, then
    the second."""
    rows = _last_step(run)
    longest = max((len(row["completions"]) for row in rows), default=0)
    for sibling in range(longest):
        for row in rows:
            if sibling < len(row["completions"]):
                said = row["completions"][sibling]
                yield Prompt(str(row["prompt"]), tuple(row["messages"])), said["text"], said["finish"] == "stop"


def _last_step(run: RunDir) -> list[dict[str, Any]]:
    """Read the groups of the last logged step, as far back as lines can be read. Raises ArtifactError if none can."""
    rows: list[dict[str, Any]] = []
    try:
        for row in read_groups(run, newest_first=True, strict=True):
            if rows and row["step"] != rows[0]["step"]:
                break
            rows.append(row)
    except ArtifactError:
        if not rows:
            raise ArtifactError(
                f"{run.groups} is damaged in its last line. Go on with the run: --resume mends it."
            ) from None
    return rows[::-1]
