"""Fork a run: what if one thing had been otherwise? Counterfactual twins from one checkpoint, in RUN/forks/.

Both twins begin from the same weights, optimizer, prompts and random numbers; one of them has the change. Every draw is
named by seed, step, prompt and sibling, so until their policies differ they say the same words, and whatever differs
later comes from the change. The unchanged twin of the first draw is the run itself again, which is checked line by
line. Further draws (`times`) name other random numbers for the answers of the forked steps (`rollout.stream`); their
prompts are the same.

    forks/at50-to75                                the unchanged twin: a run, like every other folder here
    forks/at50-to75-task.weights.format-0          the changed one, with fork.json and fork.svg
    forks/at50-to75-draw1, ...-draw1               both again, with other random numbers; twin.json: one draw's answers

The run is only read. Twins are measured by the run's own grader on its unseen prompts.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigrpo.config.load import Overrides, load_recipe
from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, RecipeError, command_line
from minigrpo.evaluation.statistics import score_groups
from minigrpo.evaluation.twins import TwinComparison, TwinPair, render_twin_svg, twin_table
from minigrpo.pipeline import prepare, stages
from minigrpo.pipeline.context import OpenedRun, open_all
from minigrpo.rollouts.async_grader import Grader
from minigrpo.rollouts.groups import prompts_of, rollout
from minigrpo.runs.lock import run_lock
from minigrpo.runs.logger import read_groups, read_metrics
from minigrpo.runs.manifest import create_run, fits, flat, refuse_other_recipe, result_path, slug, stamp, timed
from minigrpo.runs.rundir import RunDir, complete_folder, digest, read_json, tidy, write_json, write_whole
from minigrpo.tasks.registry import open_task
from minigrpo.types import Group, Sampling
from minigrpo.ui.live import duration
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from torch import Tensor

    from minigrpo.training.checkpoint import Checkpoint

FIXED = (
    "seed",
    "model.",
    "lora.",
    "warmup.",
    "eval.",
    "train.full",
    "train.optimizer",
    "train.until",
    "rollout.stream",
)
"""Knobs, or beginnings of knobs, that a checkpoint or the shared random numbers depend on."""
_ROWS = 256  # answers asked for at a time when twins are measured
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class ForkPlan:
    """What a fork is going to do. `there`: twins that an earlier call has trained; `seconds`: how long the run's own
    steps say that the rest will take; None: unknown."""

    run: RunDir
    recipe: Recipe
    changed: Recipe
    change: str
    name: str
    at: int
    until: int
    draws: int
    limit: int
    there: int = 0
    seconds: float | None = None

    def folder(self, draw: int, *, changed: bool) -> RunDir:
        base = self.name if changed else f"at{self.at}-to{self.until}"
        return RunDir(forks_of(self.run).path / (base if draw == 0 else f"{base}-draw{draw}"))

    def twins(self) -> Iterator[tuple[Recipe, RunDir]]:
        """Yield the recipe and the folder of every twin, pair by pair; without a change, of the unchanged one alone."""
        for draw in range(self.draws):
            for changed in (False, True) if self.change else (False,):
                recipe = self.changed if changed else self.recipe
                about = f"{self.run.path.name} from step {self.at} on, {self.change if changed else 'unchanged'}"
                train = recipe.train.model_copy(update={"until": self.until})
                sampling = recipe.rollout.model_copy(update={"stream": recipe.rollout.stream + draw})
                yield (
                    recipe.model_copy(update={"about": about, "train": train, "rollout": sampling}),
                    self.folder(draw, changed=changed),
                )


def forks_of(run: RunDir) -> RunDir:
    """Return the folder in which a run's forks lie; it has a lock, as runs have."""
    return RunDir(run.forks)


