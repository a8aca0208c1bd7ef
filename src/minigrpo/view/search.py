"""Look through all completions of a run for words and for what became of them, a short time at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from minigrpo.view.group_index import GroupIndex, cheats, number

KINDS = ("right", "wrong", "malformed", "cut", "cheats", "tied", "unscored")
AROUND = 60
"""Characters of the text that a hit shows before and after what was found."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Completions with this text (in any case) that are all of these KINDS."""

    text: str
    kinds: frozenset[str]

    def may_be_in(self, line: bytes) -> bool:
        """Return False where the raw line shows that nothing in it fits, without parsing it."""
        if not self.text or not self.text.isascii():
            return True  # other letters have several spellings in ASCII JSON
        return json.dumps(self.text.lower())[1:-1].encode() in line.lower()


def search_completions(
    index: GroupIndex, wanted: Wanted, start: int, *, seconds: float, most: int
) -> tuple[list[dict[str, Any]], int | None]:
    """Return the hits from line `start` on, and the line to go on from; None at the end of the file.

    Looks at one line at least, and ends after so many seconds or hits.
    """
    end = time.monotonic() + seconds
    hits: list[dict[str, Any]] = []
    for line in range(max(0, start), len(index)):
        if wanted.may_be_in(index.raw(line)):
            hits += _hits(index, line, wanted)
        if len(hits) >= most or time.monotonic() >= end:
            return hits, line + 1 if line + 1 < len(index) else None
    return hits, None


def _hits(index: GroupIndex, line: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    group, facts = index.group(line), index.facts(line)
    if group is None or facts is None:
        return
    known = [reward for reward in facts.rewards if reward == reward]
    tied = not known or max(known) - min(known) <= 1e-6
    for sibling, completion in enumerate(group["completions"]):
        text = str(completion.get("text", ""))
        at = text.lower().find(wanted.text.lower())
        if at >= 0 and wanted.kinds <= _kinds(completion, tied):
            shown = text[max(0, at - AROUND) : at + len(wanted.text) + AROUND]
            yield {
                "line": line,
                "step": facts.step,
                "prompt": facts.prompt,
                "sibling": sibling,
                "reward": completion.get("reward"),
                "text": shown,
            }


def _kinds(completion: dict[str, Any], tied: bool) -> frozenset[str]:
    right, formed = bool(completion.get("solved")), bool(completion.get("formed"))
    holds = {
        "right": right,
        "wrong": not right,
        "malformed": not formed,
        "cut": completion.get("finish") == "length",
        "cheats": cheats(completion),
        "tied": tied,
        "unscored": number(completion.get("reward")) != number(completion.get("reward")),
    }
    return frozenset(name for name, is_so in holds.items() if is_so)
