"""Adapters of other tools, in all forms that PEFT writes: judged beside their base as the merged model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from delivered import VARIANTS, adapted, save_adapter, save_base

from minigrpo.judging import evaluate
from minigrpo.merge import merge


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_gives_the_answers_of_the_model_that_is_merged_from_it(tmp_path: Path, variant: str) -> None:
    base = tmp_path / "base"
    adapter = save_adapter(tmp_path / "mine", adapted(save_base(base, "qwen2"), base, size=0.3, **VARIANTS[variant]))
    merged = merge(adapter, quiet=True, dtype="float32").folder
    answers = {name: answers_of(path, tmp_path) for name, path in (("adapter", adapter), ("merged", merged))}
    assert answers["adapter"] == answers["merged"]
    assert answers["adapter"] != answers_of(base, tmp_path)


def answers_of(model: Path, folder: Path) -> list[Any]:
    evaluate(str(model), limit=4, out=folder / "found.json", quiet=True)
    found: list[Any] = json.loads((folder / "found.json").read_text())["scores"]["answers"]
    return found
