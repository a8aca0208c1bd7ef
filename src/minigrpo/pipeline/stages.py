"""Run the stages in order: preflight, warm-up, train, evaluate, and those of pipeline/deliver.py.

Each stage leaves an artefact in the run's folder, stamped with what it was made from. A resumed run skips the artefacts
that exist and still fit, and makes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, command_line
from minigrpo.pipeline import deliver, prepare, tables, team
from minigrpo.pipeline.context import OpenedRun, allocator_for, open_all
from minigrpo.pipeline.evaluate import before_and_after, evaluate
from minigrpo.runs.chain import append_link
from minigrpo.runs.lock import run_lock
from minigrpo.runs.logger import RunLogger
from minigrpo.runs.manifest import check_folder, flat, hash_files, result_path, seconds_of, stamp, timed
from minigrpo.runs.rundir import RunDir, complete_folder, digest, read_json, staying, tidy, write_json
from minigrpo.runs.trackers.tracking import Tracking, require_trackers
from minigrpo.ui.screen import Screen
from minigrpo.utils.paths import user_path

if TYPE_CHECKING:
    from minigrpo.distributed.join import Team
    from minigrpo.evaluation.evaluate import Comparison
    from minigrpo.training.preflight import PreflightResult

__all__ = ["evaluate", "plan", "preflight", "quickstart", "run_all", "train", "warmup"]


def preflight(recipe: Recipe, run: RunDir | None = None, *, seconds: float | None = None) -> PreflightResult:
    """Sample the task, print what was seen and the verdict, and save it in the run's folder, if one is given.

    `seconds`: begin no further rollout after so many; None: preflight's own default. Ctrl-C prints what has been
    sampled, saves nothing and raises KeyboardInterrupt.
    """
    with run_lock(run) if run else nullcontext(), settings_of(recipe, run):
        return prepare.run_preflight(open_all(recipe, run), run, Screen(), seconds=seconds)


def plan(recipe: Recipe, gpu_memory: float | None = None) -> Any:
    """Print the memory plan of a run, on a GPU of `gpu_memory` GB or on this machine; no weights are loaded."""
    from minigrpo.training.memory.estimate import forecast

    memory_plan = forecast(recipe, gpu_memory)
    Screen().show(tables.plan_table(memory_plan))
    return memory_plan


def warmup(recipe: Recipe, run: RunDir, *, resume: bool = False) -> dict[str, Any]:
    """Train the model on right answers, and leave its adapter in RUN/warmup, for `train` to begin with.

    Return how many answers were taught, and what was measured before and after.
    """
    from minigrpo.training.sft_warmup import require_warmup_steps

    console = Screen()
    require_warmup_steps(recipe.warmup)
    with begin_stage(recipe, run, resume):
        if prepare.is_warm(recipe, run):
            console.show(Text(f"{run.warmup} is there already."))
        else:
            opened = open_all(recipe, run)
            prepare.check_warmup_answers(opened)
            prepare.begin_run(opened, run)
            prepare.warm_up(opened, run, console)
        following = command_line("minigrpo", "train", run.path, "--resume")
        console.show(Text(f"Warmed up: {run.warmup}\nNext: {following}"))
        figures: dict[str, Any] = read_json(run.warmup / "made.json")
    return {name: value for name, value in figures.items() if name != "made"} | {"run": str(run.path)}


def train(recipe: Recipe, run: RunDir, *, resume: bool = False, show_samples: bool = False) -> None:
    """Train, and leave the adapter (or the model) in the run's folder.

    Where torch's launcher started several processes (docs/scale.md), this one does its part of the same training.
    """
    with team.joined(recipe) as ranks:
        if ranks is None or ranks.leads:
            resume = resume or (ranks is not None and ranks.place.attempt > 0)
            _train(recipe, run, ranks, resume=resume, show_samples=show_samples)
        else:
            team.follow(recipe, run, ranks)


def train_on_ranks(arguments: Sequence[str], ranks: int, restarts: int, *, resume: bool = False) -> int:
    """Start so many processes with these arguments, again where one is lost. Return the exit code."""
    from minigrpo.distributed.launch import launch_ranks

    def attempt(number: int) -> list[str]:
        return [*arguments, *(["--resume"] if resume or number else [])]

    return launch_ranks(attempt, ranks, restarts, lambda sentence: Screen(stderr=True).show(Text(sentence)))


def _train(recipe: Recipe, run: RunDir, ranks: Team | None, *, resume: bool, show_samples: bool) -> None:
    console = Screen()
    with begin_stage(recipe, run, resume, ranks.size if ranks else 1):
        if result_path(run, recipe.train).exists():
            team.dismiss(ranks)
            console.show(Text(f"{result_path(run, recipe.train)} is there already: nothing left to train."))
            return
        opened = open_all(recipe, run)
        prepare.check_warmup_answers(opened)
        prepare.begin_run(opened, run)
        prepare.warm_up(opened, run, console)
        with timed(run, "train"):
            train_opened(opened, run, show_samples, ranks)
    following = command_line("minigrpo", "evaluate", run.path)
    console.show(Text(f"Trained: {result_path(run, recipe.train)}\nNext: {following}"))


@contextmanager
def begin_stage(recipe: Recipe, run: RunDir, resume: bool, ranks: int = 1) -> Iterator[None]:
    """Hold the run's folder for this process alone, check it, and remove what killed processes left.

    Inside the block the process has the run's settings; afterwards it has its own again. `ranks`: that train the run.
    """
    require_trackers(recipe.track)
    if ranks == 1:
        team.refuse_ranks()
    with run_lock(run), staying(user_path(recipe.model.path)):
        check_folder(recipe, run, resume)
        tidy(run)
        with settings_of(recipe, run, ranks):
            yield


@contextmanager
def settings_of(recipe: Recipe, run: RunDir | None, ranks: int = 1) -> Iterator[None]:
    """Set the process for this run, with as many threads as when the run began, until the block ends.

    Where another number of ranks began it, the recipe's threads count: cores are shared out otherwise.
    """
    with allocator_for(recipe):
        from minigrpo.training.checkpoint import read_machine
        from minigrpo.utils.process import process_settings

        began = read_machine(run) if run else None
        alike = began is not None and began.ranks == ranks
        with process_settings(began.threads if began and alike else recipe.train.threads):
            yield


def run_all(recipe: Recipe, run: RunDir, *, resume: bool = False, show_samples: bool = False) -> dict[str, Any]:
    """Preflight, train, evaluate before and after, check, merge, export, and publish where the recipe says so.

    Return the figures, which are also in evals/comparison.json.
    """
    console = Screen()
    with begin_stage(recipe, run, resume):
        figures, _, delivered = _run_all(recipe, run, console, show_samples)
        deliver.finish_delivery(recipe.publish, run, delivered, console)
    return figures


def quickstart(recipe: Recipe, run: RunDir, *, resume: bool = False, show_samples: bool = False) -> dict[str, Any]:
    """Do `run_all`, then show answers before and after, and what to try next."""
    from minigrpo.evaluation.evaluate import pick_example_pairs

    console = Screen()
    with begin_stage(recipe, run, resume):
        figures, comparisons, delivered = _run_all(recipe, run, console, show_samples)
        deliver.finish_delivery(recipe.publish, run, delivered, console)
    for before, after in pick_example_pairs(comparisons[0]):
        console.print(tables.answer_panel(before, "before"))
        console.print(tables.answer_panel(after, "after"))
    console.show(
        Text(
            "What next:\n"
            "  minigrpo recipes quickstart > mine.yaml  # a recipe of your own to change\n"
            "  minigrpo run mine.yaml                   # the same stages with it\n"
            "  minigrpo tasks                           # what else can be learned\n"
            f"All of this stands in {run.summary}"
        )
    )
    return figures


def _run_all(
    recipe: Recipe, run: RunDir, console: Screen, show_samples: bool
) -> tuple[dict[str, Any], list[Comparison], deliver.Delivered]:
    road = "preflight, train, evaluate, check, merge" + (", export" if recipe.export.formats else "")
    console.show(Text(f"run {run.path}: {road}", style="bold"))
    deliver.check_delivery(recipe, console)
    comparisons = _train_and_evaluate(recipe, run, console, show_samples)
    # Only now, when no policy is in memory any more: each of these opens models of its own, in float32.
    delivered = deliver.deliver(recipe.export, run, console)
    figures = _save_figures(run, comparisons, delivered)
    deliver.print_summary(run, comparisons, delivered, console)
    return figures, comparisons, delivered


def _train_and_evaluate(recipe: Recipe, run: RunDir, console: Screen, show_samples: bool) -> list[Comparison]:
    with timed(run, "model"):
        opened = open_all(recipe, run)
        prepare.check_warmup_answers(opened)
        prepare.begin_run(opened, run)
    if result_path(run, recipe.train).exists():
        restore_result(opened, result_path(run, recipe.train))
        console.show(Text(f"{result_path(run, recipe.train)} is there already."))
    else:
        prepare.prepare(opened, run, console)
        with timed(run, "train"):
            train_opened(opened, run, show_samples)
    with timed(run, "evaluate"):
        return before_and_after(opened, run, console)


def restore_result(opened: OpenedRun, folder: Path) -> None:
    """Take up the weights of a result, in the policy and in the engine."""
    try:
        opened.policy.restore(folder)
    except ArtifactError as fault:
        raise ArtifactError(
            f"{fault} Or remove {folder} and give the same command with --resume: it is made again from the last "
            "checkpoint."
        ) from fault
    opened.engine.update(opened.policy)


def train_opened(opened: OpenedRun, run: RunDir, show_samples: bool = False, ranks: Team | None = None) -> None:
    """Train what was opened, and leave the result in the run's folder. Raise KeyboardInterrupt where the user stopped
    it, after the step was saved.
    """
    from minigrpo.training import checkpoint
    from minigrpo.training.grpo import grpo

    recipe = opened.recipe
    knobs = flat(recipe.model_dump(mode="json", exclude={"about"}))
    tracking = Tracking(run, recipe.track, knobs)
    logger = RunLogger(run, recipe.train.last_step, show_samples=show_samples, tracking=tracking)
    grpo(recipe, opened.task, opened.policy, opened.engine, logger, ranks=team.lead(opened, ranks))
    last, _ = checkpoint.find_latest(run)
    done = last.step if last else 0
    if done < recipe.train.last_step:
        logger.say(f"Stopped after step {done} of {recipe.train.last_step}. The same command with --resume goes on.")
        raise KeyboardInterrupt  # the signal had waited until the step was saved
    with complete_folder(result_path(run, recipe.train)) as draft:
        opened.policy.save(draft)
        write_json(draft / "made.json", stamp("train", recipe))
        name = result_path(run, recipe.train).name
        made = {"step": done, "name": name, "digest": digest(draft), "files": hash_files(draft)}
        append_link(run, "result", made)


def _save_figures(run: RunDir, comparisons: list[Comparison], delivered: deliver.Delivered) -> dict[str, Any]:
    figures = {
        "run": str(run.path),
        "comparisons": {comparison.after.decoding: comparison.summary() for comparison in comparisons},
        "delivered": delivered.to_dict(),
        "seconds": seconds_of(run),
    }
    write_json(run.evals / "comparison.json", figures)
    return figures
