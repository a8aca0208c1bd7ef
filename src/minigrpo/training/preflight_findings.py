"""What preflight found: the figures, and sentences that say what they mean and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minigrpo.config.schema import GroupsConfig, Recipe, RolloutConfig, WarmupConfig
from minigrpo.rollouts.grading import gold_answer, judge
from minigrpo.types import Completion, Group, Task
from minigrpo.utils.rates import Rate, wilson_interval

SMALLEST_SHARE, MAX_ERROR = 0.1, 0.02
"""The smallest share of groups that differ with which a training is worth its while, and how often preflight may call
one hopeless that has it."""
HOPELESS_GROUPS = math.ceil(math.log(MAX_ERROR) / math.log(1 - SMALLEST_SHARE))
"""Groups of which none differs before preflight calls the training hopeless: 0.9 to the power of 38 is below 0.02."""
FORMLESS_COMPLETIONS = math.ceil(math.log(0.05) / math.log(1 - SMALLEST_SHARE))
"""Completions of which none has the form before preflight says so: of 29, in 95 % of cases, fewer than a tenth can."""

WARMUP_STEPS = 60
"""Proposed where a recipe has no warm-up: enough to learn a form, too few to learn many answers by heart."""

LITTLE_FORM = 0.1


OFTEN_CUT = 0.2
"""The share of completions that are cut off from which preflight speaks of it."""


@dataclass(frozen=True, slots=True)
class PreflightFinding:
    """What was seen, and what to turn. `warms`: a warm start mends it."""

    what: str
    change: str
    warms: bool = False

    def __str__(self) -> str:
        return f"{self.what} {self.change}"


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Lengths of the training prompts in tokens. `crowded`: the share that leaves less than rollout.max_tokens of the
    context.

    `context`: the model's longest text, None where its configuration does not tell.
    """

    longest: int
    context: int | None
    crowded: float


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares from 0 to 1, times in seconds; None where it could not be measured.

    `decided`: enough was sampled to tell whether training could work; else time was up, or the user stopped.

    Rewards are those of the completions whose reward could be told.
    `step_seconds` is what one training step will take: a rollout, and a training pass over the groups that teach.
    `pass_seconds` is that pass if all groups teach. `planned_memory_gb`: what training will take at its height.
    `shortest_gold`, `longest_gold`: tokens of the task's own right answers to these prompts, where it has them.
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
    tokens_per_second: float | None
    rollout_seconds: float | None
    pass_seconds: float | None
    step_seconds: float | None
    training_seconds: float | None
    peak_memory_gb: float | None
    planned_memory_gb: float | None = None
    short_of_memory: bool = False
    decided: bool = True
    shortest_gold: int | None = None
    longest_gold: int | None = None

    @property
    def informative_rate(self) -> Rate:
        return wilson_interval(self.informative, self.groups)


def is_informative(group: Group, config: GroupsConfig) -> bool:
    return group.spread > config.min_spread


def is_truncated(completion: Completion) -> bool:
    return completion.finish == "length"


def is_decided(groups: Sequence[Group], config: GroupsConfig) -> bool:
    """Return whether these groups suffice to tell that training could work, or that it could not.

    One group that differs shows that it could. That none would is only said after HOPELESS_GROUPS, or where none of
    FORMLESS_COMPLETIONS has the form or could be graded: then something else has to be mended first in any case.
    """
    if any(is_informative(group, config) for group in groups):
        return True
    grades = [grade for group in groups for grade in group.grades]
    mendable = not any(grade.formed for grade in grades) or not any(grade.scored for grade in grades)
    if mendable and len(grades) >= FORMLESS_COMPLETIONS:
        return True
    return len(groups) >= HOPELESS_GROUPS


