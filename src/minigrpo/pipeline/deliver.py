"""Run the stages after training: check, merge, export, one question to the exported file, the summary, the Hub.

An artefact that cannot be made here (a missing library, an architecture that llama.cpp does not know) is reported at
once and in the summary, and the run goes on without it. An artefact that fails its proof ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.text import Text

from minigrpo.config.schema import ExportConfig, PublishConfig, Recipe
from minigrpo.delivery.hub.client import Hub, check_repo_name, find_token, format_bytes
from minigrpo.errors import ArtifactError, ModelError, command_line, install_hint
from minigrpo.pipeline import tables
from minigrpo.runs.logger import system_message
from minigrpo.runs.manifest import existing_result, seconds_of, slug, timed
from minigrpo.runs.rundir import RunDir, writing
from minigrpo.ui.plain_text import printable
from minigrpo.ui.screen import Screen
from minigrpo.ui.tables import plain_table, titled

if TYPE_CHECKING:
    from minigrpo.delivery.gguf.export import Exported
    from minigrpo.delivery.serve.serve import ServedAnswer
    from minigrpo.evaluation.evaluate import Comparison

WIDTH = 120
"""Columns of summary.txt."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the stages after training made. `missing`: what they could not make, in sentences."""

    merged: bool
    exported: Exported | None = None
    answer: ServedAnswer | None = None
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "merged": self.merged,
            "exported": self.exported.to_dict() if self.exported else None,
            "answer": self.answer.to_dict() if self.answer else None,
            "missing": list(self.missing),
        }


def check_delivery(recipe: Recipe, console: Screen) -> None:
    """Report, before training takes its hours, what the stages after it will lack.

    Raise MinigrpoError for formats that do not exist, and for a Hub that would not take the result.
    """
    if recipe.export.formats:
        from minigrpo.delivery.gguf.export import parse_formats

        parse_formats([recipe.export.formats])
        if reason := _no_library():
            console.show(Text(f"note: {reason}", style="yellow"))
    if recipe.publish.repo:
        check_repo_name(recipe.publish.repo)
        Hub(*find_token(), command="the same command").whoami()


def deliver(config: ExportConfig, run: RunDir, console: Screen) -> Delivered:
    """Check, merge, export, ask one question. Raise ArtifactError where the merge is not what was trained."""
    if not _check(run, console):
        return Delivered(False, missing=("Nothing was merged: the check above says why.",))
    _merge(run, console)
    if not config.formats:
        return Delivered(True)
    if reason := _no_library():
        return Delivered(True, missing=(reason,))
    try:
        exported = _export(config, run, console)
    except ModelError as fault:
        return Delivered(True, missing=(f"Not exported. {fault}",))
    return Delivered(True, exported, _answer(run, exported) if exported.ok else None)


def finish_delivery(config: PublishConfig, run: RunDir, delivered: Delivered, console: Screen) -> None:
    """Publish, after the run's summary. Raise ArtifactError where an exported file was rejected."""
    if delivered.exported and not delivered.exported.ok:
        again = command_line("minigrpo", "export", run.path)
        raise ArtifactError(f"Not every file that was exported is the merged model. Look at: {again}")
    if config.repo and delivered.merged:
        from minigrpo.delivery.hub.publish import publish, published_table

        with timed(run, "publish"):
            console.show(published_table(publish(run, config.repo, private=not config.public)))


def _no_library() -> str | None:
    from minigrpo.delivery.gguf.llamacpp import find_library

    if find_library() is None:
        return f"No GGUF file will be made: xllamacpp is not installed. {install_hint('gguf')}"
    return None


def _check(run: RunDir, console: Screen) -> bool:
    from minigrpo.delivery.merge.check import check, checked_table, has_passed_check

    if has_passed_check(run):
        console.show(Text(f"{run.check} is there already."))
        return True
    with timed(run, "check"):
        result = check(run)
    console.show(checked_table(result))
    return result.ok


