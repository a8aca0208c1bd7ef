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

from minigrpo.errors import install_hint
from minigrpo.tasks.common.answers import PLAIN, Reading, read_number

LONGEST = 100  # characters
DRESS = re.compile(r"\\(?:[()\[\],;!]|left\b|right\b)")
DEGREES = re.compile(r"\^\{?\\circ\}?")
SIGNS = re.compile(r"\\([$%])")
THOUSANDS = re.compile(r"(?<=[0-9])(?:,|\{,\})(?=[0-9]{3}(?![0-9]))")
BEYOND_WORDS = re.compile(r"\^|\\(?!(?:boxed|text|textbf|mathrm|mathbf)\b)")

NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
FRACTION = rf"-?\\[dt]?frac\{{{NUMBER}\}}\{{{NUMBER}\}}"
POWER = r"-?[0-9]{1,6}\^(?:[0-9]|\{[0-9]{1,2}\})"
ONE = f"(?:{FRACTION}|{POWER}|{NUMBER})"
FORM = re.compile(rf"{ONE}|\\boxed\{{{ONE}\}}")
"""In a box or not: digits enough for any honest answer, and too few for a hostile one."""

_reading = threading.Lock()  # the parser below math-verify keeps tables that all threads share


def read_answer(text: str) -> Reading | None:
    """`read_number`, for notation too."""
    if len(text) > LONGEST or not ("\\" in text or "^" in text):
        return read_number(text)
    bare = SIGNS.sub(r"\1", DRESS.sub(" ", DEGREES.sub("°", text.translate(PLAIN)))).strip()
    form = THOUSANDS.sub("", re.sub(r"[$%\s]", "", bare))
    if re.search(r"[0-9][\s$%]+[0-9]", bare) or FORM.fullmatch(form) is None:
        return None if BEYOND_WORDS.search(bare) else read_number(bare)
    value = value_of(form)
    return None if value is None else Reading(value, alone=True)


def value_of(form: str) -> Fraction | None:
    """What math-verify reads; None where that is no exact number, or it is not installed, which is said once."""
    parse = parser()
    if parse is None:
        return None
    try:
        with _reading:
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
def parser() -> Any:
    try:
        found = importlib.import_module("math_verify")
    except ImportError:
        warnings.warn(
            "math-verify is not installed, so answers in mathematical notation (\\frac{1}{2}, \\boxed{72}, 2^3) earn "
            f"nothing: {install_hint('math')}",
            stacklevel=2,
        )
        return None
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)  # it warns of the limit that is switched off
    return found.parse
