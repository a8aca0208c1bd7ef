"""What preflight's figures mean: why training could not work, what would make it lame, and the knob that mends it.

Only the cause nearest to the model is named; what follows from it would confuse. Values in, sentences out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minigrpo.config import Recipe
from minigrpo.types import Completion, Group, Task

WARMUP_STEPS = 60
"""Proposed where a recipe has no warm-up: enough to learn a form, too few to learn many answers by heart."""

LITTLE_FORM = 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen, and what to turn. `warms`: a warm start mends it."""

    what: str
    change: str
    warms: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.change}"


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Of the training prompts, in tokens. `crowded`: share that leave less than rollout.max_tokens of the context.

    `context`: the model's longest text, None where its configuration does not tell.
    """

    longest: int
    context: int | None
    crowded: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares from 0 to 1, times in seconds; None where it could not be measured.

    Rewards are those of the completions whose reward could be told.
    `step_seconds` is what one training step will take: a rollout, and a training pass over the groups that teach.
    `pass_seconds` is that pass if all groups teach. `planned_memory_gb`: what training will take at its height.
    """

    groups: int
    completions: int
    formed: float
    solved: float
    reward_mean: float | None
    reward_std: float | None
    unscored: float
    group_spread: float
    informative: float
    truncated: float
    prompts: PromptLengths
    mean_tokens: float
    tokens_per_second: float
    rollout_seconds: float
    pass_seconds: float
    step_seconds: float
    training_seconds: float
    peak_memory_gb: float | None
    planned_memory_gb: float | None = None
    short_of_memory: bool = False


def teaches(group: Group, recipe: Recipe) -> bool:
    return group.spread > recipe.groups.min_spread


def cut(completion: Completion) -> bool:
    return completion.finish == "length"


