"""Additions to typer: a recipe's knobs as options, examples and knobs in the help, errors as sentences."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from minigrpo.config.fields import Field, field_table, fields_by_name, nearest
from minigrpo.config.load import PATHS
from minigrpo.errors import MinigrpoError, RecipeError, more_at
from minigrpo.ui.screen import Screen, print_result, stdout_encodes

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and all else to stderr.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
OVERRIDES = "minigrpo.overrides"
SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0")

PANELS: dict[str, str] = {
    "Begin": "quickstart run recipes tasks",
    "Before training": "check-task plan preflight warmup",
    "Train and measure": "train evaluate launch",
    "Look at a run": "view watch report inspect fork replay audit",
    "Deliver": "check merge export verify serve publish adopt",
    "The machine": "doctor sandbox",
}
"""The commands under the headings of `minigrpo --help`, in the order in which a run needs them."""

EXAMPLES: dict[str, str] = {
    "preflight": """
        minigrpo preflight quickstart
        minigrpo preflight my.yaml --rollout.max_tokens 512  # do longer answers end?
        minigrpo preflight my.yaml --seconds 600  # sample longer, where differences are rare""",
    "plan": """
        minigrpo plan quickstart  # on this machine
        minigrpo plan my.yaml --gpu-memory 15GB
        minigrpo plan my.yaml --gpu-memory 15GB --model.quantize nf4 --json""",
    "warmup": """
        minigrpo warmup my.yaml --warmup.steps 60  # on the task's own right answers
        minigrpo warmup my.yaml --warmup.steps 60 --warmup.data answers.jsonl
        minigrpo train my.yaml --warmup.steps 60  # the same, and GRPO from there""",
    "train": """
        minigrpo train quickstart
        minigrpo train my.yaml --lora.rank 16 --train.lr=2e-5 --run runs/r16
        minigrpo train runs/r16 --resume  # after a stop or a crash
        minigrpo train my.yaml --samples  # shows one answer a step
        minigrpo train my.yaml --nproc 2  # two processes share every step; one that is lost is replaced""",
    "launch": """
        minigrpo launch slurm my.yaml --nodes 2 --gpus 8 --run /shared/runs/my > job.sh  # then: sbatch job.sh
        minigrpo launch skypilot my.yaml --nodes 2 --gpus 8 --run /shared/runs/my > job.yaml
        minigrpo launch ssh my.yaml --hosts gpu-a,gpu-b --gpus 4 --run /shared/runs/my > job.sh  # then: bash job.sh""",
    "evaluate": """
        minigrpo evaluate runs/quickstart  # what the run trained, on its task
        minigrpo evaluate runs/my/adapter --base Qwen/Qwen2.5-0.5B-Instruct
        minigrpo evaluate ./model --recipe my.yaml -n 8 --json > result.json
        minigrpo evaluate ./model --split train -n 8 --limit 9999 --out rates.json  # then train with --task.rates""",
    "fork": """
        minigrpo fork runs/my --at 50  # the same again: is it, byte for byte?
        minigrpo fork runs/my --at 50 --steps 25 --set task.weights.format=0 --times 5  # without this reward
        minigrpo fork runs/my --at 50 --set train.lr=5e-4 --set objective.name=dr_grpo
        minigrpo fork runs/my --at 50 --set groups.factor.train-7@51=-1  # one group of step 51, turned
        minigrpo fork runs/my --at 50 --set train.lr=5e-4 --dry-run  # how long would that take?""",
    "adopt": """
        minigrpo adopt ./adapter --task.name gsm8k  # its config names the base; leaves runs/adapter
        minigrpo adopt ./adapter --base ./base --recipe my.yaml --run runs/theirs""",
    "check": """
        minigrpo check runs/my  # the adapter that the run trained
        minigrpo check runs/my/adapter --no-model --json  # the files alone: seconds""",
    "merge": """
        minigrpo merge runs/my  # leaves runs/my/merged
        minigrpo merge runs/my --dtype float32 --out models/mine
        minigrpo merge ./adapter --base Qwen/Qwen2.5-0.5B-Instruct  # an adapter of any other tool""",
    "export": """
        minigrpo export runs/my  # leaves runs/my/gguf/my-Q8_0.gguf
        minigrpo export runs/my --format F16 --format Q4_K_M
        minigrpo export runs/my --format FP8 --compressor compressor/bin/python  # for vLLM: runs/my/compressed/my-FP8
        minigrpo export ./model --format BF16 --llama-cpp ~/llama.cpp --json  # any model folder""",
    "verify": """
        minigrpo verify runs/my  # all that is there, measured again
        minigrpo verify runs/my --serve --json
        minigrpo verify runs/my --served http://127.0.0.1:8000""",
    "replay": """
        minigrpo replay runs/my --step 63  # is it what the log says, to the last bit?
        minigrpo replay runs/my --step 63 --group 4  # with the answers of its fourth prompt
        minigrpo replay runs/my --steps 50 --seed 7  # fifty steps drawn at random, with one model
        minigrpo replay runs/my  # which steps can be done again, and at what cost""",
    "audit": """
        minigrpo audit runs/my  # the chain, 3 steps and 5 answers; leaves runs/my/audit.json
        minigrpo audit runs/my --steps 0 --answers 0  # the hashes alone: seconds
        minigrpo audit runs/my --steps 20 --seed 7 --json
        minigrpo audit my-run --model my-GGUF  # published with --with-run, downloaded; is this model of it?""",
    "publish": """
        minigrpo publish runs/my --repo me/my-model --dry-run  # what would go where; no network
        minigrpo publish runs/my --repo me/my-model  # me/my-model, me/my-model-lora, me/my-model-GGUF; private
        minigrpo publish runs/my --repo me/my-model --what gguf --public --fetch
        minigrpo publish runs/my --repo me/my-model --with-run  # me/my-model-run, too: what others need to audit it
        minigrpo publish --folder ./model --repo me/other  # any folder as it is""",
    "serve": """
        minigrpo serve runs/my  # its GGUF file, with llama.cpp, until Ctrl-C
        minigrpo serve runs/my --question "What is 7 x 8?" --once
        minigrpo serve runs/my --engine vllm --adapter --port 8001
        minigrpo serve model.gguf --ctx 8192 --parallel 4  # four requests at a time
        minigrpo serve runs/my --host 0.0.0.0  # set MINIGRPO_API_KEY first: clients send it
        minigrpo serve runs/my --cors http://localhost:3000  # a web page of that origin may ask, too
        minigrpo serve runs/my --dry-run  # the command lines only""",
    "view": """
        minigrpo view  # all runs in runs/
        minigrpo view runs/my  # this one first
        minigrpo view runs --port 8300  # elsewhere: ssh -L 8300:127.0.0.1:8300 HOST, then open its address here""",
    "report": """
        minigrpo report runs/my  # leaves runs/my/report.html
        minigrpo report runs/my --out ~/my-run.html  # elsewhere; replaces nothing but an older report""",
    "watch": """
        minigrpo watch runs/my  # while it trains in another terminal
        minigrpo watch runs/my --wait  # from before it begins, and over stops
        minigrpo watch runs/my > watch.log && minigrpo report runs/my  # when it has ended""",
    "inspect": """
        minigrpo inspect runs/my --step 63 --group 4
        minigrpo inspect runs/my --step 63 --by entropy  # colours: where was it undecided?
        minigrpo inspect runs/my --step 63 --group 4 --json > tokens.json""",
    "run": """
        minigrpo run my.yaml
        minigrpo run my.yaml --resume  # goes on at the first stage not done""",
    "quickstart": """
        minigrpo quickstart
        minigrpo quickstart --seed 1 --run runs/second
        minigrpo quickstart --train.steps 40 --run runs/short""",
    "check-task": """
        minigrpo check-task  # the embedded task
        minigrpo check-task my.yaml --json  # the task of a recipe; --task.name FILE.py:NAME for one of your own
        minigrpo check-task my.yaml --attack  # can its reward be earned without the question?
        minigrpo check-task my.yaml --attack --steps 0  # only the ways that need no training: seconds""",
    "doctor": """
        minigrpo doctor
        minigrpo doctor --json""",
    "sandbox": """
        minigrpo sandbox --doctor  # may model-written programs run here?
        minigrpo sandbox --doctor --json""",
    "tasks": """
        minigrpo tasks
        minigrpo train my.yaml --task.name mine.py:task  # a task of your own""",
    "recipes": """
        minigrpo recipes
        minigrpo recipes quickstart > my.yaml  # a file of your own to start from
        minigrpo recipes --from-trl train.py > my.yaml""",
}


