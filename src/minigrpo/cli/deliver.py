"""The commands from a trained adapter to a model that others can use. They take a run's folder, some of them
any model, and no knobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from minigrpo.cli.options import (
    OVERRIDES,
    AsJson,
    Command,
    QuietRecipeCommand,
    as_typed,
    print_json,
    stdout_for_json,
)
from minigrpo.config.schema import MOST_TOKENS, DtypeName
from minigrpo.errors import MinigrpoError, command_line
from minigrpo.runs.lock import run_lock
from minigrpo.runs.rundir import RunDir, find_run, tidy
from minigrpo.ui.screen import Screen

if TYPE_CHECKING:
    from minigrpo.delivery.compressed.export import Compressed
    from minigrpo.delivery.gguf.export import Exported

Trained = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or that of a PEFT adapter.")]
Writer = Literal["auto", "official", "own"]
ServerName = Literal["auto", "llama.cpp", "vllm"]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Where the base is now.", show_default="as it was trained")
]

LicenceOption = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="ID",
        help="The Hub's name of the licence: apache-2.0, mit ...",
        show_default="the recipe's or base's",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        "--ctx",
        min=16,
        max=MOST_TOKENS,
        metavar="TOKENS",
        help="Tokens of prompt and answer together.",
        show_default="up to 4096",
    ),
]
ParallelOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=256,
        metavar="N",
        help="Requests at a time. In llama.cpp each takes memory of its own; in vLLM it is the most.",
        show_default="1; llama-server's and vLLM's own",
    ),
]
QuestionOption = Annotated[
    str | None,
    typer.Option(
        "--question",
        metavar="TEXT",
        parser=as_typed,
        help="The first question, sent with the system message of the training.",
        show_default="a problem of the run's task",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        envvar=["MINIGRPO_API_KEY", "VLLM_API_KEY", "LLAMA_API_KEY"],
        help="Clients without it are refused. Better set it in the environment, which no process list shows.",
        show_default=False,
    ),
]
CorsOption = Annotated[
    str | None,
    typer.Option(metavar="ORIGIN", help="Whose web pages may read answers; * for all.", show_default="none"),
]


@contextmanager
def lock_run_of(path: Path | None) -> Iterator[None]:
    """Hold the run that a path belongs to, and remove what killed processes left in it; hold nothing for other paths.

    An adapter of its warm-up or of a checkpoint may be looked at and merged while the run trains.
    """
    found = find_run(path) if path else None
    if found is None or found.artefact not in ("run", "adapter", "model", "merged"):
        yield
        return
    with run_lock(found.run):
        tidy(found.run)
        yield


def adopt(
    context: typer.Context,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of a PEFT adapter.")],
    *,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="The new run's folder.", show_default="runs/ADAPTER")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="The adapter's base.", show_default="as the adapter says"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="The recipe whose task and limits count.", show_default="all defaults"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run of an adapter that another tool trained.

    Then every later command takes it: evaluate, check, merge, verify, export, serve, publish. Its task is that of the
    recipe, or --task.name NAME. The adapter is copied; the folder that was given stays as it is.
    """
    from minigrpo.pipeline.adopt import adopt

    target = RunDir(run or Path("runs") / adapter.absolute().name)
    with stdout_for_json(as_json):
        adopt(adapter, target, base=base, recipe=recipe, knobs=context.meta[OVERRIDES])
    if as_json:
        print_json({"run": str(target.path)})
    else:
        Screen().show(Text(f"Adopted: {target.path}\nNext: {command_line('minigrpo', 'check', target.path)}"))


