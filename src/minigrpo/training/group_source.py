"""Find informative groups: siblings that all earn the same have no advantage, so other groups replace them.

First further prompts are tried, up to a budget (dynamic sampling: DAPO, arXiv 2503.14476, section 3.2). Then groups of
the last steps are replayed, each once. An older policy sampled those: importance weights, p_policy / p_sampler, correct
for it.

Shapes: P prompts of a step, G siblings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minigrpo.config.schema import GroupsConfig
from minigrpo.rollouts.serialize import group_data, group_of
from minigrpo.training.prompt_sampler import PromptSampler
from minigrpo.types import Group, Prompt

LOWEST_RATE = 0.25
"""Assume at least this share of informative groups: at most 4 prompts are tried at once for each missing group."""


@dataclass(frozen=True, slots=True)
class StepGroups:
    """The groups of one step.

    `groups`: the P that the step learns from. `sampled`: all that were rolled out; the first P of them, as drawn, are a
    fair sample of the task. `figures`: what the search cost and found.
    """

    groups: tuple[Group, ...]
    sampled: tuple[Group, ...]
    drawn: int
    figures: Mapping[str, float]

    @property
    def fair(self) -> tuple[Group, ...]:
        """Return the groups that were not chosen by reward: the ones to measure progress with."""
        return self.sampled[: self.drawn]

    @property
    def others(self) -> tuple[Group, ...]:
        """Return the groups that were sampled but are not learned from."""
        kept = {id(group) for group in self.groups}
        return tuple(group for group in self.sampled if id(group) not in kept)


class GroupSource:
    """Gathers the groups of one step after another; its `state` holds the prompt sampler and the replay pool."""

    def __init__(self, sampler: PromptSampler, prompts: int, config: GroupsConfig) -> None:
        self.sampler = sampler
        self.prompts = prompts
        self.config = config
        self.pool: list[tuple[int, Group]] = []

    def gather(
        self, step: int, ask: Callable[[Sequence[Prompt]], list[Group]], is_informative: Callable[[Group], bool]
    ) -> StepGroups:
        """Return P groups for the step.

        `ask` rolls out and grades prompts; `is_informative` tells whether a group changes the policy.
        """
        groups = ask(self.sampler.take(self.prompts))
        sampled = list(groups)
        tied = [place for place, group in enumerate(groups) if not is_informative(group)]
        figures = {"informative_groups": 1 - len(tied) / len(groups), "frac_reward_zero_std": len(tied) / len(groups)}
        budget, tries = round(self.config.resample * self.prompts), 0
        while tied and tries < budget:
            rate = max(LOWEST_RATE, sum(map(is_informative, sampled)) / len(sampled))
            fresh = ask(self.sampler.more(min(budget - tries, math.ceil(len(tied) / rate))))
            if not fresh:
                break
            tries += len(fresh)
            sampled += fresh
            informative = [group for group in fresh if is_informative(group)]
            for group in informative[: len(tied)]:
                groups[tied.pop(0)] = group
        if budget:
            figures |= {"resample/tried": tries, "resample/found": sum(map(is_informative, sampled[self.prompts :]))}
        if self.config.replay:
            figures["replayed_groups"] = self._replay(step, groups, tied)
            self.pool += [(step, group) for group in sampled if is_informative(group)]
        self.sampler.learn(sampled)
        return StepGroups(tuple(groups), tuple(sampled), len(groups), figures)

    def _replay(self, step: int, groups: list[Group], tied: list[int]) -> int:
        """Replace tied groups by the newest of the pool, each used once and none too old. Returns how many."""
        self.pool = [(then, group) for then, group in self.pool if step - then <= self.config.replay]
        asked = {group.prompt.id for group in groups}
        count = 0
        for place in tied:
            fits = [index for index, (_, group) in enumerate(self.pool) if group.prompt.id not in asked]
            if not fits:
                break
            _, groups[place] = self.pool.pop(fits[-1])
            asked.add(groups[place].prompt.id)
            count += 1
        return count

    def state(self) -> dict[str, Any]:
        """Return what later steps depend on, as JSON data."""
        pool = [{"step": step, **group_data(group)} for step, group in self.pool]
        return {"sampler": self.sampler.state(), "pool": pool}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.sampler.restore(state["sampler"])
        known = {prompt.id: prompt for prompt in self.sampler.prompts}
        self.pool = [(row["step"], group_of(row, known)) for row in state["pool"]]
