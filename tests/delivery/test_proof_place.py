"""A proof computes where it has room and in what fits there, and says so; where nothing does, it is not begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from minigrpo.delivery.artifacts.source import read_seal
from minigrpo.delivery.gguf.parity import gguf_reference
from minigrpo.delivery.hub.model_card import parity_markdown
from minigrpo.delivery.merge.check import check
from minigrpo.delivery.merge.merge import merge, merged_table
from minigrpo.delivery.parity import place
from minigrpo.delivery.parity.kl import Divergence
from minigrpo.delivery.parity.place import SPARE, model_bytes, pick_proof_place
from minigrpo.errors import ModelError
from minigrpo.models.model_files import BaseFiles, open_base
from minigrpo.runs.rundir import RunDir, read_json
from tests.helpers.delivered import adapted, make_run, save_base

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a bfloat16 base, which has learned much."""
    base = tmp_path / "base"
    return make_run(tmp_path / "run", base, adapted(save_base(base, "qwen2", dtype=torch.bfloat16), base, size=0.1))


def base_of(run: RunDir) -> BaseFiles:
    return open_base(run.path.parent / "base")


def grant(patch: pytest.MonkeyPatch, run: RunDir, cpu: float, gpu: float = 0.0) -> None:
    """Let so much be free, in times of what the base takes in float32, with the room for its passes."""
    unit = model_bytes(base_of(run), torch.float32) * SPARE
    patch.setattr(place, "free_memory", lambda device: int(unit * (cpu if device.type == "cpu" else gpu)) + 1)


@pytest.mark.parametrize(
    ("cpu", "gpu", "chosen"),
    [
        (2.0, 2.0, (GPU, torch.float32)),
        (2.0, 0.9, (CPU, torch.float32)),  # a proof in float32 is worth the wait
        (0.8, 0.9, (GPU, torch.bfloat16)),  # a 3B model in Colab with a T4
        (0.8, 0.4, (CPU, torch.bfloat16)),
    ],
)
def test_it_takes_float32_where_that_fits_and_else_the_bits_in_which_the_base_is_stored(
    run: RunDir, cpu: float, gpu: float, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant(monkeypatch, run, cpu, gpu)
    found = pick_proof_place(base_of(run), GPU)
    assert (found.device, found.dtype) == chosen


def test_a_merge_is_proved_in_16_bits_where_float32_has_no_room_and_its_record_and_table_say_so(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant(monkeypatch, run, cpu=0.8)
    rough = merge(run, quiet=True)
    assert all(row.ok for row in rough.stages)
    assert rough.stages[2].mean_kl > 1e-6  # rounding counts: in float32 it would be less than a hundredth of that
    for rows in (read_json(run.parity)["stages"], read_seal(run.merged)["stages"]):
        assert {row["precision"] for row in rows} == {"bfloat16"}
    screen = Console(width=200, record=True)
    screen.print(merged_table(rough))
    assert "computed in bfloat16, for want of memory" in screen.export_text()
    assert "| merged (computed in bfloat16) |" in parity_markdown(read_json(run.parity)["stages"])


def test_where_nothing_fits_nothing_is_begun(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    grant(monkeypatch, run, cpu=0.3)
    with pytest.raises(ModelError, match=r"GB in float32 or .* GB in bfloat16, and .* are free.*--no-proof"):
        merge(run, quiet=True)
    assert not list(run.path.glob("merged*"))
    (fault,) = check(run, quiet=True).faults
    assert "--no-model" in fault
    assert check(run, model=False, quiet=True).ok
    assert merge(run, proof=False, quiet=True).verdict == "not proved"


def test_what_16_bits_would_round_away_is_compared_in_float32_or_not_at_all(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(run.path.parent / "whole", run.path.parent / "base")
    save_base(whole.model, "qwen2")
    grant(monkeypatch, run, cpu=0.8)
    (fault,) = check(whole, quiet=True).faults
    assert "GB in float32, and" in fault
    with pytest.raises(ModelError, match="GB in float32, and"):
        gguf_reference(run.path.parent / "base", None)


def test_a_row_that_fails_in_16_bits_says_that_rounding_counted() -> None:
    row = Divergence("merged", 1, 9, 2e-3, 1.0, 0.4, 1.0, 9.0, 9.0, limit=0.1, precision="bfloat16")
    assert row.excess is not None
    assert row.excess.endswith("both were computed in bfloat16, whose rounding counts here, too")
    assert "float" not in str(Divergence("merged", 1, 9, 2e-3, 1.0, 0.4, 1.0, 9.0, 9.0, limit=0.1).excess)
