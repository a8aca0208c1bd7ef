"""Values of users' rows and functions, made ready for a file of JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DEEPEST = 50
"""Levels of lists and mappings that are written; deeper ones, and those that hold themselves, end in dots."""
_MOST_BITS = 14_000
"""Of a whole number: Python reads no more than 4300 digits back."""


def json_ready(value: Any, depth: int = 0) -> Any:
    """Convert a value to what JSON can hold: NaN and infinity become null, an array its numbers, all else its text."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _MOST_BITS else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping | list | tuple) and depth == DEEPEST:
        return "..."
    if isinstance(value, Mapping):
        return {_text(key): json_ready(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item, depth + 1) for item in value]
    try:
        numbers = value.tolist()
    except Exception:  # it has none, or it is a class of a user's
        return _text(value)
    return json_ready(numbers, depth + 1) if isinstance(numbers, list | int | float) else _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # __str__ of arbitrary classes
        return f"a {type(value).__name__}"