def check(
    run: Trained,
    *,
    base: BaseOption = None,
    no_model: Annotated[bool, typer.Option("--no-model", help="Look at the files only; load no model.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check what was trained, before anything is made from it.

    Checks that every layer is there, finite and trained, and reports the norms of each and how much the adapter changes
    the base's probabilities. Exit code 0 where all is well, 1 where not. A run keeps the figures in check.json.
    """
    from minigrpo.delivery.merge.check import check, checked_table

    with stdout_for_json(as_json), lock_run_of(run):
        found = check(run, base=base, model=not no_model)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(checked_table(found))
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
    """Merge base and adapter into one model folder, and prove it.

    Written shard by shard, with tokenizer, chat template and all else that other tools need. Then its probabilities
    are compared with those of the trained policy: it is refused if they differ by more than a tenth of what training
    changed.
    """
    from minigrpo.delivery.merge.merge import merge, merged_table

    with stdout_for_json(as_json), lock_run_of(run):
        found = merge(run, base=base, dtype=dtype, out=out, proof=not no_proof, force=force)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(merged_table(found))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a model's.")],
    *,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="TYPE",
            help="F32, F16, Q8_0, Q4_K_M ...; for vLLM FP8, W4A16, NVFP4; may be repeated.",
            show_default="Q8_0",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the files go.", show_default="RUN/gguf, RUN/compressed"),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="DIR", help="llama.cpp's sources.", show_default="LLAMA_CPP_DIR"),
    ] = None,
    writer: Annotated[
        Writer, typer.Option(help="auto: llama.cpp's converter if it can be had, else our own for a few architectures.")
    ] = "auto",
    compressor: Annotated[
        Path | None,
        typer.Option(metavar="PYTHON", help="A python that has llm-compressor.", show_default="MINIGRPO_COMPRESSOR"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make again what is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """The merged model as GGUF files, each proved by llama.cpp, or in compressed formats for vLLM.

    Token ids of rendered prompts, and probabilities on held-out texts, are compared with the merged model's. What is
    too far away is kept with .rejected after its name, and the exit code is 1. Beside each is a Modelfile for Ollama.
    FP8, W4A16 and NVFP4 are folders that vLLM serves, made by llm-compressor: every weight is unpacked and compared.
    """
    from minigrpo.delivery.compressed.export import compress
    from minigrpo.delivery.compressed.schemes import split_formats
    from minigrpo.delivery.gguf.export import export

    kinds, schemes = split_formats(formats or ["Q8_0"])
    options: dict[str, Any] = {"out": out, "force": force}
    with stdout_for_json(as_json), lock_run_of(run):
        gguf = None if schemes and not kinds else export(run, kinds, llama_cpp=llama_cpp, writer=writer, **options)
        packed = compress(run, schemes, compressor=compressor, **options) if schemes else None
    _print_exports(gguf, packed, as_json)
    raise typer.Exit(0 if gguf is None or gguf.ok else 1)


def _print_exports(gguf: Exported | None, packed: Compressed | None, as_json: bool) -> None:
    from minigrpo.delivery.compressed.export import compressed_table
    from minigrpo.delivery.gguf.export import exported_table

    if as_json:
        told = gguf.to_dict() if gguf else {"ok": True}
        print_json(told | {"compressed": packed.to_dict()} if packed else told)
        return
    if gguf:
        Screen().show(exported_table(gguf))
    if packed:
        Screen().show(compressed_table(packed))


def serve(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A run, a .gguf file, a folder, or a Hub id.")],
    *,
    engine: Annotated[ServerName, typer.Option(help="auto: vLLM where it is installed and has a GPU.")] = "auto",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines ask, too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    kind: Annotated[str, typer.Option("--format", metavar="TYPE", help="Which GGUF file of the run.")] = "Q8_0",
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter unmerged, beside its base (vLLM).")] = False,
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The adapter's base, if it has moved.")] = None,
    question: QuestionOption = None,
    once: Annotated[bool, typer.Option("--once", help="Stop when the question is answered.")] = False,
    context: ContextOption = None,
    parallel: ParallelOption = None,
    api_key: KeyOption = None,
    cors: CorsOption = None,
    wait: Annotated[float, typer.Option(min=1, help="Seconds of silence allowed while it starts.")] = 600.0,
    vllm: Annotated[Path | None, typer.Option(metavar="PYTHON", help="The python of an environment with vLLM.")] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", metavar="DIR", help="The folder of llama-server.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command lines only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve what was trained behind OpenAI's protocol, until Ctrl-C.

    Waits until the server is ready, asks it one question, and prints how to ask it more. Ctrl-C ends the server and
    everything that it started.
    """
    from minigrpo.delivery.serve.access import Access
    from minigrpo.delivery.serve.resolve import ServeOptions
    from minigrpo.delivery.serve.serve import ReadyServer, plan_lines, plan_server, ready_lines, serve

    wanted = ServeOptions(
        *(engine, host, port, kind, adapter, base, context, wait, vllm, llama_cpp, parallel),
        access=Access(api_key or None, cors),
    )

    def tell(ready: ReadyServer) -> None:
        if as_json:
            print_json(ready.to_dict())
        else:
            lines = plan_lines(ready) if dry_run else ready_lines(ready, stays=not once)
            Screen().show(lines)

    if dry_run:
        tell(plan_server(what, wanted, question))
    else:
        serve(what, wanted, question=question, once=once, tell=tell)


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    *,
    serve: Annotated[bool, typer.Option("--serve", help="Serve its GGUF file and ask the server, too.")] = False,
    served: Annotated[
        str | None,
        typer.Option("--served", metavar="URL", help="Ask this server of the model, which already runs, too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Open everything that a run left, and compare it with what was trained.

    Merged model, GGUF files, a server: bytes as they were sealed, the same tokens, probabilities within the limits.
    Rewrites parity.json. Exit code 0 where all is well, 1 where a stage is beyond its limit or was changed.
    """
    from minigrpo.delivery.verify import verified_table, verify

    with stdout_for_json(as_json), lock_run_of(run):
        found = verify(run, serve=serve, served=served)
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(verified_table(found))
    raise typer.Exit(0 if found.ok else 1)


def publish(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)] = None,
    *,
    repo: Annotated[str, typer.Option(metavar="USER/NAME", help="The model's; the others get -lora or -GGUF added.")],
    what: Annotated[
        list[str] | None,
        typer.Option("--what", metavar="KIND", help="merged, adapter or gguf; may be repeated.", show_default="all"),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Any folder, as it is, in place of a run.")
    ] = None,
    with_run: Annotated[
        bool, typer.Option("--with-run", help="Also logs, checkpoints and hashes, by which others can audit the run.")
    ] = False,
    with_paths: Annotated[
        bool, typer.Option("--with-paths", help="Send files that hold paths of this machine, too.")
    ] = False,
    licence: LicenceOption = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see a new repository.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go where; no network.")] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download it again into the Hub's cache, and compare.")
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(metavar="TEXT", parser=as_typed, help="The commit's message.", show_default="the run's name"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files there that are not of this run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put the merged model, the adapter and the GGUF files on the Hugging Face Hub.

    Publishes only what is proved, each repository with a page that tells how it was trained and proved. What you add
    to a page by hand stays. The token is HF_TOKEN of the environment or of a file .env, or the login. After an
    interruption the same command sends only what is missing; at the end every file there is compared with the one here.
    """
    from minigrpo.delivery.hub.publish import publish, publish_folder, published_table

    _refuse_mixed(run, folder, licence=licence is not None, run_options=with_run or with_paths)
    options = {"private": private, "dry_run": dry_run, "fetch": fetch, "force": force, "message": message}
    with stdout_for_json(as_json), lock_run_of(run):
        if run is None:
            found = publish_folder(folder, repo, **options)  # type: ignore[arg-type]
        else:
            own = {"what": what or (), "with_run": with_run, "with_paths": with_paths, "licence": licence}
            found = publish(run, repo, **own, **options)  # type: ignore[arg-type]
    if as_json:
        print_json(found.to_dict())
    else:
        Screen().show(published_table(found))


def _refuse_mixed(run: Path | None, folder: Path | None, *, licence: bool, run_options: bool) -> None:
    """Raise MinigrpoError where what is to be published, or its options, do not go together."""
    if (run is None) == (folder is None):
        raise MinigrpoError(
            "Name a run's folder, or any folder: minigrpo publish RUN, or minigrpo publish --folder DIR"
        )
    if folder is not None and licence:
        raise MinigrpoError("A folder goes as it is: write the licence into its README.md, or leave out --license.")
    if folder is not None and run_options:
        raise MinigrpoError("A folder goes as it is. --with-run and --with-paths are for a run: minigrpo publish RUN")


def add_to(app: typer.Typer) -> None:
    for command in (check, merge, export, verify, publish, serve):
        app.command(cls=Command)(command)
    app.command(cls=QuietRecipeCommand)(adopt)
