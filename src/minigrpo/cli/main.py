"""The command line. Heavy modules are imported inside the command that needs them, so that --help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from minigrpo.cli import deliver
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
    stdout_for_json,
)
from minigrpo.config.load import dump_recipe, load_recipe, recipe_names
from minigrpo.config.schema import MOST_ANSWERS, MOST_PROMPTS, Recipe
from minigrpo.errors import MinigrpoError
from minigrpo.runs.rundir import RunDir, find_run
from minigrpo.types import Split
from minigrpo.ui.screen import Screen, lenient_streams, print_result, stdout_encodes

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
    take, and ends with one verdict: go (exit code 0), or what to change (exit code 1). Ctrl-C shows what has been seen.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    with stdout_for_json(as_json):
        verdict = stages.preflight(loaded, folder(recipe, run), seconds=seconds)
    if as_json:
        print_json(verdict.to_dict())
    raise typer.Exit(0 if verdict.go else 1)


@app.command(cls=QuietRecipeCommand)
def plan(
    context: typer.Context,
    recipe: RecipeName,
    *,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="GB", help="Of a GPU, here or not.", show_default="this machine"),
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
) -> None:
    """Train with GRPO.

    The run's folder gets the adapter, checkpoints, metrics and every completion. Ctrl-C finishes the step and saves.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.pipeline import stages

    stages.train(loaded, folder(recipe, run), resume=resume, show_samples=samples)


@app.command(cls=QuietRecipeCommand)
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A run, a model or adapter folder, or a Hub id.")],
    *,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Whose task and limits count.", show_default="the run's, or all defaults"),
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="Compare with this one, prompt by prompt.")] = None,
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
    split: Annotated[Split, typer.Option(help="train: how hard each training prompt is, for task.rates.")] = "test",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Every answer as JSON; replaces an evaluation only.")
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


deliver.add_to(app)
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
    recipe: Annotated[str | None, typer.Argument(help="Whose task it is.", show_default="all defaults")] = None,
    *,
    limit: Annotated[int, typer.Option(min=2, max=MOST_PROMPTS, help="Prompts tried, half of each split.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Try a task's grader on right and wrong answers.

    Scores right, empty, wrong, very long and strange answers, and compares the splits. No model is loaded. Exit code 0
    where all is well, 1 where training would go wrong. The knobs of the recipe are options here too: --task.name.
    """
    loaded = load_recipe(recipe, context.meta[OVERRIDES])
    from minigrpo.evaluation.check_task import check_task, task_check_table
    from minigrpo.tasks.registry import open_task

    with stdout_for_json(as_json):
        found = check_task(open_task(loaded), loaded.task, limit)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(task_check_table(found))
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


@app.command(cls=Command)
def view(
    runs: Annotated[Path, typer.Argument(metavar="RUNS_FOLDER", help="The folder of your runs, or one run.")] = Path(
        "runs"
    ),
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 0,
) -> None:
    """See why the reward moved: a page of this machine alone.

    Curves of one run or several, the change between any two windows of steps split into its causes, every group with
    its answers, every prompt through time, what each stage proved. Live while a run trains, and afterwards. Reads the
    run folders, writes nothing, and asks nobody else. Ctrl-C ends it. See docs/view.md.
    """
    from minigrpo.view.server import serve

    def tell(address: str) -> None:
        Screen().show(Text(f"Open this address, which is for you alone:\n  {address}\nCtrl-C ends it."))

    serve(runs, port, tell)


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
    as_json: AsJson = False,
) -> None:
    """The recipes that come with the package, or one of them as YAML."""
    if name is None:
        print_list({known: load_recipe(known).about for known in recipe_names()}, as_json)
        return
    loaded = load_recipe(name)
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        text = dump_recipe(loaded)
        print_result(text if stdout_encodes(text) else dump_recipe(loaded, ascii_only=True), end="")


def folder(recipe: str, run: Path | None) -> RunDir:
    """Return --run, or the run folder that was given as the recipe, or runs/NAME."""
    if run is None:
        run = Path(recipe) if os.path.isdir(recipe) else Path("runs") / Path(recipe).stem
    return RunDir(run)


def main(args: list[str] | None = None) -> None:
    """Run the command line: an error that the user can mend ends as a sentence with exit code 2, any other with a
    traceback. What cannot be displayed changes no exit code; a result for stdout that is lost there is an error."""
    with lenient_streams():
        try:
            app(args=args, prog_name="minigrpo")
        except MinigrpoError as fault:
            print_error(fault)
            sys.exit(2)
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
