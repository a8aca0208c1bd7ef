"""The command line. Heavy modules are imported inside the command that needs them, so that --help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from minigrpo.cli import deliver, explain, jobs, prove
from minigrpo.cli.doctor import sandbox
from minigrpo.cli.options import (
    OVERRIDES,
    AsJson,
    Command,
    QuietRecipeCommand,
    RecipeCommand,
    parse_gigabytes,
    print_error,
    print_json,
    print_list,
    set_panels,
    stdout_for_json,
)
from minigrpo.config.load import dump_recipe, load_recipe, recipe_names
from minigrpo.config.schema import MOST_ANSWERS, MOST_PROMPTS, MOST_STEPS, Recipe
from minigrpo.errors import MinigrpoError, RecipeError
from minigrpo.runs.rundir import RunDir, find_run
from minigrpo.types import Split
from minigrpo.ui.screen import Screen, lenient_streams, print_result, stdout_encodes
from minigrpo.utils.spinning import spin_while_free

app = typer.Typer(
    help="From a base model and a reward function to a fine-tuned model, on the machine you have. "
    "Start with: minigrpo quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    # A traceback with the values of all variables could show a token.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[
    str, typer.Argument(help="A name of `minigrpo recipes`, a .yaml or .toml file, or a run folder.")
]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run's folder.", show_default="runs/RECIPE")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")]
Samples = Annotated[bool, typer.Option("--samples", help="Show one completion a step.")]


def tell_version(asked: bool) -> None:
    if asked:
        import minigrpo

        print(f"minigrpo {minigrpo.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=tell_version)
    ] = False,
) -> None:
    pass


@app.command(cls=RecipeCommand)
def preflight(
    context: typer.Context,
    recipe: RecipeName,
    *,
    run: RunOption = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Begin no rollout that would end after so many seconds; default 120.", min=0),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try a recipe before hours are spent on it.

    Samples groups of the real task until it is sure whether they would teach anything, says what the whole run would
    take, and ends with one verdict: go (exit code 0), or what to change (exit code 1). What the recipe's own warm-up
    will mend is no reason to change it. Ctrl-C shows what has been seen.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    with stdout_for_json(as_json):
        verdict = stages.preflight(loaded, folder(recipe, run), seconds=seconds)
    if as_json:
        print_json(verdict.to_dict())
    raise typer.Exit(0 if verdict.go or verdict.after_warmup else 1)


@app.command(cls=QuietRecipeCommand)
def plan(
    context: typer.Context,
    recipe: RecipeName,
    *,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="GB", help="Plan for a GPU of this size.", show_default="this machine"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The memory that a run would take, line by line.

    Needs the model's config and tokenizer, but neither its weights nor a GPU. Says what would be chosen to fit, and
    what to turn where nothing fits (exit code 1). The knobs of the recipe are options here too: --lora.rank 16.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    with stdout_for_json(as_json):
        found = stages.plan(loaded, parse_gigabytes(gpu_memory))
    if as_json:
        print_json(found.to_dict())
    raise typer.Exit(0 if found.fits else 1)


@app.command(cls=QuietRecipeCommand)
def warmup(
    context: typer.Context,
    recipe: RecipeName,
    *,
    run: RunOption = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Show a model the form that it never finds.

    The adapter imitates right answers, the task's own or those of --warmup.data, for --warmup.steps steps. Train and
    run go on from it, and do it by themselves where the recipe has warmup.steps.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    with stdout_for_json(as_json):
        result = stages.warmup(loaded, folder(recipe, run), resume=resume)
    if as_json:
        print_json(result)


@app.command(cls=RecipeCommand)
def train(
    context: typer.Context,
    recipe: RecipeName,
    *,
    run: RunOption = None,
    resume: Resume = False,
    samples: Samples = False,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, max=1024, help="Processes of this machine that share every step.")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, max=1000, help="Restarts of all of them after one was lost.")
    ] = 3,
) -> None:
    """Train with GRPO.

    The run's folder gets the adapter, checkpoints, metrics and every completion. Ctrl-C finishes the step and saves.
    With --nproc, or under torchrun, several processes train one adapter: docs/scale.md.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    if nproc > 1:
        again = ["train", recipe, *(f"--{name}={text}" for name, text in context.meta[OVERRIDES])]
        again += ["--run", str(folder(recipe, run).path), *(["--samples"] if samples else [])]
        raise typer.Exit(stages.train_on_ranks(again, nproc, max_restarts, resume=resume))
    stages.train(loaded, folder(recipe, run), resume=resume, show_samples=samples)


