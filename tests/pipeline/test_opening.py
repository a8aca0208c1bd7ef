"""What a run opens with: weights in blocks, for its engine and its training passes, where memory admits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigrpo.config.schema import Recipe
from minigrpo.pipeline.context import OpenedRun, open_all
from tests.helpers.tiny import build_model, build_tokenizer


def opened(folder: Path, dtype: str = "bfloat16", **train: Any) -> OpenedRun:
    recipe = {"path": str(folder), "dtype": dtype, "device": "cpu"}
    return open_all(Recipe.model_validate({"model": recipe, "task": {"name": "wordproblems"}, "train": train}))


@pytest.mark.needs("bfloat16")
def test_engine_and_training_get_blocks_where_memory_admits(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for part in (build_model(), build_tokenizer()):
        part.save_pretrained(folder)
    for found, expected in (
        (opened(folder), True),
        (opened(folder, memory=0.1), False),  # not even the program fits
        (opened(folder, "float32"), False),
    ):
        assert (found.engine.blocks, found.policy.blocks_due) == (expected, expected)  # type: ignore[attr-defined]