def _merge(run: RunDir, console: Screen) -> None:
    from minigrpo.delivery.merge.merge import merge, merged_table

    with timed(run, "merge"):
        console.show(merged_table(merge(run)))


def _export(config: ExportConfig, run: RunDir, console: Screen) -> Exported:
    from minigrpo.delivery.gguf.export import export, exported_table

    with timed(run, "export"):
        exported = export(run, [config.formats])
    console.show(exported_table(exported))
    return exported


def _answer(run: RunDir, exported: Exported) -> ServedAnswer:
    from minigrpo.delivery.serve.serve import ask_once

    with timed(run, "question"):
        return ask_once(run, format=exported.files[-1].format)


def print_summary(run: RunDir, comparisons: Sequence[Comparison], delivered: Delivered, console: Screen) -> None:
    """Save the summary as RUN/summary.txt, beside a picture of the reward, and print it.

    It shows before and after, parity, files, times, and commands to use what was made.
    """
    from minigrpo.delivery.hub.reward_svg import read_rewards, render_reward_svg

    if rewards := list(read_rewards(run)):
        with writing(run.reward_curve):
            run.reward_curve.write_text(render_reward_svg(rewards), encoding="utf-8")
    parts = list(_summary(run, comparisons, delivered))
    with writing(run.summary), run.summary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        paper = Console(file=stream, width=WIDTH, no_color=True)  # of rich, which fails where the disk is full
        for part in parts:
            paper.print(part, soft_wrap=isinstance(part, Text))
    for part in parts:
        console.show(part)


def _summary(run: RunDir, comparisons: Sequence[Comparison], delivered: Delivered) -> Iterator[RenderableType]:
    from minigrpo.delivery.parity.table import parity_table, read_parity

    yield tables.comparison_table(comparisons)
    if delivered.merged:
        yield parity_table(read_parity(run))
    if delivered.answer:
        yield _answer_panel(delivered.answer)
    yield _files_table(run, delivered)
    yield tables.times_table(seconds_of(run))
    for sentence in delivered.missing:
        yield Text(f"note: {sentence}", style="yellow")
    yield Text("Use it:\n" + "\n".join(f"  {line}" for line in commands_to_use(run, delivered)))


def _answer_panel(answer: ServedAnswer) -> RenderableType:
    earned = "" if answer.reward is None else f"\nreward {answer.reward:g}"
    lines = (
        (printable(answer.question).strip(), "dim"),
        ("\n→ ", "bold"),
        printable(answer.answer).strip(),
        (earned, "italic"),
    )
    title = f"what {answer.engine} answers from the file"
    return Panel(Text.assemble(*lines), title=title, title_align="left", width=100)


def _files_table(run: RunDir, delivered: Delivered) -> RenderableType:
    table = plain_table("size", "")
    made = [existing_result(run), *([run.merged] if delivered.merged else [])]
    made += [file.file for file in delivered.exported.files] if delivered.exported else []
    for path in made:
        table.add_row(str(path), format_bytes(_size(path)), "" if path.exists() else "missing")
    return titled("what was made", table)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def commands_to_use(run: RunDir, delivered: Delivered) -> Iterator[str]:
    """Yield the command lines by which what was made is used."""
    yield command_line("minigrpo", "evaluate", run.path, "-n", 8)
    if delivered.exported and delivered.exported.ok:
        file = delivered.exported.files[-1].file
        yield command_line("minigrpo", "serve", run.path)
        system = system_message(run)
        yield command_line("llama-cli", "-m", file, *(("-sys", system) if system else ()))
        yield command_line("ollama", "create", slug(run.path.absolute().name), "-f", file.with_suffix(".Modelfile"))
    if delivered.merged:
        yield command_line("vllm", "serve", run.merged)
        yield command_line("minigrpo", "publish", run.path, "--repo", f"USER/{slug(run.path.absolute().name)}")
