"""Show a logged group in a few lines of a terminal: what was asked, and what the best and the worst answers earned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from minigrpo.ui.plain_text import one_line

SIBLINGS = 4
"""Answers that are shown: the best half of them from the top, the rest from the bottom."""
GROUP_EVERY = 5
"""Steps for which one group stays on the panel."""


def pick_group(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the first group of a step that teaches something, else the first; rows are lines of groups.jsonl."""
    differing = (row for row in rows if len({_reward(each) for each in row["completions"]}) > 1)
    return next(differing, next(iter(rows), None))


def group_lines(row: Mapping[str, Any], width: int) -> list[Text]:
    """Write a group with the reasons of its rewards: reward, its parts, advantage, and how the answer begins."""
    answers = sorted(row["completions"], key=lambda each: -(_reward(each) or 0.0))
    half = SIBLINGS - SIBLINGS // 2
    shown = answers if len(answers) <= SIBLINGS else [*answers[:half], *answers[-(SIBLINGS - half) :]]
    asked = (row.get("messages") or [{}])[-1].get("content", "")
    head = Text(f"step {row['step']}, {row['prompt']}: {one_line(asked)}", style="bold dim")
    lines = [head, *(_answer(each) for each in shown)]
    if len(answers) > len(shown):
        lines.insert(1 + half, Text(f"  ... {len(answers) - len(shown)} between", style="dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines


def _answer(each: Mapping[str, Any]) -> Text:
    reward, advantage = _reward(each), each.get("advantage") or 0.0
    parts = " ".join(f"{name} {value:g}" for name, value in (each.get("parts") or {}).items() if value is not None)
    told = "no reward" if reward is None else f"{reward:.2f}"
    told += f" ({parts})" if parts else ""
    style = "green" if advantage > 0 else "red" if advantage < 0 else ""
    cut = " cut off" if each.get("finish") == "length" else ""
    words = f"{each.get('opening', '')}{each.get('text', '')}"
    return Text.assemble("  ", (told, style), f" {advantage:+.2f}{cut}  ", (one_line(words), "dim"))


def _reward(each: Mapping[str, Any]) -> float | None:
    """Return what an answer earned; None where that could not be told."""
    reward = each.get("reward")
    return float(reward) if isinstance(reward, int | float) and reward == reward else None
