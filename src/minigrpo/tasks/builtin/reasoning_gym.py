"""Any data set of reasoning-gym as a task: `--task.name rg:leg_counting`. Problems are generated without end and graded
by the data set's own scorer (reasoning-gym, Stojanovski et al., arXiv 2505.24760).

The answer is the text in <answer></answer>. Scorers give a little for any wrong answer (0.01 or 0.05); here that is
0, because in a group that is all wrong such small scores would become large advantages.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.errors import MinigrpoError, TaskError, install_hint
from minigrpo.tasks.builtin.wordproblems import SYSTEM_PROMPT
from minigrpo.tasks.common.answers import find_answer
from minigrpo.tasks.common.rewards import Reward, check_finite, reweighted, weighted_sum
from minigrpo.types import Grade, Prompt, Split, Task

_MAX_WRONG_SCORE = 0.05
_TEST_SIZE = 256
_TEST_SEED = 1_900_000_000  # problem i of a data set is drawn with seed + i; training seeds stay below
_SEED_STRIDE = 100_000
_DRAWS_PER_PROMPT = 4  # entries drawn per prompt, because repeated problems and those of the test split are skipped


def reasoning_gym_task(name: str, recipe: Recipe) -> Task:
    """Build the task. `recipe.seed` chooses the training problems; the test problems are always the same."""
    make = _dataset_factory(name)
    rewards = (Reward("score", 1.0, lambda prompt, text: 0.0), Reward("format", 0.2, lambda prompt, text: 0.0))
    weights = {reward.name: reward.weight for reward in reweighted(rewards, recipe.task.weights)}

    @cache
    def entries(split: Split) -> dict[str, dict[str, Any]]:
        if split == "test":
            return _draw_entries(make(seed=_TEST_SEED, size=_TEST_SIZE), _TEST_SIZE, ())
        seed = recipe.seed * _SEED_STRIDE % (_TEST_SEED - recipe.task.size * _DRAWS_PER_PROMPT - _SEED_STRIDE)
        return _draw_entries(
            make(seed=seed, size=recipe.task.size * _DRAWS_PER_PROMPT), recipe.task.size, entries("test")
        )

    def prompts(split: Split) -> Sequence[Prompt]:
        return [_make_prompt(f"{split}-{i}", split, entry) for i, entry in enumerate(entries(split).values(), 1)]

    judge = make(seed=_TEST_SEED, size=1)

    def grade(prompt: Prompt, text: str) -> Grade:
        entry = entries(prompt.target["split"])[prompt.messages[-1]["content"]]
        answer = find_answer(text)
        score, note = _score_answer(judge, answer.text, entry) if answer else (0.0, {})
        parts = {"score": score, "format": float(answer is not None)}
        total = weighted_sum(parts, weights)
        return Grade(total, parts, answer is not None, score >= 1, weights=weights, notes=note)

    about = f"{name} of reasoning-gym, problems generated without end"
    return Task(f"rg:{name}", prompts, grade, _gold_answer, about=about)


def _dataset_factory(name: str) -> Any:
    """Return a function that creates data sets of this name.

    Raise TaskError where the package or the name is missing.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise TaskError(f"rg:{name} needs reasoning-gym: {install_hint('reasoning-gym')}") from None
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"Did you mean rg:{near[0]}?" if near else f"There are {len(DATASETS)}, such as rg:leg_counting."
        raise TaskError(f"reasoning-gym has no data set {name!r}. {hint}")

    def make(**options: Any) -> Any:
        try:
            return reasoning_gym.create_dataset(name, **options)
        except Exception as fault:
            raise TaskError(f"reasoning-gym could not make {name}: {type(fault).__name__}: {fault}.") from fault

    return make


def _draw_entries(dataset: Any, size: int, taken: Any) -> dict[str, dict[str, Any]]:
    """Return up to `size` entries by question, each once and none of `taken`."""
    found: dict[str, dict[str, Any]] = {}
    for i in range(len(dataset)):
        if len(found) == size:
            break
        entry = dataset[i]
        if entry["question"] not in taken:
            found.setdefault(entry["question"], entry)
    return found


def _make_prompt(name: str, split: Split, entry: dict[str, Any]) -> Prompt:
    messages = ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": entry["question"]})
    return Prompt(name, messages, {"answer": entry["answer"], "split": split})


def _score_answer(judge: Any, answer: str, entry: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return the scorer's number and notes.

    A scorer that raises on a wrong text scores 0, with the error in the notes.
    """
    try:
        value = judge.score_answer(answer, copy.deepcopy(entry))
    except MinigrpoError:
        raise
    except Exception as fault:
        return 0.0, {"scorer": f"{type(fault).__name__}: {fault}"}
    score = check_finite(value, f"rg:{judge.config.__class__.__name__}", entry["question"][:80])
    return (score if score > _MAX_WRONG_SCORE else 0.0), {}


def _gold_answer(prompt: Prompt) -> str:
    return f"<think></think><answer>{prompt.target['answer']}</answer>"