def set_panels(app: typer.Typer) -> None:
    """Put every command of the app under its heading, in the order of PANELS. Raise KeyError for one that has none."""
    panels = {name: heading for heading, names in PANELS.items() for name in names.split()}
    commands = {one.name or getattr(one.callback, "__name__", ""): one for one in app.registered_commands}
    for name, command in commands.items():
        command.rich_help_panel = panels[name]
    app.registered_commands = [commands[name] for name in panels]


class Command(TyperCommand):
    """A command whose help ends with examples, and that ends with 130 when it is interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            print(stop or "Stopped.", file=sys.stderr)
            raise typer.Exit(130) from None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # The lines of a docstring are broken for the source: a terminal breaks them again where it ends.
        self.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))
        super().format_help(ctx, formatter)
        lines = [line.strip() for line in EXAMPLES[str(self.name)].splitlines() if line.strip()]
        Screen().print(_panel(Text("\n").join(_example(line) for line in lines), "Examples"))


class RecipeCommand(Command):
    """A command that takes every knob of the recipe as an option: --lora.rank 16, --lora.rank=16."""

    lists_knobs = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = [option for param in self.params for option in param.opts]
        rest, overrides = split_overrides(args, [*own, "--help"])
        ctx.meta[OVERRIDES] = [(name, text if name in PATHS else as_typed(text)) for name, text in overrides]
        parsed: list[str] = super().parse_args(ctx, rest)
        return parsed

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        if self.lists_knobs:
            Screen().print(field_panel())


class QuietRecipeCommand(RecipeCommand):
    """Takes the knobs, but leaves their list to the help of `train`."""

    lists_knobs = False


def split_overrides(args: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split arguments into those for typer and (knob, text) pairs. A misspelled knob is a pair, too: loading the recipe
    then names the right one."""
    rest: list[str] = []
    pairs: list[tuple[str, str]] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        name, equals, text = arg.removeprefix("--").partition("=")
        if arg == "--":
            return [*rest, arg, *queue], pairs
        if not arg.startswith("--") or f"--{name}" in own or not _is_knob(name, own):
            rest.append(arg)
        elif equals:
            pairs.append((name, text))
        else:
            pairs.append((name, _value(name, queue)))
    return rest, pairs


