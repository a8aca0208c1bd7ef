"""Every command that is printed can be pasted: names are quoted, and the options that it gives exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from minigrpo.cli.main import app
from minigrpo.cli.options import split_overrides
from minigrpo.config.fields import fields_by_name
from minigrpo.config.load import load_recipe
from minigrpo.errors import MinigrpoError, command_line
from minigrpo.runs.rundir import RunDir

SOURCE = Path(__file__).parents[2] / "src" / "minigrpo"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.rglob("*.py"))}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
PROGRAMS = re.compile(
    rf"\bminigrpo (?:{'|'.join(COMMANDS)})\b|\b(?:llama-cli|llama-server|vllm serve|docker run)\b|-m pip"
)
USAGE_ERROR: Any = typer.BadParameter.__base__
AWKWARD = ("a run", "it's", "$HOME", 'a "b" `c` \\ d;e', "-dash", "Ω")


def docstrings(tree: ast.AST) -> set[int]:
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def texts() -> Iterator[tuple[str, list[ast.expr]]]:
    """Yield (where, pieces) of every text that is no docstring; the pieces of an f-string in order."""
    for path, tree in TREES.items():
        about = docstrings(tree)
        inner = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            where = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                yield where, node.values
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inner | about):
                yield where, [node]


def said(piece: ast.expr) -> str:
    return piece.value if isinstance(piece, ast.Constant) and isinstance(piece.value, str) else ""


def is_number(piece: ast.expr) -> bool:
    """Return whether a field of an f-string is a count: a constant of the module, a length, or a sum."""
    value = piece.value if isinstance(piece, ast.FormattedValue) else piece
    return (isinstance(value, ast.Name) and value.id.isupper()) or ast.unparse(value).startswith(("len(", "2 * "))


def bare_fields() -> Iterator[str]:
    """Yield the places where a field stands in a command, or behind an option, without `command_line`."""
    for where, pieces in texts():
        open_command = False
        for before, piece in zip([None, *pieces], pieces, strict=False):
            if isinstance(piece, ast.FormattedValue):
                behind = re.search(r"--(?:run|out|base|folder|recipe|vllm)[ =]$", said(before) if before else "")
                if (open_command or behind) and not is_number(piece):
                    yield f"{where}: {ast.unparse(piece)}"
                continue
            last = list(PROGRAMS.finditer(said(piece)))
            if last:
                open_command = not re.search(r"[.;`)] |`|\n", said(piece)[last[-1].end() :])
            elif re.search(r"[.;`)] |\n", said(piece)):
                open_command = False


def test_no_field_stands_in_a_command_unquoted() -> None:
    assert not list(bare_fields())


def calls() -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each `command_line("minigrpo", ...)`, and of the tuples that become one; what is not known
    in the source is X."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            words = node.args if isinstance(node, ast.Call) else node.elts if isinstance(node, ast.Tuple) else []
            if len(words) > 1 and said(words[0]) == "minigrpo" and said(words[1]) in COMMANDS:
                known = [word for word in words[1:] if not isinstance(word, ast.Starred)]
                line = [said(word) or "8" if isinstance(word, ast.Constant) else "X" for word in known]
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", line


def written() -> Iterator[tuple[str, list[str]]]:
    """Yield the words of each command that stands in a text as it is, up to the end of its sentence."""
    for where, pieces in texts():
        text = "".join(said(piece) or "8" for piece in pieces)
        for found in re.finditer(rf"\bminigrpo ((?:{'|'.join(COMMANDS)})\b[^`\n>]*)", text):
            line = re.split(r"  ?# |[.,;:)] |[.,]$|, or | whether | prints | and then |\s{2,}", found[1])[0]
            yield where, shlex.split(line)


def refusal(words: list[str]) -> str:
    """Return what the command line has against the options of a command; "" where they exist."""
    verb, *rest = words
    command = COMMANDS[verb]
    own = [option for param in command.params for option in (*param.opts, *param.secondary_opts)]
    args, knobs = split_overrides(rest, [*own, "--help"])
    if unknown := [name for name, _ in knobs if ".".join(name.split(".")[:2]) not in fields_by_name()]:
        return f"{verb} {unknown}"
    if knobs and not hasattr(command, "lists_knobs"):
        return f"{verb} takes no knob {knobs}"
    context = command.context_class(command, info_name=verb)
    named = [word for word in args if word.startswith("-")]
    try:
        command.make_parser(context).parse_args([word for word in args if word != "..."])
    except USAGE_ERROR as fault:
        return f"{verb} {named}: {fault.format_message()}"
    return ""


def test_every_command_that_is_printed_has_options_that_exist() -> None:
    found = [*calls(), *written()]
    assert len(found) >= 60
    assert not [f"{where}: {why}" for where, words in found if (why := refusal(words))]


def test_an_option_that_does_not_exist_is_found() -> None:
    assert refusal(["merge", "X", "--forse"])
    assert refusal(["merge", "X", "--lora.rank", "3"])
    assert refusal(["warmup", "X", "--warmup.stepz", "3"])
    assert not refusal(["warmup", "X", "--warmup.steps", "3", "--run", "X"])


@pytest.mark.parametrize("name", AWKWARD)
def test_a_command_splits_back_into_what_it_was_made_of(name: str) -> None:
    words = shlex.split(command_line("minigrpo", "merge", Path("runs") / name, "--out", Path(name), "-n", 8))
    assert words[:4] == ["minigrpo", "merge", f"runs/{name}", "--out"]
    assert Path(words[4]) == Path(name)
    assert not words[4].startswith("-")
    assert words[5:] == ["-n", "8"]


def refusals(run: RunDir) -> Iterator[str]:
    """Yield what is said of a run's folder that lacks one thing after the other."""
    from minigrpo.delivery.artifacts.source import require_merged
    from minigrpo.delivery.hub.contents import run_contents
    from minigrpo.delivery.parity.table import read_parity
    from minigrpo.delivery.serve.resolve import ServeOptions, require_gguf, resolve_servable
    from minigrpo.models.lora import load_adapter
    from minigrpo.runs.manifest import existing_result

    run.gguf.mkdir(parents=True)
    run.recipe.write_text("seed: 1\n")
    run.parity.write_text("{}")
    other = run.path / "model.gguf"
    other.write_bytes(b"GGUF")
    asks = (
        lambda: require_merged(run),
        lambda: existing_result(run),
        lambda: read_parity(run),
        lambda: require_gguf(run, "Q8_0"),
        lambda: load_adapter(None, run.adapter),
        lambda: run_contents(run, "me/it", (), None),
        lambda: run_contents(run, "me/it", ("gguf",), None),
        lambda: run_contents(run, "me/it", ("adapter",), None),
        lambda: resolve_servable(str(other), ServeOptions("vllm")),
        lambda: load_recipe(str(run.path / "none.yaml")),
    )
    for ask in asks:
        with pytest.raises(MinigrpoError) as refused:
            ask()
        yield str(refused.value)