def find_faults(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> list[PreflightFinding]:
    """Return the reasons why training could not work."""
    rest = find_answer_faults(figures, groups, recipe, task) if figures.decided else []
    return [explain_long_prompts(figures, recipe.rollout.max_tokens), *rest] if figures.prompts.crowded else rest


def find_answer_faults(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> list[PreflightFinding]:
    """Return why the sampled answers teach nothing."""
    if figures.unscored == 1:
        return [
            PreflightFinding(
                f"The reward of none of the {figures.completions} completions could be told.",
                "Every reward function declined, or the grader took too long: see what it returns for the sample "
                f"above, or raise --task.seconds {2 * recipe.task.seconds:g}.",
            )
        ]
    if always_cut(figures):
        limit = recipe.rollout.max_tokens
        return [
            PreflightFinding(
                f"{figures.truncated:.0%} of the completions were cut off at {limit} tokens.",
                f"Let them finish: {advise_limit(figures, limit)} If the model never stops, its chat template or "
                f"eos token does not fit it: use the instruct version. {advise_warmup(recipe.warmup, task)}",
                warms=figures.formed == 0,
            )
        ]
    limit = recipe.rollout.max_tokens
    if gold_is_cut(figures, limit):
        return [
            PreflightFinding(
                f"{figures.truncated:.0%} of the completions were cut off at {limit} tokens and none is right: even "
                f"the shortest right answer that the task gives has {figures.shortest_gold}.",
                f"Let them finish: {advise_limit(figures, limit)}",
            )
        ]
    if figures.formed == 0:
        return [
            PreflightFinding(
                f"Not one of {figures.completions} completions has the form that the task asks for.",
                f"GRPO can only strengthen what the model already does sometimes. {advise_warmup(recipe.warmup, task)} "
                "Or show the form in the system prompt with one worked example, or use an instruct model.",
                warms=True,
            )
        ]
    if figures.informative == 0:
        return [explain_ties(figures, groups, recipe, task)]
    return []


def always_cut(figures: Figures) -> bool:
    """Return whether nearly all completions are cut off and none solves: a task may pay for unfinished answers.

    Then being cut off is no reason to stop.
    """
    return figures.truncated > 0.95 and figures.solved == 0


def gold_is_cut(figures: Figures, limit: int) -> bool:
    """Return whether many completions are cut off, none is right, and no right answer of the task fits the limit."""
    return figures.truncated > OFTEN_CUT and figures.solved == 0 and (figures.shortest_gold or 0) > limit


def advise_limit(figures: Figures, limit: int) -> str:
    """Name a limit twice as high, or one with room for twice the task's longest right answer where that is more."""
    return f"--rollout.max_tokens {2 * max(limit, figures.longest_gold or 0)}."


def advise_warmup(config: WarmupConfig, task: Task) -> str:
    """Return advice with the command for a supervised warm-up of this model on this task."""
    if config.steps:
        return (
            f"The recipe's warm-up comes next in `minigrpo run`; if these samples were taken after it, it was too "
            f"short: --warmup.steps {2 * config.steps}."
        )
    if task.gold is not None or config.data:
        return f"Warm it up on right answers first: minigrpo warmup RECIPE --warmup.steps {WARMUP_STEPS}"
    return (
        "Write some right answers down, as lines of JSON {prompt, completion}, and warm it up on them first: "
        f"minigrpo warmup RECIPE --warmup.data FILE --warmup.steps {WARMUP_STEPS}"
    )


def explain_long_prompts(figures: Figures, max_tokens: int) -> PreflightFinding:
    """Return the finding that a completion may run beyond the longest text that the model can read."""
    context, longest = figures.prompts.context or 0, figures.prompts.longest
    room = context - longest
    cure = f"--rollout.max_tokens {room} fits them all, or shorten" if room > 0 else "Shorten or leave out"
    return PreflightFinding(
        f"{figures.prompts.crowded:.0%} of the prompts leave less than rollout.max_tokens {max_tokens} "
        f"of the model's context of {context} tokens (the longest prompt has {longest}).",
        f"Beyond its context a model babbles: {cure} the longest prompts.",
    )


def explain_ties(figures: Figures, groups: Sequence[Group], recipe: Recipe, task: Task) -> PreflightFinding:
    """Return the finding that every group's siblings earn the same, with what makes them differ."""
    what = f"In all {figures.groups} groups the siblings earned the same reward, so there is nothing to compare."
    if figures.solved == 1:
        return PreflightFinding(what, "The model already solves every prompt: choose a harder task.")
    more = 2 * recipe.rollout.completions
    if all(len({completion.text for completion in group.completions}) == 1 for group in groups):
        return PreflightFinding(
            what, "Siblings say the same, too: raise --rollout.temperature, or use a less certain model."
        )
    if earn_like_gold(groups, task, recipe.groups):
        return PreflightFinding(
            what,
            f"Every completion earned {figures.reward_mean:g}, as much as the task's own right answers: choose a "
            "harder task, or let the reward tell better answers from good ones.",
        )
    begun = next((one.opening for group in groups for one in group.completions if one.opening), "")
    if figures.solved == 0 and begun:
        return PreflightFinding(
            what,
            f"None is right. The prompt itself begins each answer, with {begun!r}: functions that take `completions` "
            "are passed only what follows, as in TRL, and must not ask for that beginning. If they do not, make the "
            f"task easier, or look longer for a lucky answer: --rollout.completions {more}.",
        )
    if figures.solved == 0:
        return PreflightFinding(
            what,
            "The answers have the form and none is right: make the task easier, give part of the reward for part of "
            f"the way, use a stronger model, or look longer for a lucky one: --rollout.completions {more}. If the "
            f"{figures.reward_mean:g} that they earned is the most that the reward pays, choose a harder task.",
        )
    return PreflightFinding(
        what, f"Prompts are either always or never solved: mix the difficulty, or --rollout.completions {more}."
    )


def earn_like_gold(groups: Sequence[Group], task: Task, config: GroupsConfig) -> bool:
    """Return whether no completion earned less than a right answer to its prompt; False where nobody can tell."""
    if task.gold is None:
        return False
    pairs = [(group, judge(task, group.prompt, gold_answer(task, group.prompt))) for group in groups]
    return all(min(group.rewards) >= gold.reward - config.min_spread for group, gold in pairs)


def explain_doubt(figures: Figures) -> PreflightFinding:
    """Return the warning that too little was sampled to tell whether training could work."""
    formed = "; none of their completions has the form" if figures.formed == 0 else ""
    return PreflightFinding(
        f"In none of the {figures.groups} groups sampled did the siblings earn different rewards{formed}. That is too "
        f"few to call it hopeless: up to {figures.informative_rate.high:.0%} of the groups may differ.",
        f"Sample longer, until {HOPELESS_GROUPS} groups decide it: minigrpo preflight RECIPE --seconds SECONDS",
    )


def find_warnings(figures: Figures, recipe: Recipe, task: Task) -> list[PreflightFinding]:
    """Return what makes training slow or weak without keeping it from working."""
    warnings = [] if figures.decided else [explain_doubt(figures)]
    if 0 < figures.unscored < 1:
        warnings.append(
            PreflightFinding(
                f"The reward of {figures.unscored:.0%} of the completions could not be told.",
                "They are left out of their groups' comparisons; if the grader took too long: "
                f"--task.seconds {2 * recipe.task.seconds:g}.",
            )
        )
    if figures.short_of_memory:
        warnings.append(
            PreflightFinding(
                f"The whole training is planned to take {figures.planned_memory_gb:.1f} GB at its height, more than "
                "is free here.",
                "What takes it and what to turn: minigrpo plan RECIPE",
            )
        )
    cut_is_told = always_cut(figures) or gold_is_cut(figures, recipe.rollout.max_tokens)
    if figures.truncated > OFTEN_CUT and not cut_is_told:
        warnings.append(
            PreflightFinding(
                f"{figures.truncated:.0%} of the completions were cut off at {recipe.rollout.max_tokens} tokens.",
                f"They earn what an unfinished answer earns; if they were on the right way: "
                f"{advise_limit(figures, recipe.rollout.max_tokens)}",
            )
        )
    if 0 < figures.formed < LITTLE_FORM:
        warnings.append(
            PreflightFinding(
                f"Only {figures.formed:.0%} of the completions have the form.",
                f"The first steps would teach the form alone. {advise_warmup(recipe.warmup, task)} Or show one "
                "worked example in the system prompt.",
            )
        )
    return warnings + find_slow_learning(figures, recipe.rollout)


def find_slow_learning(figures: Figures, config: RolloutConfig) -> list[PreflightFinding]:
    """Return warnings that few groups differ, or that little is left to learn."""
    warnings = []
    if 0 < figures.informative < 0.25:
        warnings.append(
            PreflightFinding(
                f"Only {figures.informative:.0%} of the groups teach anything.",
                f"More siblings find more differences: --rollout.completions {2 * config.completions}.",
            )
        )
    if 0.9 < figures.solved < 1:
        warnings.append(
            PreflightFinding(f"{figures.solved:.0%} of the completions are right already.", "Little is left to learn.")
        )
    return warnings