def faults(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> list[Finding]:
    """Why training could not work."""
    rest = faults_of_answers(figures, groups, recipe, task)
    return [crowded(figures, recipe), *rest] if figures.prompts.crowded else rest


def faults_of_answers(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> list[Finding]:
    """What keeps the sampled answers from teaching anything."""
    if figures.unscored == 1:
        return [
            Finding(
                f"The reward of none of the {figures.completions} completions could be told.",
                "Every reward function declined, or the grader took too long: see what it returns for the sample "
                f"above, or raise --task.seconds {2 * recipe.task.seconds:g}.",
            )
        ]
    if always_cut(figures):
        limit = recipe.rollout.max_tokens
        return [
            Finding(
                f"{figures.truncated:.0%} of the completions were cut off at {limit} tokens.",
                f"Let them finish: --rollout.max_tokens {2 * limit}. If the model never stops, its chat template or "
                f"eos token does not fit it: use the instruct version. {warm_up(recipe, task)}",
                warms=figures.formed == 0,
            )
        ]
    if figures.formed == 0:
        return [
            Finding(
                f"Not one of {figures.completions} completions has the form that the task asks for.",
                f"GRPO can only strengthen what the model already does sometimes. {warm_up(recipe, task)} Or show the "
                "form in the system prompt with one worked example, or use an instruct model.",
                warms=True,
            )
        ]
    if figures.informative == 0:
        return [tied(figures, groups, recipe, task)]
    return []


def always_cut(figures: Figures) -> bool:
    """A task may pay for unfinished answers; then being cut off is no reason to stop."""
    return figures.truncated > 0.95 and figures.solved == 0


def warm_up(recipe: Recipe, task: Task) -> str:
    """How to give this model a supervised start on this task, as a command."""
    steps = recipe.warmup.steps
    if steps:
        return (
            f"The recipe's warm-up comes next in `minigrpo run`; if these samples were taken after it, it was too "
            f"short: --warmup.steps {2 * steps}."
        )
    if task.gold is not None or recipe.warmup.data:
        return f"Warm it up on right answers first: minigrpo warmup RECIPE --warmup.steps {WARMUP_STEPS}"
    return (
        "Write some right answers down, as lines of JSON {prompt, completion}, and warm it up on them first: "
        f"minigrpo warmup RECIPE --warmup.data FILE --warmup.steps {WARMUP_STEPS}"
    )


def crowded(figures: Figures, recipe: Recipe) -> Finding:
    """Prompts so long that a completion may run beyond the longest text that the model can read."""
    context, longest = figures.prompts.context or 0, figures.prompts.longest
    room = context - longest
    cure = f"--rollout.max_tokens {room} fits them all, or shorten" if room > 0 else "Shorten or leave out"
    return Finding(
        f"{figures.prompts.crowded:.0%} of the prompts leave less than rollout.max_tokens {recipe.rollout.max_tokens} "
        f"of the model's context of {context} tokens (the longest prompt has {longest}).",
        f"Beyond its context a model babbles: {cure} the longest prompts.",
    )


def tied(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> Finding:
    """Why every group's siblings earn the same, and what separates them again."""
    what = f"In all {figures.groups} groups the siblings earned the same reward, so there is nothing to compare."
    if figures.solved == 1:
        return Finding(what, "The model already solves every prompt: choose a harder task.")
    more = 2 * recipe.rollout.completions
    if all(len({completion.text for completion in group.completions}) == 1 for group in groups):
        return Finding(what, "Siblings say the same, too: raise --rollout.temperature, or use a less certain model.")
    if at_the_top(groups, recipe, task):
        return Finding(
            what,
            f"Every completion earned {figures.reward_mean:g}, as much as the task's own right answers: choose a "
            "harder task, or let the reward tell better answers from good ones.",
        )
    if figures.solved == 0:
        return Finding(
            what,
            "The answers have the form and none is right: make the task easier, give part of the reward for part of "
            f"the way, use a stronger model, or look longer for a lucky one: --rollout.completions {more}. If the "
            f"{figures.reward_mean:g} that they earned is the most that the reward pays, choose a harder task.",
        )
    return Finding(
        what, f"Prompts are either always or never solved: mix the difficulty, or --rollout.completions {more}."
    )


def at_the_top(groups: Sequence[Group], recipe: Recipe, task: Task) -> bool:
    """Whether no completion earned less than a right answer to its prompt; False where nobody can tell."""
    if task.gold is None:
        return False
    pairs = [(group, task.grade(group.prompt, task.gold(group.prompt))) for group in groups]
    return all(min(group.rewards) >= gold.reward - recipe.groups.min_spread for group, gold in pairs)


def worries(figures: Figures, recipe: Recipe, task: Task) -> list[Finding]:
    """What will make training slow or lame, without keeping it from working."""
    found = []
    if 0 < figures.unscored < 1:
        found.append(
            Finding(
                f"The reward of {figures.unscored:.0%} of the completions could not be told.",
                "They are left out of their groups' comparisons; if the grader took too long: "
                f"--task.seconds {2 * recipe.task.seconds:g}.",
            )
        )
    if figures.short_of_memory:
        found.append(
            Finding(
                f"The whole training is planned to take {figures.planned_memory_gb:.1f} GB at its height, more than "
                "is free here.",
                "What takes it and what to turn: minigrpo plan RECIPE",
            )
        )
    if figures.truncated > 0.2 and not always_cut(figures):
        found.append(
            Finding(
                f"{figures.truncated:.0%} of the completions were cut off at {recipe.rollout.max_tokens} tokens.",
                f"They earn what an unfinished answer earns; if they were on the right way: "
                f"--rollout.max_tokens {2 * recipe.rollout.max_tokens}.",
            )
        )
    if 0 < figures.formed < LITTLE_FORM:
        found.append(
            Finding(
                f"Only {figures.formed:.0%} of the completions have the form.",
                f"The first steps would teach the form alone. {warm_up(recipe, task)} Or show one worked example in "
                "the system prompt.",
            )
        )
    return found + lame(figures, recipe)


def lame(figures: Figures, recipe: Recipe) -> list[Finding]:
    """Little to compare, or little left to learn."""
    found = []
    if 0 < figures.informative < 0.25:
        found.append(
            Finding(
                f"Only {figures.informative:.0%} of the groups teach anything.",
                f"More siblings find more differences: --rollout.completions {2 * recipe.rollout.completions}.",
            )
        )
    if 0.9 < figures.solved < 1:
        found.append(Finding(f"{figures.solved:.0%} of the completions are right already.", "Little is left to learn."))
    return found
