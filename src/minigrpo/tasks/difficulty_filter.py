"""Leave out training prompts that are too hard or too easy, by their solve rate in an evaluation over them.

    minigrpo evaluate MODEL --split train -n 8 --out rates.json
    minigrpo train RECIPE --task.rates rates.json --task.hardest 0.1 --task.easiest 0.9

A prompt that is never solved, or always, has siblings that tie, and teaches nothing (arXiv 2503.14476).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from minigrpo.config.schema import TaskConfig
from minigrpo.errors import TaskError, command_line
from minigrpo.types import Prompt, Split, Task
from minigrpo.utils.paths import user_path


def filter_by_difficulty(task: Task, config: TaskConfig) -> Task:
    """Keep only training prompts whose rate is within [hardest, easiest]. Raise TaskError if none is."""
    source = config.rates
    if source is None:
        if config.hardest > 0 or config.easiest < 1:
            raise TaskError(
                "task.hardest and task.easiest have no meaning without task.rates: measure first, with "
                "minigrpo evaluate MODEL --split train -n 8 --out rates.json"
            )
        return task
    if config.hardest > config.easiest:
        raise TaskError(
            f"task.hardest {config.hardest:g} is above task.easiest {config.easiest:g}: nothing lies within."
        )

    @cache
    def training() -> Sequence[Prompt]:
        return _select_within_range(task.prompts("train"), _read_rates(user_path(source), task.name), config)

    def prompts(split: Split) -> Sequence[Prompt]:
        return training() if split == "train" else task.prompts(split)

    return replace(task, prompts=prompts)


def _select_within_range(prompts: Sequence[Prompt], rates: Mapping[str, float], config: TaskConfig) -> list[Prompt]:
    known = [prompt for prompt in prompts if prompt.id in rates]
    if not known:
        raise TaskError(
            f"{config.rates} knows none of the {len(prompts)} training prompts. Measure them with the same task.data, "
            "task.size and seed."
        )
    if len(known) < len(prompts):
        warnings.warn(
            f"{config.rates} does not know {len(prompts) - len(known)} of the {len(prompts)} training prompts. They "
            f"are left out; to measure them all: minigrpo evaluate MODEL --split train --limit {len(prompts)}",
            stacklevel=2,
        )
    kept = [prompt for prompt in known if config.hardest <= rates[prompt.id] <= config.easiest]
    if not kept:
        easy = sum(rates[prompt.id] > config.easiest for prompt in known)
        raise TaskError(
            f"Of {len(known)} training prompts {len(known) - easy} are solved less often than task.hardest "
            f"{config.hardest:g} and {easy} more often than task.easiest {config.easiest:g}, so none is left. "
            "Widen them."
        )
    return kept


def _read_rates(path: Path, task: str) -> dict[str, float]:
    """Return each prompt's share of right answers from an evaluation's JSON. Raise TaskError for any other file."""
    words = ("minigrpo", "evaluate", "MODEL", "--split", "train", "-n", 8, "--out", path)
    measure = f"Make it with: {command_line(*words)}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaskError(f"task.rates {str(path)!r} is missing. {measure}") from None
    except OSError as fault:
        raise TaskError(f"task.rates {str(path)!r} cannot be read: {fault.strerror or fault}.") from None
    except (ValueError, RecursionError):
        raise TaskError(f"task.rates {str(path)!r} is no JSON. {measure}") from None
    try:
        split, name, answers = found["split"], found["task"], found["scores"]["answers"]
        rates = _solve_rates(answers)
    except (KeyError, TypeError, AttributeError):
        raise TaskError(f"task.rates {str(path)!r} is no evaluation. {measure}") from None
    if split != "train":
        raise TaskError(f"task.rates {str(path)!r} was measured on the {split} split. {measure}")
    if name != task:
        raise TaskError(f"task.rates {str(path)!r} was measured on the task {name}, and this is {task}. {measure}")
    return rates


def _solve_rates(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    solved: dict[str, list[bool]] = {}
    for answer in answers:
        solved.setdefault(answer["prompt"], []).append(bool(answer["solved"]))
    return {name: sum(right) / len(right) for name, right in solved.items()}
