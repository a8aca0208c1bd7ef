"""The command that gives a run's models to others, on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from minigrpo.door import AsJson, print_json, result_alone
from minigrpo.errors import MinigrpoError


def publish(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)] = None,
    *,
    repo: Annotated[str, typer.Option(metavar="USER/NAME", help="Where to; -lora and -GGUF are added to the others.")],
    what: Annotated[
        list[str] | None,
        typer.Option("--what", metavar="KIND", help="merged, adapter or gguf; may be repeated.", show_default="all"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Any folder, as it is, in place of a run.")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see a new repository.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go where; no network.")] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download it again into the Hub's cache, and compare.")
    ] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of the commit.", show_default="the run's name")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what a repository holds of somebody's own.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the merged model, the adapter and the GGUF files on the Hugging Face Hub.

    Only what is proved, each repository with a page that tells how it was trained and proved. The token is HF_TOKEN of
    the environment or of a file .env, or the login. After a cut the same command sends only what is missing; at the
    end every file there is compared with the one here.
    """
    from minigrpo.publish import publish_alone, publish_folder, published_table

    if (run is None) == (folder is None):
        raise MinigrpoError(
            "Name a run's folder, or any folder: minigrpo publish RUN, or minigrpo publish --folder DIR"
        )
    options = {"private": private, "dry_run": dry_run, "fetch": fetch, "force": force, "message": message}
    with result_alone(as_json):
        if folder is not None:
            found = publish_folder(folder, repo, **options)  # type: ignore[arg-type]
        else:
            found = publish_alone(run, repo, what=what or (), **options)  # type: ignore[arg-type]
    if as_json:
        print_json(found.to_dict())
    else:
        Console().print(published_table(found), soft_wrap=True)
