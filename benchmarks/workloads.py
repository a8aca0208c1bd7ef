"""The workloads of both sides: a model folder, prompts, a group size, and when each completion stops.

Stop lengths are forced, because which tokens a model happens to sample is no property of a trainer. They are drawn
once, and are the same in every step and on both sides: log-normal with median 0.3 of the limit and sigma 0.6, cut at
the limit. The second row has no stragglers: every completion has the draw's mean length, so the tokens are as many.
The third forces nothing: the model ends its completions itself, and each side samples its own; it needs a trained
model, the embedded one (`tiny`) or a pretrained one (`real`). Sweeps let every completion run to the limit.

Rewards are the task's own plus a number that follows from the text, so that no group ties: a group without spread
has no gradient, and minigrpo would skip its passes.
"""

from __future__ import annotations

import math
import os
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

from benchmarks import models
from minigrpo.config.schema import Recipe
from minigrpo.types import Grade, Prompt, Task

Stops = Literal["draw", "fixed", "natural", "full"]

MEDIAN, SIGMA, SEED = 0.3, 0.6, 0


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload. `dtype`, `trl_dtype`: each side's fastest where it was measured.

    `limit`: longest completion; `long`: the same in the row with long completions. `recipe`: both sides take LoRA,
    objective and optimizer from it; the workload's own fields override it. `needs_gpu`: a CPU would take hours.
    """

    name: str
    about: str
    prompts: int
    completions: int
    limit: int
    dtype: str
    trl_dtype: str
    repeats: int
    stops: Stops = "draw"
    recipe: str | None = None
    long: int = 0
    prompt_tokens: int = 150
    needs_gpu: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}/{self.stops}, limit {self.limit}"

    @property
    def lengths_B(self) -> tuple[int, ...]:
        """Return the tokens of each completion, prompt by prompt; empty where the model ends them itself."""
        if self.stops == "natural":
            return ()
        return stop_lengths(self.prompts * self.completions, self.limit, self.stops)

    @property
    def kind(self) -> Kind:
        """Return the kind of model: only a trained one ends completions in sensible places."""
        return KINDS["grown" if (self.name, self.stops) == ("tiny", "natural") else self.name]

    def missing(self) -> str | None:
        """Return why it cannot be run here, or None."""
        lacks = [name for name in self.kind.variables if not os.environ.get(name)]
        if lacks:
            return f"Workload {self.name} needs {' and '.join(lacks)}: {'; '.join(VARIABLES[name] for name in lacks)}"
        if self.stops == "natural" and self.name not in TRAINED:
            trained = " and ".join(TRAINED)
            return f"Workload {self.name} has random weights, which end no completion: --stops natural is for {trained}"
        return None

    def on_gpu(self) -> Workload:
        """Return a size for a data-centre GPU: 32 prompts x 8 completions of up to 128 or 512 tokens, in bfloat16."""
        sizes = {"prompts": 32, "completions": 8, "limit": 128, "long": 512}
        return replace(self, **sizes, dtype="bfloat16", trl_dtype="bfloat16+autocast")  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model.

    `make` writes its folder; `prompts` reads its tokenizer where a prompt needs a certain length. `task`: what grades
    its completions, where anything does. `variables`: of the environment, which it needs.
    """

    make: Callable[[Path], None]
    prompts: Callable[[Workload, Path], Sequence[Prompt]]
    task: Callable[[], Task] | None = None
    variables: tuple[str, ...] = ()


def stop_lengths(count: int, limit: int, stops: Stops = "draw") -> tuple[int, ...]:
    """Draw stop lengths as published.

    Python's own generator, so that it can be repeated anywhere without numpy or torch.
    """
    rng = random.Random(SEED)
    drawn = [rng.lognormvariate(math.log(MEDIAN * limit), SIGMA) for _ in range(count)]
    lengths = tuple(min(limit, max(1, round(length))) for length in drawn)
    if stops == "full":
        return (limit,) * count
    return lengths if stops == "draw" else (round(sum(lengths) / count),) * count


