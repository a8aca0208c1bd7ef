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
    from minigrpo.pipeline.replay import Replayed, Stretch

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
    if done.machine:
        lines.append(Text(f"note: not the run's machine: {'; '.join(done.machine)}", style="yellow"))
    if done.without_ids:
        note = "note: this log is of before token ids were hashed, so answers were compared as texts"
        lines.append(Text(note, style="yellow"))
    lines += [Text(f"{_where(each)}: {each.what}", style="red") for each in done.differences[:MOST_SHOWN]]
    if len(done.differences) > MOST_SHOWN:
        lines.append(Text(f"and {len(done.differences) - MOST_SHOWN} more: --json", style="red"))
    words, style = ("exact", "bold green") if done.ok else ("not exact: the first line above came first", "bold red")
    return Stack(*lines, Text(words, style=style))


def audited_table(found: Audited) -> RenderableType:
    """Show what was shown, what was not, the faults, and the statement."""
    lines: list[RenderableType] = [Text(f"audit of {found.run}, seed {found.seed}", style="bold")]
    lines += [Text(f"shown: {sentence}", style="green") for sentence in found.shown]
    lines += [Text(f"not shown: {sentence}", style="yellow") for sentence in found.unshown]
    lines += [Text(f"fault: {sentence}", style="red") for sentence in found.faults]
    return Stack(*lines, "", Text(found.statement, style="bold green" if found.ok else "bold red"))


def _where(found: Any) -> str:
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
