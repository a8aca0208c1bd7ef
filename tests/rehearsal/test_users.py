"""What a user with a GPU runs first: the notebooks' cells, and the benchmarks' own proof, on a pretended T4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.workloads import WORKLOADS
from tests.rehearsal.conftest import ROOT, Play, saved

pytestmark = [pytest.mark.needs("pretended_gpu"), pytest.mark.long]

STEPS = 2
KNOBS = {
    "train.steps": STEPS,
    "rollout.prompts": 2,
    "rollout.completions": 2,
    "rollout.max_tokens": 12,
    "task.size": 8,
    "save.every": 1,
    "lora.rank": 4,
    "objective.entropy": 0.05,  # random weights all earn the same: the bonus gives them something to learn
}
"""What makes a recipe's run small; its number type, objective and way of training stay."""


def run_notebook(name: str, play: Play, home: Path, **values: Any) -> dict[str, str]:
    given = {"RUN": "runs/rehearsed", "DESPITE_PREFLIGHT": True, **values}
    found = play("notebook", "T4", path=str(ROOT / f"notebooks/{name}_colab.ipynb"), home=str(home), values=given)
    assert found["launches"] > 10_000
    told: dict[str, str] = found["told"]
    steps = (home / "runs/rehearsed/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(step)["skipped"] for step in steps] == [0] * STEPS
    assert "Tesla T4" in told["machine"]
    assert "float16" in told["machine"]
    return told


@pytest.mark.extra("notebook")
def test_the_notebook_for_gsm8k_runs_on_a_t4(play: Play, tmp_path: Path) -> None:
    model = str(saved(tmp_path / "model", "qwen2", max_position_embeddings=4096))
    knobs = {**KNOBS, "model.path": model, "task.data": "wordproblems:"}
    told = run_notebook("gsm8k", play, tmp_path, RECIPE="gsm8k-fast", KNOBS=knobs, QUESTIONS=4)
    assert "before:" in told["figures"]
    assert "after:" in told["figures"]


@pytest.mark.extra("notebook", "qlora")
@pytest.mark.timeout(900)  # beside other programs; alone it takes half a minute
def test_the_notebook_for_sudoku_runs_on_a_t4_with_its_weights_in_four_bit(play: Play, tmp_path: Path) -> None:
    model = str(saved(tmp_path / "model", "ministral3", max_position_embeddings=8192))
    knobs = {**KNOBS, "model.path": model, "model.quantize": "nf4", "sandbox.workers": 1}
    told = run_notebook("sudoku", play, tmp_path, RECIPE="sudoku-ministral", KNOBS=knobs, PUZZLES=2)
    assert "win all" in told["figures"]
    assert (tmp_path / "runs/rehearsed/merged/model.safetensors").is_file()


@pytest.mark.extra("bench")
def test_the_benchmarks_prove_equal_gradients_and_tokens_before_they_time_anything(play: Play, tmp_path: Path) -> None:
    found = play("benchmark", "T4", scratch=str(tmp_path))
    assert [row["engine"] for row in found["tokens"]] == ["native", "slots", "transformers"]
    assert all(row["same"] and row["tokens"] > 10 for row in found["tokens"])
    for proof in found["proofs"].values():
        assert proof["gap"] <= 1e-4
        assert proof["tokens"] == sum(WORKLOADS["mini"].lengths_B[: WORKLOADS["mini"].completions])
    assert found["launches"] > 100
