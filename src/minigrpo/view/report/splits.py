"""The change of the mean reward, split, as tables with bars: what the page "Why" shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minigrpo.view.report.markup import Markup, figure, interval, joined, percent, signed, tag

NOTHING = 5e-10
"""Size below which a part of the change is not shown: rounding."""


def split_section(found: Mapping[str, Any]) -> Markup:
    """Show every way in which `explain` has split the change."""
    change = found["change"]
    boxes = [_split(each, change["total"]["value"], found) for each in change["splits"]]
    about = "Each table splits the same change exactly. Brackets are 95 % intervals over prompts."
    return joined(tag("p", about, class_="soft"), tag("div", *boxes, class_="splits"))


def _split(split: Mapping[str, Any], total: float, found: Mapping[str, Any]) -> Markup:
    shown = [term for term in split["terms"] if max(abs(term["value"]), term["half"] or 0) > NOTHING]
    largest = max(abs(total), *(abs(term["value"]) for term in split["terms"]), 1e-12)
    rows = [
        tag(
            "tr",
            tag("th", term["name"], _facts(term), scope="row"),
            tag("td", _bar(term["value"], term["half"], largest), class_="bar", aria_hidden="true"),
            tag("td", signed(term["value"]), " ", _spread(term), class_="size"),
        )
        for term in shown
    ]
    added = sum(term["value"] for term in split["terms"])
    foot = tag(
        "tr", tag("th", "sum", scope="row"), tag("td", class_="bar"), tag("td", tag("b", signed(added)), class_="size")
    )
    heads = tag("tr", *(tag("th", name, scope="col") for name in ("Part", "Size", "Change")))
    whole = tag("table", tag("thead", heads, class_="hidden"), tag("tbody", *rows), tag("tfoot", foot), class_="bars")
    notes = [tag("p", note, class_="note") for note in _notes(split, found)]
    title = tag("h3", split["title"])
    return tag("section", title, tag("p", split["about"], class_="about"), whole, *notes, class_="split")


def _notes(split: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    notes = []
    if split["name"] == "prompts" and split["terms"][0]["name"] == "no prompt in common":
        notes.append(
            "No prompt was drawn in both windows, so this log cannot tell better answers from easier prompts: an "
            "evaluation can, which asks both models the same."
        )
    if split["name"] == "prompts" and found["by"] != "prompt":
        notes.append(f"Prompts of the same {found['by']} count as the same here.")
    if tied := split["notes"].get("tied"):
        notes.append(f"{', '.join(tied)}: always 0 here, or always moved with the others, so no weight can be told.")
    return notes


def _spread(term: Mapping[str, Any]) -> Markup | None:
    value, half = term["value"], term["half"]
    return None if half is None else interval(value - half, value + half)


def _facts(term: Mapping[str, Any]) -> Markup | None:
    facts = term["facts"]
    before, after, weight = facts.get("before"), facts.get("after"), facts.get("weight")
    if before is None or after is None:
        return None
    if "in both" in facts:
        return tag("small", f"{facts['in both']:.0f} in both windows, of {before:.0f} and {after:.0f}")
    show = percent if "more or less often" in term["name"] else figure
    return tag("small", f"{figure(weight)} × " if weight is not None else None, f"{show(before)} → {show(after)}")


def _bar(value: float, half: float | None, largest: float) -> Markup:
    """Draw a bar from the middle, with a whisker for the interval."""
    room = 1.08 * largest

    def place(at: float) -> float:
        return 50 + 46 * max(-room, min(room, at)) / room

    low, high = place(min(0.0, value)), place(max(0.0, value))
    width, kind = max(0.4, high - low), "down" if value < 0 else "up"
    parts = '<line x1="50" x2="50" y1="0" y2="16" class="zero"/>'
    parts += f'<rect x="{low:.2f}" width="{width:.2f}" y="3" height="10" class="{kind}"/>'
    if half is not None:
        parts += f'<line x1="{place(value - half):.2f}" x2="{place(value + half):.2f}" y1="8" y2="8" class="whisker"/>'
    return tag("svg", Markup(parts), viewBox="0 0 100 16", preserveAspectRatio="none")
