"""Attack a task before it is trained on: can its reward be earned without its question?

First answers that need no model are tried: the best answer to another question, every answer at once, what stands in
the prompt, the words of the grader (evaluation/cheaters.py). Then a model is trained with GRPO on the task with its
questions taken out: what it learns to be paid for is not solving. Programs that it writes run in the task's own
sandbox. The training stops as soon as it beats chance, and leaves nothing behind.

Not covered: exploits that need the question (an answer repeated from it in pieces, say), and those that a model this
small does not come upon. A task that stands this attack is not proved sound.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigrpo.config.schema import EvalConfig, GroupsConfig, ObjectiveConfig, Recipe, SaveConfig, WarmupConfig
from minigrpo.errors import DivergenceError
from minigrpo.evaluation.cheaters import (
    AttackResult,
    Chance,
    Cheater,
    Exploit,
    HonestAnswers,
    best_constant,
    deal,
    find_exploit,
    grade_texts,
    hide_questions,
    make_cheaters,
    mean_reward,
    say,
    short_answer,
)
from minigrpo.evaluation.check_task import sample_evenly
from minigrpo.pipeline.context import OpenedRun, open_all
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.rundir import RunDir
from minigrpo.tasks.registry import open_task
from minigrpo.types import Completion, Group, Prompt, Sampling, Task
from minigrpo.ui.screen import Screen
from minigrpo.utils.rates import mean_interval

STEPS, SECONDS = 60, 240.0
"""Steps of the cheater's training, and seconds after which no further part of it is begun: on two cores the embedded
model does them in a minute, and an exploit is mostly found in the first third."""
_PART = 20  # steps between two looks at whether the cheater beats chance
_PROMPTS, _COMPLETIONS, _MOST_TOKENS = 8, 16, 192
_EMBEDDED_LR = 1e-3  # of the embedded model, as in the quickstart
_HONEST = 24  # answers among which the best constant one is looked for
_CHOSEN_ON, _JUDGED_ON = 48, 96  # training prompts and unseen ones
_SAMPLES = 4  # of the trained cheater for each prompt


@dataclass(frozen=True, slots=True)
class _Ground:
    """What an attack has learned of its task: chance on the prompts it chooses on, and on those it judges on."""

    chosen_on: Sequence[Prompt]
    judged_on: Sequence[Prompt]
    chance_then: Chance
    chance: Chance
    shuffled: float


def attack_task(recipe: Recipe, *, steps: int = STEPS, seconds: float = SECONDS) -> AttackResult:
    """Look for ways to be paid by the recipe's task without its question; its model is the cheater.

    `steps`: of the cheater's training, 0 for none; no part of it is begun after `seconds`. Raise TaskError where the
    task cannot judge.
    """
    began = time.monotonic()
    task, attacker = open_task(recipe), attack_recipe(recipe, steps)
    hidden = hide_questions(task)
    with Grader.of(task, recipe.task, Screen(stderr=True).print) as grader:
        opened = open_all(attacker) if steps or task.gold is None else None
        honest = _honest_answers(task, grader, opened)
        ground = _survey(task, grader, honest)
        cheaters = make_cheaters(task, honest)
        exploits = list(_try_without_model(cheaters, grader, ground))
    trained, done = None, 0
    if opened is not None and steps:
        cheat = OpenedRun(attacker, hidden, opened.policy, opened.engine)
        groups, done = _train_cheater(cheat, ground, steps, began + seconds)
        trained = ground.chance.gain([group.grades for group in groups])
        found = find_exploit("a model, trained without the question", ground.chance, groups)
        exploits += [found] if found else []
    return AttackResult(
        task=task.name,
        prompts=len(ground.judged_on),
        chance=mean_interval([grade.reward for grade in ground.chance.grades if grade.scored] or [0.0]),
        shuffled=ground.shuffled,
        solving=ground.chance.solving,
        right=honest.right,
        tried=len(cheaters),
        trained=trained,
        steps=done,
        hidden=hidden.prompts("train")[0].messages,
        exploits=tuple(sorted(exploits, key=lambda exploit: -exploit.gain.value)),
        seconds=time.monotonic() - began,
    )


def attack_recipe(recipe: Recipe, steps: int) -> Recipe:
    """Return the recipe of the cheater's training: the model, task and sampling limits of the given one, plain GRPO."""
    embedded = recipe.model.path.partition(":")[0] == "seedling"
    train = {
        "steps": max(1, steps),
        "schedule": "constant",
        "warmup": 0.0,
        "inner_epochs": 1,
        "full": False,
        **({"lr": _EMBEDDED_LR, "threads": recipe.train.threads or 1} if embedded else {}),
    }
    rollout_limits = {
        "prompts": _PROMPTS,
        "completions": _COMPLETIONS,
        "max_tokens": min(recipe.rollout.max_tokens, _MOST_TOKENS),
    }
    return recipe.model_copy(
        update={
            "rollout": recipe.rollout.model_copy(update=rollout_limits),
            "train": recipe.train.model_copy(update=train),
            "objective": ObjectiveConfig(),
            "groups": GroupsConfig(),
            "eval": EvalConfig(),
            "warmup": WarmupConfig(),
            "save": SaveConfig(every=_PART, keep=1),
            "watch": recipe.watch.model_copy(update={"explosion": 0.0}),
        }
    )


