"""Twenty kills at random moments, and the run ends as if there had been none."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigrpo import audit
from minigrpo.runs.manifest import seconds_of
from minigrpo.runs.rundir import RunDir

TASK = """
import time
from minigrpo import Grade, Prompt, Task

def prompts(split):
    start = 0 if split == "train" else 100
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},)) for i in range(start, start + 20)]

def grade(prompt, text):
    time.sleep(0.002)
    share = sum(letter.islower() for letter in text) / 8
    return Grade(round(2 * share) / 2, solved=share > 0.4)

letters = Task("letters", prompts, grade)
"""
RECIPE = """
model: {{path: {model}}}
lora: {{rank: 8, alpha: 16, dropout: 0.1}}
task: {{name: '{task}:letters'}}
rollout: {{prompts: 3, completions: 4, max_tokens: 12}}
groups: {{resample: 1.0, rest: 0.9, focus: 2.0}}
train: {{steps: 150, lr: 1e-2, threads: 2, tokens_per_pass: 90}}
save: {{every: 2}}
"""


def launch(run: Path, recipe: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "minigrpo.cli.main", "train", str(recipe), "--run", str(run), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> None:
    told = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 0, told


def changed(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def kill_somewhere(process: subprocess.Popen[bytes], run: RunDir, draw: random.Random, pace: float) -> bool:
    """One in four at any time from the start on, the others once the log has moved: within a step or a save."""
    moves = 0 if draw.random() < 0.25 else draw.randint(1, 3)
    delay = draw.uniform(0, 6) if moves == 0 else draw.uniform(0, pace)
    seen = changed(run.metrics)
    while moves and process.poll() is None:
        time.sleep(0.002)
        now = changed(run.metrics)
        moves -= now != seen
        seen = now
    time.sleep(delay)
    process.kill()
    told = process.communicate()[1].decode()
    assert process.returncode in (-signal.SIGKILL, 0), told
    return process.returncode != 0


def logged(file: Path) -> list[dict[str, Any]]:
    """What depends on the clock left aside."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if "second" not in name and "memory" not in name} for row in rows
    ]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_killed_twenty_times_ends_like_one_that_was_left_alone(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TASK)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(model=tiny_folder(), task=tmp_path / "mine.py"))
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    ended(launch(whole.path, recipe))
    draw = random.Random(5)
    pace = seconds_of(whole)["train"] / len(logged(whole.metrics))
    assert sum(row["resample/tried"] for row in logged(whole.metrics)) > 0
    kills = sum(kill_somewhere(launch(cut.path, recipe), cut, draw, pace) for _ in range(20))
    assert kills == 20
    ended(launch(cut.path, recipe))
    weights = "adapter_model.safetensors"
    assert (whole.adapter / weights).read_bytes() == (cut.adapter / weights).read_bytes()
    assert logged(whole.metrics) == logged(cut.metrics)
    assert whole.groups.read_bytes() == cut.groups.read_bytes()
    assert checkpoint_names(whole) == checkpoint_names(cut)
    for run in (whole, cut):
        found = audit(run, steps=2, answers=0, quiet=True)
        assert found.faults == ()
        assert len(found.stretches) in (1, 2)


def checkpoint_names(run: RunDir) -> list[str]:
    """The checkpoints that are left; no leftovers of those that were never finished."""
    return sorted(path.name for path in run.checkpoints.iterdir())
