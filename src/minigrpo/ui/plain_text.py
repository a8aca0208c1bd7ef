"""Texts of a model for a terminal, which they must not steer."""

from __future__ import annotations

from typing import Any


def one_line(text: Any) -> str:
    """Return the beginning of a text on one line."""
    return " ".join(printable(str(text)[:2000]).split())


def printable(text: str) -> str:
    """Remove the control characters from model output, which could rewrite a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
