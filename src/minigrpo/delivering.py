"""The commands from a trained adapter to a model that others can use. They take a run's folder, and no knobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from minigrpo.config import DtypeName
from minigrpo.door import AsJson, Command, print_json, result_alone

Trained = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or that of a PEFT adapter.")]
Writer = Literal["auto", "official", "own"]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Where the base is now.", show_default="as it was trained")
]


def check(
    run: Trained,
    *,
    base: BaseOption = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Look at the files only; load no model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check what was trained, before anything is made from it.

    Every layer there and finite, none untrained, its norms, and what it does to the base's probabilities. Exit code 0
    where all is well, 1 where not. A run keeps the figures of each layer in check.json.
    """
    from minigrpo.check import check, checked_table

    with result_alone(as_json):
        found = check(run, base=base, model=not no_model)
    if as_json:
        print_json(found.to_dict())
    else:
        Console().print(checked_table(found))
    raise typer.Exit(0 if found.ok else 1)


def merge(
    run: Trained,
    *,
    base: BaseOption = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="auto: the base's own, unless it would round away what was learned.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new folder.", show_default="RUN/merged")] = None,
    no_proof: Annotated[bool, typer.Option("--no-proof", help="Do not compare it with what was trained.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that was changed by hand.")] = False,
    as_json: AsJson = False,
) -> None:
    """Base and adapter in one model folder, proved.

    Written shard by shard, with tokenizer, chat template and all else that other tools need. Then its probabilities
    are compared with those of the policy that was trained: more than a tenth of what training did, and it is refused.
    """
    from minigrpo.merge import merge_alone, merged_table

    with result_alone(as_json):
        found = merge_alone(run, base=base, dtype=dtype, out=out, proof=not no_proof, force=force)
    if as_json:
        print_json(found.to_dict())
    else:
        Console().print(merged_table(found))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a model's.")],
    *,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", metavar="TYPE", help="F32, F16, BF16, Q8_0, Q4_K_M ...; may be repeated.", show_default="Q8_0"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the files go.", show_default="RUN/gguf")
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="DIR", help="Sources of llama.cpp.", show_default="LLAMA_CPP_DIR"),
    ] = None,
    writer: Annotated[
        Writer, typer.Option(help="auto: llama.cpp's converter if it can be had, else our own for a few architectures.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Make again what is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """The merged model as GGUF files, each proved by llama.cpp.

    Token ids of rendered prompts, and probabilities on held texts, are compared with the merged model's. What is too
    far away is kept with .rejected after its name, and the exit code is 1. A Modelfile for Ollama lies beside each.
    """
    from minigrpo.export import export_alone, exported_table

    with result_alone(as_json):
        found = export_alone(run, formats or ["Q8_0"], out=out, llama_cpp=llama_cpp, writer=writer, force=force)
    if as_json:
        print_json(found.to_dict())
    else:
        Console().print(exported_table(found))
    raise typer.Exit(0 if found.ok else 1)


def add_to(app: typer.Typer) -> None:
    for command in (check, merge, export):
        app.command(cls=Command)(command)
