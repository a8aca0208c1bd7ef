"""KL between distributions: known values, and distances relative to what training did."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from minigrpo.delivery.parity.kl import MAX_RELATIVE_KL, ZERO_KL, compare_distributions, kl_divergence, record_parity
from minigrpo.errors import ArtifactError
from minigrpo.runs.rundir import read_json, write_json


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_the_kl_of_two_coins_is_the_textbooks() -> None:
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl_divergence(logs([0.9, 0.1]), logs([0.5, 0.5])).item() == pytest.approx(expected, rel=1e-6)
    assert kl_divergence(logs([0.5, 0.5]), logs([0.5, 0.5])).item() == 0


def test_tokens_with_probability_zero_give_no_nan() -> None:
    assert kl_divergence(logs([1.0, 0.0]), logs([0.5, 0.5])).item() == pytest.approx(math.log(2))
    assert kl_divergence(logs([0.5, 0.5]), logs([1.0, 0.0])).item() == math.inf
    assert kl_divergence(logs([1.0, 0.0]), logs([1.0, 0.0])).item() == 0


def test_rounded_log_probabilities_do_not_hide_a_tiny_change() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5000, generator=draw, dtype=torch.float64)
    moved = logits + 1e-4 * torch.randn(50, 5000, generator=draw, dtype=torch.float64)
    exact = kl_divergence(moved.log_softmax(-1), logits.log_softmax(-1)).mean()
    rounded = kl_divergence(moved.log_softmax(-1).float(), logits.log_softmax(-1).float()).mean()
    assert ZERO_KL < exact < 1e-7
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)


def test_a_stage_is_measured_relative_to_what_training_did() -> None:
    reference = [logs([0.8, 0.2]), logs([0.1, 0.9], [0.4, 0.6])]
    base = compare_distributions("base", [logs([0.5, 0.5]), logs([0.5, 0.5], [0.5, 0.5])], reference)
    itself = compare_distributions(
        "base again", [logs([0.5, 0.5]), logs([0.5, 0.5], [0.5, 0.5])], reference, base_kl=base.mean_kl
    )
    assert itself.relative_kl == 1
    near = compare_distributions("near", reference, reference, base_kl=base.mean_kl, limit=MAX_RELATIVE_KL)
    assert (near.relative_kl, near.top1, near.greedy, near.greedy_of) == (0, 1, 1.5, 1.5)
    assert near.ok
    far = compare_distributions(
        "far", [reference[0], logs([0.9, 0.1], [0.4, 0.6])], reference, base_kl=base.mean_kl, limit=MAX_RELATIVE_KL
    )
    assert (far.top1, far.greedy, far.tokens, far.texts) == (pytest.approx(2 / 3), 0.5, 3, 2)
    assert not far.ok


def test_where_training_changed_nothing_no_stage_may_change_anything() -> None:
    reference = [logs([0.8, 0.2])]
    same = compare_distributions("same", reference, reference, base_kl=0.0, limit=MAX_RELATIVE_KL)
    assert same.relative_kl is None
    assert same.ok
    assert not compare_distributions("other", [logs([0.7, 0.3])], reference, base_kl=0.0, limit=MAX_RELATIVE_KL).ok


@pytest.mark.parametrize(
    ("found", "told"),
    [(logs([0.5, 0.25, 0.25]), "Tokenizer or vocabulary"), (logs([math.nan, 0.5]), "NaN instead of probabilities")],
)
def test_what_cannot_be_compared_is_refused(found: torch.Tensor, told: str) -> None:
    with pytest.raises(ArtifactError, match=told):
        compare_distributions("server", [found], [logs([0.5, 0.5])])


def test_recording_a_stage_keeps_the_rows_of_other_stages(tmp_path: Path) -> None:
    file, reference = tmp_path / "parity.json", [logs([0.5, 0.5])]
    record_parity(
        file,
        [
            compare_distributions("merged", [logs([0.9, 0.1])], reference).to_dict(),
            compare_distributions("gguf", reference, reference).to_dict(),
        ],
    )
    record_parity(file, [compare_distributions("merged", reference, reference).to_dict()], {"made": {"verb": "merge"}})
    written = read_json(file)
    assert [(row["name"], row["mean_kl"]) for row in written["stages"]] == [("merged", 0), ("gguf", 0)]
    assert written["made"] == {"verb": "merge"}
    write_json(file, [])
    with pytest.raises(ArtifactError, match="damaged"):
        record_parity(file, [])
