"""Numbers in mathematical notation, through math-verify: \\frac{1}{2}, \\boxed{72}, 2^3.

math-verify reads whatever it can find in a text and passes over the rest (2^-1 is 2 to it), and a tower of powers
would keep it busy for ever. So it is asked only about texts that have, as a whole, one of few short forms, and only
where plain reading does not decide. Its own time limit needs the main thread, and graders have none: it is off, and
the forms are the limit.

Not covered, and so no number: roots, products, sums, mixed numbers. An answer is a result, not a calculation.
"""

from __future__ import annotations

import importlib
import logging
import re
import threading
import warnings
from fractions import Fraction
from functools import cache
from typing import Any

from minigrpo.tasks.common.answers import PLAIN_CHARACTERS, ParsedNumber, read_number

_MAX_CHARS = 100  # characters
_SPACING = re.compile(r"\\(?:[()\[\],;!]|left\b|right\b)")
_DEGREES = re.compile(r"\^\{?\\circ\}?")
_SIGNS = re.compile(r"\\([$%])")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\{,\})(?=[0-9]{3}(?![0-9]))")
_BEYOND_WORDS = re.compile(r"\^|\\(?!(?:boxed|text|textbf|mathrm|mathbf)\b)")

_NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
_FRACTION = rf"-?\\[dt]?frac\{{{_NUMBER}\}}\{{{_NUMBER}\}}"
_POWER = r"-?[0-9]{1,6}\^(?:[0-9]|\{[0-9]{1,2}\})"
_SINGLE_NUMBER = f"(?:{_FRACTION}|{_POWER}|{_NUMBER})"
_ALLOWED_FORM = re.compile(rf"{_SINGLE_NUMBER}|\\boxed\{{{_SINGLE_NUMBER}\}}")
"""In a box or not: digits enough for any honest answer, and too few for a hostile one."""

_parser_lock = threading.Lock()  # the parser below math-verify keeps tables that all threads share


def read_answer(text: str) -> ParsedNumber | None:
    """`read_number`, for notation too."""
    if len(text) > _MAX_CHARS or not ("\\" in text or "^" in text):
        return read_number(text)
    bare = _SIGNS.sub(r"\1", _SPACING.sub(" ", _DEGREES.sub("°", text.translate(PLAIN_CHARACTERS)))).strip()
    form = _THOUSANDS.sub("", re.sub(r"[$%\s]", "", bare))
    if re.search(r"[0-9][\s$%]+[0-9]", bare) or _ALLOWED_FORM.fullmatch(form) is None:
        return None if _BEYOND_WORDS.search(bare) else read_number(bare)
    value = _parse_form(form)
    return None if value is None else ParsedNumber(value, alone=True)


def _parse_form(form: str) -> Fraction | None:
    """What math-verify reads; None where that is no exact number, or it is not installed, which is said once."""
    parse = load_parser()
    if parse is None:
        return None
    try:
        with _parser_lock:
            found = parse(f"${form}$", parsing_timeout=None, raise_on_error=False)
            value = Fraction(str(found[0].doit()))
    except (
        ValueError,
        ArithmeticError,
        AttributeError,
        IndexError,
        TypeError,
    ):  # nothing found, text, or a division by zero
        return None
    # A fraction that comes out even is a calculation that was not carried out, as in parse_fraction.
    return None if value.denominator == 1 and "frac" in form else value


@cache
def load_parser() -> Any:
    try:
        found = importlib.import_module("math_verify")
    except ImportError:
        warnings.warn(
            "math-verify is not installed, so answers in mathematical notation (\\frac{1}{2}, \\boxed{72}, 2^3) earn "
            "nothing: pip install 'minigrpo[math]'",
            stacklevel=2,
        )
        return None
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)  # it warns of the limit that is switched off
    return found.parse