def task_of(workload: Workload, folder: Path) -> Task:
    """Return the workload's task; rewards differ in every group."""
    kind = workload.kind
    prompts = kind.prompts(workload, folder)[: workload.prompts]
    return Task(workload.name, lambda split: prompts, partial(spread, task=kind.task() if kind.task else None))


def spread(prompt: Prompt, text: str, task: Task | None = None) -> Grade:
    """Return the task's grade where there is a task, plus a checksum of the text in [0, 1)."""
    reward = zlib.crc32(text.encode()) / 2**32
    if task is None:
        return Grade(reward)
    grade = task.grade(prompt, text)
    return replace(grade, reward=grade.reward + reward)


@lru_cache(maxsize=1)
def _wordproblems() -> Task:
    from minigrpo.tasks.registry import TASKS

    return TASKS["wordproblems"](Recipe())


def _word_prompts(workload: Workload, folder: Path) -> Sequence[Prompt]:
    return _wordproblems().prompts("train")


@lru_cache(maxsize=1)
def _gsm8k() -> Task:
    """GSM8K as the recipe asks it, worked example included."""
    from minigrpo.config.load import load_recipe
    from minigrpo.tasks.registry import TASKS

    return TASKS["gsm8k"](load_recipe("gsm8k-fast", [("task.data", os.environ[GSM8K])]))


def _gsm8k_prompts(workload: Workload, folder: Path) -> Sequence[Prompt]:
    return _gsm8k().prompts("train")


def _long_prompts(workload: Workload, folder: Path) -> Sequence[Prompt]:
    """Return prompts of exactly `prompt_tokens` tokens: one token a byte, so the text is cut to fit."""
    from transformers import AutoTokenizer

    from minigrpo.models.chat_template import render

    tokenizer = AutoTokenizer.from_pretrained(folder)
    empty = len(render(tokenizer, Prompt("", ({"role": "user", "content": ""},))).ids)
    sentence = "The quick brown fox jumps over the lazy dog and then asks what it was all about. "
    text, size = sentence * (workload.prompt_tokens // len(sentence) + 1), workload.prompt_tokens - empty
    return [Prompt(f"long-{n}", ({"role": "user", "content": f"{n} {text}"[:size]},)) for n in range(workload.prompts)]


GSM8K = "MINIGRPO_GSM8K"
VARIABLES = {
    models.REAL: "a folder with a pretrained instruct model, such as Qwen2.5-0.5B-Instruct",
    GSM8K: "a folder with GSM8K's train.jsonl and test.jsonl",
}
TRAINED = ("tiny", "real")
KINDS: Mapping[str, Kind] = {
    "tiny": Kind(models.make_tiny, _word_prompts, _wordproblems),
    "grown": Kind(models.make_grown, _word_prompts, _wordproblems),
    "real": Kind(models.link_real, _gsm8k_prompts, _gsm8k, tuple(VARIABLES)),
    **{name: Kind(partial(models.make_shape, name), _long_prompts) for name in models.SHAPES},
}

WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("tiny", "the embedded model, word problems", 8, 8, 64, "float32", "bfloat16+autocast", 7, long=256),
        Workload(
            *("half", "random weights, Qwen2.5-0.5B's shape, long prompts", 2, 8, 64),
            *("bfloat16", "bfloat16+autocast", 3),
            long=256,
        ),
        Workload(
            *("3b", "random weights, Ministral-3-3B's shape, long prompts", 32, 8, 128),
            *("bfloat16", "bfloat16+autocast", 3),
            long=512,
            needs_gpu=True,
        ),
        Workload(
            *("fast", "recipe gsm8k-fast at short lengths, Qwen2.5-0.5B's shape", 8, 2, 64),
            *("bfloat16", "bfloat16+autocast", 3),
            recipe="gsm8k-fast",
            long=256,
        ),
        Workload(
            *("real", "recipe gsm8k-fast on a pretrained model, real questions", 8, 2, 300),
            *("bfloat16", "bfloat16+autocast", 3),
            recipe="gsm8k-fast",
            long=600,
        ),
        Workload("mini", "seconds, for the tests", 2, 2, 6, "float32", "float32", 1, long=12),
    )
}
