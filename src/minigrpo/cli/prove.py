"""The commands by which a run is held to its own records: replay does steps again, audit checks the chain of hashes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigrpo.cli.deliver import BaseOption, lock_run_of
from minigrpo.cli.options import AsJson, Command, RunFolder, print_json, stdout_for_json
from minigrpo.config.schema import MOST_STEPS
from minigrpo.errors import MinigrpoError
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from minigrpo.pipeline.replay import Replayed, ReplayedSteps


def replay(
    run: RunFolder,
    *,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="The step to do again, as the log numbers it.", show_default="say what each costs"),
    ] = None,
    group: Annotated[int | None, typer.Option(min=1, metavar="K", help="Show this group of the step, from 1.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_STEPS, metavar="N", help="Draw N steps at random, in place of --step."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The draw's seed.", show_default="a new one")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads, to see what they change.", show_default="the run's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Do steps of a run again, and compare every byte with its log.

    From the checkpoint before, in a scratch folder: prompts, token ids, rewards, advantages, figures, weights. Exit
    code 0 where all are the same, 1 where not: then the first difference is named, and by how much. The run is only
    read. With neither --step nor --steps: which steps can be done again, and at what cost.
    """
    from minigrpo.pipeline.proof_tables import reach_table, replayed_steps_table, replayed_table
    from minigrpo.pipeline.replay import reach, replay, replay_steps

    refuse_mixed_options(step, steps, group, seed)
    done: Replayed | ReplayedSteps
    if steps is not None:
        with stdout_for_json(as_json):
            done = replay_steps(run, steps, seed=seed, threads=threads)
        table = replayed_steps_table(done)
    elif step is not None:
        with stdout_for_json(as_json):
            done = replay(run, step, group=group, threads=threads)
        table = replayed_table(done)
    else:
        found = reach(run)
        if as_json:
            print_json([stretch.to_dict() for stretch in found])
        else:
            Screen().show(reach_table(found))
        return
    if as_json:
        print_json(done.to_dict())
    else:
        Screen().show(table)
    raise typer.Exit(0 if done.ok else 1)


def refuse_mixed_options(step: int | None, steps: int | None, group: int | None, seed: int | None) -> None:
    """Raise MinigrpoError where options do not go together."""
    if step is not None and steps is not None:
        raise MinigrpoError("--step names a step, and --steps draws some at random: give one of them.")
    if group is not None and step is None:
        raise MinigrpoError(f"--group {group} is a group of one step. Say of which: --step N")
    if seed is not None and steps is None:
        raise MinigrpoError(f"--seed {seed} is the seed of a draw. Say of how many steps: --steps N")


def audit(
    run: RunFolder,
    *,
    steps: Annotated[
        int, typer.Option(min=0, help="Steps to draw at random and do again, with those between the same saves.")
    ] = 3,
    answers: Annotated[int, typer.Option(min=0, help="Answers of evaluations to draw at random and ask again.")] = 5,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The seed of the draw.", show_default="a new one, kept in audit.json")
    ] = None,
    base: BaseOption = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "--model", metavar="PATH", help="Also compare this model with the run: a file or folder; repeatable."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a run against its chain of hashes, and do parts of it again.

    Recipe, code, base and data -> checkpoints -> logs -> adapter -> merged -> GGUF -> evaluations. Writes audit.json:
    what was shown, what was not, and on which machine. RUN may also be what publish --with-run has put on the Hub.
    Exit code 0 where nothing is wrong, 1 where something is. It raises the price of fraud; it does not prove honesty.
    """
    from minigrpo.pipeline.audit import audit
    from minigrpo.pipeline.proof_tables import audited_table

    with stdout_for_json(as_json), lock_run_of(run):
        found = audit(run, steps=steps, answers=answers, seed=seed, base=base, models=model or ())
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(audited_table(found))
    raise typer.Exit(0 if found.ok else 1)


def add_proofs_to(app: typer.Typer) -> None:
    for command in (replay, audit):
        app.command(cls=Command)(command)
