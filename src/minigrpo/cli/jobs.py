"""The command that writes a job's file: how a scheduler starts a training on several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minigrpo.cli.options import OVERRIDES, QuietRecipeCommand
from minigrpo.config.load import load_recipe
from minigrpo.ui.screen import print_result


def launch(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="slurm, skypilot, hf-jobs or ssh.")],
    recipe: Annotated[str, typer.Argument(help="As for train; the machines must find it under the same name.")],
    *,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="DIR", help="The run's folder, where all machines see it.", show_default="runs/RECIPE"
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=65_536, help="Number of machines; for ssh those of --hosts.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, max=1024, help="Processes of each machine, one for each GPU.")] = 8,
    hosts: Annotated[
        str, typer.Option(help="ssh: names of the machines, with commas; all others connect to the first.")
    ] = "",
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, max=1000, help="Restarts of all ranks after one was lost.")
    ] = 3,
) -> None:
    """Write the file of a job that trains on several machines.

    Prints a script for Slurm's sbatch, a task for SkyPilot, a script that gives a job to Hugging Face, or one that
    starts the ranks over ssh. Nothing is started. The knobs of the recipe are options here too, and become part of
    the command: docs/scale.md.
    """
    from minigrpo.distributed.jobs import Job, job_file, names_of

    load_recipe(recipe, context.meta[OVERRIDES])  # a mistake is told here, not in a queue
    knobs = [f"--{name}={text}" for name, text in context.meta[OVERRIDES]]
    words = (recipe, *knobs, *(["--run", str(run)] if run else []))
    job = Job(Path(recipe).stem, words, nodes, gpus, max_restarts, tuple(names_of(hosts)))
    print_result(job_file(kind, job), end="")


def add_launch_to(app: typer.Typer) -> None:
    app.command(cls=QuietRecipeCommand)(launch)
