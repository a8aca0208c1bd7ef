"""What tests read from tests/data: figures and texts that are too long to stand beside a claim."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"


def read_data(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")
