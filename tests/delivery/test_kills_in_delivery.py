"""Kills at random moments of everything that follows a training, and every artefact is as if there had been none."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minigrpo.runs.rundir import RunDir, digest
from tests.helpers.exported import model_folder
from tests.helpers.hub_server import standing
from tests.helpers.hub_storage import TOKEN, StandIn

pytestmark = [pytest.mark.long, pytest.mark.extra("gguf"), pytest.mark.timeout(1800)]

TASK = """
from minigrpo import Grade, Prompt, Task

def prompts(split):
    start = 0 if split == "train" else 100
    return [Prompt(f"{split}-{i}", ({"role": "user", "content": f"say {i}"},), str(i)) for i in range(start, start + 8)]

def grade(prompt, text):
    share = sum(letter.islower() for letter in text) / 8
    return Grade(round(2 * share) / 2, solved=share > 0.4)

letters = Task("letters", prompts, grade)
"""
RECIPE = """
model: {{path: {model}, device: cpu}}
lora: {{rank: 4, alpha: 8}}
task: {{name: '{task}:letters'}}
rollout: {{prompts: 3, completions: 4, max_tokens: 8}}
train: {{steps: 3, lr: 1e-2, threads: 2, tokens_per_pass: 256}}
save: {{every: 1}}
eval: {{limit: 6}}
export: {{formats: 'F16,Q8_0'}}
publish: {{repo: me/tiny}}
"""
KILLS = 24
CLOCK = ("second", "memory", "gb", "seal", "lasted")
"""Parts of the names of values that depend on the clock or on what else the machine does; a seal covers them."""


def launch(hub: StandIn, *words: str) -> subprocess.Popen[bytes]:
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "minigrpo", *words]
    return subprocess.Popen(command, env=os.environ | own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes]) -> float:
    began = time.monotonic()
    told = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, told
    return time.monotonic() - began


def road(recipe: Path, run: RunDir) -> tuple[str, ...]:
    return ("run", str(recipe), "--run", str(run.path), "--resume")


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if not any(part in name for part in CLOCK)}
        return {name: without_clock(each) for name, each in kept.items()}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


def contents(run: RunDir) -> dict[str, Any]:
    """Return every file of a run by name: JSON without what depends on the clock, all else as its hash."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in run.path.rglob("*") if path.is_file()):
        name = file.relative_to(run.path).as_posix()
        if file.suffix in (".json", ".jsonl"):
            lines = file.read_text().replace(str(run.path), "RUN").splitlines() if file.suffix == ".jsonl" else None
            text = file.read_text().replace(str(run.path), "RUN")
            found[name] = without_clock([json.loads(line) for line in lines] if lines is not None else json.loads(text))
        else:
            found[name] = digest(file)
    own = (run.lock.name, run.chain.name, "seconds.json")
    # The chain, a checkpoint's state and its seal hold hashes of the log, whose lines hold seconds.
    return {
        name: value
        for name, value in found.items()
        if name not in own and not (name.startswith("checkpoints/") and name.endswith(("state.json", "made.json")))
    }


def published(hub: StandIn) -> dict[str, dict[str, Any]]:
    """Return what each repository holds: JSON without what depends on the clock."""
    return {
        name: {
            file: without_clock(json.loads(data)) if file.endswith(".json") else data
            for file, (data, _) in repo.files.items()
        }
        for name, repo in hub.repos.items()
    }


def test_a_delivery_killed_two_dozen_times_leaves_what_one_leaves_that_was_let_alone(tmp_path: Path) -> None:
    model_folder(tmp_path / "base", "qwen2")
    (tmp_path / "mine.py").write_text(TASK)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(model=tmp_path / "base", task=tmp_path / "mine.py"))
    whole, cut = RunDir(tmp_path / "whole" / "tiny"), RunDir(tmp_path / "cut" / "tiny")
    with standing() as first, standing() as second:
        lasted = ended(launch(first, *road(recipe, whole)))
        draw, kills, told = random.Random(3), 0, set[str]()
        while kills < KILLS:
            process = launch(second, *road(recipe, cut))
            # Half of the kills at any time, half while the last stages write: those begin when training has ended.
            time.sleep(draw.uniform(0.2, 1.0) * lasted)
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            told |= {path.name for path in cut.path.iterdir()} if cut.path.is_dir() else set()
            if process.returncode == 0:  # all was done: begin the delivery again, from what was trained
                undo(cut, draw)
        ended(launch(second, *road(recipe, cut)))
        for run, hub in ((whole, first), (cut, second)):
            ended(launch(hub, "verify", str(run.path)))
        assert {"merged", "gguf", "check.json", "evals"} <= told
        ours, theirs = contents(cut), contents(whole)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
        assert published(second) == published(first)


def undo(run: RunDir, draw: random.Random) -> None:
    """Remove one of the results, and so what is made from it."""
    import shutil

    for path in draw.choice([(run.merged, run.gguf), (run.gguf,), (run.check,)]):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