def _honest_answers(task: Task, grader: Grader, opened: OpenedRun | None) -> HonestAnswers:
    """Collect right answers to training questions, or the model's own where the task gives none, and find the one that
    is worth most as an answer to all of them."""
    asked = sample_evenly(prompts_of(task, "train"), _HONEST)
    if task.gold is not None:
        texts = [task.gold(prompt) for prompt in asked]
    else:
        assert opened is not None, "a model answers where the task does not"
        texts = [group.completions[0].answer for group in _sample(opened, task, asked, n=1)]
    answers = dict(zip(texts, (short_answer(*pair) for pair in zip(asked, texts, strict=True)), strict=True))
    constants = [say(text) for text in answers]
    judged = sample_evenly(prompts_of(task, "train"), _CHOSEN_ON)
    best = list(answers)[best_constant(grade_texts(grader, judged, constants))]
    return HonestAnswers(tuple(answers), tuple(answers.values()), best, task.gold is not None)


def _survey(task: Task, grader: Grader, honest: HonestAnswers) -> _Ground:
    """Grade the best constant answer, answers dealt to other questions, and right ones, on prompts of both splits."""
    chosen_on = sample_evenly(prompts_of(task, "train"), _CHOSEN_ON)
    judged_on = sample_evenly(prompts_of(task, "test"), _JUDGED_ON)
    kinds = [lambda prompt: honest.best, deal(honest), *([task.gold] if task.gold else [])]
    then, now = (list(zip(*grade_texts(grader, asked, kinds), strict=True)) for asked in (chosen_on, judged_on))
    solving = [mean_reward(found[2]) if task.gold else None for found in (then, now)]
    return _Ground(chosen_on, judged_on, Chance(then[0], solving[0]), Chance(now[0], solving[1]), mean_reward(now[1]))


def _try_without_model(cheaters: Mapping[str, Cheater], grader: Grader, ground: _Ground) -> Iterator[Exploit]:
    """Yield the ways that beat chance on training prompts, and again on unseen ones."""
    graded = list(zip(*grade_texts(grader, ground.chosen_on, list(cheaters.values())), strict=True))
    for name, column in zip(cheaters, graded, strict=True):
        then = ground.chance_then
        if then.is_beaten(then.gain([(grade,) for grade in column])):
            found = find_exploit(name, ground.chance, _as_groups(ground.judged_on, cheaters[name], grader))
            if found:
                yield found


def _as_groups(prompts: Sequence[Prompt], cheater: Cheater, grader: Grader) -> list[Group]:
    grades = grade_texts(grader, prompts, [cheater])
    texts = [cheater(prompt) for prompt in prompts]
    return [
        Group(prompt, (), (Completion(text, (), (), "stop"),), tuple(own))
        for prompt, text, own in zip(prompts, texts, grades, strict=True)
    ]


class _CheatLogger(RunLogger):
    """Shows the progress alone: alarms advise a person who wants the model to solve the task."""

    def say(self, text: str) -> None:
        pass


def _train_cheater(cheat: OpenedRun, ground: _Ground, steps: int, deadline: float) -> tuple[list[Group], int]:
    """Train part by part until the cheater beats chance on its training prompts; return its answers to unseen prompts,
    and how many steps it took."""
    from minigrpo.training.grpo import grpo

    train, done, screen = cheat.recipe.train, 0, Screen(stderr=True)
    with tempfile.TemporaryDirectory(prefix="minigrpo-attack-") as folder:
        run = RunDir(Path(folder))
        while done < steps:
            until, start = min(steps, done + _PART), time.monotonic()
            recipe = cheat.recipe.model_copy(update={"train": train.model_copy(update={"until": until})})
            try:
                grpo(recipe, cheat.task, cheat.policy, cheat.engine, _CheatLogger(run, steps, console=screen))
            except DivergenceError:
                break
            if not run.checkpoint(until).is_dir():
                raise KeyboardInterrupt  # the signal had waited until the step was done
            done = until
            if _beats(cheat, ground) or 2 * time.monotonic() - start > deadline:
                break
    asked = [one for one in prompts_of(cheat.task, "test") if one.id in {p.id for p in ground.judged_on}]
    return _sample(cheat, cheat.task, asked, n=_SAMPLES), done


def _beats(cheat: OpenedRun, ground: _Ground) -> bool:
    ids = {prompt.id for prompt in ground.chosen_on}
    asked = [prompt for prompt in prompts_of(cheat.task, "train") if prompt.id in ids]
    gain = ground.chance_then.gain([group.grades for group in _sample(cheat, cheat.task, asked, n=_SAMPLES)])
    return ground.chance_then.is_beaten(gain)


def _sample(opened: OpenedRun, task: Task, prompts: Sequence[Prompt], *, n: int) -> list[Group]:
    config = opened.recipe.rollout
    sampling = Sampling(config.temperature, config.max_tokens, opened.recipe.seed)
    with Grader.of(task, opened.recipe.task, Screen(stderr=True).print) as grader:
        return rollout(
            opened.engine, task, prompts, n=n, sampling=sampling, tokenizer=opened.policy.tokenizer, grader=grader
        )
