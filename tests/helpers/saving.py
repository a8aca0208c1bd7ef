"""Shared by the tests of checkpoints: a model as small as can be saved and restored, with a real optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minigrpo.runs.rundir import RunDir
from minigrpo.training import checkpoint
from minigrpo.training.checkpoint import Checkpoint


class Small:
    """A linear layer with an optimizer: after `n` steps its weights show n."""

    device = torch.device("cpu")
    is_sharded = False

    def __init__(self, width: int = 3) -> None:
        self.layer = torch.nn.Linear(width, 2)
        with torch.no_grad():
            for weight in self.layer.parameters():
                weight.zero_()
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1.0, weight_decay=0.0)

    def step(self) -> None:
        for weight in self.layer.parameters():
            weight.grad = torch.ones_like(weight)
        self.optimizer.step()

    @property
    def steps(self) -> int:
        return round(-self.layer.bias[0].item())

    def save(self, folder: Path) -> None:
        save_file(self.layer.state_dict(), folder / "weights.safetensors")
        (folder / "about").mkdir()
        (folder / "about" / "config.json").write_text("{}")

    def restore(self, folder: Path) -> None:
        self.layer.load_state_dict(load_file(folder / "weights.safetensors"))


def begun(folder: Path) -> RunDir:
    """Make a run's folder as training leaves it before its first checkpoint."""
    run = RunDir(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text("seed: 0\n")
    checkpoint.write_machine(run, checkpoint.this_machine(256, 64, torch.device("cpu"), torch.float32))
    return run


def save(run: RunDir, small: Small, step: int, state: Any = None) -> None:
    while small.steps < step:
        small.step()
    checkpoint.save(run, step, small, small.optimizer, {}, state=state or {"tries": step})


def saved(folder: Path, *steps: int) -> RunDir:
    run, small = begun(folder), Small()
    for step in steps:
        save(run, small, step)
    return run


def newest(run: RunDir) -> Checkpoint:
    found, complaints = checkpoint.find_latest(run)
    assert found is not None
    assert not complaints
    return found


def restored(found: Checkpoint) -> int:
    """Return the number of steps on which the checkpoint's weights, moments and state agree."""
    small = Small()
    checkpoint.load(found, small, small.optimizer)
    moments = {int(moment["step"]) for moment in small.optimizer.state.values()}
    assert {small.steps, found.step, found.state["tries"]} | moments == {found.step}
    return found.step
