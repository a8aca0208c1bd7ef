"""The commands by which a run is held to its own records: replay does steps again, audit checks the chain of hashes."""

from __future__ import annotations

from typing import Annotated

import typer

from minigrpo.cli.deliver import lock_run_of
from minigrpo.cli.options import AsJson, Command, RunFolder, print_json, stdout_for_json
from minigrpo.ui.screen import Screen


def replay(
    run: RunFolder,
    *,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="The step to do again, as the log numbers it.", show_default="say what each costs"),
    ] = None,
    group: Annotated[int | None, typer.Option(min=1, metavar="K", help="Show this group of it, from 1.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads, to see what they change.", show_default="the run's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Do a step of a run again, and compare every byte with its log.

    From the checkpoint before, in a scratch folder: prompts, token ids, rewards, advantages, figures, weights. Exit
    code 0 where all are the same, 1 where not: then the first difference is named, and by how much. The run is only
    read. Without --step: which steps can be done again, and at what cost.
    """
    from minigrpo.pipeline.proof_tables import reach_table, replayed_table
    from minigrpo.pipeline.replay import reach, replay

    if step is None:
        found = reach(run)
        if as_json:
            print_json([stretch.to_dict() for stretch in found])
        else:
            Screen().show(reach_table(found))
        return
    with stdout_for_json(as_json):
        done = replay(run, step, group=group, threads=threads)
    if as_json:
        print_json(done.to_dict())
    else:
        Screen().show(replayed_table(done))
    raise typer.Exit(0 if done.ok else 1)


def audit(
    run: RunFolder,
    *,
    steps: Annotated[int, typer.Option(min=0, help="Steps drawn at random and done again, with their stretch.")] = 3,
    answers: Annotated[int, typer.Option(min=0, help="Answers of evaluations drawn at random and asked again.")] = 5,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the draw.", show_default="a new one, told in audit.json")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold a run to its chain of hashes, and do parts of it again.

    Recipe, code, base and data -> checkpoints -> logs -> adapter -> merged -> GGUF -> evaluations. Writes audit.json:
    what was shown, what was not, and on which machine. Exit code 0 where nothing is wrong, 1 where something is. It
    raises the price of fraud; it does not prove honesty.
    """
    from minigrpo.pipeline.audit import audit
    from minigrpo.pipeline.proof_tables import audited_table

    with stdout_for_json(as_json), lock_run_of(run):
        found = audit(run, steps=steps, answers=answers, seed=seed)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(audited_table(found))
    raise typer.Exit(0 if found.ok else 1)


def add_proofs_to(app: typer.Typer) -> None:
    for command in (replay, audit):
        app.command(cls=Command)(command)
