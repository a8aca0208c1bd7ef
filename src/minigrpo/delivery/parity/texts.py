"""Held texts on which models are compared, and next-token distributions on them: the input of every proof of parity.

The texts of the task are the policy's completions at the end of training; else right answers of its task; else what it
answers now. Beside them stand texts of many other kinds (parity/varied_texts.py), which training may not have spoilt.
All are kept as token ids, so that every stage is asked about the same ids.

Shapes: N scored positions of a text, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, overload

import torch
from torch import Tensor

from minigrpo.delivery.parity.varied_texts import VARIED_TEXTS
from minigrpo.errors import ArtifactError, TaskError
from minigrpo.models.chat_template import after_opening, opening, probe_messages, render
from minigrpo.models.lora import own_model
from minigrpo.rollouts.grading import gold_answer
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
    """The texts of a proof. `texts`: the task's; `source`: where they come from, in words for the user. `others`: texts
    of other kinds."""

    texts: tuple[ScoredText, ...]
    source: str
    others: tuple[ScoredText, ...] = ()

    @property
    def all(self) -> tuple[ScoredText, ...]:
        """Return the task's texts, then the others."""
        return (*self.texts, *self.others)


def held_texts(run: RunDir | None, task: Task | None, tokenizer: Any, vocabulary: int) -> HeldTexts | None:
    """Return texts of the run's last step, or the task's right answers; None where there are neither."""
    pairs = list(_last_completions(run)) if run else []
    source = "completions of the last training step"
    if not pairs and task is not None and task.gold is not None:
        try:
            prompts = prompts_of(task, "test", MAX_TEXTS)
        except TaskError:
            prompts = []
        pairs = [(prompt, gold_answer(task, prompt), True) for prompt in prompts]
        source = "right answers of the task"
    texts = [held for pair in pairs[:MAX_TEXTS] if (held := _tokenize_text(*pair, tokenizer)).scored]
    return HeldTexts(_truncate_texts(texts, vocabulary), source, other_texts(tokenizer)) if texts else None


def sampled_texts(model: Any, tokenizer: Any, task: Task | None, vocabulary: int) -> HeldTexts:
    """Return the model's greedy answers to a few prompts."""
    question = Prompt("question", tuple(probe_messages(tokenizer)))
    found = prompts_of(task, "test", 4) if task is not None else [question]
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
    return HeldTexts(
        _truncate_texts(texts, vocabulary), "likeliest answers of the trained policy", other_texts(tokenizer)
    )


def other_texts(tokenizer: Any) -> tuple[ScoredText, ...]:
    """Return the fixed texts as token ids, each with the beginning that the tokenizer puts before a text; every token
    after the first is scored."""
    found = (tuple(tokenizer(text)["input_ids"][: MAX_TEXT_TOKENS + 1]) for text in VARIED_TEXTS)
    return tuple(ScoredText(ids, 1) for ids in found if len(ids) > 1)


class StoredLogprobs(Sequence[Tensor]):
    """Log-probabilities [N, V] of each text, in a temporary file: with 152k tokens in the vocabulary, those of 2,500
    positions take 1.5 GB, and one text's at a time are looked at.

    Raises ArtifactError where the disk has no room for them.
    """

    def __init__(self, found: Iterable[Tensor]) -> None:
        # It lives as long as this object, and has no name that could stay behind.
        self._file = tempfile.TemporaryFile(prefix="minigrpo-")  # noqa: SIM115
        self._shapes: list[tuple[int, int]] = []
        self._starts = [0]
        for logprobs_NV in found:
            rows, width = logprobs_NV.shape
            try:
                self._file.write(logprobs_NV.contiguous().numpy().data)
            except OSError as fault:
                raise ArtifactError(
                    f"What a model says on the texts of the proof could not be written to {tempfile.gettempdir()}: "
                    f"{fault.strerror}. Make room, or name another place: TMPDIR=FOLDER"
                ) from None
            self._shapes.append((rows, width))
            self._starts.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._shapes)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return _Part(self, range(len(self))[index])
        place = range(len(self))[index]
        self._file.seek(self._starts[place])
        raw = bytearray(self._starts[place + 1] - self._starts[place])
        self._file.readinto(raw)
        return torch.frombuffer(raw, dtype=torch.float32).view(self._shapes[place])


class _Part(Sequence[Tensor]):
    """A slice of stored log-probabilities, read when asked for."""

    def __init__(self, whole: StoredLogprobs, places: range) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._places[index]
        return _Part(self._whole, chosen) if isinstance(chosen, range) else self._whole[chosen]


def text_logprobs(model: Any, texts: Sequence[ScoredText]) -> Iterator[Tensor]:
    """Yield log-probabilities [N, V] of each text in float32, on the CPU. A prompt's positions get no logits, where the
    model can leave them out: with 152k tokens in the vocabulary a thousand of them take 0.6 GB."""
    named = "logits_to_keep" in signature(own_model(model).forward).parameters
    for held in texts:
        yield _scored_logprobs(model, held, {"logits_to_keep": held.scored} if named else {})


@torch.no_grad()
def _scored_logprobs(model: Any, held: ScoredText, options: dict[str, int]) -> Tensor:
    ids = torch.tensor([held.ids[:-1]], device=model.device)
    logits_NV = model(input_ids=ids, use_cache=False, **options).logits[0, -held.scored :]
    return logits_NV.float().log_softmax(-1).cpu()


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
    rest = after_opening(opening(tokenizer, prompt), text)
    said = tuple(tokenizer(rest, add_special_tokens=False)["input_ids"])
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
