"""Tables for a terminal: what a replay and an audit have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from minigrpo.ui.live import duration
from minigrpo.ui.plain_text import printable
from minigrpo.ui.tables import plain_table, titled

if TYPE_CHECKING:
    from minigrpo.pipeline.audit import Audited
    from minigrpo.pipeline.replay import Replayed, ReplayedSteps, Stretch
    from minigrpo.pipeline.step_differences import Difference

MOST_SHOWN = 5
"""Differences that are printed; --json gives all."""


def reach_table(found: Sequence[Stretch]) -> RenderableType:
    """Show from where each step is done again, and what the last one of each line costs."""
    table = plain_table("from", "steps to do", "time, as the run took")
    for each in found:
        time = "unknown" if each.seconds is None else f"up to {duration(each.seconds)}"
        start = f"checkpoint {each.start}" if each.start else "the beginning"
        table.add_row(f"steps {each.start + 1} to {each.until}", start, f"up to {each.steps}", time)
    return titled("what can be done again", table)


def replayed_table(done: Replayed) -> RenderableType:
    """Show how many steps were exact, the differences in order, and the verdict."""
    stretch = done.stretch
    start = f"checkpoint {stretch.start}" if stretch.start else "the beginning"
    table = plain_table("")
    table.add_row("done again", f"steps {stretch.start + 1} to {stretch.until}, from {start}")
    table.add_row("exact", f"{len(done.exact)} of {stretch.steps}: prompts, tokens, rewards, advantages, figures")
    saved = f"compared after step {', '.join(map(str, done.saved))}"
    table.add_row("weights and optimizer", saved if done.saved else "not compared: nothing was saved after these steps")
    for name, sha256 in done.weights.items():
        table.add_row(name, f"{sha256[:16]}... after step {stretch.until}")
    lines: list[RenderableType] = [titled(f"replay of {done.run}", table)]
    if done.group is not None:
        lines.append(_group_table(done.group))
    return Stack(*lines, *_notes([done]), *_verdict(done.differences))


def replayed_steps_table(done: ReplayedSteps) -> RenderableType:
    """Show what was drawn and done, every step that is not exact, the differences in order, and the verdict."""
    table = plain_table("")
    table.add_row("drawn", f"{len(done.drawn)} steps, with seed {done.seed}")
    for part in done.parts:
        stretch = part.stretch
        start = f"checkpoint {stretch.start}" if stretch.start else "the beginning"
        table.add_row("done again", f"steps {stretch.start + 1} to {stretch.until}, from {start}")
    exact = len({*done.drawn} & {*done.exact})
    of = sum(part.stretch.steps for part in done.parts)
    words = "prompts, tokens, rewards, advantages, figures"
    table.add_row("exact", f"{exact} of {len(done.drawn)} drawn, {len(done.exact)} of {of} done: {words}")
    if done.inexact:
        table.add_row("not exact", f"steps {', '.join(map(str, done.inexact))}")
    saved = ", ".join(str(step) for part in done.parts for step in part.saved)
    table.add_row(
        "weights and optimizer", f"compared after step {saved}" if saved else "not compared: nothing was saved"
    )
    return Stack(titled(f"replay of {done.run}", table), *_notes(done.parts), *_verdict(done.differences))


def _notes(parts: Sequence[Replayed]) -> list[Text]:
    machines = dict.fromkeys(f"not the run's machine: {'; '.join(part.machine)}" for part in parts if part.machine)
    older = "this log is of before token ids were hashed, so answers were compared as texts"
    notes = [*machines, *([older] if any(part.without_ids for part in parts) else [])]
    return [Text(f"note: {note}", style="yellow") for note in notes]


def _verdict(differences: Sequence[Difference]) -> list[Text]:
    lines = [Text(f"{_where(each)}: {each.what}", style="red") for each in differences[:MOST_SHOWN]]
    if len(differences) > MOST_SHOWN:
        lines.append(Text(f"and {len(differences) - MOST_SHOWN} more: --json", style="red"))
    words = "not exact: the first line above came first" if differences else "exact"
    return [*lines, Text(words, style="bold red" if differences else "bold green")]


def audited_table(found: Audited) -> RenderableType:
    """Show what was shown, what was not, the faults, and the statement."""
    lines: list[RenderableType] = [Text(f"audit of {found.run}, seed {found.seed}", style="bold")]
    lines += [Text(f"shown: {sentence}", style="green") for sentence in found.shown]
    lines += [Text(f"not shown: {sentence}", style="yellow") for sentence in found.unshown]
    lines += [Text(f"fault: {sentence}", style="red") for sentence in found.faults]
    return Stack(*lines, "", Text(found.statement, style="bold green" if found.ok else "bold red"))


def _where(found: Difference) -> str:
    where = [found.kind, f"step {found.step}"]
    where += [f"prompt {found.prompt}"] if found.prompt else []
    where += [f"sibling {found.sibling}"] if found.sibling else []
    return ", ".join(where)


def _group_table(group: Mapping[str, Any]) -> RenderableType:
    table = plain_table("reward", "now", "advantage", "now", "answer")
    logged, replayed = group["logged"] or {}, group["replayed"] or {}
    pairs = zip(logged.get("completions", ()), replayed.get("completions", ()), strict=False)
    for sibling, (then, now) in enumerate(pairs, 1):
        figures = [f"{row.get(name)}"[:8] for name in ("reward", "advantage") for row in (then, now)]
        text = " ".join(printable(str(now.get("text"))).split())
        table.add_row(str(sibling), *figures, text if len(text) <= 50 else f"{text[:46]} ...")
    name = (logged or replayed).get("prompt")
    return titled(f"group {group['number']} of {group['of']}, prompt {name}: as logged, and now", table)
