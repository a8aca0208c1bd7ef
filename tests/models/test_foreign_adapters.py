"""Adapters of other tools, in all forms that PEFT writes, score over their base as the merged model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigrpo.delivery.merge.merge import merge
from minigrpo.errors import MinigrpoError
from minigrpo.pipeline.evaluate import evaluate
from tests.helpers.delivered import VARIANTS, adapted, edit, save_adapter, save_base
from tests.helpers.marks import rest_is_long
from tests.helpers.models import make_policy


@pytest.mark.parametrize("variant", rest_is_long(VARIANTS, "plain", "dora"))
def test_an_adapter_gives_the_answers_of_the_model_that_is_merged_from_it(tmp_path: Path, variant: str) -> None:
    base = tmp_path / "base"
    adapter = save_adapter(tmp_path / "mine", adapted(save_base(base, "qwen2"), base, size=0.3, **VARIANTS[variant]))
    merged = merge(adapter, quiet=True, dtype="float32").folder
    answers = {name: answers_of(path, tmp_path) for name, path in (("adapter", adapter), ("merged", merged))}
    assert answers["adapter"] == answers["merged"]
    assert answers["adapter"] != answers_of(base, tmp_path)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:3000]), "was cut short"),
        (lambda file: file.write_bytes(b"words " * 500), "is damaged"),
        (lambda file: edit(file, **dict.fromkeys(named(file, "q_proj"))), "missing adapter keys"),
        (lambda file: edit(file, **dict.fromkeys(named(file, "0.self_attn.q_proj.lora_A"), torch.zeros(4, 7))), "size"),
    ],
    ids=["cut", "damaged", "names", "shapes"],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path: Path, harm: Any, told: str) -> None:
    """PEFT leaves tensors that it cannot find at their initial values, and warns."""
    base = tmp_path / "base"
    adapter = save_adapter(tmp_path / "mine", adapted(save_base(base, "qwen2"), base))
    harm(adapter / "adapter_model.safetensors")
    with pytest.raises(MinigrpoError, match=rf"{adapter}.* {told}"):
        evaluate(str(adapter), limit=2, out=tmp_path / "found.json", quiet=True)
    assert not (tmp_path / "found.json").exists()


def named(file: Path, part: str) -> list[str]:
    return [name for name in load_file(file) if part in name]


def answers_of(model: Path, folder: Path) -> list[Any]:
    evaluate(str(model), limit=4, out=folder / "found.json", quiet=True)
    found: list[Any] = json.loads((folder / "found.json").read_text())["scores"]["answers"]
    return found


def test_the_targets_of_a_saved_adapter_stand_in_order_in_every_process(tmp_path: Path) -> None:
    """PEFT keeps them in a set, whose order changes with PYTHONHASHSEED."""
    policy = make_policy("qwen2")
    policy.save(tmp_path)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    assert len(targets) > 5
