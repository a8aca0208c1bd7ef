"""Phrases: what stands between the names of a program's variables ("if len(", ") == 1:"), each to be one token.

A tokenizer that llama.cpp knows splits texts at every word and gives a word the space before it. A program would be
twice as long, and a name two tokens, one with a space and one without; a small model keeps to the names that it began
with only where one name is one token. So phrases are added tokens: these are cut out before the rest is split, and the
rest is little more than names.

transformers and llama.cpp look for added tokens in different orders: the one takes the leftmost in a text, and of those
that begin there the longest; the other begins with the longest in the whole text. They find the same where, of any two
that may overlap, the one that begins first is longer (`may_collide`). Therefore a phrase has no space before it ("for "
and " in range(9):" would share one), and a phrase that collides with a weightier one is left to the pre-tokenizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from minigrpo.models.embedded.sudoku_programs import VARIABLE_NAMES

_NAMES = sorted(name for names in VARIABLE_NAMES.values() for name in names)
_NAME_OR_LINE = re.compile(rf"(\n *)|\b(?:{'|'.join(_NAMES)})\b")
_ONE_PIECE = re.compile(r"\w+|[^\w\s]+|\s?")
"""What a pre-tokenizer leaves whole by itself."""
_PROGRAMS_A_PHRASE = 100  # a phrase stands at least once in so many programs


def find_phrases(programs: Sequence[str], reserved: Sequence[str]) -> list[str]:
    """Return the frequent phrases, beginnings of lines among them, that can be told apart in every text: those that
    take up most of the programs first. `reserved`: tokens that are cut out of texts besides.
    """
    pieces = (piece for text in programs for piece in _NAME_OR_LINE.split(text) if piece)
    counts = Counter(piece if piece.startswith("\n") else piece.lstrip(" ") for piece in pieces)
    frequent = [
        phrase
        for phrase, count in counts.items()
        if count * _PROGRAMS_A_PHRASE >= len(programs) and not _ONE_PIECE.fullmatch(phrase)
    ]
    chosen: list[str] = []
    for phrase in sorted(frequent, key=lambda phrase: (-counts[phrase] * len(phrase), phrase)):
        if not any(may_collide(phrase, other) for other in (*reserved, *chosen, phrase)):
            chosen.append(phrase)
    return chosen


def may_collide(one: str, other: str) -> bool:
    """Return whether there is a text in which the two overlap and the one that begins first is not longer."""
    return any(
        len(first) <= len(second) and any(first.endswith(second[:shared]) for shared in range(1, len(first)))
        for first, second in ((one, other), (other, one))
    )


def remove_phrases(texts: Sequence[str], phrases: Sequence[str]) -> list[str]:
    """Return what is left of the texts where the phrases are cut out; all of it where there are none."""
    if not phrases:
        return [*texts]
    longest_first = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True))))
    return [rest for text in texts for rest in longest_first.split(text) if rest]
