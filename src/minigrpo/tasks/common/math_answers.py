r"""Numbers in mathematical notation, through math-verify: \frac{1}{2}, \boxed{72}, 2^3.

math-verify reads whatever it can find in a text and ignores the rest (it reads 2^-1 as 2), and a tower of powers would
keep it busy for ever. So it is called only for texts that match, as a whole, one of a few short forms, and only where
plain parsing does not decide. Its own time limit needs the main thread, which graders do not run in: it is off, and the
forms are the limit.

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
"""With or without a box; enough digits for any honest answer, too few for a hostile one."""

_parser_lock = threading.Lock()  # the parser that math-verify uses keeps tables shared by all threads


def read_answer(text: str) -> ParsedNumber | None:
    """Return the number of a text, as `read_number` does, in mathematical notation too."""
    if len(text) > _MAX_CHARS or not ("\\" in text or "^" in text):
        return read_number(text)
    bare = _SIGNS.sub(r"\1", _SPACING.sub(" ", _DEGREES.sub("°", text.translate(PLAIN_CHARACTERS)))).strip()
    form = _THOUSANDS.sub("", re.sub(r"[$%\s]", "", bare))
    if re.search(r"[0-9][\s$%]+[0-9]", bare) or _ALLOWED_FORM.fullmatch(form) is None:
        return None if _BEYOND_WORDS.search(bare) else read_number(bare)
    value = _parse_form(form)
    return None if value is None else ParsedNumber(value, alone=True)


def _parse_form(form: str) -> Fraction | None:
    """Parse with math-verify; None where that gives no exact number, or it is not installed (then warn once)."""
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
    ):  # nothing found, not a number, or a division by zero
        return None
    # A fraction whose value is an integer is an unfinished calculation, as in parse_fraction.
    return None if value.denominator == 1 and "frac" in form else value


@cache
def load_parser() -> Any:
    try:
        found = importlib.import_module("math_verify")
    except ImportError:
        warnings.warn(
            "math-verify is not installed, so answers in mathematical notation (\\frac{1}{2}, \\boxed{72}, 2^3) earn "
            f"nothing: {install_hint('math')}",
            stacklevel=2,
        )
        return None
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)  # it warns that its time limit is off
    return found.parse
