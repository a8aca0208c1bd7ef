"""Find an answer in a text, parse a number, compare. No model, no torch.

The text may be anything that a model can write, so all of this runs in linear time: tags are counted, not matched by a
pattern that could backtrack; a number longer than `_MAX_NUMBER_CHARS` is not read at all, nor is an answer longer than
`_MAX_ANSWER_CHARS`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import islice

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_MAX_NUMBER_CHARS = 64  # far above any gold answer, so that a text of a million digits costs nothing
_MAX_ANSWER_CHARS = 2000  # a longer text is an essay, not an answer

_CURRENCY = "$€£¥₹¢"
_UNITS = _CURRENCY + "%°′″'\""
# Maps full-width forms and the other minus signs to ASCII.
PLAIN_CHARACTERS = str.maketrans("０１２３４５６７８９，．＄％－＋−–", "0123456789,.$%-+--", "\u2060\ufeff")

# A sign may stand before or after the currency: -$5, $-5. Thousands commas only where they belong: 1,200 but not 12,00.
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*[{_CURRENCY}]?\s*(?P<late>[-+]?)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+|\.?)|\.[0-9]+)(?P<power>[eE][-+]?[0-9]{1,2})?"
    rf"\s*[{_UNITS}]?"
)
_FRACTION = re.compile(rf"(?P<sign>[-+]?)\s*[{_CURRENCY}]?(?P<over>[0-9]+)\s*/\s*(?P<under>[0-9]+)\s*[{_UNITS}]?")
_DIGITS = re.compile(r"\d[\d.,]*")
_MINUS_BEFORE = re.compile(rf"(?:(?<![\w)\]])-[{_CURRENCY}]?|\b(?:minus|negative)\s+[{_CURRENCY}]?)\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TaggedAnswer:
    """The texts between the think tags and between the answer tags, stripped of surrounding space."""

    reasoning: str
    text: str


@dataclass(frozen=True, slots=True)
class ParsedNumber:
    """The one number in a text. `alone`: there is nothing else but a currency, percent or unit sign."""

    value: Fraction
    alone: bool

    @property
    def canonical(self) -> str:
        """Return the same text for the same number, however it was written: "1200" for 1,200.0, "1/2" for 0.5."""
        return str(self.value)


def find_answer(text: str) -> TaggedAnswer | None:
    """Return the answer of `<think>...</think><answer>...</answer>`; None where the form is broken.

    Each of the four tags must occur exactly once and in this order, and the answer must not be empty. So two answers, a
    nested tag, a tag inside the reasoning and a tag never closed all fail. Text around the two blocks is allowed.
    """
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    think, end_think, answer, end_answer = (text.find(tag) for tag in TAGS)
    if not think < end_think < answer < end_answer:
        return None
    found = text[answer + len("<answer>") : end_answer].strip()
    reasoning = text[think + len("<think>") : end_think].strip()
    return TaggedAnswer(reasoning, found) if found else None


def parse_number(text: str) -> Decimal | None:
    """Parse a text that is a number: 1200 for "1,200", "$1200", "1200.0" and "1.2e3"; None if it is anything else."""
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text.strip().translate(PLAIN_CHARACTERS))
    if match is None or (match["sign"] and match["late"]):
        return None
    number = Decimal(match["digits"].replace(",", "") + (match["power"] or ""))
    # copy_negate is exact; unary minus would round to the context's precision
    return number.copy_negate() if "-" in (match["sign"], match["late"]) else number


def same_number(text: str, gold: int | str | Decimal) -> bool:
    """Return whether the text is the gold number and nothing else. Numbers are compared by value: "28.0" is 28."""
    number = parse_number(text)
    return number is not None and number == Decimal(gold)


def parse_fraction(text: str) -> Fraction | None:
    """Parse a fraction in lowest terms, such as 1/2. "144/2" is an unfinished calculation, not a number: None."""
    match = _FRACTION.fullmatch(text.strip().translate(PLAIN_CHARACTERS)) if len(text) <= _MAX_NUMBER_CHARS else None
    if match is None or not int(match["under"]):
        return None
    value = Fraction(int(match["over"]), int(match["under"]))
    if value.denominator == 1 or value.denominator != int(match["under"]):
        return None
    return -value if match["sign"] == "-" else value


def read_number(text: str) -> ParsedNumber | None:
    """Return the number of a text, among words or alone; None where it has none, several, or one hard to read."""
    if len(text) > _MAX_ANSWER_CHARS:
        return None
    number = parse_number(text)
    value = parse_fraction(text) if number is None else Fraction(number)
    return _find_among_words(text.translate(PLAIN_CHARACTERS)) if value is None else ParsedNumber(value, alone=True)


def _find_among_words(text: str) -> ParsedNumber | None:
    found = list(islice(_DIGITS.finditer(text), 2))
    # A superscript or Roman numeral beside the digits is a second number; Chinese numerals count as words.
    if len(found) != 1 or any(not c.isascii() and unicodedata.category(c) in ("Nd", "Nl", "No") for c in text):
        return None
    before = text[: found[0].start()]
    number = None if before.endswith((".", ",")) else parse_number(found[0][0].rstrip(".,"))
    if number is None:
        return None
    minus = _MINUS_BEFORE.search(before[-24:]) is not None
    return ParsedNumber(-Fraction(number) if minus else Fraction(number), alone=False)
