"""Answers of the training itself: the same prompt, or one of its kind, in the earlier and in the later window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf, isnan
from statistics import fmean
from typing import Any

from minigrpo.view.group_index import GroupIndex, number
from minigrpo.view.library import OpenRun
from minigrpo.view.report.markup import Markup, model_text, signed, tag
from minigrpo.view.report.stages import answer_box
from minigrpo.view.why import BY_PROMPT

MOST_EXAMPLES = 3
"""Prompts that are shown of those that rose most, and of those that fell most."""


def moved_examples(run: OpenRun, found: Mapping[str, Any]) -> Iterator[Markup]:
    """Yield a section for the prompts that rose most between the windows of `explain`, and one for those that fell."""
    index, (before, after) = run.groups, found["windows"]
    for title, pools in (("Moved up most", found["up"]), ("Moved down most", found["down"])):
        shown = [
            box for pool in pools[:MOST_EXAMPLES] if (box := _example(index, pool, found["by"], before)) is not None
        ]
        if shown:
            about = f"Of each group the answer that earned closest to the group's mean. A: steps {before['first']} to "
            about += f"{before['last']}; B: steps {after['first']} to {after['last']}."
            yield tag("section", tag("h3", title), tag("p", about, class_="about"), *shown, class_="stage")
    if not found["up"] and not found["down"]:
        yield from _window_examples(index, before, after)


def _window_examples(index: GroupIndex, *windows: Mapping[str, Any]) -> Iterator[Markup]:
    """Yield one group of each window, where no prompt came in both: the first whose siblings differ."""
    for title, window in zip("AB", windows, strict=True):
        lines = index.lines_of_steps(window["first"], window["last"])
        line = next((line for line, facts in index.all_facts(lines) if len(set(facts.rewards)) > 1), None)
        group = None if line is None else index.group(line)
        if group is not None:
            ranked = sorted(_answers(group), key=lambda each: number(each.get("reward"), -inf))
            boxes = [answer_box(words, each) for words, each in (("worst", ranked[0]), ("best", ranked[-1]))]
            head = f"One group of {title}, steps {window['first']} to {window['last']}: {group['prompt']}"
            pair = tag("div", *boxes, class_="pairs")
            yield tag("section", tag("h3", head), model_text(_question(group)), pair, class_="stage")


def _example(index: GroupIndex, pool: Mapping[str, Any], by: str, window: Mapping[str, Any]) -> Markup | None:
    earlier = _first_of(index, pool["name"], by, window)
    groups = [None if line is None else index.group(line) for line in (earlier, pool["line"])]
    if None in groups:
        return None
    boxes = [_box(title, group) for title, group in zip("AB", groups, strict=True) if group]
    words = f"{pool['name'] or '(none)'}: {signed(pool['moved'])}"
    return tag("div", tag("h4", words), tag("div", *boxes, class_="pairs"), class_="example")


def _first_of(index: GroupIndex, name: str, by: str, window: Mapping[str, Any]) -> int | None:
    """Return the first line of the window that is of this prompt, or of a prompt of this kind."""
    lines = index.lines_of_steps(window["first"], window["last"])
    named = (
        (line, facts.prompt if by == BY_PROMPT else facts.labels.get(by, "")) for line, facts in index.all_facts(lines)
    )
    return next((line for line, found in named if found == name), None)


def _box(title: str, group: Mapping[str, Any]) -> Markup:
    answers = _answers(group)
    rewards = [number(each.get("reward")) for each in answers]
    known = [reward for reward in rewards if not isnan(reward)]
    middle = fmean(known) if known else 0.0
    nearest = min(range(len(answers)), key=lambda at: inf if isnan(rewards[at]) else abs(rewards[at] - middle))
    box = answer_box(f"{title}, step {group['step']}", answers[nearest])
    return tag("div", model_text(_question(group)), box)


def _answers(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [each for each in group["completions"] if isinstance(each, dict)]


def _question(group: Mapping[str, Any]) -> Any:
    asked = (group.get("messages") or [{}])[-1]
    return asked.get("content", "") if isinstance(asked, dict) else asked