def fork(
    run: RunDir,
    *,
    at: int,
    change: Overrides = (),
    steps: int | None = None,
    times: int = 1,
    name: str | None = None,
    limit: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train twins of the run from its checkpoint `at`, with and without the change, and show what the change did.

    `steps`: how many, by default all that are left; `times`: draws of random numbers. The same call goes on where one
    was stopped. `dry_run`: say what would be done, and how long it would take. Return the figures, which are also in
    the changed twin's fork.json. Raise RecipeError for a change that a checkpoint cannot take.
    """
    from minigrpo.training.checkpoint import find_step

    console = Screen()
    plan = plan_fork(run, at, change, steps=steps, times=times, name=name, limit=limit)
    checkpoint = find_step(run, at)
    console.show(Text(describe(plan)))
    if dry_run:
        return {"run": str(run.path), "at": at, "until": plan.until, "draws": times, "seconds": plan.seconds}
    with run_lock(forks_of(run)):
        tidy(forks_of(run))
        _train_twins(plan, checkpoint, console)
        repeats = compare_with_run(plan)
        console.show(Text(str(repeats)))
        figures: dict[str, Any] = {"run": str(run.path), "at": at, "until": plan.until, "repeats": repeats.to_dict()}
        if plan.change:
            figures |= _compare_twins(plan, figures, console)
    return figures


def plan_fork(
    run: RunDir,
    at: int,
    change: Overrides,
    *,
    steps: int | None = None,
    times: int = 1,
    name: str | None = None,
    limit: int | None = None,
) -> ForkPlan:
    """Check what is asked for. Raise RecipeError or ArtifactError where it cannot be done."""
    if not run.exists():
        raise ArtifactError(f"{run.path} is no run: it has no recipe.yaml. Name the folder of one: runs/NAME")
    recipe, changed = load_recipe(str(run.path)), load_recipe(str(run.path), change)
    refuse_other_recipe(recipe, run)
    then, now = (flat(each.model_dump(exclude={"about"})) for each in (recipe, changed))
    names = [knob for knob in now if now[knob] != then[knob]]
    for knob in names:
        if knob.startswith(FIXED):
            raise RecipeError(
                f"--set {knob}: a fork goes on from a checkpoint, whose weights, prompts and random numbers depend on "
                "it. Begin a run of its own with it: minigrpo train"
            )
    if names and recipe.rollout.ahead:
        raise RecipeError(
            "This run sampled ahead (rollout.ahead): the first groups of a twin were sampled and graded before the "
            "change. Fork a run without it"
        )
    until = at + steps if steps is not None else recipe.train.last_step
    most = min(recipe.train.steps, changed.train.steps)
    if at >= most:
        raise RecipeError(f"The run ends with step {most}, so a fork at step {at} has no step left. Fork earlier: --at")
    if not at < until <= most:
        raise RecipeError(
            f"From step {at} a fork can go on to step {most}, where the learning rate of the run ends, and "
            f"--steps {steps if steps is not None else until - at} asks for step {until}. Ask for 1 to {most - at}."
        )
    if times > 1 and not names:
        raise RecipeError(f"--times {times} compares twins, but nothing is changed. Say what: --set KNOB=VALUE")
    words = ", ".join(word for knob in names for word in _changes(knob, then[knob], now[knob]))
    stem = name or slug(f"at{at}-to{until}-{words}")[:_LONGEST_NAME]
    limit = limit or recipe.eval.limit
    return _timed_plan(ForkPlan(run, recipe, changed, words, stem, at, until, times, limit))


def _timed_plan(plan: ForkPlan) -> ForkPlan:
    """Return the plan with what is there already, and how long the rest will take."""
    twins = [result_path(twin, recipe.train).exists() for recipe, twin in plan.twins()]
    pairs = [plan.folder(draw, changed=True).path / "twin.json" for draw in range(plan.draws if plan.change else 0)]
    answers = 2 * plan.limit * sum(not pair.is_file() for pair in pairs)
    seconds = expected_seconds(plan.run, plan.recipe, twins.count(False) * (plan.until - plan.at), answers)
    return replace(plan, there=twins.count(True), seconds=seconds)


def _changes(knob: str, then: Any, now: Any) -> Iterator[str]:
    """Yield KNOB=VALUE for a knob, or for each row of a table that differs."""
    if isinstance(now, Mapping):
        for name in (*now, *(name for name in then if name not in now)):
            if now.get(name) != then.get(name):
                yield from _changes(f"{knob}.{name}", None, now.get(name))
    else:
        yield f"{knob}={now:g}" if isinstance(now, float) else f"{knob}={now}"


def expected_seconds(run: RunDir, recipe: Recipe, steps: int, answers: int) -> float | None:
    """Return how long so many steps and answers take at the run's own pace; None where its log does not say."""
    rows = [row for row in read_metrics(run) if row.get("seconds") and row.get("seconds/rollout")]
    if not rows:
        return None
    sampled = recipe.rollout.prompts * recipe.rollout.completions
    answer = median(row["seconds/rollout"] for row in rows) / sampled
    return steps * median(row["seconds"] for row in rows) + answers * answer


def describe(plan: ForkPlan) -> str:
    """Say what a fork is going to do, and how long it will take."""
    twins = f"{2 * plan.draws} twins" if plan.change else "The unchanged twin"
    asked = f", and {plan.limit} answers of each" if plan.change else ""
    there = f" Of these twins {plan.there} are there already." if plan.there else ""
    pace = "The run's log does not say how long a step takes"
    if plan.seconds is not None:
        what = "the rest" if plan.there else "that"
        pace = f"At the run's own pace {what} takes about {duration(plan.seconds)}"
    return (
        f"{twins} from step {plan.at} to {plan.until} of {plan.run.path}{asked}.{there} {pace}, besides opening the "
        f"model. Changed: {plan.change or 'nothing'}."
    )


def _train_twins(plan: ForkPlan, checkpoint: Checkpoint, console: Screen) -> None:
    """Train every twin that is not trained yet. They are opened one after the other: two may not fit side by side."""
    twins = list(plan.twins())
    left = [(recipe, twin) for recipe, twin in twins if not result_path(twin, recipe.train).exists()]
    began = time.monotonic()
    for done, (recipe, twin) in enumerate(left):
        pace = (time.monotonic() - began) / done if done else None
        rest = f", about {duration(pace * (len(left) - done))} left in all" if pace else ""
        console.show(Text(f"twin {len(twins) - len(left) + done + 1} of {len(twins)}: {twin.path}{rest}"))
        _begin_twin(plan.run, checkpoint, recipe, twin)
        with stages.begin_stage(recipe, twin, resume=True):
            opened = open_all(recipe, twin)
            if not done and plan.change:
                _refuse_other_prompts(opened, plan)
            prepare.begin_run(opened, twin)
            prepare.warm_up(opened, twin, console)
            with timed(twin, "train"):
                stages.train_opened(opened, twin)
        del opened
        gc.collect()


def _refuse_other_prompts(opened: OpenedRun, plan: ForkPlan) -> None:
    """Raise RecipeError where the change leads to other training prompts: twins would not be asked the same. Find now
    what would else end the changed twin, after the unchanged one was trained: names that the task does not know."""
    from minigrpo.training.group_factor import check_factors

    own, theirs = (prompts_of(task, "train") for task in (opened.task, open_task(plan.changed)))
    if [prompt.id for prompt in own] != [prompt.id for prompt in theirs]:
        raise RecipeError(
            f"With {plan.change} the task has other training prompts, so the twins would not be asked the same. Begin "
            "a run of its own with it: minigrpo train"
        )
    check_factors(plan.changed.groups.factor, own)


def _begin_twin(run: RunDir, checkpoint: Checkpoint, recipe: Recipe, twin: RunDir) -> None:
    """Make the twin a run that has done as many steps as the checkpoint: its log, machine, base and warm start, too."""
    if twin.exists():
        return
    with complete_folder(twin.path) as draft:
        begun = RunDir(draft)
        create_run(recipe, begun)
        for file in (run.machine, run.base):
            if file.is_file():
                shutil.copyfile(file, draft / file.name)
        for name, then in checkpoint.positions.items():
            with (run.path / name).open("rb") as source, (draft / name).open("wb") as target:
                _copy_beginning(source, target, then["bytes"])
        shutil.copytree(checkpoint.folder, begun.checkpoint(checkpoint.step))
        prepare.carry_warmup(run, begun, recipe)


def _copy_beginning(source: Any, target: Any, length: int) -> None:
    while length and (block := source.read(min(1 << 20, length))):
        target.write(block)
        length -= len(block)


@dataclass(frozen=True, slots=True)
class RunRepeated:
    """Whether the unchanged twin is the run again: the groups of its steps, and the files of the checkpoint at its end
    (None where the run has not kept that one, or has not come so far)."""

    steps: int
    first_difference: str | None
    checkpoint: bool | None

    def __str__(self) -> str:
        if self.first_difference or self.checkpoint is False:
            where = self.first_difference or "the weights of the last checkpoint"
            return (
                f"The unchanged twin differs from the run, first in {where}: another processor, thread count or "
                "library, or a reward that is not the same twice. Twins are compared with one another, so what follows "
                "holds for this machine."
            )
        ends = ", and so are weights and optimizer at the end" if self.checkpoint else ""
        if not self.steps:
            return "The run has not come so far, so the unchanged twin cannot be compared with it."
        return (
            f"The unchanged twin is the run again, in every answer, reward and advantage of {self.steps} steps{ends}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "first_difference": self.first_difference, "checkpoint": self.checkpoint}


def compare_with_run(plan: ForkPlan) -> RunRepeated:
    """Compare the unchanged twin of the first draw with the run, as far as both go."""
    from minigrpo.training.checkpoint import find_step

    twin, steps = plan.folder(0, changed=False), set[int]()
    own, again = (_rows_after(each, plan.at, plan.until) for each in (plan.run, twin))
    for then, now in zip(own, again, strict=False):
        if then != now:
            return RunRepeated(len(steps), f"prompt {then['prompt']} of step {then['step']}", None)
        steps.add(then["step"])
    try:
        ends = [find_step(each, plan.until).folder / "made.json" for each in (plan.run, twin)]
    except ArtifactError:
        return RunRepeated(len(steps), None, None)
    # state.json holds hashes of the logs, whose lines hold seconds.
    kept = [{k: v for k, v in read_json(end)["sha256"].items() if k != "state.json"} for end in ends]
    return RunRepeated(len(steps), None, kept[0] == kept[1])


def _rows_after(run: RunDir, at: int, until: int) -> Iterator[dict[str, Any]]:
    return (row for row in read_groups(run) if at < row["step"] <= until)


def _compare_twins(plan: ForkPlan, figures: Mapping[str, Any], console: Screen) -> dict[str, Any]:
    """Measure every pair, show what the change did, and leave table and plot in the changed twin's folder."""

    found = TwinComparison(plan.change, tuple(_measure_pairs(plan, console)))
    changed = plan.folder(0, changed=True)
    curves = [
        [_accuracy_curve(plan, plan.folder(draw, changed=side)) for draw in range(plan.draws)] for side in (False, True)
    ]
    result = {**found.to_dict(), "twins": str(changed.path), "plot": str(changed.path / "fork.svg")}
    write_json(changed.path / "fork.json", {**figures, **result})
    write_whole(changed.path / "fork.svg", render_twin_svg(found, *curves))
    console.show(twin_table(found))
    following = command_line("minigrpo", "evaluate", changed.path)
    console.show(Text(f"Every prompt: {changed.path / 'fork.json'}\nPlot: {changed.path / 'fork.svg'}"))
    console.show(Text(f"Each twin is a run: {following}"))
    return result


def _accuracy_curve(plan: ForkPlan, twin: RunDir) -> list[tuple[float, float]]:
    rows = (row for row in read_metrics(twin) if plan.at < row["step"] <= plan.until)
    return [(float(row["step"]), float(row["accuracy"])) for row in rows]


def _measure_pairs(plan: ForkPlan, console: Screen) -> list[TwinPair]:
    """Return the answers of every pair, from its file where that still fits; one policy takes up one twin's weights
    after the other's."""

    pairs: list[TwinPair] = []
    opened: OpenedRun | None = None
    with stages.settings_of(plan.recipe, plan.run), stage("compare", plan.draws, Screen(stderr=True)) as report:
        for draw in range(plan.draws):
            twins = [plan.folder(draw, changed=changed) for changed in (False, True)]
            results = [result_path(twin, plan.recipe.train) for twin in twins]
            made = stamp("fork", plan.recipe, results[1])
            made["from"] |= {"unchanged": digest(results[0]), "limit": plan.limit}
            file = twins[1].path / "twin.json"
            if not fits(file, made):
                opened = opened or open_all(plan.recipe, plan.run)
                write_json(file, _measure(opened, twins, plan, draw).to_dict() | {"made": made})
            pairs.append(TwinPair.from_dict(read_json(file)))
            report(draw + 1, plan.draws)
    return pairs


def _measure(opened: OpenedRun, twins: Sequence[RunDir], plan: ForkPlan, draw: int) -> TwinPair:
    """Ask both twins the run's unseen prompts with the same random numbers; score the unchanged one's answers twice."""
    import torch

    from minigrpo.algorithms.objective import kl_k3
    from minigrpo.utils.rng import name_key

    config = opened.recipe.rollout
    sampling = Sampling(config.temperature, config.max_tokens, name_key(opened.recipe.seed, "fork", draw))
    asked: list[list[Group]] = []
    scored: list[Tensor] = []
    for twin in twins:
        stages.restore_result(opened, result_path(twin, opened.recipe.train))
        asked.append(_ask(opened, plan, sampling))
        scored.append(torch.cat([*_logprobs(opened, plan, asked[0])]))
    kl = float(kl_k3(*(each.double() for each in scored)).mean())
    return TwinPair(score_groups(asked[0]), score_groups(asked[1]), kl)


def _ask(opened: OpenedRun, plan: ForkPlan, sampling: Sampling) -> list[Group]:

    prompts = prompts_of(opened.task, "test", plan.limit)
    groups: list[Group] = []
    with Grader.of(opened.task, opened.recipe.task, Screen(stderr=True).print) as grader:
        for start in range(0, len(prompts), _ROWS):
            groups += rollout(
                opened.engine,
                opened.task,
                prompts[start : start + _ROWS],
                n=1,
                sampling=sampling,
                tokenizer=opened.policy.tokenizer,
                grader=grader,
            )
    return groups


def _logprobs(opened: OpenedRun, plan: ForkPlan, groups: Sequence[Group]) -> Iterator[Tensor]:
    """Yield the policy's log-probabilities of all tokens of these answers, pass by pass."""
    from minigrpo.algorithms.objective import OBJECTIVES
    from minigrpo.algorithms.packing import pack
    from minigrpo.training.checkpoint import read_machine

    machine = read_machine(plan.run)
    assert machine is not None, "a run that has a checkpoint has a machine"
    # As if a KL term pulled on every token: groups of one, which tie, would be left out.
    batch = replace(pack(groups, OBJECTIVES["grpo"], opened.recipe.rollout.max_tokens), needs_all=True)
    for part in batch.split(machine.tokens_per_pass):
        yield opened.policy.present(part).logprobs_N
