"""The commands that say why a reward moved: a page, a file, a panel of another terminal, the tokens of a group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from minigrpo.cli.options import AsJson, Command, RunFolder, print_json, stdout_for_json
from minigrpo.runs.rundir import RunDir
from minigrpo.ui.screen import Screen
from minigrpo.utils.json_values import json_ready

By = Literal["change", "logprob", "entropy"]


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


def report(
    run: RunFolder,
    *,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Where to write it.", show_default="RUN/report.html")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is not a report.")] = False,
) -> None:
    """Write a run as one HTML file, to mail or to keep.

    Curves, the change of the reward from the first tenth of the steps to the last, split into its causes, answers
    before and after, the evaluation with intervals, parity, recipe, versions, alarms. Light and dark. It has no script
    and loads nothing; folders of this machine and secrets of its environment are left out of the recipe.
    """
    from minigrpo.view.report.page import write_report

    path = write_report(RunDir(run), out, force=force)
    Screen().show(Text(f"Report: {path} ({path.stat().st_size / 1000:,.0f} kB)"))


def watch(
    run: RunFolder,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a run that has not begun, or was stopped.")] = False,
) -> None:
    """Follow a run from another terminal.

    Step, reward, share of groups that teach, length, time left, alarms, what it is doing: a panel in a terminal;
    elsewhere a line now and then, at most one every ten seconds. Only reads; Ctrl-C leaves the run alone. Ends when no
    process works on the run any more, with exit code 0 where it has ended, 1 where it was killed or failed, 3 where it
    waits: not begun yet, or stopped before its last step.
    """
    from minigrpo.view.watch import EXIT_CODES, watch_run

    try:
        outcome = watch_run(RunDir(run), wait=wait)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("No longer watched. The run goes on.") from None
    raise typer.Exit(EXIT_CODES[outcome])


def inspect(
    run: RunFolder,
    *,
    step: Annotated[int, typer.Option(min=1, help="The step, as the log numbers it.")],
    group: Annotated[int, typer.Option(min=1, metavar="K", help="Which group of the step, from 1.")] = 1,
    by: Annotated[By, typer.Option(help="The figure by which a terminal colours tokens.")] = "change",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="the run's")] = None,
    as_json: AsJson = False,
) -> None:
    """What a step's update did to the tokens of one group.

    Does the step again from the checkpoint before it, in a scratch folder, and measures each sampled token by the
    policy before the update and after it: log-probability, entropy, and how far they moved. Siblings come with their
    rewards by part, advantage, length, and the first word that differs from the best. The run is only read; what it
    costs is what `minigrpo replay RUN` says. Exit code 0 where the step is the log's to the last byte, 1 where not.
    """
    from minigrpo.pipeline.inspect_group import inspect_group
    from minigrpo.pipeline.inspect_table import inspected_table

    with stdout_for_json(as_json):
        found = inspect_group(run, step, group, threads=threads)
    if as_json:
        print_json(json_ready(found.to_dict()))
    else:
        Screen().show(inspected_table(found, by))
    raise typer.Exit(0 if found.exact else 1)


def add_explanations_to(app: typer.Typer) -> None:
    for command in (view, report, watch, inspect):
        app.command(cls=Command)(command)
