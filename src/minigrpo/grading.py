"""Find an answer in a text, read a number, compare. No model, no torch.

The text may be anything that a model can write, so nothing here looks twice at a character: tags are counted, not
matched by a pattern that could backtrack, and a number longer than `LONGEST_NUMBER` is not read at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
LONGEST_NUMBER = 64  # characters; no gold answer comes near, and a text of a million digits costs nothing

# A sign may stand before or after the currency: -$5, $-5. Thousands commas only where they belong: 1,200 but not 12,00.
NUMBER = re.compile(
    r"(?P<sign>[-+−]?)[$€£]?(?P<late>[-+−]?)(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?P<rest>\.[0-9]+|\.?)%?"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What stood between the tags, stripped of surrounding space."""

    reasoning: str
    text: str


def find_answer(text: str) -> Answer | None:
    """The answer of `<think>...</think><answer>...</answer>`; None where the form is broken.

    Each of the four tags must occur exactly once and in this order, and the answer must hold something. So two answers,
    a nested tag, a tag inside the reasoning and a tag never closed all fail. Text around the two blocks is allowed.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    think, end_think, answer, end_answer = (text.find(tag) for tag in TAGS)
    if not think < end_think < answer < end_answer:
        return None
    found = text[answer + len("<answer>") : end_answer].strip()
    reasoning = text[think + len("<think>") : end_think].strip()
    return Answer(reasoning, found) if found else None


def parse_number(text: str) -> Decimal | None:
    """The number that the text is: 1200 for "1,200", "$1200" and "1200.0"; None if it is anything else or more."""
    if len(text) > LONGEST_NUMBER:
        return None
    match = NUMBER.fullmatch(text.strip())
    if match is None or (match["sign"] and match["late"]):
        return None
    number = Decimal(match["whole"].replace(",", "") + match["rest"])
    # copy_negate is exact; unary minus would round to the context's precision
    return number.copy_negate() if "-" in (sign := match["sign"] + match["late"]) or "−" in sign else number


def same_number(text: str, gold: int | str | Decimal) -> bool:
    """Whether the text is the gold number and nothing else. Numbers compare as numbers: "28.0" is 28."""
    number = parse_number(text)
    return number is not None and number == Decimal(gold)
