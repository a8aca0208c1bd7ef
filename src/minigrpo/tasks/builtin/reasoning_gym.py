"""Any data set of reasoning-gym as a task: `--task.name rg:leg_counting`. Problems are generated, judged by their own
scorers (reasoning-gym, Stojanovski et al., arXiv 2505.24760), and never end.

An answer is what stands in <answer></answer>. Scorers give a little for any wrong answer (0.01 or 0.05); here that is
0, because in a group that is all wrong such crumbs would become large advantages.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any

from minigrpo.config.schema import Recipe
from minigrpo.errors import MinigrpoError, TaskError, install_hint
from minigrpo.tasks.builtin.wordproblems import SYSTEM
from minigrpo.tasks.common.answers import find_answer
from minigrpo.tasks.common.rewards import Reward, finite, reweighted, weighted
from minigrpo.types import Grade, Prompt, Split, Task

CRUMB = 0.05
TEST_SIZE = 256
TEST_SEED = 1_900_000_000  # problem i of a data set is drawn with seed + i; training seeds stay below
SEEDS_APART = 100_000
DRAWS = 4  # for each prompt wanted: repeated problems, and those that are in the test split, are passed over


def task(name: str, recipe: Recipe) -> Task:
    """`recipe.seed` chooses the training problems; the test problems are the same for everybody."""
    make = factory(name)
    rewards = (Reward("score", 1.0, lambda prompt, text: 0.0), Reward("format", 0.2, lambda prompt, text: 0.0))
    weights = {reward.name: reward.weight for reward in reweighted(rewards, recipe.task.weights)}

    @cache
    def entries(split: Split) -> dict[str, dict[str, Any]]:
        if split == "test":
            return drawn(make(seed=TEST_SEED, size=TEST_SIZE), TEST_SIZE, ())
        seed = recipe.seed * SEEDS_APART % (TEST_SEED - recipe.task.size * DRAWS - SEEDS_APART)
        return drawn(make(seed=seed, size=recipe.task.size * DRAWS), recipe.task.size, entries("test"))

    def prompts(split: Split) -> Sequence[Prompt]:
        return [as_prompt(f"{split}-{i}", split, entry) for i, entry in enumerate(entries(split).values(), 1)]

    judge = make(seed=TEST_SEED, size=1)

    def grade(prompt: Prompt, text: str) -> Grade:
        entry = entries(prompt.target["split"])[prompt.messages[-1]["content"]]
        answer = find_answer(text)
        score, note = scored(judge, answer.text, entry) if answer else (0.0, {})
        parts = {"score": score, "format": float(answer is not None)}
        total = weighted(parts, weights)
        return Grade(total, parts, answer is not None, score >= 1, weights=weights, notes=note)

    about = f"{name} of reasoning-gym, problems generated without end"
    return Task(f"rg:{name}", prompts, grade, gold, about=about)


def factory(name: str) -> Any:
    """What makes data sets of that name; raises TaskError where the package or the name is missing."""
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


def drawn(dataset: Any, size: int, taken: Any) -> dict[str, dict[str, Any]]:
    """Up to `size` problems by their question, none twice and none of `taken`."""
    found: dict[str, dict[str, Any]] = {}
    for i in range(len(dataset)):
        if len(found) == size:
            break
        entry = dataset[i]
        if entry["question"] not in taken:
            found.setdefault(entry["question"], entry)
    return found


def as_prompt(name: str, split: Split, entry: dict[str, Any]) -> Prompt:
    messages = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": entry["question"]})
    return Prompt(name, messages, {"answer": entry["answer"], "split": split})


def scored(judge: Any, answer: str, entry: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The scorer's number and a note. A scorer that falls over a wrong text is not the user's to mend: it earns 0."""
    try:
        value = judge.score_answer(answer, copy.deepcopy(entry))
    except MinigrpoError:
        raise
    except Exception as fault:
        return 0.0, {"scorer": f"{type(fault).__name__}: {fault}"}
    score = finite(value, f"rg:{judge.config.__class__.__name__}", entry["question"][:80])
    return (score if score > CRUMB else 0.0), {}


def gold(prompt: Prompt) -> str:
    return f"<think></think><answer>{prompt.target['answer']}</answer>"
