"""What is run on both sides: a model folder, prompts, a group size, and when each completion stops.

Stop lengths are forced, because which tokens a model happens to sample is no property of a trainer. They are drawn
once, and are the same in every step and on both sides: log-normal with median 0.3 of the limit and sigma 0.6, cut at
the limit. The second row has no stragglers: every completion has the draw's mean length, so the tokens are as many.

Rewards are the task's own plus a number that follows from the text, so that no group ties: a group without spread
teaches nothing, and minigrpo would skip its passes.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from minigrpo.config import Recipe
from minigrpo.types import Grade, Prompt, Task

Stops = Literal["draw", "fixed"]

MEDIAN, SIGMA, SEED = 0.3, 0.6, 0


@dataclass(frozen=True, slots=True)
class Workload:
    """`dtype`, `trl_dtype`: each side's fastest where it was measured (a Xeon with AMX).

    `recipe`: what both sides take LoRA, objective and optimizer from; what the workload itself says goes before it.
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

    @property
    def title(self) -> str:
        return f"{self.name}/{self.stops}"

    @property
    def lengths_B(self) -> tuple[int, ...]:
        """Tokens of each completion, prompt by prompt."""
        return stop_lengths(self.prompts * self.completions, self.limit, self.stops)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


@dataclass(frozen=True, slots=True)
class Kind:
    """`make` leaves a model folder; `prompts` reads its tokenizer where a prompt must have a certain length."""

    make: Callable[[Path], None]
    prompts: Callable[[Path], Sequence[Prompt]]


def stop_lengths(count: int, limit: int, stops: Stops = "draw") -> tuple[int, ...]:
    """The published draw. Python's own generator, so that it can be repeated anywhere without numpy or torch."""
    rng = random.Random(SEED)
    drawn = [rng.lognormvariate(math.log(MEDIAN * limit), SIGMA) for _ in range(count)]
    lengths = tuple(min(limit, max(1, round(length))) for length in drawn)
    return lengths if stops == "draw" else (round(sum(lengths) / count),) * count


def task_of(workload: Workload, folder: Path) -> Task:
    """The workload's prompts; the reward spreads in every group."""
    prompts = workload.kind.prompts(folder)[: workload.prompts]
    return Task(workload.name, lambda split: prompts, spread)


def spread(prompt: Prompt, text: str) -> Grade:
    """The task's grade where there is a task, plus a checksum of the text in [0, 1)."""
    reward = zlib.crc32(text.encode()) / 2**32
    if not isinstance(prompt.target, Mapping):
        return Grade(reward)
    grade = _wordproblems().grade(prompt, text)
    return replace(grade, reward=grade.reward + reward)


def _wordproblems() -> Task:
    from minigrpo.tasks import TASKS

    return TASKS["wordproblems"](Recipe())


def _word_prompts(folder: Path) -> Sequence[Prompt]:
    return _wordproblems().prompts("train")


def _long_prompts(folder: Path) -> Sequence[Prompt]:
    """Prompts of exactly PROMPT_TOKENS tokens: one token a byte, so the text is cut to fit."""
    from transformers import AutoTokenizer

    from minigrpo.render import render

    tokenizer = AutoTokenizer.from_pretrained(folder)
    empty = len(render(tokenizer, Prompt("", ({"role": "user", "content": ""},))).ids)
    text = "The quick brown fox jumps over the lazy dog and then asks what it was all about. " * 9
    return [
        Prompt(f"long-{n}", ({"role": "user", "content": f"{n} {text}"[: PROMPT_TOKENS - empty]},)) for n in range(8)
    ]


def _make_tiny(folder: Path) -> None:
    """The embedded model before its warm start, which would change no figure here."""
    import torch

    from minigrpo import seedling

    blueprint = seedling.Blueprint()
    tokenizer = seedling.train_tokenizer(blueprint)
    torch.manual_seed(SEED)
    seedling.decoder(blueprint, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_half(folder: Path) -> None:
    """Random weights of the shape of Qwen2.5-0.5B."""
    shape = Qwen2(vocab=151936, hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864)
    _save(folder, shape, "bfloat16")


def _make_mini(folder: Path) -> None:
    _save(folder, Qwen2(vocab=300, hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64), "float32")


@dataclass(frozen=True, slots=True)
class Qwen2:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


def _save(folder: Path, shape: Qwen2, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    tokenizer = byte_tokenizer(shape.vocab)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer(size: int) -> Any:
    """A real fast tokenizer that writes one token a byte, and reads `size`: what random weights say has a text too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The names that transformers gives to any tokenizer beside a Qwen2 model, if it has them or not.
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"word{i}" for i in range(len(tokens), size)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


PROMPT_TOKENS = 150

KINDS: Mapping[str, Kind] = {
    "tiny": Kind(_make_tiny, _word_prompts),
    "half": Kind(_make_half, _long_prompts),
    "fast": Kind(_make_half, _long_prompts),
    "mini": Kind(_make_mini, _long_prompts),
}

WORKLOADS: Mapping[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("tiny", "the embedded model, word problems", 8, 8, 64, "float32", "float32+autocast", 7),
        Workload(
            "half", "random weights, Qwen2.5-0.5B's shape, long prompts", 2, 8, 64, "bfloat16", "bfloat16+autocast", 3
        ),
        Workload(
            *("fast", "recipe gsm8k-fast at short lengths, Qwen2.5-0.5B's shape", 8, 2, 64),
            *("bfloat16", "bfloat16+autocast", 3),
            recipe="gsm8k-fast",
        ),
        Workload("mini", "seconds, for the tests", 2, 2, 6, "float32", "float32", 1),
    )
}
