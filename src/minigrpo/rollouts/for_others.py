"""A task for other trainers: its prompts as rows of a data set, its grader as a function of their signature.

What `minigrpo recipes RECIPE --to trl` and `--to verl` print calls these, so that the other trainer asks the same
questions and pays the same rewards. TRL hands over siblings one after the other, so they are graded as the group that
they are; verl grades each text by itself, so a function that compares siblings sees one alone there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from minigrpo.config.load import load_recipe
from minigrpo.rollouts.grading import judge_group
from minigrpo.rollouts.groups import prompts_of
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion, Split


class SharedTask:
    """The task of a recipe, by the recipe's name or file."""

    def __init__(self, recipe: str) -> None:
        self.task = open_task(load_recipe(recipe))
        self._prompts = {
            (split, prompt.id): prompt for split in ("train", "test") for prompt in self.task.prompts(split)
        }

    def rows(self, split: Split) -> list[dict[str, Any]]:
        """Return rows for TRL: the messages of each prompt, and by what `reward` finds it again."""
        return [
            {"prompt": _messages(prompt.messages), "prompt_id": prompt.id, "split": split}
            for prompt in prompts_of(self.task, split)
        ]

    def verl_rows(self, split: Split) -> list[dict[str, Any]]:
        """Return the same rows in the columns that verl's data set has."""
        return [
            {
                "data_source": self.task.name,
                "prompt": row["prompt"],
                "reward_model": {"style": "rule", "ground_truth": row["prompt_id"]},
                "extra_info": {"prompt_id": row["prompt_id"], "split": split},
            }
            for row in self.rows(split)
        ]

    def reward(
        self, completions: Sequence[Any], prompt_id: Sequence[str], split: Sequence[Split], **_: Any
    ) -> list[float | None]:
        """Return the reward of each completion, a text or a conversation: TRL's signature. Unscored ones get None."""
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        rows = zip(texts, zip(split, prompt_id, strict=True), strict=True)
        return [
            reward
            for (own_split, name), siblings in groupby(rows, key=lambda row: row[1])
            for reward in self._rewards([text for text, _ in siblings], name, own_split)
        ]

    def score(self, text: str, prompt_id: str, split: Split) -> float:
        """Return the reward of one text, 0 where it could not be scored."""
        return self._rewards([text], prompt_id, split)[0] or 0.0

    def _rewards(self, texts: Sequence[str], prompt_id: str, split: Split) -> list[float | None]:
        completions = [Completion(text, (), (), "stop") for text in texts]
        grades = judge_group(self.task, self._prompts[split, prompt_id], completions)
        return [grade.reward if grade.scored else None for grade in grades]


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]
