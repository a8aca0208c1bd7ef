"""Choose each step's prompts: shuffled epochs in which solved prompts rest and half-solved ones come more often.

What is drawn depends on the seed and on the results recorded for each prompt, which are in `state`: a resumed run
draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from minigrpo.config.schema import EvalConfig, GroupsConfig
from minigrpo.errors import ArtifactError, RecipeError
from minigrpo.types import Group, Prompt
from minigrpo.utils.rng import name_key

UNKNOWN = 0.5
"""Solved share assumed for an untried prompt: half, as nothing says that it would teach less."""


@dataclass(frozen=True, slots=True)
class SolveRecord:
    """Share of right completions when a prompt was last tried, and the epoch of that try."""

    solved: float
    epoch: int


def split_held_out(prompts: Sequence[Prompt], config: EvalConfig, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return (training prompts, held-out prompts). Raise RecipeError where none would be left to train on."""
    if not config.every:
        return list(prompts), []
    count = config.held_out
    if count >= len(prompts):
        raise RecipeError(
            f"eval.held_out keeps {count} of the {len(prompts)} training prompts aside, which leaves none to train on. "
            "Lower it, or raise task.size."
        )
    order = sorted(range(len(prompts)), key=lambda index: name_key(seed, "held out", prompts[index].id))
    aside = set(order[:count])
    return [p for i, p in enumerate(prompts) if i not in aside], [prompts[i] for i in sorted(aside)]


class PromptSampler:
    """Draws without replacement within an epoch; what is left at its end is shuffled into the next.

    No step holds a prompt twice, unless a step takes more than there are.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, config: GroupsConfig | None = None) -> None:
        self.prompts = prompts
        self.seed = seed
        self.config = config or GroupsConfig()
        self.epoch = -1
        self.deck: list[int] = []
        self.records: dict[str, SolveRecord] = {}
        self.tried: set[int] = set()
        self.ids = {prompt.id for prompt in prompts}

    def take(self, count: int) -> list[Prompt]:
        """Return the prompts of a new step."""
        self.tried = set()
        if count > len(self.prompts):
            return self._repeated(count)
        if count > len(self.deck):
            self._deal(count)
        return self._draw(count)

    def more(self, count: int) -> list[Prompt]:
        """Return further prompts for the same step, none of them repeated.

        Fewer than `count`, or none, where they run out.
        """
        if count > len(self.deck):
            self._deal(count)
        return self._draw(count)

    def learn(self, groups: Sequence[Group]) -> None:
        """Record the solved share of each prompt where later draws depend on it."""
        if self.config.rest is None and not self.config.focus:
            return
        for group in groups:
            share = fmean(grade.solved for grade in group.grades)
            name = group.prompt.id
            # A copy (see _repeated) counts for its original.
            self.records[name if name in self.ids else name.rpartition("#")[0]] = SolveRecord(share, self.epoch)

    def state(self) -> dict[str, Any]:
        """Return all that later draws depend on, for JSON."""
        records = {name: [record.solved, record.epoch] for name, record in self.records.items()}
        return {"epoch": self.epoch, "deck": self.deck, "records": records}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the state; raises ArtifactError where the prompts cannot be the same."""
        if any(not 0 <= index < len(self.prompts) for index in state["deck"]):
            raise ArtifactError(
                f"The checkpoint was made with more prompts than the {len(self.prompts)} that the task has now. "
                "Put the task's data back as it was, or begin another run: --run runs/NAME"
            )
        self.epoch, self.deck = state["epoch"], list(state["deck"])
        self.records = {name: SolveRecord(*record) for name, record in state["records"].items()}

    def _draw(self, count: int) -> list[Prompt]:
        drawn = [index for index in self.deck if index not in self.tried][:count]
        taken = set(drawn)
        self.deck = [index for index in self.deck if index not in taken]
        self.tried |= taken
        return [self.prompts[index] for index in drawn]

    def _deal(self, count: int) -> None:
        """Start a new epoch of the prompts that do not rest, shuffled; of all prompts where too few are left."""
        self.epoch += 1
        awake = [index for index in self._order(str(self.epoch)) if self._is_awake(index)]
        self.deck = awake if len(awake) >= count else self._order(str(self.epoch))

    def _is_awake(self, index: int) -> bool:
        """Return whether a prompt is in this epoch: solved ones rest, others come by chance (groups.focus)."""
        name = self.prompts[index].id
        record = self.records.get(name)
        if record and self.config.rest is not None and record.solved >= self.config.rest:
            return self.epoch - record.epoch > self.config.rest_epochs
        if not self.config.focus:
            return True
        solved = record.solved if record else UNKNOWN
        # p (1 - p) is the variance of right and wrong among siblings: what a group has to teach.
        chance = (1 + self.config.focus * 4 * solved * (1 - solved)) / (1 + self.config.focus)
        return random.Random(f"focus/{self.seed}/{self.epoch}/{name}").random() < chance

    def _repeated(self, count: int) -> list[Prompt]:
        """Return more prompts than there are.

        Copies get names of their own, because a name is also a random stream (Sampling).
        """
        self.epoch += 1
        rounds = math.ceil(count / len(self.prompts))
        drawn = [
            self.prompts[index]
            if round_index == 0
            else replace(self.prompts[index], id=f"{self.prompts[index].id}#{round_index + 1}")
            for round_index in range(rounds)
            for index in self._order(f"{self.epoch}/{round_index}")
        ]
        return drawn[:count]

    def _order(self, name: str) -> list[int]:
        order = list(range(len(self.prompts)))
        random.Random(f"prompts/{self.seed}/{name}").shuffle(order)  # seeding by text is the same on every platform
        return order