@app.command(cls=QuietRecipeCommand)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A run, a model or adapter folder, or a Hub id.")],
    *,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="The recipe whose task and limits count.", show_default="the run's, or all defaults"
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="A model to compare with, by prompt.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_PROMPTS, help="Number of unseen prompts.", show_default="eval.limit of the recipe"
        ),
    ] = None,
    n: Annotated[
        int, typer.Option("--n", "-n", min=1, max=MOST_ANSWERS, help="Answers to each prompt, all in memory at once.")
    ] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, max=10, help="0 takes the likeliest token.", show_default="0; with --n: 1"),
    ] = None,
    split: Annotated[Split, typer.Option(help="train: rates each training prompt, for task.rates.")] = "test",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every answer as JSON; replaces only an older evaluation.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on unseen prompts of a task.

    Accuracy with its interval, format, examples right and wrong; with --base both side by side, prompt by prompt.
    After a stop the same command goes on where it was. The knobs of the recipe are options too: minigrpo train --help.
    """
    found = None if recipe else find_run(model)
    loaded = load_recipe(str(found.run.path) if found else recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    heat = temperature if temperature is not None else 0.0 if n == 1 else 1.0
    with stdout_for_json(as_json):
        result = stages.evaluate(model, loaded, base=base, limit=limit, n=n, temperature=heat, split=split, out=out)
    if as_json:
        print_json(result)


@app.command(cls=Command)
def fork(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has trained.")],
    *,
    at: Annotated[
        int, typer.Option(min=0, max=MOST_STEPS, metavar="STEP", help="The step of the checkpoint to fork at.")
    ],
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KNOB=VALUE", help="What to change; may be repeated.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_STEPS, help="Steps that each twin does.", show_default="all that the run has left"
        ),
    ] = None,
    times: Annotated[
        int, typer.Option(min=1, max=1000, help="Draws of random numbers; from 3 on the interval is worth having.")
    ] = 1,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The changed twin's name: RUN/forks/NAME.", show_default="step and change"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=2, max=MOST_PROMPTS, help="Unseen prompts that twins are asked.", show_default="eval.limit of the run"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how long it would take, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """What if one thing had been different?

    Trains twins from a checkpoint of the run, with and without the change, on the same random numbers: without a
    reward function (--set task.weights.NAME=0), without one group (--set groups.factor.PROMPT=0), with another
    learning rate or loss. Shows what the change did, prompt by prompt. The run is only read; after a stop the same
    command goes on.
    """
    from minigrpo.pipeline import forks

    pairs = [split_change(text) for text in change or ()]
    with stdout_for_json(as_json):
        result = forks.fork(
            RunDir(run), at=at, change=pairs, steps=steps, times=times, name=name, limit=limit, dry_run=dry_run
        )
    if as_json:
        print_json(result)


def split_change(text: str) -> tuple[str, str]:
    """Split KNOB=VALUE. Raise RecipeError for anything else."""
    knob, equals, value = text.partition("=")
    if not equals or not knob.strip():
        raise RecipeError(f"--set {text!r} sets nothing. Write the knob and its value: --set train.lr=5e-4")
    return knob.strip().removeprefix("--"), value


deliver.add_to(app)
prove.add_proofs_to(app)
jobs.add_launch_to(app)
app.command(cls=Command)(sandbox)


@app.command("run", cls=RecipeCommand)
def run_command(
    context: typer.Context,
    recipe: RecipeName,
    *,
    run: RunOption = None,
    resume: Resume = False,
    samples: Samples = False,
    as_json: AsJson = False,
) -> None:
    """Run all stages: preflight, warm-up, training, evaluation, check, merge, export, publishing.

    Stage after stage, each trusting only what the one before has proved. With --resume, a stage that is done is not
    done again.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    with stdout_for_json(as_json):
        result = stages.run_all(loaded, folder(recipe, run), resume=resume, show_samples=samples)
    if as_json:
        print_json(result)


