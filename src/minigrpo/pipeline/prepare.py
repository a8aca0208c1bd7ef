"""Prepare the first step of GRPO: preflight and the warm-up, in the order that the model needs.

Preflight judges the model that GRPO would begin with. Where its only fault is that no answer has the form, and the
recipe has a warm-up, the warm-up comes first, and preflight judges again.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigrpo.config.schema import Recipe
from minigrpo.errors import ArtifactError, MinigrpoError, command_line
from minigrpo.pipeline import tables
from minigrpo.pipeline.context import OpenedRun
from minigrpo.runs.manifest import create_run, fits, settle_base, stamp, timed, write_sealed
from minigrpo.runs.rundir import RunDir, complete_folder, read_json, write_json
from minigrpo.ui.progress import stage
from minigrpo.ui.screen import Screen
from minigrpo.utils.paths import user_path

if TYPE_CHECKING:
    from minigrpo.training.preflight import PreflightResult


def prepare(opened: OpenedRun, run: RunDir, console: Screen) -> None:
    """Do preflight and warm-up unless they are done. Raise MinigrpoError where training would teach nothing."""
    go, warms = preflight_verdict(opened, run, console)
    if not go and warms and opened.recipe.warmup.steps and not is_warm(opened.recipe, run):
        warm_up(opened, run, console)
        go, _ = preflight_verdict(opened, run, console)
    if not go:
        again = command_line("minigrpo", "train", run.recipe, "--run", run.path, "--resume")
        raise MinigrpoError(
            f"Preflight found that this would teach nothing (see above, and {run.preflight}). Change what it names; "
            f"to train all the same: {again}"
        )
    warm_up(opened, run, console)


def preflight_verdict(opened: OpenedRun, run: RunDir, console: Screen) -> tuple[bool, bool]:
    """Return preflight's (go, whether a warm-up would mend the faults), from a saved verdict if that still holds."""
    if verdict_holds(opened.recipe, run):
        console.show(Text(f"{run.preflight} is there already."))
    else:
        with timed(run, "preflight"):
            run_preflight(opened, run, console)
    verdict = read_json(run.preflight)
    return bool(verdict["go"]), bool(verdict.get("warms"))


def verdict_holds(recipe: Recipe, run: RunDir) -> bool:
    """Return whether the saved verdict holds. A warm-up needs a new one only where the model failed before it."""
    if fits(run.preflight, verdict_stamp(recipe, run)):
        return True
    return fits(run.preflight, stamp("preflight", recipe)) and bool(read_json(run.preflight)["go"])


def verdict_stamp(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """Return the stamp of a verdict on the model that GRPO would begin with now."""
    return stamp("preflight", recipe, *([run.warmup] if is_warm(recipe, run) else []))


def run_preflight(
    opened: OpenedRun, run: RunDir | None, console: Screen, *, seconds: float | None = None
) -> PreflightResult:
    """Sample the task, save the verdict in the run's folder, if one is given, and print what was seen.

    Raise KeyboardInterrupt where the user stopped the sampling, after printing what was seen; then nothing is saved.
    """
    from minigrpo.training.preflight import DEFAULT_SECONDS, preflight

    recipe = opened.recipe
    warm = run is not None and is_warm(recipe, run)
    if run and warm:
        begin_with_warmup(opened, run)
    with stage("preflight", 0) as report:
        verdict = preflight(
            recipe,
            opened.task,
            opened.policy,
            opened.engine,
            report,
            seconds=DEFAULT_SECONDS if seconds is None else seconds,
        )
    verdict = replace(verdict, after_warmup=verdict.warms and bool(recipe.warmup.steps) and not warm)
    if run and not verdict.interrupted:
        write_sealed(run.preflight, verdict.to_dict() | {"made": verdict_stamp(recipe, run)})
    console.show(tables.verdict_table(verdict))
    if verdict.interrupted:
        raise KeyboardInterrupt("Stopped: the verdict is of what had been sampled, and was not saved.")
    return verdict


def begin_run(opened: OpenedRun, run: RunDir) -> None:
    """Make the folder a run, unless it is one, and keep the hash of its base. Call it when the recipe's parts are open.

    Raise ArtifactError where the base is another than the one that the run began from.
    """
    from minigrpo.models.model_files import local_fingerprint

    create_run(opened.recipe, run)
    with stage(f"hash of {opened.policy.path}", 0):
        found = local_fingerprint(opened.policy.path, opened.recipe.model.revision)
    if found is not None:
        settle_base(run, opened.policy.path, found)


def check_warmup_answers(opened: OpenedRun) -> None:
    """Raise RecipeError or TaskError where the recipe's warm-up cannot be done. Call it before a run begins."""
    from minigrpo.training.sft_warmup import check_warmup

    if opened.recipe.warmup.steps:
        check_warmup(opened.recipe, opened.task, opened.policy)


def warm_up(opened: OpenedRun, run: RunDir, console: Screen) -> None:
    """If the recipe has a warm-up, do it unless it is done, and let the policy begin with its adapter."""
    if not opened.recipe.warmup.steps:
        return
    if not is_warm(opened.recipe, run):
        _refuse_other_warmup(run)
        with timed(run, "warmup"):
            _warm_up(opened, run, console)
    begin_with_warmup(opened, run)


def is_warm(recipe: Recipe, run: RunDir) -> bool:
    return bool(recipe.warmup.steps) and fits(run.warmup / "made.json", _warmup_stamp(recipe))


def begin_with_warmup(opened: OpenedRun, run: RunDir) -> None:
    opened.policy.begin_with(run.warmup, keep_reference=opened.recipe.objective.kl > 0)
    opened.engine.update(opened.policy)


def carry_warmup(run: RunDir, fork: RunDir, recipe: Recipe) -> None:
    """Copy the run's warm start, if it has one, into a fork with another recipe: it began with the same adapter."""
    if run.warmup.is_dir():
        shutil.copytree(run.warmup, fork.warmup)
        made = read_json(fork.warmup / "made.json")
        write_json(fork.warmup / "made.json", made | {"made": _warmup_stamp(recipe)})


def _warm_up(opened: OpenedRun, run: RunDir, console: Screen) -> None:
    from minigrpo.training.sft_warmup import warmup

    recipe = opened.recipe
    with stage("warmup", recipe.warmup.steps) as report:
        warmed = warmup(recipe, opened.task, opened.policy, opened.engine, report)
    with complete_folder(run.warmup) as draft:
        opened.policy.save(draft)
        write_json(draft / "made.json", warmed.to_dict() | {"made": _warmup_stamp(recipe)})
    console.show(tables.warmup_table(warmed))


def _warmup_stamp(recipe: Recipe) -> dict[str, Any]:
    data = [user_path(recipe.warmup.data)] if recipe.warmup.data else []
    return stamp("warmup", recipe, *data)


def _refuse_other_warmup(run: RunDir) -> None:
    """Raise ArtifactError where a new warm adapter would replace the one from which the checkpoints were trained."""
    if run.warmup.exists() and run.checkpoints.exists():
        raise ArtifactError(
            f"{run.warmup} was made from other answers than warmup.data holds now, and the run has gone on from it. "
            "Put the file back as it was, or begin another run: --run runs/NAME"
        )