def test_what_a_refusal_advises_can_be_pasted(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "it's a $run")
    told = list(refusals(run))
    for sentence in told:
        words = shlex.split(sentence[sentence.index("minigrpo ") :])
        assert any(word.startswith(str(run.path)) for word in words), sentence
        assert not refusal(words[1:]) or ">" in words, sentence
    assert {shlex.split(text[text.index("minigrpo ") :])[1] for text in told} >= {"merge", "export", "train", "serve"}


def test_the_commands_of_a_summary_can_be_pasted(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from minigrpo.pipeline.deliver import Delivered, commands_to_use

    run = RunDir(tmp_path / "it's a $run")
    file = run.gguf / "it's-Q8_0.gguf"
    exported: Any = SimpleNamespace(ok=True, files=[SimpleNamespace(file=file)])
    lines = [shlex.split(line) for line in commands_to_use(run, Delivered(True, exported))]
    assert [line[0] for line in lines] == ["minigrpo", "minigrpo", "llama-cli", "ollama", "vllm", "minigrpo"]
    assert lines[0] == ["minigrpo", "evaluate", str(run.path), "-n", "8"]
    assert lines[2] == ["llama-cli", "-m", str(file)]
    assert lines[3][1:] == ["create", "it-s-a-run", "-f", str(file.with_suffix(".Modelfile"))]
    assert lines[4] == ["vllm", "serve", str(run.merged)]
    assert lines[5][2:] == [str(run.path), "--repo", "USER/it-s-a-run"]
    assert not [why for line in lines if line[0] == "minigrpo" and (why := refusal(line[1:]))]


@pytest.mark.parametrize("option", ["-n", "--limit", "--rollout.completions", "--rollout.max_tokens"])
def test_no_count_is_without_a_bound(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    from minigrpo.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "tiny", option, "999999999999"])
    assert ended.value.code == 2
    assert re.search(r"\b(65536|10000000|16777216)\b", capsys.readouterr().err)