@app.command(cls=RecipeCommand)
def quickstart(
    context: typer.Context,
    *,
    run: RunOption = None,
    resume: Resume = False,
    samples: Samples = False,
    as_json: AsJson = False,
) -> None:
    """See it work: minutes on a CPU, no download.

    Builds a tiny model from nothing, trains it with GRPO on word problems, and compares before and after on problems
    that it has never seen.
    """
    loaded = load_recipe("quickstart", context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    with stdout_for_json(as_json):
        result = stages.quickstart(loaded, folder("quickstart", run), resume=resume, show_samples=samples)
    if as_json:
        print_json(result)


@app.command("check-task", cls=QuietRecipeCommand)
def check_task_command(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="The recipe that names the task.", show_default="all defaults")
    ] = None,
    *,
    limit: Annotated[int, typer.Option(min=2, max=MOST_PROMPTS, help="Prompts tried, half of each split.")] = 32,
    attack: Annotated[
        bool, typer.Option("--attack", help="Train a cheater, which never sees a question, and see what pays it.")
    ] = False,
    steps: Annotated[
        int,
        typer.Option(min=0, max=MOST_STEPS, help="Steps of the cheater's training; 0: only attacks that need none."),
    ] = 60,
    seconds: Annotated[float, typer.Option(min=0, help="Begin no part of that training after this time.")] = 240.0,
    as_json: AsJson = False,
) -> None:
    """Try a task's grader on right and wrong answers, or attack it.

    Scores right, empty, wrong, very long and strange answers, and compares the splits. No model is loaded. With
    --attack the recipe's model, by default the embedded one, is trained on the task without its questions: what it is
    paid beyond chance is not for solving. Exit code 0 where all is well, 1 where training would go wrong. The knobs of
    the recipe are options here too: --task.name.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.evaluation.check_task import check_task, task_check_table
    from minigrpo.tasks.registry import open_task

    if attack:
        return _attack(loaded, steps, seconds, as_json)
    with stdout_for_json(as_json):
        found = check_task(open_task(loaded), loaded.task, limit)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(task_check_table(found))
    raise typer.Exit(0 if found.ok else 1)


def _attack(recipe: Recipe, steps: int, seconds: float, as_json: bool) -> None:
    from minigrpo.evaluation.cheaters import attack_table
    from minigrpo.pipeline.attack import attack_task

    with stdout_for_json(as_json):
        found = attack_task(recipe, steps=steps, seconds=seconds)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(attack_table(found))
    raise typer.Exit(0 if found.ok else 1)


@app.command(cls=Command)
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, and what it lacks.

    Devices and their true number types, memory, disk, versions against the tested ones, optional parts. Exit code 1
    where something would stop a training.
    """
    from minigrpo.cli.doctor import doctor_table, examine
    from minigrpo.sandbox.doctor import to_dict

    findings = examine()
    report = to_dict(findings)
    if as_json:
        print_json(report)
        raise typer.Exit(0 if report["ok"] else 1)
    Screen().show(doctor_table(findings))
    raise typer.Exit(0 if report["ok"] else 1)


explain.add_explanations_to(app)


@app.command(cls=Command)
def tasks(as_json: AsJson = False) -> None:
    """The tasks that come with the package, and where others come from."""
    from minigrpo.tasks.registry import TASKS

    others = {
        "rg:NAME": "a data set of reasoning-gym, as in rg:leg_counting",
        "FILE.py:NAME": "your own: a reward function with its rows, or a Task (docs/tasks.md)",
    }
    print_list({name: build(Recipe()).about for name, build in TASKS.items()} | others, as_json)


@app.command(cls=Command)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one, every knob of it.")] = None,
    from_trl: Annotated[
        Path | None, typer.Option("--from-trl", metavar="FILE", help="Make one of a script or options for TRL's GRPO.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TRAINER", help="Write it for trl, verl or prime-rl instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The recipes that come with the package, or one of them as YAML.

    With --from-trl: a recipe with what a script (.py, which is read, not run) or a file of options (.yaml, .json) sets;
    what has no counterpart is listed. With --to: a script for TRL or verl, or a file for prime-rl, which asks and
    grades with this recipe's task; what has no counterpart stands in its comments.
    """
    if to is not None:
        from minigrpo.config.to_others import recipe_for

        if name is None or from_trl is not None or as_json:
            raise RecipeError("--to writes one recipe for another trainer: minigrpo recipes RECIPE --to trl")
        print_result(recipe_for(to, load_recipe(name), name), end="")
        return
    if from_trl is not None:
        loaded = import_from_trl(from_trl)
    elif name is None:
        print_list({known: load_recipe(known).about for known in recipe_names()}, as_json)
        return
    else:
        loaded = load_recipe(name)
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        text = dump_recipe(loaded)
        print_result(text if stdout_encodes(text) else dump_recipe(loaded, ascii_only=True), end="")


set_panels(app)


def import_from_trl(file: Path) -> Recipe:
    """Return the recipe that a script or options for TRL come to, and tell what has no counterpart on stderr."""
    from minigrpo.config.from_trl import recipe_from_trl

    found = recipe_from_trl(file)
    console = Screen(stderr=True)
    for note in found.notes:
        console.show(Text(f"note: {note}"))
    return found.recipe


def folder(recipe: str, run: Path | None) -> RunDir:
    """Return --run, or the run folder that was given as the recipe, or runs/NAME."""
    if run is None:
        run = Path(recipe) if os.path.isdir(recipe) else Path("runs") / Path(recipe).stem
    return RunDir(run)


def main(args: list[str] | None = None) -> None:
    """Run the command line: an error that the user can mend ends as a sentence with exit code 2, any other with a
    traceback. What cannot be displayed changes no exit code; a result for stdout that is lost there is an error."""
    with lenient_streams(), spin_while_free():
        try:
            app(args=args, prog_name="minigrpo")
        except MinigrpoError as fault:
            print_error(fault)
            sys.exit(fault.exit_code)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