def as_typed(text: str) -> str:
    """Return a text of the command line as it was typed, in UTF-8: where the locale is POSIX, Python read bytes.

    Not for names of files, which must stay as Python read them. Half a character (on Windows, or from Python) is none.
    """
    whole = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
    return whole.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_knob(name: str, own: Sequence[str]) -> bool:
    if name in fields_by_name() or "." in name:
        return True
    return not difflib.get_close_matches(f"--{name}", own, n=1, cutoff=0.75) and nearest(name) is not None


def _value(name: str, queue: list[str]) -> str:
    """Take the option's value off the queue. A switch needs none: --train.full."""
    # A row of a table (task.weights.NAME) is found under the table's own name.
    knob = fields_by_name().get(name) or fields_by_name().get(".".join(name.split(".")[:2]))
    follows = bool(queue) and (not queue[0].startswith("-") or re.fullmatch(r"-[\d.].*", queue[0]) is not None)
    if knob and knob.kind == "true or false":
        return queue.pop(0) if follows and queue[0].lower() in SWITCH_WORDS else "true"
    if follows:
        return queue.pop(0)
    if knob:
        raise RecipeError(f"--{name} needs a value: {knob.expects}.\n    {knob.summary}")
    return ""


def field_panel() -> Panel:
    """Show every knob with its default, what it does, its unit and range."""
    table = Table(box=None, padding=(0, 1, 0, 0), show_header=False, expand=True)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(ratio=1)
    for knob in field_table():
        facts = ", ".join(filter(None, _facts(knob)))
        words = Text(f"{knob.about} ").append(f"[{facts}]", "dim")
        table.add_row(f"--{knob.name}", words)
    return _panel(table, r"Knobs of the recipe \[default, unit, range]: --NAME VALUE or --NAME=VALUE")


def _facts(knob: Field) -> Iterator[str]:
    yield f"default {knob.shown_default} {knob.unit}".strip()
    yield "|".join(knob.choices) or knob.range


def _example(line: str) -> Text:
    command, mark, remark = line.partition("  # ")
    return Text.assemble(command, (mark + remark, "dim"))


def _panel(content: Any, title: str) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim")


def print_error(fault: MinigrpoError) -> None:
    """Print the error to stderr, without breaking lines, so that a command in it can be copied, and the entry of the
    troubleshooting page on it."""
    console = Screen(stderr=True)
    console.show(Text.assemble(("error: ", "bold red"), str(fault), "\n", (more_at(fault.entry), "dim")))


@contextlib.contextmanager
def stdout_for_json(as_json: bool) -> Iterator[None]:
    """With --json, send what a stage prints for people to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def print_json(data: Any) -> None:
    """Print JSON to stdout, with escapes where it cannot encode all characters. Raise MinigrpoError where that cannot
    take it."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=str)
    print_result(text if stdout_encodes(text) else json.dumps(data, indent=2, default=str))


def print_list(rows: dict[str, str], as_json: bool) -> None:
    """Print names with one line each."""
    if as_json:
        print_json([{"name": name, "about": about} for name, about in rows.items()])
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    for name, about in rows.items():
        table.add_row(name, plain(about))
    Screen().print(table)


def plain(text: str) -> str:
    """Escape text for rich: brackets in it are no markup."""
    return text.replace("[", r"\[")


def parse_gigabytes(text: str | None) -> float | None:
    """Parse 15, 15GB or 15 GB. Raise RecipeError for anything else."""
    if text is None:
        return None
    try:
        number = float(text.strip().upper().removesuffix("B").removesuffix("G"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise RecipeError(f"--gpu-memory {text!r} is no amount of memory. Write it in GB: --gpu-memory 15GB")
    return number
